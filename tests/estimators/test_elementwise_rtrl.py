"""Element-wise recurrences learned online, exactly: against autograd, and the published recursions in NumPy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from elementwise_traces import elstm_online, lru_online
from systems import Forgetful, relative
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, ElementwiseRTRL, Recurrence, Window
from tbptt.errors import AlarmWarning, CapabilityError
from tbptt.models import ELSTM, LRU


def along(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient with respect to the outputs is the targets."""
    return (outputs * targets).sum(-1)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def summed(
    estimator: Any, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any = squared, reset: Tensor | None = None
) -> dict[str, Tensor]:
    carry, sums = estimator.init(model, inputs.shape[1]), dict[str, Tensor]()
    for at in range(0, len(inputs), estimator.k1):
        cut = slice(at, at + estimator.k1)
        window = Window(inputs[cut], targets[cut], reset=None if reset is None else reset[cut], start=at)
        estimate, carry = estimator.estimate(model, loss, carry, window)
        for name, value in estimate.gradients.items():
            sums[name] = sums.get(name, 0.0) + value * estimate.num_injected
    return sums


def full(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any, reset: Tensor | None = None
) -> dict[str, Tensor]:
    """By plain autograd over all steps, resets applied by hand."""
    state, total = None, 0.0
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        if reset is not None and state is not None and reset[t].any():
            state = tuple(torch.where(reset[t][:, None], torch.zeros_like(each), each) for each in state)
        outputs, state = model(x[None], state)
        total = total + loss(outputs, y[None]).sum()
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, values, materialize_grads=True), strict=True))


CASES = {
    "elstm": (lambda: ELSTM(3, 8).double(), 70, 1e-12),
    "lru": (lambda: LRU(3, 8, 4, r_min=0.5, r_max=0.99).double(), 200, 1e-11),
    "lru, parallel": (lambda: LRU(3, 8, 4, scan="parallel").double(), 200, 1e-11),
    "glu": (lambda: LRU(3, 8, 4, glu=True).double(), 70, 1e-11),
    "own": (lambda: Forgetful(3, 8).double(), 70, 1e-12),
}


@pytest.mark.parametrize("k1", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_it_is_full_backpropagation(name: str, k1: int) -> None:
    make, steps, bound = CASES[name]
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(steps, 2, 3).double()
    targets = torch.randn_like(model(inputs)[0])
    wanted = full(model, inputs, targets, squared)
    assert relative(summed(ElementwiseRTRL(k1), model, inputs, targets), wanted) < bound
    assert relative(summed(TBPTT(k1, k1), model, inputs, targets), wanted) > 1e-3  # the control


@pytest.mark.parametrize("name", ["elstm", "lru"])
def test_a_lane_that_starts_anew_takes_no_trace_along(name: str) -> None:
    make, _, bound = CASES[name]
    torch.manual_seed(0)
    model, inputs = make(), torch.randn(40, 2, 3).double()
    targets, reset = torch.randn_like(model(inputs)[0]), torch.rand(40, 2) < 0.06
    reset[8, 0] = reset[21] = True
    wanted = full(model, inputs, targets, squared, reset)
    assert relative(summed(ElementwiseRTRL(4), model, inputs, targets, reset=reset), wanted) < bound
    assert relative(summed(ElementwiseRTRL(4), model, inputs, targets), wanted) > 1e-3


@pytest.mark.parametrize("name", ["elstm", "lru"])
def test_it_is_the_published_recursion(name: str) -> None:
    """The traces of Irie et al. and of Zucchet et al., in NumPy, two lanes; declared parameters only."""
    make, steps, bound = CASES[name]
    torch.manual_seed(0)
    model, inputs = make(), torch.randn(steps, 2, 3).double()
    targets = torch.randn_like(model(inputs)[0])
    found = summed(ElementwiseRTRL(), model, inputs, targets, along)
    short = {key.removeprefix("layers.0.").removeprefix("lru."): value.numpy() for key, value in found.items()}
    parameters = {
        key.removeprefix("layers.0.").removeprefix("lru."): value.detach().numpy()
        for key, value in model.named_parameters()
    }
    online = elstm_online if name == "elstm" else lru_online
    wanted = online(parameters, inputs.numpy(), targets.numpy())
    assert wanted
    for key, value in wanted.items():
        assert np.abs(short[key] - value).max() <= bound * np.abs(value).max(), key
    if name == "elstm":
        wrong = elstm_online(parameters, inputs.numpy(), targets.numpy(), through_z=False)
        assert max(np.abs(short[key] - wrong[key]).max() / np.abs(wrong[key]).max() for key in wrong) > 1e-2


def test_in_a_stack_it_is_exact_for_the_last_layer_and_says_so() -> None:
    torch.manual_seed(0)
    model, inputs = ELSTM(3, 6, layers=2).double(), torch.randn(60, 2, 3).double()
    targets = torch.randn_like(model(inputs)[0])
    wanted, estimator = full(model, inputs, targets, squared), ElementwiseRTRL(4)
    found = summed(estimator, model, inputs, targets)
    limits = estimator.limits(model, inputs)
    for name, value in wanted.items():
        apart = float((found[name] - value).norm() / value.norm())
        assert (apart < 1e-12) == (not name.startswith("layers.0.")), name
    cut = summed(TBPTT(4, 4), model, inputs, targets)
    own = {
        name for name in model.recurrences()[0].parameters
    }  # of the lower layer: what goes through it alone is there
    assert relative({n: found[n] for n in own}, {n: wanted[n] for n in own}) < relative(
        {n: cut[n] for n in own}, {n: wanted[n] for n in own}
    )
    assert limits.startswith("not exact for layers.0.F, ")
    assert "layers.1" not in limits
    assert ElementwiseRTRL().limits(ELSTM(3, 6), torch.randn(4, 2, 3)) == ""
    report = tbptt.check(model, inputs[:12], estimator)
    assert report
    assert "not exact for layers.0.F" in str(report)
    stream = tbptt.ArrayStream(torch.randn(400, 3).double(), torch.randn(400, 6).double(), lanes=2)
    found = tbptt.compare([estimator, TBPTT(4, 4)], model, stream, loss=nn.MSELoss(), points=2, span=8, burn_in=8)
    assert [each for each in found.notes if "not exact for layers.0.F" in each]


def test_the_trainer_says_it_too() -> None:
    model = tbptt.SequenceModel(4, 4, hidden=5, embedding=3, core="elstm")
    stream = tbptt.streams.DelayedRecall(3, lanes=2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(AlarmWarning, match="not exact for embedding.weight"):
        tbptt.Trainer(model, nn.CrossEntropyLoss(), sgd, ElementwiseRTRL(), stream).run(updates=2)
    plain = ELSTM(1, 3)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    stream = tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 3), lanes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tbptt.Trainer(plain, nn.MSELoss(), sgd, ElementwiseRTRL(), stream).run(updates=2)


# What is refused


class Dense(nn.Module):
    """Claims to be element-wise, and is not."""

    def __init__(self, names: tuple[str, ...], leaf: int = 0) -> None:
        super().__init__()
        self.drive, self.again = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 4))
        self.mix, self.names, self.leaf = nn.Parameter(torch.randn(3, 3)), names, leaf

    def recurrences(self) -> tuple[Recurrence, ...]:
        return (Recurrence(self.leaf, self.names),)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state, outputs = inputs.new_zeros(inputs.shape[1], 4) if state is None else state, []
        for step in inputs:
            state = torch.tanh(step @ self.mix @ self.drive.T + state @ self.again.T)
            outputs.append(state)
        return torch.stack(outputs), state


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.GRU(3, 4), "GRU names none"),
        (Dense(("drive",)), "another unit's part of the state before"),
        (Dense(("mix",)), "mix has other rows"),
        (Dense(("drive",), leaf=1), "came with 1 tensors"),
    ],
    ids=["none", "dense", "rows", "leaf"],
)
def test_what_is_not_so_is_refused(model: nn.Module, message: str) -> None:
    estimator, window = ElementwiseRTRL(), Window(torch.randn(1, 2, 3), torch.randn(1, 2, 4))
    with pytest.raises(CapabilityError) as caught:
        estimator.estimate(model, squared, estimator.init(model, 2), window)
    assert message in str(caught.value)
    report = tbptt.check(model, torch.randn(24, 2, 3), estimator)
    assert not report  # it answers, and does not raise
    assert message in str(report)


def test_a_weight_that_drives_other_units_too_is_refused() -> None:
    class Mixed(Dense):
        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            state = torch.zeros(inputs.shape[1], 4) if state is None else state
            for step in inputs:
                state = 0.5 * state + (step @ self.drive.T).cumsum(-1)
            return state[None].expand(len(inputs), -1, -1), state

    estimator, model = ElementwiseRTRL(), Mixed(("drive",))
    window = Window(torch.randn(1, 2, 3), torch.randn(1, 2, 4))
    with pytest.raises(CapabilityError, match="another unit's part of drive"):
        estimator.estimate(model, squared, estimator.init(model, 2), window)


@pytest.mark.parametrize("declared", [False, True])
def test_a_learned_start_is_followed_where_it_is_declared_and_else_named(declared: bool) -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep, self.start = (nn.Parameter(torch.rand(3).double()) for _ in range(2))

        def recurrences(self) -> tuple[tbptt.Recurrence, ...]:
            return (tbptt.Recurrence(0, ("cell.keep", "cell.start") if declared else ("cell.keep",)),)

        def initial_state(self, lanes: int) -> torch.Tensor:
            return self.start.expand(lanes, -1)

        def forward(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            state = self.keep * state + inputs
            return 1 * state, state

    torch.manual_seed(0)
    model, (x, y) = tbptt.scan(Started()), torch.randn(2, 12, 2, 3).double()
    model.recurrences = model.cell.recurrences  # type: ignore[assignment]
    limits, sums = tbptt.ElementwiseRTRL().limits(model, x), {}
    for estimator in (tbptt.ElementwiseRTRL(), tbptt.RTRL()):
        carry, sums[estimator] = estimator.init(model, 2), 0.0
        for at in range(12):
            window = tbptt.Window(x[at : at + 1], y[at : at + 1])
            estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
            sums[estimator] = sums[estimator] + estimate.gradients.get("cell.start", torch.zeros(3).double())
    found, wanted = sums.values()
    assert bool((found - wanted).abs().max() < 1e-12) == declared
    assert ("cell.start" in limits) == (not declared)
