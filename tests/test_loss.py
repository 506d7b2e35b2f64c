"""Losses: torch's own mean, whatever counts; and no wrong shape gets through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbptt import RTRL, TBPTT, ArrayStream, FullBPTT, Trainer, Window, evaluate
from tbptt.errors import CapabilityError, CheckError, ConfigError, ShapeError
from tbptt.loss import StepLoss

T, B, C, D = 6, 3, 5, 2


def window(targets: Tensor, mask: Tensor | None = None) -> Window:
    return Window(torch.zeros(*targets.shape[:2], 1), targets, mask)


def mean(loss: Any, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    total, counted, _ = StepLoss.of(loss).total(outputs, window(targets, mask))
    return total / counted.weight


def some() -> Tensor:
    mask = torch.rand(T, B) < 0.6
    mask[0, 0] = True
    mask[1, 1] = False
    return mask


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


BY_CLASS: list[Any] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.NLLLoss(),
    nn.MultiMarginLoss(),
    F.cross_entropy,
    F.nll_loss,
]
BY_ELEMENT: list[Any] = [
    nn.MSELoss(),
    nn.L1Loss(),
    nn.SmoothL1Loss(beta=0.3),
    nn.HuberLoss(delta=0.4),
    nn.BCEWithLogitsLoss(),
    nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    nn.PoissonNLLLoss(),
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
]


def name(loss: Any) -> str:
    return loss.__name__ if not isinstance(loss, nn.Module) else type(loss).__name__


@pytest.mark.parametrize("loss", BY_CLASS, ids=name)
def test_losses_over_classes_are_torchs_own_mean(loss: Any) -> None:
    outputs, targets, mask = torch.randn(T, B, C).log_softmax(-1), torch.randint(C, (T, B)), some()
    torch.testing.assert_close(mean(loss, outputs, targets), loss(outputs.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))
    # The control: the mean over steps of the means over lanes is another number.
    by_step = torch.stack([loss(o[m], t[m]) for o, t, m in zip(outputs, targets, mask, strict=True) if m.any()])
    assert not torch.allclose(mean(loss, outputs, targets, mask), by_step.mean(), rtol=1e-3)


@pytest.mark.parametrize("loss", BY_ELEMENT, ids=name)
@pytest.mark.parametrize("trailing", [(), (D,), (D, 4)])
def test_losses_over_elements_are_torchs_own_mean(loss: Any, trailing: tuple[int, ...]) -> None:
    outputs, targets, mask = torch.randn(T, B, *trailing), torch.rand(T, B, *trailing), some()
    torch.testing.assert_close(mean(loss, outputs, targets), loss(outputs, targets))
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))


@pytest.mark.parametrize("loss", [nn.BCELoss(), F.binary_cross_entropy])
def test_probabilities(loss: Any) -> None:
    outputs, targets, mask = torch.rand(T, B), torch.randint(2, (T, B)), some()  # whole numbers as targets
    torch.testing.assert_close(
        mean(loss, outputs, targets, mask), F.binary_cross_entropy(outputs[mask], targets[mask].float())
    )


@pytest.mark.parametrize("ignore", [-100, -1, 0, 3])
def test_an_ignored_class_does_not_count(ignore: int) -> None:
    outputs, targets, mask = torch.randn(T, B, C), torch.randint(C, (T, B)), some()
    targets[0, 1] = targets[3, 2] = ignore
    loss = nn.CrossEntropyLoss(ignore_index=ignore)
    total, counted, _ = StepLoss.of(loss).total(outputs, window(targets, mask))
    assert counted.num == counted.weight == int((mask & (targets != ignore)).sum())
    torch.testing.assert_close(total / counted.weight, loss(outputs[mask], targets[mask]))


WEIGHTED: list[Any] = [
    *(
        nn.CrossEntropyLoss(weight, ignore_index=ignore, label_smoothing=smoothing)
        for weight in (torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0]), torch.tensor([0.05, 0.0, 1.0, 0.3, 0.2]))
        for ignore in (-100, 2)
        for smoothing in (0.0, 0.1)
    ),
    nn.NLLLoss(torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0])),
    nn.NLLLoss(torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0]), ignore_index=0),
    nn.MultiMarginLoss(weight=torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0])),
]


@pytest.mark.parametrize("loss", WEIGHTED, ids=repr)
def test_with_class_weights_the_mean_is_torchs_own(loss: nn.Module) -> None:
    outputs, targets, mask = torch.randn(T, B, C).log_softmax(-1), torch.randint(C, (T, B)), some()
    targets[2, 0] = 2  # a target that may be ignored
    torch.testing.assert_close(mean(loss, outputs, targets), loss(outputs.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))
    if not isinstance(loss, nn.MultiMarginLoss):  # which alone divides by the number of targets
        total, counted, _ = StepLoss.of(loss).total(outputs, window(targets))
        assert not torch.allclose(total / counted.num, total / counted.weight, rtol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_class_weights_and_probabilities_torch_divides_by_the_number(smoothing: float) -> None:
    outputs, targets, mask = torch.randn(T, B, C), torch.rand(T, B, C).softmax(-1), some()
    loss = nn.CrossEntropyLoss(torch.rand(C), label_smoothing=smoothing)
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))


def test_targets_that_all_weigh_nothing_are_as_none() -> None:
    loss = nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
    assert loss(torch.randn(4, C), torch.zeros(4, dtype=torch.int64)).isnan()  # in torch
    model, estimator = nn.RNN(D, C), TBPTT(T, T)
    targets = torch.zeros(T, B, dtype=torch.int64)
    found, _ = estimator.estimate(model, loss, estimator.init(model, B), Window(torch.randn(T, B, D), targets))
    assert (found.num_injected, found.num_terms, found.loss_weight) == (0, 0, 0.0)
    assert found.loss.isnan()
    assert not any(each.any() for each in found.gradients.values())


@pytest.mark.parametrize("estimator", [TBPTT(T, T), TBPTT(T, 2, losses="all"), TBPTT(T, 2)], ids=str)
def test_class_weights_of_an_estimate(estimator: TBPTT) -> None:
    """The gradient, its scale and the loss are those of torch's own mean over the steps that are learned from."""
    weight = torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0])
    loss, model = nn.CrossEntropyLoss(weight), nn.RNN(D, C)
    inputs, targets, mask = torch.randn(T, B, D), torch.randint(C, (T, B)), some()
    found, _ = estimator.estimate(model, loss, estimator.init(model, B), Window(inputs, targets, mask))
    outputs, _ = model(inputs)
    torch.testing.assert_close(found.loss, loss(outputs[mask], targets[mask]).detach())
    learned = mask.clone()
    learned[: T - 2] &= estimator.k2 == T or estimator.losses == "all"
    assert found.num_injected == int(learned.sum())
    assert found.weight == pytest.approx(float(weight[targets[learned]].sum()))
    assert found.loss_weight == pytest.approx(float(weight[targets[mask]].sum()))
    if estimator.k2 == T:
        loss(outputs[mask], targets[mask]).backward()
        torch.testing.assert_close(found.gradients["weight_hh_l0"], model.weight_hh_l0.grad)


@pytest.mark.parametrize("wrong", [C, C + 3])
def test_a_class_without_a_weight_is_refused(wrong: int) -> None:
    targets = torch.randint(C, (T, B))
    targets[4, 2] = wrong
    with pytest.raises(ShapeError, match=f"target {wrong} stands at step 4 of the window, lane 2"):
        mean(nn.CrossEntropyLoss(torch.rand(C)), torch.randn(T, B, C), targets)


def test_class_probabilities_as_targets() -> None:
    outputs, targets = torch.randn(T, B, C), torch.rand(T, B, C).softmax(-1)
    wanted = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1))
    torch.testing.assert_close(mean(nn.CrossEntropyLoss(), outputs, targets), wanted)


def test_the_users_loss_is_left_as_it_is() -> None:
    loss = nn.MSELoss()
    StepLoss.of(loss)
    assert loss.reduction == "mean"
    ready = StepLoss.of(loss)
    assert StepLoss.of(ready) is ready


def test_a_loss_that_cannot_be_hashed() -> None:
    @dataclass  # with eq and without frozen: Python takes its hash away
    class Scaled:
        factor: float

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.factor * (outputs - targets).square()

    outputs, targets = torch.randn(T, B), torch.randn(T, B)
    torch.testing.assert_close(mean(Scaled(2.0), outputs, targets), 2 * F.mse_loss(outputs, targets))


def gradient(loss: Any, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    model = nn.RNN(D, C)
    inputs = torch.randn(T, B, D)
    estimator = TBPTT(T, T)
    estimate, _ = estimator.estimate(model, loss, estimator.init(model, B), Window(inputs, targets, mask))
    return estimate.loss, estimate.gradients["weight_hh_l0"]


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda o, t: (o - t).square().sum(-1)], ids=["torch", "own"])
def test_missing_targets_do_not_reach_the_gradient_unless_they_count(loss: Any, missing: float) -> None:
    targets, mask = torch.randn(T, B, C), some()
    torch.manual_seed(1)
    value, wanted = gradient(loss, targets, mask)
    targets[~mask] = missing
    torch.manual_seed(1)
    again, found = gradient(loss, targets, mask)
    assert torch.equal(again, value)
    assert torch.equal(found, wanted)
    targets[0, 0] = missing  # this one counts
    value, found = gradient(loss, targets, mask)
    assert not value.isfinite()
    assert not found.isfinite().all()


LOGS: dict[str, Any] = {
    "relative": lambda o, t: ((o - t) / t).square().mean(-1),
    "log": lambda o, t: (o.exp().log() - t.log()).square().mean(-1),
    "log of the outputs": lambda o, t: -(t * torch.log(o.clamp(min=0))).mean(-1),
    "poisson": lambda o, t: F.poisson_nll_loss(o, t, log_input=True, full=True, reduction="none").mean(-1),
    "distribution": lambda o, t: -torch.distributions.LogNormal(o, 1.0).log_prob(t).mean(-1),
}


class Positive(nn.Module):
    """An RNN with positive outputs, but for the steps whose input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.RNN(D, C)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        return outputs.sigmoid() * (inputs[..., :1] > -50), state


@pytest.mark.parametrize("loss", LOGS.values(), ids=LOGS)
@pytest.mark.parametrize("estimator", [TBPTT(T, T), TBPTT(T, 2, losses="all"), TBPTT(3, 5), FullBPTT(T)], ids=str)
@pytest.mark.parametrize("missing", [0.0, float("nan")])
def test_a_target_that_does_not_count_makes_no_nan(loss: Any, estimator: Any, missing: float) -> None:
    """A pass whose rows are no multiple of the lanes ends with such targets; the last windows hold nothing else."""
    model, steps = Positive(), 4 * T
    inputs, targets = torch.randn(steps, B, D), torch.rand(steps, B, C) + 0.5
    mask = torch.rand(steps, B) < 0.7
    mask[2 * T :] = False
    mask[2 * T + 1, 0] = True
    targets[~mask] = missing
    inputs[~mask] = -100.0  # where the outputs are 0, too
    carry = estimator.init(model, B)
    for window in windows_of(inputs, targets, mask, estimator.k1):
        found, carry = estimator.estimate(model, loss, carry, window)
        assert found.num_terms == int(window.mask.sum())
        assert all(each.isfinite().all() for each in found.gradients.values())
        assert found.loss.isfinite() or not found.num_terms


def windows_of(inputs: Tensor, targets: Tensor, mask: Tensor, steps: int) -> list[Window]:
    return [
        Window(inputs[at : at + steps], targets[at : at + steps], mask[at : at + steps], start=at)
        for at in range(0, len(inputs), steps)
    ]


def test_a_loss_is_not_called_where_no_target_counts() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("there is nothing to compare")

    summed = StepLoss.of(loss).total(torch.randn(T, B, D), window(torch.zeros(T, B), torch.zeros(T, B).bool()))
    assert (float(summed.total), summed.counted.num) == (0.0, 0)


def test_shapes_that_do_not_fit_are_found_where_no_target_counts() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        mean(nn.MSELoss(), torch.randn(T, B, 1), torch.randn(T, B), torch.zeros(T, B).bool())


# Several outputs and several terms


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.policy, self.value = nn.RNN(D, 4), nn.Linear(4, C), nn.Linear(4, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        hidden, state = self.core(inputs, state)
        return {"policy": self.policy(hidden), "value": self.value(hidden).squeeze(-1)}, state


def policy_of(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    steps = targets["action"].shape
    flat = outputs["policy"].flatten(0, 1), targets["action"].flatten()
    return F.cross_entropy(*flat, reduction="none").view(steps)


def by_term(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"policy": policy_of(outputs, targets), "value": 0.5 * (outputs["value"] - targets["return"]).square()}


def added_up(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return policy_of(outputs, targets) + 0.5 * (outputs["value"] - targets["return"]).square()


ESTIMATORS = [TBPTT(T, 2, losses="all"), TBPTT(3, 5), TBPTT(3, 5, replay="retain"), FullBPTT(T, segment=2), RTRL(1)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_dict_of_terms_is_summed_for_the_gradient_and_reported_by_name(estimator: Any) -> None:
    model, inputs, mask = Heads(), torch.randn(2 * T, B, D), torch.rand(2 * T, B) < 0.6
    targets = {"action": torch.randint(C, (2 * T, B)), "return": torch.randn(2 * T, B)}
    reset = torch.zeros(2 * T, B, dtype=torch.bool)
    reset[4, 1] = True
    whole = Window(inputs, targets, mask, reset)
    carries = [estimator.init(model, B) for _ in range(2)]
    for at in range(0, 2 * T, estimator.k1):
        piece = whole[at : at + estimator.k1]
        one, carries[0] = estimator.estimate(model, by_term, carries[0], piece)
        other, carries[1] = estimator.estimate(model, added_up, carries[1], piece)
        torch.testing.assert_close(one.gradients, other.gradients)
        if one.num_terms:
            terms = {name: each for name, each in one.metrics.items() if name.startswith("loss/")}
            assert terms.keys() == {"loss/policy", "loss/value"}
            assert sum(terms.values()) == pytest.approx(float(other.loss))
            assert terms["loss/value"] != terms["loss/policy"]


def test_evaluate_reports_terms_by_name_and_class_weights_as_torch() -> None:
    torch.manual_seed(3)
    model, inputs = Heads(), torch.randn(31, D)
    actions, returns = torch.randint(C, (31,)), torch.randn(31)
    stream = ArrayStream(inputs, {"action": actions, "return": returns}, lanes=1)
    with torch.no_grad():
        outputs, _ = model(inputs[:, None])
        wanted = by_term(outputs, {"action": actions[:, None], "return": returns[:, None]})
    for steps in (7, 64):
        found = evaluate(model, by_term, stream, steps=steps)
        assert found["loss/policy"] == pytest.approx(float(wanted["policy"].mean()))
        assert found["loss/value"] == pytest.approx(float(wanted["value"].mean()))
        assert found["loss"] == pytest.approx(found["loss/policy"] + found["loss/value"])
    core, weight = nn.RNN(D, C), torch.tensor([1.0, 5.0, 20.0, 0.5, 2.0])
    loss = nn.CrossEntropyLoss(weight)
    found = evaluate(core, loss, ArrayStream(inputs, actions, lanes=1), steps=7)
    assert found["loss"] == pytest.approx(float(loss(core(inputs[:, None])[0][:, 0], actions).detach()))
    assert found["targets"] == 31


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), F.mse_loss], ids=name)
def test_torchs_losses_say_which_outputs_to_choose(loss: Any) -> None:
    outputs = {"policy": torch.randn(T, B, C), "value": torch.randn(T, B)}
    with pytest.raises(ShapeError, match=r"policy \(6, 3, 5\), value \(6, 3\)") as caught:
        mean(loss, outputs, torch.randn(T, B, C))  # pyright: ignore[reportArgumentType]
    assert "outputs['policy']" in caught.value.fix
    with pytest.raises(ShapeError, match="there are none"):
        StepLoss.of(loss).total(torch.randn(T, B, C), Window(torch.zeros(T, B, 1)))


class Balanced(nn.Module):
    """An LSTM that returns an auxiliary loss beside its outputs."""

    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.core, self.head, self.reduce = nn.LSTM(2, 5), nn.Linear(5, 2), reduce

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Any, Any]:
        hidden, state = self.core(inputs, state)
        return (self.head(hidden), self.reduce(hidden.square())), state


def with_balance(outputs: Any, targets: Tensor) -> Tensor:
    return (outputs[0] - targets).square().mean(-1) + 0.1 * outputs[1]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("reduce", [lambda h: h.mean(), lambda h: h.mean((0, 1)), lambda h: h.mean((0, 2))])
def test_an_auxiliary_output_of_the_whole_window_is_refused(estimator: Any, reduce: Any) -> None:
    model = Balanced(reduce)
    with pytest.raises(ShapeError, match=r"outputs of shape \(T, B, ...\) .* but the output \[1\] has shape") as caught:
        estimator.estimate(
            model,
            with_balance,
            estimator.init(model, B),
            Window(torch.randn(estimator.k1, B, 2), torch.randn(estimator.k1, B, 2)),
        )
    assert "return the auxiliary loss with shape (T, B)" in caught.value.fix


def test_an_auxiliary_output_is_refused_before_training_and_by_evaluate() -> None:
    model, x = Balanced(lambda h: h.mean()), torch.randn(80, 2)
    stream = ArrayStream(x, x, lanes=2)
    trainer = Trainer(model, with_balance, torch.optim.SGD(model.parameters(), 0.1), TBPTT(8, 8), stream)
    with pytest.raises(CheckError, match=r"outputs of shape \(T, B, ...\)"):
        trainer.run(updates=1)
    with pytest.raises(ShapeError, match=r"outputs of shape \(T, B, ...\)"):
        evaluate(model, with_balance, stream)
    model = Balanced(lambda h: h.mean(-1))  # the fix
    trainer = Trainer(model, with_balance, torch.optim.SGD(model.parameters(), 0.1), TBPTT(8, 8), stream)
    assert trainer.run(updates=3).updates == 3


# Refusals


def test_sums_are_refused() -> None:
    with pytest.raises(ConfigError, match='reduction="sum" was asked for') as caught:
        StepLoss.of(nn.MSELoss(reduction="sum"))
    assert "torch.nn.MSELoss()" in caught.value.fix


@pytest.mark.parametrize("loss", [nn.CTCLoss(), nn.TripletMarginLoss(), nn.CosineEmbeddingLoss(), nn.KLDivLoss()])
def test_losses_that_compare_something_else_are_refused(loss: nn.Module) -> None:
    with pytest.raises(CapabilityError, match=f"{type(loss).__name__} is not a loss of outputs against targets"):
        StepLoss.of(loss)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(CapabilityError, match="but a str came"):
        StepLoss.of("mse")


@pytest.mark.parametrize(
    "terms", [{}, {"error": 0.5}, {"error": torch.randn(T, B), "balance": torch.tensor(0.1)}], ids=len
)
def test_terms_of_other_shapes_are_refused_by_name(terms: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=r"(the loss|the term 'error'|the term 'balance').* shape \(T, B\) = \(6, 3\)"):
        mean(lambda outputs, targets: terms, torch.randn(T, B, D), torch.randn(T, B, D))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (o - t).square().mean(),
        lambda o, t: (o - t).square().mean((1, 2)),
        lambda o, t: (o - t).square().mean((0, 2)),
        lambda o, t: (o - t).square().mean((0, 2), keepdim=True),
        lambda o, t: (o - t).square().mean(-1).T,
        lambda o, t: (o - t).square(),
    ],
    ids=["scalar", "T", "B", "1 B 1", "B T", "T B D"],
)
def test_shapes_other_than_steps_and_lanes_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match=rf"shape \(T, B\) = \({T}, {B}\), but it returned shape") as caught:
        mean(loss, torch.randn(T, B, D), torch.randn(T, B, D))
    assert 'reduction="none"' in caught.value.fix


def test_elements_are_not_broadcast() -> None:
    """(T, B, 1) against (T, B) would compare every lane with every other, or every step."""
    with pytest.raises(ShapeError, match="one shape") as caught:
        mean(nn.MSELoss(), torch.randn(T, B, 1), torch.randn(T, B))
    assert "squeeze(-1)" in caught.value.fix


def test_classes_come_last() -> None:
    with pytest.raises(ShapeError, match=r"outputs \(T, B, C\), class last"):
        mean(nn.CrossEntropyLoss(), torch.randn(T, C, B), torch.randint(C, (T, B)))
    with pytest.raises(ShapeError, match="class last"):
        mean(nn.CrossEntropyLoss(), torch.randn(T, B), torch.randint(C, (T, B)))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MultiMarginLoss()], ids=name)
@pytest.mark.parametrize("wrong", [C, C + 6, -2])
def test_a_class_out_of_range_says_where(loss: nn.Module, wrong: int) -> None:
    targets, mask = torch.randint(C, (T, B)), torch.ones(T, B, dtype=torch.bool)
    targets[4, 2] = wrong
    targets[1, 0], mask[1, 0] = 1000, False  # does not count
    with pytest.raises(ShapeError, match=rf"target {wrong} stands at step 4 of the window, lane 2 \(1 such\)"):
        mean(loss, torch.randn(T, B, C), targets, mask)
