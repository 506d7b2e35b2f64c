"""RFLO and e-prop against their published recursions in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from systems import relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import RFLO, TBPTT, EProp, Window
from tbptt.errors import CapabilityError

T, N, M, K = 30, 6, 3, 2


class Leaky(nn.Module):
    """h' = (1 - leak) h + leak tanh(W h + U x + b), and a linear readout of it."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.leak = leak
        self.again, self.enter = nn.Linear(N, N, bias=False), nn.Linear(M, N)
        self.head = nn.Linear(N, K)

    def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(len(inputs), N) if state is None else state
        state = (1 - self.leak) * state + self.leak * torch.tanh(self.again(state) + self.enter(inputs))
        return self.head(state), state


def spikes(value: Tensor) -> Tensor:
    """1 above 0, with the pseudo-derivative 0.3 max(0, 1 - |value|)."""

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(value: Tensor) -> Tensor:
            return (value > 0).to(value.dtype)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * 0.3 * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)

        @staticmethod
        def vmap(info: Any, in_dims: Any, value: Tensor) -> tuple[Tensor, Any]:
            return Step.apply(value), in_dims[0]

    return Step.apply(value)  # type: ignore[return-value]


class Adaptive(nn.Module):
    """Adaptive leaky integrate-and-fire neurons: potential v, threshold a, and a readout of the spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.enter = nn.Linear(N, N, bias=False), nn.Linear(M, N, bias=False)
        self.head = nn.Linear(N, K, bias=False)
        nn.init.normal_(self.again.weight, std=0.5)
        nn.init.normal_(self.enter.weight, std=0.7)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        zeros = inputs.new_zeros(len(inputs), N)
        v, a, z = (zeros, zeros, zeros) if state is None else (state["v"], state["a"], state["z"])
        v = 0.8 * v + self.again(z) + self.enter(inputs)
        z = spikes(v - 0.5 - 0.2 * a)
        a = 0.9 * a + z
        return self.head(z), {"a": a, "v": v, "z": z}


def recorded(lanes: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(T, lanes, size, generator=generator).double() for size in (M, K))  # type: ignore[return-value]


def summed(estimator: Any, model: nn.Module, inputs: Tensor, targets: Tensor, k1: int = 1) -> dict[str, Tensor]:
    carry, sums = estimator.init(model, inputs.shape[1]), {}
    for at in range(0, len(inputs), k1):
        estimate, carry = estimator.estimate(model, squared, carry, Window(inputs[at : at + k1], targets[at : at + k1]))
        for name, value in estimate.gradients.items():
            sums[name] = sums.get(name, 0.0) + value * estimate.num_injected
    return sums


def rflo_in_numpy(cell: Leaky, leak: float, inputs: Tensor, targets: Tensor, feedback: np.ndarray | None) -> Any:
    w, u = cell.again.weight.detach().numpy(), cell.enter.weight.detach().numpy()
    b, c, d = (each.detach().numpy() for each in (cell.enter.bias, cell.head.weight, cell.head.bias))
    h, trace, gradient = np.zeros(N), np.zeros((N, N + M + 1)), np.zeros((N, N + M + 1))
    for x, y in zip(inputs[:, 0].numpy(), targets[:, 0].numpy(), strict=True):
        a = np.concatenate([h, x, [1.0]])
        value = np.tanh(w @ h + u @ x + b)
        h = (1 - cell.leak) * h + cell.leak * value
        trace = (1 - leak) * trace + np.outer(cell.leak * (1 - value**2), a)
        error = 2 * (c @ h + d - y)
        gradient += (error @ (c if feedback is None else feedback))[:, None] * trace
    return gradient


def joined(sums: dict[str, Tensor]) -> np.ndarray:
    parts = [sums["cell.again.weight"], sums["cell.enter.weight"], sums["cell.enter.bias"][:, None]]
    return torch.cat(parts, 1).numpy()


@pytest.mark.parametrize("k1", [1, 5])
@pytest.mark.parametrize("leak", [0.2, 1.0])
def test_rflo_is_its_recursion(leak: float, k1: int) -> None:
    torch.manual_seed(0)
    cell = Leaky(leak).double()
    model, (inputs, targets) = tbptt.scan(cell), recorded()
    found = summed(RFLO(k1, leak=leak), model, inputs, targets, k1)
    wanted = rflo_in_numpy(cell, leak, inputs, targets, None)
    assert np.abs(joined(found) - wanted).max() < 1e-12
    full = summed(tbptt.RTRL(k1), model, inputs, targets, k1)
    assert relative({"": found["cell.head.weight"]}, {"": full["cell.head.weight"]}) < 1e-12  # the readout's is exact
    assert np.abs(joined(full) - wanted).max() > 1e-2  # the control


def test_rflo_without_a_leak_is_truncation_after_one_step() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = tbptt.scan(Leaky(1.0).double()), recorded(3)
    found, wanted = (summed(each, model, inputs, targets) for each in (RFLO(leak=1.0), TBPTT(1, 1)))
    assert relative(found, wanted) < 1e-12
    assert relative(summed(RFLO(leak=0.9), model, inputs, targets), wanted) > 1e-3
    assert relative(summed(TBPTT(1, 2), model, inputs, targets), wanted) > 1e-3


def test_random_feedback_is_the_error_times_fixed_weights() -> None:
    torch.manual_seed(0)
    cell = Leaky(0.3).double()
    model, (inputs, targets) = tbptt.scan(cell), recorded()
    found = summed(RFLO(leak=0.3, feedback="random", seed=4), model, inputs, targets)
    weights = np.random.default_rng((4, 0x4C4F43414C)).standard_normal((K, N)) / K**0.5
    wanted = rflo_in_numpy(cell, 0.3, inputs, targets, weights)
    assert np.abs(joined(found) - wanted).max() < 1e-12
    exact = summed(TBPTT(1, 1), model, inputs, targets)  # the readout sees the true error
    assert relative({"": found["cell.head.weight"]}, {"": exact["cell.head.weight"]}) < 1e-12
    other = summed(RFLO(leak=0.3, feedback="random", seed=5), model, inputs, targets)
    assert np.abs(joined(found) - joined(other)).max() > 1e-2


def eprop_in_numpy(cell: Adaptive, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """Bellec et al. (2020): traces of potential and threshold by neuron and weight, learning signals by the readout."""
    w, u, c = (each.weight.detach().numpy() for each in (cell.again, cell.enter, cell.head))
    v, a, z = np.zeros(N), np.zeros(N), np.zeros(N)
    of_v, of_a = np.zeros((N, N + M)), np.zeros((N, N + M))
    gradient = np.zeros((N, N + M))
    for x, y in zip(inputs[:, 0].numpy(), targets[:, 0].numpy(), strict=True):
        before = np.concatenate([z, x])
        v = 0.8 * v + w @ z + u @ x
        at = v - 0.5 - 0.2 * a
        z = (at > 0).astype(float)
        a = 0.9 * a + z
        slope = 0.3 * np.maximum(0, 1 - np.abs(at))
        of_v = 0.8 * of_v + before
        of_z = slope[:, None] * (of_v - 0.2 * of_a)
        of_a = 0.9 * of_a + of_z
        error = 2 * (c @ z - y)
        gradient += (error @ c)[:, None] * of_z
    return gradient


@pytest.mark.parametrize("k1", [1, 6])
def test_eprop_has_the_published_traces_of_adaptive_neurons(k1: int) -> None:
    torch.manual_seed(0)
    cell = Adaptive().double()
    model, (inputs, targets) = tbptt.scan(cell), recorded()
    found = summed(EProp(k1), model, inputs, targets, k1)
    gradient = torch.cat([found["cell.again.weight"], found["cell.enter.weight"]], 1).numpy()
    wanted = eprop_in_numpy(cell, inputs, targets)
    assert np.abs(wanted).max() > 0.1  # there were spikes
    assert np.abs(gradient - wanted).max() < 1e-12
    full = summed(tbptt.RTRL(k1), model, inputs, targets, k1)
    whole = torch.cat([full["cell.again.weight"], full["cell.enter.weight"]], 1).numpy()
    assert np.abs(whole - wanted).max() > 1e-2  # the control: what goes round by other neurons


def test_layers_that_return_copies_are_refused_with_symmetric_feedback_only() -> None:
    inputs, targets = torch.randn(1, 2, M), torch.randn(1, 2, N)
    for estimator in (EProp(), RFLO()):
        model = nn.RNN(M, N)
        with pytest.raises(CapabilityError, match="outputs made of the state that is returned") as caught:
            estimator.estimate(model, squared, estimator.init(model, 2), Window(inputs, targets))
        assert "tbptt.scan(cell)" in str(caught.value)
    estimator = EProp(feedback="random")
    estimate, _ = estimator.estimate(model, squared, estimator.init(model, 2), Window(inputs, targets))
    assert estimate.gradients["weight_hh_l0"].shape == (N, N)


def test_a_leak_is_that_of_one_number() -> None:
    model = tbptt.scan(Adaptive().double())
    with pytest.raises(CapabilityError, match="a state of one tensor"):
        RFLO().estimate(model, squared, RFLO().init(model, 1), Window(*(each[:1] for each in recorded())))


def test_weights_that_are_no_units_are_named() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.cell = nn.Embedding(4, M), Leaky(0.5)

        def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.cell(self.embedding(inputs), state)

    model, inputs = tbptt.scan(Embedded()), torch.randint(4, (12, 2))
    assert "cell.embedding.weight: learned from each step alone" in EProp().limits(model, inputs)
    report = tbptt.check(model, inputs, EProp())
    assert report
    assert "cell.embedding.weight" in str(report)
    assert RFLO().limits(tbptt.scan(Leaky(0.5)), torch.randn(12, 2, M)) == ""


def test_what_is_left_out_is_said() -> None:
    """The ways by which units depend on each other; a leak in such a way is lost with it."""
    leaky = EProp().limits(tbptt.scan(Leaky(0.5)), torch.randn(12, 2, M))
    assert leaky == "units depend on each other by state to state: left out, with what they depend on themselves by it"
    adaptive = EProp().limits(tbptt.scan(Adaptive()), torch.randn(12, 1, M))
    assert adaptive == "units depend on each other by z to v: left out, with what they depend on themselves by it"


def test_units_that_are_alone_at_first_are_not_taken_for_it() -> None:
    """Recurrent weights that begin as an identity, as relu networks have them: what a unit tells others will come."""
    cell = Leaky(0.5).double()
    with torch.no_grad():
        cell.again.weight.copy_(torch.eye(N))
    model, (inputs, targets) = tbptt.scan(cell), recorded()
    assert "state to state" in EProp().limits(model, inputs)
    found = summed(EProp(), model, inputs, targets)
    assert relative(found, summed(TBPTT(1, 1), model, inputs, targets)) < 1e-12
    assert relative(found, summed(tbptt.RTRL(), model, inputs, targets)) > 1e-2  # the control


def test_a_dependence_that_shows_late_is_taken_for_what_it_is() -> None:
    """Neighbours are driven above a level that no probe comes to: from then on rows are seen to be no units."""

    class Far(Adaptive):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
            zeros = inputs.new_zeros(len(inputs), N)
            v, z = (zeros, zeros) if state is None else state
            v = 0.8 * v + self.again(z) + self.enter(inputs)
            z = torch.relu(v - 1e4).roll(1, 1)
            return self.head(z), (v, z)

    torch.manual_seed(0)
    model, (inputs, targets) = tbptt.scan(Far().double()), recorded()
    assert "enter" not in EProp().limits(model, inputs)
    inputs[10:] *= 1e5
    found, wanted = (summed(each, model, inputs, targets) for each in (EProp(), TBPTT(1, 1)))
    assert relative(found, wanted) < 1e-12
    assert relative(summed(TBPTT(1, 2), model, inputs, targets), wanted) > 1e-3  # the control


def test_outputs_that_pass_the_returned_state_by_are_refused() -> None:
    class Late(Leaky):
        def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            state = inputs.new_zeros(len(inputs), N) if state is None else state
            outputs, after = super().forward(inputs, state)
            return outputs + self.head(state), after

    model, (inputs, targets) = tbptt.scan(Late(0.5).double()), recorded()
    with pytest.raises(CapabilityError, match="depend on the state before the step in another way"):
        summed(RFLO(leak=0.5), model, inputs, targets)
    summed(RFLO(leak=0.5, feedback="random"), model, inputs, targets)


def test_a_start_whose_rows_are_no_units_is_learned_from_the_first_step() -> None:
    class Made(Leaky):
        def __init__(self) -> None:
            super().__init__(0.5)
            self.make = nn.Linear(N, N, bias=False)

        def initial_state(self, lanes: int) -> Tensor:
            return self.make(torch.ones(N).double()).cumsum(0).expand(lanes, -1)

    torch.manual_seed(0)
    model, (inputs, targets) = tbptt.scan(Made().double()), recorded(2)
    assert "cell.make.weight: learned from each step alone" in RFLO(leak=0.5).limits(model, inputs)
    found, wanted = (summed(each, model, inputs, targets) for each in (RFLO(leak=0.5), TBPTT(1, 1)))
    assert wanted["cell.make.weight"].abs().max() > 1e-3
    assert relative({"": found["cell.make.weight"]}, {"": wanted["cell.make.weight"]}) < 1e-12
    assert relative({"": found["cell.enter.bias"]}, {"": wanted["cell.enter.bias"]}) > 1e-3  # the control
