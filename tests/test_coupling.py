"""Losses that couple steps or lanes are found on a real window; losses of single steps pass, whatever they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tbptt
from tbptt import (
    ARTBP,
    PES,
    RFLO,
    RTRL,
    TBPTT,
    ArrayStream,
    FullBPTT,
    Mixture,
    Online,
    Telescope,
    Trainer,
    Window,
    WindowLoss,
    evaluate,
)
from tbptt.cli.config import estimator_classes
from tbptt.coupling import refuse_coupled
from tbptt.errors import CapabilityError, ConfigError
from tbptt.loss import StepLoss

T, B, D = 13, 3, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def looked_at(loss: Any, outputs: Any, targets: Any, mask: Tensor | None = None) -> None:
    model = loss if isinstance(loss, nn.Module) else nn.Module()
    refuse_coupled(StepLoss.of(loss), outputs, Window(torch.zeros(*size(outputs), 1), targets, mask), model)


def size(outputs: Any) -> tuple[int, int]:
    first = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    return first.shape[0], first.shape[1]


def numbers(steps: int, lanes: int) -> tuple[Any, Any]:
    return torch.randn(steps, lanes, D), torch.randn(steps, lanes, D)


def positive(steps: int, lanes: int) -> tuple[Any, Any]:
    return torch.rand(steps, lanes, D) * 0.8 + 0.1, torch.rand(steps, lanes, D) * 0.8 + 0.1


def classes(steps: int, lanes: int) -> tuple[Any, Any]:
    return torch.randn(steps, lanes, D), torch.randint(D, (steps, lanes))


def heads(steps: int, lanes: int) -> tuple[Any, Any]:
    outputs = {"mean": torch.randn(steps, lanes, D), "scale": torch.rand(steps, lanes, D) + 0.5}
    return outputs, torch.randn(steps, lanes, D)


# Losses of single steps


def entropy(outputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), weight, reduction="none")
    return flat.view(targets.shape)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = entropy(outputs, targets)
    return (1 - torch.exp(-losses)) ** 2 * losses


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = entropy(outputs, targets.clamp(min=1))
    return torch.where(targets == 0, 0.0, losses)


def quantiles(outputs: Tensor, targets: Tensor) -> Tensor:
    error = targets - outputs
    q = torch.tensor([0.1, 0.25, 0.5, 0.9])
    return torch.maximum(q * error, (q - 1) * error).mean(-1)


def gaussian(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return -torch.distributions.Normal(outputs["mean"], outputs["scale"]).log_prob(targets).sum(-1)


def mixture(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    logs = -torch.distributions.Normal(outputs["mean"], outputs["scale"]).log_prob(targets[..., :1])
    return -torch.logsumexp(-logs, -1)


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1 - (2 * (outputs * targets).sum(-1) + 1) / (outputs.sum(-1) + targets.sum(-1) + 1)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Within the features: each against the others of its own step and lane."""
    similar = outputs[..., :, None] * targets[..., None, :]
    return -similar.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)


def with_missing(outputs: Tensor, targets: Tensor) -> Tensor:
    known = ~targets.isnan()
    error = torch.where(known, outputs - targets.nan_to_num(), 0.0)
    return error.square().sum(-1) / known.sum(-1).clamp(min=1)


def missing(steps: int, lanes: int) -> tuple[Any, Any]:
    outputs, targets = numbers(steps, lanes)
    return outputs, torch.where(torch.rand(steps, lanes, D) < 0.3, torch.nan, targets)


class Running(nn.Module):
    """Divides by a running mean of its own errors, of the window among them: it depends on calls, not on steps."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = (outputs - targets).square().mean(-1)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * error.mean())
        return error / self.scale


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return (outputs - targets).square().mean(-1) * (1 + 1 / self.calls)


class Uncertain(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(D))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * torch.exp(-self.log_scale) + self.log_scale).sum(-1)


def actor_critic(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    return {"actor": outputs["mean"].square().mean(-1), "critic": (outputs["scale"] - targets).abs().mean(-1)}


def perceptual(outputs: Tensor, targets: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(D, 7, generator=generator)
    return (torch.tanh(outputs @ features) - torch.tanh(targets @ features)).square().mean(-1)


def ranked(outputs: Tensor, targets: Tensor) -> Tensor:
    order = targets.argsort(-1)
    return F.relu(0.1 - outputs.gather(-1, order).diff(dim=-1)).sum(-1)


def counted_calls() -> Callable[[Tensor, Tensor], Tensor]:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (outputs - targets).square().mean(-1) / calls

    return loss


def steps_of(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: function(outputs, targets, reduction="none", **options).mean(-1)


BY_STEP: dict[str, tuple[Any, Any]] = {
    "squared": (steps_of(F.mse_loss), numbers),
    "huber": (steps_of(F.huber_loss), numbers),
    "log cosh": (lambda o, t: torch.log(torch.cosh(o - t)).mean(-1), numbers),
    "relative": (lambda o, t: ((o - t).abs() / t).mean(-1), positive),
    "logs": (lambda o, t: (o.log() - t.log()).square().mean(-1), positive),
    "itakura-saito": (lambda o, t: (t / o - (t / o).log() - 1).sum(-1), positive),
    "cosine": (lambda o, t: 1 - F.cosine_similarity(o, t, dim=-1), numbers),
    "kl": (lambda o, t: F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1), numbers),
    "label smoothing": (lambda o, t: 0.9 * entropy(o, t) - 0.1 * o.log_softmax(-1).mean(-1), classes),
    "focal": (focal, classes),
    "ignoring": (ignoring, classes),
    "fixed class weights": (lambda o, t: entropy(o, t, torch.tensor([1.0, 5.0, 20.0, 0.0])), classes),
    "quantiles": (quantiles, numbers),
    "gaussian": (gaussian, heads),
    "mixture": (mixture, heads),
    "dice": (dice, positive),
    "contrastive": (contrastive, numbers),
    "with missing targets": (with_missing, missing),
    "perceptual": (perceptual, numbers),
    "ranked": (ranked, numbers),
    "two terms": (actor_critic, heads),
    "running scale": (Running(), numbers),
    "annealed by calls": (Annealed(), numbers),
    "annealed by a closure": (counted_calls(), numbers),
    "own parameters": (Uncertain(), numbers),
    "constant": (lambda o, t: torch.ones(o.shape[:2]), numbers),
}


def reparametrised(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    sample = outputs["mean"] + outputs["scale"] * torch.randn_like(outputs["mean"])
    return (sample - targets).square().mean(-1)


def policy_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
    chosen = torch.distributions.Categorical(logits=outputs).sample()
    return entropy(outputs, chosen) * (chosen == targets).float()


def gumbel(outputs: Tensor, targets: Tensor) -> Tensor:
    return (F.gumbel_softmax(outputs) * (torch.arange(D) - targets[..., None]).abs()).sum(-1)


def from_numpy(outputs: Tensor, targets: Tensor) -> Tensor:
    noise = torch.from_numpy(np.random.standard_normal(outputs.shape)).float()
    return (outputs + noise - targets).square().mean(-1)


def gamma(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sampled by rejection: how many random numbers are drawn depends on the values."""
    return (torch.distributions.Gamma(outputs * 0.2, 1.0).rsample() - targets).square().mean(-1)


SAMPLED: dict[str, tuple[Any, Any]] = {
    "reparametrised": (reparametrised, heads),
    "dropout": (lambda o, t: (F.dropout(o, 0.5) - t).square().mean(-1), numbers),
    "policy gradient": (policy_gradient, classes),
    "gumbel": (gumbel, classes),
    "numpy": (from_numpy, numbers),
    "gamma": (gamma, positive),
}


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("case", (BY_STEP | SAMPLED).values(), ids=BY_STEP | SAMPLED)
def test_losses_of_single_steps_pass(case: tuple[Any, Any], steps: int) -> None:
    loss, data = case
    outputs, targets = data(steps, B)
    looked_at(loss, outputs, targets)
    mask = torch.rand(steps, B) < 0.6
    mask[0, 1] = True
    looked_at(loss, outputs, targets, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_losses_of_single_steps_pass_in_other_types(dtype: torch.dtype) -> None:
    outputs, targets = (each.to(dtype) for each in numbers(T, B))
    for loss in (steps_of(F.mse_loss), contrastive, lambda o, t: 1 - F.cosine_similarity(o, t, dim=-1)):
        looked_at(loss, outputs, targets)


def test_losses_of_torch_are_not_even_called() -> None:
    class Counting(nn.MSELoss):
        __module__ = "torch.nn.modules.loss"

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            raise AssertionError

    looked_at(Counting(), *numbers(T, B))


# Losses that couple steps, or lanes


def pre_emphasis(outputs: Tensor, targets: Tensor) -> Tensor:
    error = outputs - targets
    return (error - 0.95 * torch.cat([error[:1] * 0, error[:-1]])).square().mean(-1)


def difference(outputs: Tensor, targets: Tensor) -> Tensor:
    error = outputs - targets
    return (error.diff(dim=0, prepend=error[:1] * 0) ** 2).mean(-1)


def spectral(outputs: Tensor, targets: Tensor) -> Tensor:
    def spectrum(signal: Tensor) -> Tensor:
        flat = F.pad(signal[..., 0].T, (2, 2))  # a window may have one step
        options: dict[str, Any] = {"center": False, "return_complex": True}
        frames = torch.stft(flat, 4, hop_length=1, window=torch.hann_window(4, dtype=flat.dtype), **options)
        return frames.abs().mean(1)[:, : len(signal)].T

    return (spectrum(outputs) - spectrum(targets)).abs()


def normalised(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) / targets.std()).square().mean(-1)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    soft = F.one_hot(targets, D).float()
    soft = 0.8 * soft + 0.1 * soft.roll(1, 0) + 0.1 * soft.roll(-1, 0)
    return -(soft * outputs.log_softmax(-1)).sum(-1)


def expanded(outputs: Tensor, targets: Tensor) -> Tensor:
    return -10 * torch.log10(targets.square().sum((0, 2)) / (outputs - targets).square().sum((0, 2))).expand(
        outputs.shape[:2]
    )


def seasonal(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean(-1) / (targets[5:] - targets[:-5]).abs().mean()


def in_pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Blocks of two steps, which halves of a window would not tear apart."""
    error = (outputs - targets).square().mean(-1)
    whole = error[: len(error) // 2 * 2].unflatten(0, (-1, 2)).mean(1, keepdim=True).expand(-1, 2, -1).flatten(0, 1)
    return torch.cat([whole, error[len(whole) :]])


def of_the_largest(outputs: Tensor, targets: Tensor) -> Tensor:
    error = (outputs - targets).square().mean(-1)
    return error / error.detach().max()


def balanced(outputs: Tensor, targets: Tensor) -> Tensor:
    """By how often each class comes in the window."""
    return entropy(outputs, targets, 1 / F.one_hot(targets, D).flatten(0, 1).sum(0).clamp(min=1).float())


COUPLED: dict[str, tuple[Any, Any]] = {
    "pre-emphasis": (pre_emphasis, numbers),
    "difference": (difference, numbers),
    "spectral": (spectral, numbers),
    "normalised": (normalised, numbers),
    "smoothed": (smoothed, classes),
    "expanded": (expanded, numbers),
    "seasonal": (seasonal, numbers),
    "in pairs": (in_pairs, numbers),
    "of the largest": (of_the_largest, numbers),
    "balanced": (balanced, classes),
}


@pytest.mark.parametrize("case", COUPLED.values(), ids=COUPLED)
@pytest.mark.parametrize("lanes", [1, B])
def test_losses_that_couple_steps_are_refused(case: tuple[Any, Any], lanes: int) -> None:
    loss, data = case
    outputs, targets = data(T, lanes)
    with pytest.raises(CapabilityError, match=rf"of {loss.__name__} at step \d+ depends on what stands at step \d+"):
        looked_at(loss, outputs, targets)
    looked_at(WindowLoss(loss), outputs, targets)


@pytest.mark.parametrize("lanes", [1, B])
def test_steps_are_coupled_in_windows_of_one_step_too(lanes: int) -> None:
    for loss in (pre_emphasis, difference, expanded):
        with pytest.raises(CapabilityError, match="at step"):
            looked_at(loss, *numbers(1, lanes))


@pytest.mark.parametrize("lanes", [1, 2, B])
@pytest.mark.parametrize("steps", [1, T])
def test_targets_that_are_all_the_same_hide_nothing(steps: int, lanes: int) -> None:
    """A stream that begins with a pause, or windows of one step: those of other steps are made up."""
    outputs = torch.randn(steps, lanes, D)
    for value in (0, 2):
        same = torch.full((steps, lanes), value)
        with pytest.raises(CapabilityError, match="of smoothed at step"):
            looked_at(smoothed, outputs, same)
        with pytest.raises(CapabilityError, match="of normalised at step"):
            looked_at(normalised, outputs, torch.full((steps, lanes, D), value + 1.0))
        for loss, data in (BY_STEP | SAMPLED).values():
            if data is classes:
                looked_at(loss, outputs, same)
            elif data is numbers:
                looked_at(loss, outputs, torch.full((steps, lanes, D), float(value)))
    flags = torch.ones(steps, lanes, dtype=torch.bool)
    with pytest.raises(CapabilityError, match="at step"):
        looked_at(lambda o, t: o.square().mean(-1) * t.float().mean(), outputs, flags)
    looked_at(lambda o, t: o.square().mean(-1) * t.float(), outputs, flags)


def test_a_loss_that_does_not_take_made_up_targets_is_looked_at_with_its_own() -> None:
    def picky(outputs: Tensor, targets: Tensor) -> Tensor:
        assert bool((targets == 3.0).all())
        return difference(outputs, targets)

    with pytest.raises(CapabilityError, match="of picky at step"):
        looked_at(picky, torch.randn(T, B, D), torch.full((T, B, D), 3.0))


def test_lanes_that_are_coupled_are_refused() -> None:
    def between(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.einsum("tbd,tcd->tbc", outputs, targets)
        return -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)

    with pytest.raises(CapabilityError, match=r"of between at lane \d depends on what stands at lane \d") as caught:
        looked_at(between, *numbers(T, B))
    assert "WindowLoss" in caught.value.fix


def test_nothing_remains_of_the_look() -> None:
    loss, before = Running(), torch.get_rng_state()
    generator = np.random.get_state()[1].copy()
    looked_at(loss, *numbers(T, B))
    looked_at(reparametrised, *heads(T, B))
    looked_at(from_numpy, *numbers(T, B))
    torch.manual_seed(0)
    assert float(loss.scale) == 1.0
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == generator).all()


# Wherever a loss is used

ESTIMATORS: list[Any] = [
    TBPTT(8, 8),
    TBPTT(8, 3),
    TBPTT(8, 3, losses="all"),
    TBPTT(3, 8),
    TBPTT(3, 8, replay="retain"),
    TBPTT(1, 4),
    FullBPTT(8),
    ARTBP(6, alpha="constant", block=2),
    Mixture(4, 4, 12, 0.5),
    Telescope(4, (4, 12)),
    RTRL(4),
    tbptt.UORO(4),
    PES(4, num_particles=4, sigma=0.1),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator_refuses_a_coupled_loss_and_looks_once(estimator: Any) -> None:
    model, calls = nn.RNN(D, D), 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (outputs - targets).square().mean(-1)

    carry, counts = estimator.init(model, 2), list[int]()
    for _ in range(3):
        steps, before = estimator.next_steps(carry), calls
        _, carry = estimator.estimate(model, loss, carry, Window(*numbers(steps, 2)))
        counts.append(calls - before)
    assert counts[0] > counts[1]
    assert isinstance(estimator, ARTBP | Mixture | Telescope) or counts[1] == counts[2]
    carry = estimator.init(model, 2)
    window = Window(*numbers(estimator.next_steps(carry), 2))
    with pytest.raises(CapabilityError, match=r"of difference at step"):
        estimator.estimate(model, difference, carry, window)


KINDS = ["pre-emphasis", "difference", "spectral", "normalised", "smoothed"]
EVERY = [each for _, kind in sorted(estimator_classes().items()) for each in kind.examples()]
MODELS: list[Callable[[], nn.Module]] = [
    lambda: nn.RNN(D, D),
    lambda: tbptt.scan(nn.RNNCell(D, D)),
    lambda: tbptt.SequenceModel(D, D, hidden=5, core="elstm"),
    lambda: tbptt.SequenceModel(D, D, hidden=5, core="attentive_lstm"),
]


def first_window(estimator: Any, loss: Any, model: nn.Module, data: Any) -> None:
    estimator.prepare(model, torch.randn(2, 2, D))
    carry = estimator.init(model, 2)
    outputs, targets = data(estimator.next_steps(carry), 2)
    estimator.estimate(model, loss, carry, Window(outputs, targets))


def a_model_for(estimator: Any) -> nn.Module:
    """The first that takes a loss of single steps: then it is the other loss that is refused."""
    for make in MODELS:
        model = make()
        try:
            first_window(estimator, steps_of(F.mse_loss), model, numbers)
        except CapabilityError:
            continue
        return model
    raise AssertionError(f"{estimator} takes none of the models")


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_every_estimator_refuses_every_kind_of_coupled_loss(estimator: Any) -> None:
    model = a_model_for(estimator)
    for name in KINDS:
        loss, data = COUPLED[name]
        with pytest.raises(CapabilityError, match=rf"of {loss.__name__} at step \d+ depends on what stands at step"):
            first_window(estimator, loss, model, data)


@pytest.mark.parametrize("name", KINDS)
def test_evaluate_trainer_and_online_refuse_every_kind_of_coupled_loss(name: str) -> None:
    loss, data = COUPLED[name]
    model, (x, _), (_, y) = nn.RNN(D, D), numbers(80, 1), data(80, 1)
    stream, sgd = ArrayStream(x[:, 0], y[:, 0], lanes=2), torch.optim.SGD(model.parameters(), 0.1)
    start, said = [each.clone() for each in model.parameters()], rf"of {loss.__name__} at step"
    with pytest.raises(CapabilityError, match=said):
        evaluate(model, loss, stream, steps=16)
    with pytest.raises(CapabilityError, match=said):
        Trainer(model, loss, sgd, TBPTT(8, 8), stream, checked=False).run(updates=1)
    online = Online(model, loss, sgd, TBPTT(4, 8))
    online.learn_many(x[:3, 0], y[:3, 0])
    with pytest.raises(CapabilityError, match=said):
        online.learn_one(x[3, 0], y[3, 0])
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_evaluate_trainer_online_and_compare_refuse_a_coupled_loss() -> None:
    model = nn.GRU(1, 1)
    x, y = torch.randn(80, 1), torch.randn(80, 1)
    stream, sgd = ArrayStream(x, y, lanes=1), torch.optim.SGD(model.parameters(), 0.1)
    start = [each.clone() for each in model.parameters()]
    with pytest.raises(CapabilityError, match="of difference at step"):
        evaluate(model, difference, stream, steps=16)
    with pytest.raises(CapabilityError, match="of difference at step"):
        Trainer(model, difference, sgd, TBPTT(8, 8), stream, checked=False).run(updates=1)
    online = Online(model, difference, sgd, TBPTT(1, 4))
    with pytest.raises(CapabilityError, match="of difference at step"):
        online.learn_one(x[0], y[0])
    with pytest.raises(CapabilityError, match="of difference at step"):
        tbptt.compare([TBPTT(4, 4)], nn.GRU(1, 1), stream, loss=difference, points=2, span=4, burn_in=4)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


# A loss of whole windows

WHOLE: list[Any] = [TBPTT(8, 8), TBPTT(8, 11), TBPTT(8, 11, replay="retain"), TBPTT(8, 20), FullBPTT(8, segment=8)]
CUT: list[Any] = [
    TBPTT(8, 3),
    TBPTT(8, 3, losses="all"),
    FullBPTT(8),
    ARTBP(8, alpha="constant", longest=8, seed=3),
    Mixture(8, 8, 16, segment=3),
    RFLO(8),
]


def masked_windows(model: nn.Module, count: int) -> tuple[list[Window], Tensor, Tensor, Tensor]:
    x, y = torch.randn(8 * count, 2, D), torch.randn(8 * count, 2, D)
    mask = torch.rand(8 * count, 2) < 0.7
    return [Window(x[at : at + 8], y[at : at + 8], mask[at : at + 8]) for at in range(0, 8 * count, 8)], x, y, mask


@pytest.mark.parametrize("estimator", WHOLE, ids=str)
def test_a_window_loss_is_given_whole_windows_as_they_are(estimator: Any) -> None:
    """Against plain autograd over all windows so far: the loss of the window, back as far as the look-back goes."""
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.RNN(D, D)
        windows, x, y, mask = masked_windows(model, 4)
        carry = estimator.init(model, 2)
        for number, window in enumerate(windows):
            found, carry = estimator.estimate(model, WindowLoss(difference), carry, window)
            end = 8 * (number + 1)
            begin = 0 if isinstance(estimator, FullBPTT) else max(0, end - estimator.k2)
            with torch.no_grad():
                state = model(x[:begin])[1] if begin else None
            outputs, _ = model(x[begin:end], state)
            losses = difference(outputs[-8:], y[end - 8 : end])[mask[end - 8 : end]]
            wanted = torch.autograd.grad(losses.mean(), list(model.parameters()))
            torch.testing.assert_close(list(found.gradients.values()), list(wanted))
            torch.testing.assert_close(found.loss, losses.mean().detach())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("estimator", CUT, ids=str)
def test_a_window_loss_is_refused_where_windows_are_cut(estimator: Any) -> None:
    model = nn.RNN(D, D)

    def run() -> None:
        carry = estimator.init(model, 2)
        for _ in range(3):
            window = Window(*numbers(estimator.next_steps(carry), 2))
            _, carry = estimator.estimate(model, WindowLoss(difference), carry, window)

    with pytest.raises(CapabilityError, match="a window in one piece was expected for a WindowLoss") as caught:
        run()
    assert "k2 >= k1" in caught.value.fix


def test_a_window_loss_across_two_sequences_is_refused() -> None:
    model, reset = nn.RNN(D, D), torch.zeros(8, 2, dtype=torch.bool)
    reset[0] = True
    estimator = TBPTT(8, 8)
    estimator.estimate(model, WindowLoss(difference), estimator.init(model, 2), Window(*numbers(8, 2), reset=reset))
    reset[5, 1] = True
    with pytest.raises(CapabilityError, match="lane 1 begins another one at step 5 of 8"):
        estimator.estimate(model, WindowLoss(difference), estimator.init(model, 2), Window(*numbers(8, 2), reset=reset))


def test_a_window_loss_elsewhere() -> None:
    model, loss = nn.GRU(1, 1), WindowLoss(difference)
    x, y = torch.randn(64, 1), torch.randn(64, 1)
    stream = ArrayStream(x, y, lanes=2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    held_out = tbptt.HeldOut(ArrayStream(x, y, lanes=2), every=4)
    found = Trainer(model, loss, sgd, TBPTT(8, 16), stream, held_out=held_out).run(updates=4)
    assert found.validation["loss"] == evaluate(model, loss, stream, steps=8)["loss"]
    assert found.validation["loss"] != evaluate(model, loss, stream, steps=16)["loss"]
    with pytest.raises(ConfigError, match="steps was expected to be given with a WindowLoss"):
        evaluate(model, loss, stream)
    online = Online(model, loss, sgd, TBPTT(2, 4))
    for step in range(4):
        online.learn_one(x[step], y[step])
    assert online.updates == 2
    online.learn_one(x[4])
    with pytest.raises(CapabilityError, match="expected with a WindowLoss, but 1 of 2"):
        online.learn_one(x[5], y[5])
    with pytest.raises(CapabilityError, match=r"by tbptt\.compare"):
        tbptt.compare([TBPTT(4, 4)], nn.GRU(1, 1), stream, loss=loss, points=2, span=4, burn_in=4)
    with pytest.raises(CapabilityError, match="expected, but a str came"):
        WindowLoss("difference")  # pyright: ignore[reportArgumentType]
