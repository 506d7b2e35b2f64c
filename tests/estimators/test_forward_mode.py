"""Influence carried along, against plain autograd over the whole sequence, closed forms and loops in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from systems import SIMPLE, SYSTEMS, B, record, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import RTRL, TBPTT, UORO, SnAp, Window
from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.forward_mode import CarriedInfluence
from tbptt.models import InfluenceBalancingModel
from tbptt.streams import InfluenceBalancing
from tbptt.testing import Recording

T = 50
KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def over(estimator: Any, model: nn.Module, recording: Recording, k1: int) -> tuple[dict[str, Tensor], Any]:
    """The gradients of all losses of a recording, as the estimator makes them window by window, and its last carry."""
    steps = len(recording.inputs)
    carry = estimator.init(model, recording.inputs.shape[1])
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    for at in range(0, steps, k1):
        window = Window(*(part[at : at + k1] for part in parts), start=at)
        estimate, carry = estimator.estimate(model, squared, carry, window)
        for name, value in estimate.gradients.items():
            sums[name] += value * estimate.num_injected
    return sums, carry


def whole(model: nn.Module, recording: Recording) -> dict[str, Tensor]:
    """The same by plain autograd."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    steps = len(recording.inputs)
    total, _ = recording.run([leaves] * steps, None, 0, steps, list(range(steps)))
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def of_torch(kind: str, hidden: int) -> tuple[nn.Module, Recording]:
    """A layer of torch's and a recording of it, with masks and resets."""
    torch.manual_seed(0)
    model = KINDS[kind](2, hidden).double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        given = tuple(each[None] for each in state)
        y, new = torch.func.functional_call(model, parameters, (x[None], given if kind == "lstm" else given[0]))
        return y[0], tuple(each[0] for each in (new if kind == "lstm" else (new,)))

    def initial(parameters: dict[str, Tensor]) -> Any:
        return tuple(torch.zeros(B, hidden).double() for _ in range(2 if kind == "lstm" else 1))

    mask, reset = torch.rand(T, B) < 0.7, torch.rand(T, B) < 0.04
    inputs, targets = torch.randn(T, B, 2).double(), torch.randn(T, B, hidden).double()
    return model, Recording(inputs, targets, mask, reset, step, initial, squared)


@pytest.mark.parametrize("hidden", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_rtrl_is_full_backpropagation(kind: str, hidden: int) -> None:
    model, recording = of_torch(kind, hidden)
    wanted = whole(model, recording)
    assert relative(over(RTRL(), model, recording, 1)[0], wanted) < 1e-12
    assert relative(over(RTRL(k1=7), model, recording, 7)[0], wanted) < 1e-12
    assert relative(over(TBPTT(1, 1), model, recording, 1)[0], wanted) > 1e-2  # the controls
    assert relative(over(SnAp(), model, recording, 1)[0], wanted) > 1e-3


@pytest.mark.parametrize("k1", [1, 4])
@pytest.mark.parametrize("name", [*SYSTEMS, *SIMPLE])
def test_rtrl_on_any_state(name: str, k1: int) -> None:
    """Layers, scanned cells with a learnable start, nested states; resets inside windows and where they begin."""
    torch.manual_seed(1)
    system = (SYSTEMS | SIMPLE)[name]()
    recording = record(system, 30, masks=True, resets=True)
    recording.reset[12, 0] = recording.reset[17] = True
    wanted = whole(system.model, recording)
    assert relative(over(RTRL(k1), system.model, recording, k1)[0], wanted) < 1e-12
    assert relative(over(TBPTT(k1, k1), system.model, recording, k1)[0], wanted) > 1e-3


@pytest.mark.parametrize("estimator", [RTRL(), SnAp(), UORO(), UORO(k1=4)], ids=str)
def test_no_lane_knows_of_another(estimator: Any) -> None:
    torch.manual_seed(1)
    system = SIMPLE["plain"]()
    recording = record(system, 20, masks=False, resets=True)
    together, carry = over(estimator, system.model, recording, estimator.k1)
    other = replace(recording, inputs=recording.inputs.clone())
    other.inputs[:, 1] += 1.0
    changed, after = over(estimator, system.model, other, estimator.k1)

    def leaves(influence: dict[str, Any]) -> list[Tensor]:
        return [leaf for leaf in tbptt.tree.tensors(influence) if leaf.is_floating_point() and leaf.shape[:1] == (B,)]

    pairs = list(zip(leaves(carry.influence), leaves(after.influence), strict=True))
    assert pairs
    for one, two in pairs:
        assert torch.equal(one[0], two[0])
        assert not torch.equal(one[1], two[1])  # the control
    assert relative(together, changed) > 1e-3


def test_a_lane_that_starts_anew_forgets_its_influence() -> None:
    torch.manual_seed(1)
    system = SYSTEMS["gru"]()
    recording = record(system, 12, masks=False, resets=False)
    recording.reset[11, 1] = True
    _, carry = over(RTRL(), system.model, recording, 1)
    fresh = replace(recording, inputs=recording.inputs[11:], targets=recording.targets[11:])
    _, anew = over(RTRL(), system.model, fresh, 1)
    for name, each in carry.influence.items():
        torch.testing.assert_close(each[1], anew.influence[name][1], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(each[0], anew.influence[name][0])


@dataclass(frozen=True)
class OneByOne(CarriedInfluence):
    """RTRL that does not try to run lanes side by side."""

    kind: ClassVar[str] = "exact"
    examples, past, brought_on = RTRL.examples, RTRL.past, RTRL.brought_on  # type: ignore[assignment]

    def init(self, model: nn.Module, lanes: int) -> Any:
        return replace(super().init(model, lanes), vectorized=False)


def test_side_by_side_is_lane_by_lane() -> None:
    """What vmap can run is run with it; the numbers are the same."""
    torch.manual_seed(1)
    system = SIMPLE["plain"]()
    recording = record(system, 12, masks=True, resets=True)
    found, carry = over(RTRL(k1=3), system.model, recording, 3)
    assert carry.vectorized is True
    again, carry = over(OneByOne(k1=3), system.model, recording, 3)
    assert carry.vectorized is False
    assert relative(again, found) < 1e-13
    _, carry = over(RTRL(k1=3), SYSTEMS["gru"]().model, recording, 3)
    assert carry.vectorized is False  # torch's own layers cannot


def test_influence_balancing_online() -> None:
    """One update a step at a rate of 1e-4: the published positions."""
    model = InfluenceBalancingModel().double()
    stream = InfluenceBalancing(steps=2000, dtype=torch.float64)
    sgd, estimator = torch.optim.SGD(model.parameters(), lr=1e-4), RTRL()
    carry, seen = estimator.init(model, 1), {}
    for update, window in enumerate(stream.windows(1), 1):
        estimate, carry = estimator.estimate(model, lambda s, t: 0.5 * (s - t).square(), carry, window)
        estimate.apply(model)
        sgd.step()
        seen[update] = round(float(model.theta.detach()), 4)
    assert [seen[update] for update in (100, 500, 1000, 2000)] == [0.1724, -0.1426, -0.1658, -0.1667]


# Sparse influence


class Masked(nn.Module):
    """h' = tanh((W * mask) h + U x), shown as it is."""

    def __init__(self, mask: Tensor, inputs: int = 2) -> None:
        super().__init__()
        self.mask = mask.double()
        n = len(mask)
        self.again = nn.Parameter(torch.randn(n, n).double() * 0.8)
        self.enter = nn.Parameter(torch.randn(n, inputs).double())

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = torch.zeros(inputs.shape[1], len(self.mask)).double() if state is None else state
        outputs = []
        for step in inputs:
            state = torch.tanh(state @ (self.again * self.mask).T + step @ self.enter.T)
            outputs.append(state)
        return torch.stack(outputs), state


def snap_in_numpy(model: Masked, inputs: np.ndarray, targets: np.ndarray, n: int) -> np.ndarray:
    """The gradient of the weights by SnAp(n), one lane, dense: J <- M (D J + I), M from powers of |W|."""
    w, u = (model.again * model.mask).detach().numpy(), model.enter.detach().numpy()
    mask, size = model.mask.numpy(), len(w)
    width = size + inputs.shape[1]
    reach = np.zeros((size, size, width), bool)
    powers = sum(np.linalg.matrix_power((w != 0).astype(float), j) for j in range(n))
    for unit in range(size):
        reach[:, unit] = (powers[:, unit] != 0)[:, None]
    influence, h, gradient = np.zeros((size, size, width)), np.zeros(size), np.zeros((size, width))
    for x, y in zip(inputs, targets, strict=True):
        a = np.concatenate([h, x])
        h = np.tanh(w @ h + u @ x)
        slope = 1 - h**2
        influence = np.einsum("ij,jkl->ikl", slope[:, None] * w, influence)
        for unit in range(size):
            influence[unit, unit] += slope[unit] * a * np.concatenate([mask[unit], np.ones(len(x))])
        gradient += np.einsum("i,ikl->kl", 2 * (h - y), influence)  # before what is out of reach is dropped
        influence = influence * reach
    return gradient


UNEVEN = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1.0]])
"""Weights of the last unit reach more than those of the first."""
RING = torch.eye(6) + torch.roll(torch.eye(6), 1, 0)


@pytest.mark.parametrize(
    "mask", [torch.ones(5, 5), RING, torch.eye(5) * 0.9, UNEVEN], ids=["dense", "ring", "diagonal", "uneven"]
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_snap_is_the_masked_recursion(mask: Tensor, n: int) -> None:
    torch.manual_seed(2)
    model = Masked(mask)
    inputs, targets = torch.randn(25, 1, 2).double(), torch.randn(25, 1, len(mask)).double()

    def found(estimator: Any) -> np.ndarray:
        carry, total = estimator.init(model, 1), 0.0
        for at in range(25):
            estimate, carry = estimator.estimate(model, squared, carry, Window(inputs[at, None], targets[at, None]))
            total = total + torch.cat([estimate.gradients["again"], estimate.gradients["enter"]], 1).numpy()
        return total

    wanted = snap_in_numpy(model, inputs[:, 0].numpy(), targets[:, 0].numpy(), n)
    assert np.abs(found(SnAp(n=n)) - wanted).max() < 1e-12
    if n == 3 and len(mask) == 6:
        others = [snap_in_numpy(model, inputs[:, 0].numpy(), targets[:, 0].numpy(), other) for other in (2, 4)]
        assert all(np.abs(other - wanted).max() > 1e-6 for other in others)  # the controls
    if (mask > 0).sum() == 5 or (n > 1 and len(mask) == 5):  # all that there is, is reached
        assert np.abs(found(RTRL()) - wanted).max() < 1e-12


def test_snap_costs_as_few_passes_as_the_pattern_allows() -> None:
    """A ring of units, and units alone: the colours are those of the sparse Jacobians."""
    passes = {}
    for name, mask in (("dense", torch.ones(6, 6)), ("ring", RING), ("alone", torch.eye(6))):
        model = Masked(mask)
        influence = SnAp().begin(model, Window(torch.randn(4, 1, 2).double()), (0,))
        passes[name] = (len(influence["weight_groups"]), len(influence["state_groups"]))
    assert passes == {"dense": (1, 6), "ring": (1, 2), "alone": (1, 1)}


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTRL(k1=0), "k1 of RTRL"),
        (lambda: SnAp(n=0), "n of SnAp"),
        (lambda: SnAp(n=1.5), "n of SnAp"),  # type: ignore[arg-type]
        (lambda: UORO(seed=-1), "a seed was expected"),
        (lambda: tbptt.KFRTRL(seed=1.5), "a seed was expected"),  # type: ignore[arg-type]
        (lambda: tbptt.RFLO(leak=0), "a leak above 0"),
        (lambda: tbptt.RFLO(leak=1.1), "a leak above 0"),
        (lambda: tbptt.EProp(feedback="none"), "feedback was expected"),  # type: ignore[arg-type]
        (lambda: tbptt.ElementwiseRTRL(k1=0), "k1 of ElementwiseRTRL"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_influences_beyond_the_memory_are_refused() -> None:
    model = nn.GRU(1, 512)
    window = Window(torch.randn(1, 1, 1), torch.randn(1, 1, 512))
    with pytest.raises(CapabilityError, match="at most 268435456 numbers were expected") as caught:
        RTRL().estimate(model, squared, RTRL().init(model, 1), window)
    assert "UORO(k1)" in str(caught.value)


def test_a_state_without_lanes_is_refused() -> None:
    class Common(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            state = torch.zeros(1) if state is None else state
            state = 0.9 * state + self.weight * inputs.mean()
            return inputs + state, state

    model = Common()
    window = Window(torch.randn(1, 2, 1), torch.randn(1, 2, 1))
    with pytest.raises(CapabilityError, match="a state of a fixed size in each lane was expected"):
        RTRL().estimate(model, squared, RTRL().init(model, 2), window)


@pytest.mark.parametrize("thawed", [False, True])
def test_weights_that_are_frozen_or_thawed_in_between_are_refused(thawed: bool) -> None:
    """What a thawed one has done to the state was not followed."""
    model, estimator = nn.GRU(2, 3), RTRL()
    model.bias_hh_l0.requires_grad_(not thawed)
    carry, window = estimator.init(model, B), Window(torch.randn(1, B, 2), torch.randn(1, B, 3))
    for _ in range(2):
        _, carry = estimator.estimate(model, squared, carry, window)
    model.bias_hh_l0.requires_grad_(thawed)
    with pytest.raises(CapabilityError, match="bias_hh_l0 has been frozen or thawed") as caught:
        estimator.estimate(model, squared, carry, window)
    assert "estimator.init(model, lanes)" in str(caught.value)
    estimator.estimate(model, squared, estimator.init(model, B), window)
