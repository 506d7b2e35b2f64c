"""Full backpropagation from checkpoints is plain autograd, in the states and advances that theory allows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from systems import SYSTEMS, B, D, H, record, relative, squared
from torch import Tensor, nn

from tbptt import FullBPTT, Window
from tbptt.errors import CapabilityError, ConfigError, EndOfStream, ShapeError
from tbptt.estimators import Estimate
from tbptt.estimators.revolve import next_kept, num_advances
from tbptt.rereading import Rereading
from tbptt.streams import ArrayStream
from tbptt.testing import Recording

T = 29


def plain(recording: Recording, model: nn.Module, begin: int, end: int) -> dict[str, Tensor]:
    """The gradient of the mean loss from `begin` to `end`, by one graph over everything before."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    total, _ = recording.run([leaves] * end, None, 0, end, list(range(begin, end)))
    count = int(recording.mask[begin:end].sum())
    found = torch.autograd.grad(total / count, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def windows(recording: Recording, k1: int) -> list[Window]:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    return [Window(*(part[at : at + k1] for part in parts), start=at) for at in range(0, len(recording.inputs), k1)]


def run(estimator: FullBPTT, model: nn.Module, given: list[Window]) -> tuple[list[Estimate], Any]:
    carry, estimates = estimator.init(model, B), []
    for window in given:
        estimate, carry = estimator.estimate(model, squared, carry, window)
        estimates.append(estimate)
    return estimates, carry


# The schedule


@cache
def cheapest(segments: int, slots: int) -> int:
    """The fewest advances, by trying every split."""
    if segments == 1:
        return 0
    if slots == 1:
        return segments * (segments - 1) // 2
    return min(y + cheapest(segments - y, slots - 1) + cheapest(y, slots) for y in range(1, segments))


def test_the_closed_form_is_the_best_of_all_schedules() -> None:
    for segments in range(1, 61):
        for slots in range(1, 9):
            assert num_advances(segments, slots) == cheapest(segments, slots)
            if segments > 1 and slots > 1:
                y = next_kept(segments, slots)
                assert y + cheapest(segments - y, slots - 1) + cheapest(y, slots) == cheapest(segments, slots)
    published = {(10, 3): 15, (100, 3): 490, (100, 5): 316, (100, 10): 222, (1000, 10): 3636, (1000, 32): 2405}
    published |= {(1000, 50): 1948, (10_000, 10): 57_624, (10_000, 100): 24_747}
    assert {case: num_advances(*case) for case in published} == published


@pytest.mark.parametrize(("segments", "slots"), [(10, 3), (100, 5), (17, 1), (12, 2), (40, 40), (1000, 50)])
def test_it_runs_as_often_as_the_schedule_says_and_keeps_no_more(segments: int, slots: int) -> None:
    model = nn.RNN(1, 1).double()
    window = Window(torch.randn(segments, 1, 1).double(), torch.randn(segments, 1, 1).double())
    estimator = FullBPTT(k1=segments, segment=1, checkpoints=slots)
    estimate, _ = estimator.estimate(model, squared, estimator.init(model, 1), window)
    assert estimate.metrics["advances"] == num_advances(segments, slots)
    assert estimate.metrics["checkpoints"] <= slots
    outputs, _ = model(window.inputs)
    wanted = torch.autograd.grad(squared(outputs, window.targets).mean(), list(model.parameters()))
    assert relative(estimate.gradients, dict(zip(estimate.gradients, wanted, strict=True))) < 1e-12


# The gradient


@pytest.mark.parametrize("checkpoints", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("segment", [None, 1, 4, 100])
@pytest.mark.parametrize("name", SYSTEMS)
def test_it_is_plain_autograd(name: str, segment: int | None, checkpoints: int | None) -> None:
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    recording = record(system, T, masks=True, resets=True)
    estimator = FullBPTT(k1=T, segment=segment, checkpoints=checkpoints)
    [estimate], carry = run(estimator, system.model, windows(recording, T))
    assert relative(estimate.gradients, plain(recording, system.model, 0, T)) < 1e-12
    assert estimate.metrics["checkpoints"] <= (checkpoints or 1000)
    [outer], _ = run(FullBPTT(k1=T), system.model, windows(recording, T))
    assert torch.allclose(estimate.loss, outer.loss, rtol=1e-13)
    assert not any(leaf.requires_grad for leaf in carry.past.stretches[0].window.inputs)


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("name", SYSTEMS)
def test_short_windows_go_back_to_the_start_of_the_sequence(name: str, checkpoints: int | None) -> None:
    torch.manual_seed(1)
    system = SYSTEMS[name]()
    recording = record(system, T, masks=True, resets=True)
    recording.reset[11] = True
    estimates, carry = run(FullBPTT(6, 3, checkpoints), system.model, windows(recording, 6))
    for estimate, begin in zip(estimates, range(0, T, 6), strict=True):
        assert relative(estimate.gradients, plain(recording, system.model, begin, min(T, begin + 6))) < 1e-12
    cut = run(FullBPTT(6), system.model, [windows(recording, 6)[1]])[0][0]  # the control: without what came before
    assert relative(cut.gradients, plain(recording, system.model, 6, 12)) > 1e-3
    assert carry.past.steps == T - 11  # what lies before a reset of all lanes is forgotten


def test_states_are_those_of_todays_weights() -> None:
    torch.manual_seed(2)
    system = SYSTEMS["gru"]()
    recording = record(system, 24, masks=False, resets=False)
    optimizer = torch.optim.SGD(system.model.parameters(), lr=0.1)
    estimator = FullBPTT(6, 2)
    carry = estimator.init(system.model, B)
    for number, window in enumerate(windows(recording, 6)):
        wanted = plain(recording, system.model, 6 * number, 6 * number + 6)
        estimate, carry = estimator.estimate(system.model, squared, carry, window)
        assert relative(estimate.gradients, wanted) < 1e-12
        estimate.apply(system.model)
        optimizer.step()


class Counting(nn.Module):
    """A recurrence with dropout, and a buffer that counts how often it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(D, H)
        self.drop = nn.Dropout(0.4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.runs += 1
        outputs, state = self.core(self.drop(inputs), state)
        return self.drop(outputs), state


@pytest.mark.parametrize("checkpoints", [None, 1, 3])
def test_what_is_run_again_drops_the_same_and_leaves_buffers_alone(checkpoints: int | None) -> None:
    torch.manual_seed(3)
    model = Counting().double()
    inputs, targets = torch.randn(24, B, D).double(), torch.randn(24, B, H).double()
    estimator = FullBPTT(24, 3, checkpoints)
    torch.manual_seed(4)
    estimate, _ = estimator.estimate(model, squared, estimator.init(model, B), Window(inputs, targets))
    after = torch.rand(1)
    assert model.runs == 8
    torch.manual_seed(4)
    outputs, state = [], None
    for begin in range(0, 24, 3):
        output, state = model(inputs[begin : begin + 3], state)
        outputs.append(output)
    loss = squared(torch.cat(outputs), targets).mean()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    assert relative(estimate.gradients, dict(zip(estimate.gradients, wanted, strict=True))) < 1e-12
    assert torch.equal(after, torch.rand(1))  # as if everything had been run once
    again, _ = estimator.estimate(model, squared, estimator.init(model, B), Window(inputs, targets))
    assert relative(again.gradients, estimate.gradients) > 1e-2  # the control: with other random numbers


def test_outputs_and_norms_are_in_the_order_of_time() -> None:
    torch.manual_seed(5)
    model = nn.GRU(D, H).double()
    recording = record(SYSTEMS["gru"](), 12, masks=False, resets=False)
    [window] = windows(recording, 12)
    for masked in (False, True):
        window.mask[:] = not masked
        window = Window(window.inputs, window.targets, window.mask)
        [estimate], _ = run(FullBPTT(12, 4, 1, keep_outputs=True), model, [window])
        torch.testing.assert_close(estimate.outputs, model(window.inputs)[0].detach(), rtol=1e-12, atol=1e-12)
    assert estimate.loss.isnan()
    assert not any(gradient.any() for gradient in estimate.gradients.values())


# Passes read again


class Watched:
    """A stream of one recording that notes what is read, and how much of it is alive."""

    def __init__(self, stream: ArrayStream) -> None:
        self.stream, self.lanes, self.reads = stream, stream.lanes, 0

    def read(self, steps: int) -> Window:
        self.reads += 1
        return self.stream.read(steps)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


@pytest.mark.parametrize("checkpoints", [None, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("steps", [5, 8, 9, 61])
def test_a_pass_that_is_read_again_is_the_same_window(checkpoints: int | None, steps: int) -> None:
    torch.manual_seed(6)
    model = nn.LSTM(D, H).double()
    inputs, targets = torch.randn(steps * B, D).double(), torch.randn(steps * B, H).double()
    stream = Watched(ArrayStream(inputs, targets, lanes=B))
    estimator = FullBPTT(segment=4, checkpoints=checkpoints)
    carry = estimator.init(model, B)
    for _ in range(2):
        estimate, carry = estimator.estimate(model, squared, carry, estimator.read(stream, carry))
        with pytest.raises(EndOfStream):
            estimator.read(stream, carry)
        stream.stream.rewind()
        [held] = list(stream.stream.windows(steps))
        outputs, _ = model(held.inputs)
        wanted = torch.autograd.grad(squared(outputs, held.targets).mean(), list(model.parameters()))
        assert relative(estimate.gradients, dict(zip(estimate.gradients, wanted, strict=True))) < 1e-12
        assert estimate.num_terms == steps * B
        assert estimate.lookback == steps
        assert estimate.metrics["checkpoints"] <= (checkpoints or 1000)
    pieces = -(-steps // 4)
    if (
        checkpoints is not None and checkpoints > 1
    ):  # at most twice the work of a length known beforehand, and the sweep
        assert estimate.metrics["advances"] <= 2 * num_advances(pieces, checkpoints) + pieces


def test_a_sequence_that_goes_on_behind_a_pass_that_was_not_held_is_refused() -> None:
    model = nn.GRU(D, H)
    stream = ArrayStream(torch.randn(20, D), torch.randn(20, H), lanes=1)
    estimator = FullBPTT(segment=4)
    _, carry = estimator.estimate(model, squared, estimator.init(model, 1), Rereading(stream, 4))
    with pytest.raises(CapabilityError, match="read from the stream and not held"):
        estimator.estimate(model, squared, carry, Window(torch.randn(4, 1, D), torch.randn(4, 1, H)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k1": 0}, "k1 of FullBPTT was expected to be a whole number"),
        ({"k1": None}, "k1 of FullBPTT was expected to be a whole number"),
        ({"k1": "epoch"}, "k1 of FullBPTT was expected to be a whole number"),
        ({"segment": 0}, "segment of FullBPTT"),
        ({"checkpoints": 2.5}, "checkpoints of FullBPTT"),
        ({"checkpoints": "pass"}, "checkpoints was expected to be a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FullBPTT(**arguments)


def test_windows_that_were_not_agreed_on_are_refused() -> None:
    model, estimator = nn.GRU(D, H), FullBPTT(4)
    with pytest.raises(ShapeError, match="at most k1 = 4 steps"):
        estimator.estimate(model, squared, estimator.init(model, 1), Window(torch.randn(5, 1, D), torch.randn(5, 1, H)))
    with pytest.raises(ShapeError, match="a window of 2 lanes"):
        estimator.estimate(model, squared, estimator.init(model, 2), Window(torch.randn(4, 1, D), torch.randn(4, 1, H)))
