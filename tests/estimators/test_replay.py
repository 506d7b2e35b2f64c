"""What is run again is the forward pass: random numbers, generators of a model's own, buffers that move."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, FullBPTT, Mixture, Telescope, Window
from tbptt.errors import CapabilityError

B, D, H, STEPS, K1 = 2, 3, 4, 24, 4


class Base(nn.Module):
    """A recurrent cell whose input is changed by `look`, once a call."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(D, H), nn.Linear(H, D)

    def look(self, inputs: Tensor) -> Tensor:
        return inputs

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(self.look(inputs), state)
        return self.head(outputs), state


class Numpy(Base):
    def look(self, inputs: Tensor) -> Tensor:
        return inputs + torch.from_numpy(np.random.randn(*inputs.shape)).to(inputs.dtype)


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(3)

    def look(self, inputs: Tensor) -> Tensor:
        return inputs + torch.randn(inputs.shape, generator=self.draws, dtype=inputs.dtype)


class Dropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(D, H, num_layers=2, dropout=0.5)


class Like(Base):
    """Draws numbers as its input lies in memory."""

    def look(self, inputs: Tensor) -> Tensor:
        return inputs + torch.randn_like(inputs)


class RunningScale(Base):
    """Divides by a running mean of the input's size, in a buffer that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def look(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.8).add_(0.2 * inputs.abs().mean())
        return inputs / self.scale


class Codebook(Base):
    """Rounds to the nearest of some vectors, which follow what they are nearest to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("book", torch.randn(5, D, generator=torch.Generator().manual_seed(5)))

    def look(self, inputs: Tensor) -> Tensor:
        nearest = torch.cdist(inputs.flatten(0, 1), self.book).argmin(1)
        found = self.book[nearest].view(inputs.shape)
        if self.training:
            book = self.book.clone()
            book[nearest] = 0.9 * book[nearest] + 0.1 * inputs.flatten(0, 1)
            self.book = book
        return inputs + (found - inputs).detach()


class BatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def look(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs.flatten(0, 1)).view(inputs.shape)


KINDS = [Numpy, OwnGenerator, Dropout, Like, RunningScale, Codebook, BatchNorm]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def made(kind: type[Base]) -> tuple[Base, Tensor, Tensor]:
    torch.manual_seed(0)
    np.random.seed(0)
    model = kind().double()
    inputs, targets = torch.randn(2, STEPS, B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, inputs, targets


def cut_by_hand(kind: type[Base], size: int, lookback: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The same, each look-back from a model that was copied where it begins, and that has run all calls but once."""
    model, inputs, targets = made(kind)
    found: list[dict[str, Tensor]] = []
    starts: list[tuple[Base, Tensor | None, Any, Any]] = []
    state: Tensor | None = None
    for begin in range(0, STEPS, size):
        starts.append((copy.deepcopy(model), state, torch.get_rng_state(), np.random.get_state()))
        with torch.no_grad():
            _, state = model(inputs[begin : begin + size], state)
        after = torch.get_rng_state(), np.random.get_state()
        index = max(0, (begin + size - lookback) // size)
        old, past, drawn, drawn_by_numpy = starts[index]
        old = copy.deepcopy(old)
        torch.set_rng_state(drawn)
        np.random.set_state(drawn_by_numpy)
        for at in range(index * size, begin + size, size):
            outputs, past = old(inputs[at : at + size], past)
        loss = squared(outputs, targets[begin : begin + size]).sum() / (size * B)
        names, values = zip(*old.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, values, materialize_grads=True)
        found.append(dict(zip(names, gradients, strict=True)))
        torch.set_rng_state(after[0])
        np.random.set_state(after[1])
    return found, {name: value.clone() for name, value in model.named_buffers()}


def estimated(kind: type[Base], estimator: Any, size: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    model, inputs, targets = made(kind)
    carry = estimator.init(model, B)
    carry = carry.with_dims(model, Window(inputs[:size], targets[:size]))
    found = []
    for begin in range(0, STEPS, size):
        window = Window(inputs[begin : begin + size], targets[begin : begin + size], start=begin)
        estimate, carry = estimator.estimate(model, squared, carry, window)
        found.append(estimate.gradients)
    return found, dict(model.named_buffers())


def apart(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    return max(
        float((one.get(name, torch.zeros(())) - value).abs().max())
        for one, other in zip(found, wanted, strict=True)
        for name, value in other.items()
    )


WAYS = [
    pytest.param(TBPTT(K1, 12), K1, 12, id="recompute"),
    pytest.param(TBPTT(K1, 12, replay="retain"), K1, 12, id="retain"),
    pytest.param(FullBPTT(K1, segment=K1), K1, STEPS, id="full"),
    pytest.param(FullBPTT(K1), K1, STEPS, id="full, segments as it likes"),
    pytest.param(FullBPTT(STEPS, segment=K1), STEPS, STEPS, id="one window"),
    pytest.param(FullBPTT(STEPS, segment=K1, checkpoints=2), STEPS, STEPS, id="two checkpoints"),
    pytest.param(Mixture(K1, 12, 16, 1.0), K1, 16, id="mixture"),
    pytest.param(Telescope(K1, (12,), segment=K1), K1, 12, id="telescope"),
]


@kinds
@pytest.mark.parametrize(("estimator", "size", "lookback"), WAYS)
def test_a_replay_is_the_forward_pass(kind: type[Base], estimator: Any, size: int, lookback: int) -> None:
    """Against copies of the model that run each step but once; buffers are moved once for each step, too."""
    found, buffers = estimated(kind, estimator, size)
    calls = K1 if size == STEPS or isinstance(estimator, FullBPTT) else size
    wanted, moved = cut_by_hand(kind, calls, lookback)
    if size == STEPS:  # one update: the sum of what the losses of all calls have
        wanted = [{name: sum(each[name] for each in wanted) / len(wanted) for name in wanted[0]}]
    if str(estimator) == str(FullBPTT(K1)):
        assert buffers.keys() == moved.keys()  # its calls are shorter: only that nothing is refused, and the next test
        return
    assert apart(found, wanted) < 1e-12
    for name, value in moved.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", [TBPTT(K1, 12), FullBPTT(K1, segment=K1), Mixture(K1, 12, 16, 1.0)], ids=str)
def test_it_does_not_matter_how_inputs_lie_in_memory(estimator: Any) -> None:
    """As those of a recording that was cut into lanes: what is drawn like them is the same, whenever it is."""
    seen: list[tuple[int, Tensor]] = []

    class Told(Like):
        def look(self, inputs: Tensor) -> Tensor:
            found = super().look(inputs)
            seen.append((int((found - inputs).abs().sum() * 1e9), inputs[:, 0, 0].detach().clone()))
            return found

    model, inputs, targets = made(Told)
    by_lane = inputs.transpose(0, 1).contiguous().transpose(0, 1)
    carry = estimator.init(model, B)
    carry = carry.with_dims(model, Window(inputs[:K1], targets[:K1]))
    drawn: dict[tuple[float, ...], set[int]] = {}
    for begin in range(0, STEPS, K1):
        seen.clear()
        window = Window(by_lane[begin : begin + K1], targets[begin : begin + K1], start=begin)
        _, carry = estimator.estimate(model, squared, carry, window)
        for number, steps in seen:
            if len(steps) == K1:
                drawn.setdefault(tuple(steps.tolist()), set()).add(number)
    assert len(drawn) == STEPS // K1
    assert all(len(numbers) == 1 for numbers in drawn.values())


@kinds
def test_the_comparison_sees_numbers_that_are_drawn_anew(kind: type[Base]) -> None:
    """The control: a look-back of one call fewer is another gradient."""
    found, _ = estimated(kind, TBPTT(K1, 12), K1)
    assert apart(found, cut_by_hand(kind, K1, 8)[0]) > 1e-6


@kinds
def test_a_saved_carry_goes_on_bit_for_bit(kind: type[Base]) -> None:
    for estimator in (TBPTT(K1, 12), TBPTT(K1, 12, replay="retain"), FullBPTT(K1, segment=K1)):
        model, inputs, targets = made(kind)
        carry = estimator.init(model, B)
        gradients = []
        for begin in range(0, STEPS, K1):
            if begin == 12:
                state = carry.state_dict()
                carry = estimator.init(model, B)
                carry.load_state_dict(tbptt.tree.to(state, torch.device("cpu")))
            window = Window(inputs[begin : begin + K1], targets[begin : begin + K1], start=begin)
            estimate, carry = estimator.estimate(model, squared, carry, window)
            gradients.append(estimate.gradients)
        assert apart(gradients, estimated(kind, estimator, K1)[0]) == 0


class Secret(Base):
    """Draws what nobody can draw again."""

    def look(self, inputs: Tensor) -> Tensor:
        return inputs + int.from_bytes(os.urandom(2), "big") / 65536


@pytest.mark.parametrize(
    "estimator", [TBPTT(K1, 12), FullBPTT(STEPS, segment=K1), FullBPTT(K1), Mixture(K1, 12, 16, 1.0)], ids=str
)
def test_what_cannot_be_run_again_is_refused(estimator: Any) -> None:
    model, inputs, targets = made(Secret)
    steps = min(estimator.k1, STEPS)
    window = Window(inputs[:steps], targets[:steps])
    with pytest.raises(CapabilityError, match="same outputs when the segment of steps"):
        estimator.estimate(model, squared, estimator.init(model, B), window)


def test_each_segment_is_compared() -> None:
    class Starts(Base):
        """Draws so in its first call alone."""

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(inputs if state is not None else Secret.look(self, inputs), state)

    model, inputs, targets = made(Starts)
    estimator = FullBPTT(STEPS, segment=K1)
    with pytest.raises(CapabilityError, match="the segment of steps 0 to 3 is run again"):
        estimator.estimate(model, squared, estimator.init(model, B), Window(inputs, targets))


def test_retained_segments_that_are_built_otherwise_are_refused() -> None:
    model, inputs, targets = made(Secret)
    estimator = TBPTT(K1, 12, replay="retain")
    carry = estimator.init(model, B)
    _, carry = estimator.estimate(model, squared, carry, Window(inputs[:K1], targets[:K1]))
    again = estimator.init(model, B)
    again.load_state_dict(carry.state_dict())
    with pytest.raises(CapabilityError, match="lead to the state"):
        estimator.estimate(model, squared, again, Window(inputs[K1 : 2 * K1], targets[K1 : 2 * K1], start=K1))


@kinds
def test_a_short_last_window_begins_with_a_call(kind: type[Base]) -> None:
    """Of such a model no call is cut: the look-back is as much shorter as is said."""
    model, inputs, targets = made(kind)
    estimator, k2 = TBPTT(5, 12), 12
    carry = estimator.init(model, B)
    lookbacks = []
    for begin in range(0, STEPS, 5):
        window = Window(inputs[begin : begin + 5], targets[begin : begin + 5], start=begin)
        estimate, carry = estimator.estimate(model, squared, carry, window)
        lookbacks.append(estimate.lookback)
    assert lookbacks == [5, 10, 12, 12, 4 + 7]  # calls begin at 20, 18, 15, 13, ...
    assert k2 == 12


def test_a_model_that_draws_and_moves_nothing_is_run_in_few_calls() -> None:
    """Calls are joined: the speed of it is why."""
    model, inputs, targets = made(Base)
    estimator = TBPTT(2, 12)
    carry = estimator.init(model, B)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    for begin in range(0, 16, 2):
        calls = 0
        window = Window(inputs[begin : begin + 2], targets[begin : begin + 2], start=begin)
        _, carry = estimator.estimate(model, squared, carry, window)
    assert carry.joins is True
    assert calls <= 4


def test_a_model_that_begins_to_draw_is_seen() -> None:
    """As scheduled sampling does: from then on its calls stay whole, and what it draws is drawn again."""

    class Later(Base):
        noise = 0.0

        def look(self, inputs: Tensor) -> Tensor:
            return inputs + self.noise * torch.randn(inputs.shape) if self.noise else inputs

    model, inputs, targets = made(Later)
    estimator = TBPTT(K1, 12)
    carry = estimator.init(model, B)
    for begin in range(0, STEPS, K1):
        if begin == 2 * K1:
            assert carry.joins is True
            model.noise = 0.1
        window = Window(inputs[begin : begin + K1], targets[begin : begin + K1], start=begin)
        _, carry = estimator.estimate(model, squared, carry, window)
    assert carry.joins is False


@pytest.mark.parametrize("estimator", [TBPTT(K1, K1), TBPTT(K1, 12), FullBPTT(K1)], ids=str)
def test_batch_norm_over_one_step_of_one_lane_is_refused_by_name(estimator: Any) -> None:
    model, inputs, targets = made(BatchNorm)
    reset = torch.zeros(K1, 1, dtype=torch.bool)
    reset[K1 - 1] = True
    window = Window(inputs[:K1, :1], targets[:K1, :1], reset=reset)
    with pytest.raises(CapabilityError, match="1 step of 1 lane"):
        estimator.estimate(model, squared, estimator.init(model, 1), window)
