"""What every estimate promises, whatever the lengths: sums over counts, ownership, and a carry to go on from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from systems import SYSTEMS, B, D, H, record, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Estimate, Window
from tbptt.testing import Recording

WITHIN, REPEATED, RETAINED = TBPTT(4, 4), TBPTT(3, 7), TBPTT(3, 7, replay="retain")
REGIMES = [WITHIN, TBPTT(5, 2), TBPTT(5, 2, losses="all"), REPEATED, RETAINED]
regimes = pytest.mark.parametrize("estimator", REGIMES, ids=["equal", "tail", "all", "recompute", "retain"])


class Headed(nn.Module):
    """A recurrence with dropout and a head of its own, whose bias meets each loss once and nothing else."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.core = nn.LSTM(D, H, num_layers=2, dropout=dropout)
        self.head = nn.Linear(H, H)
        self.idle = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(H), requires_grad=False)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.core(inputs, state)
        return self.head(outputs) * self.frozen, state


class Dropping(nn.Module):
    """A cell that draws random numbers at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D + H, H)

    def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(len(inputs), H) if state is None else state
        state = torch.tanh(self.mix(nn.functional.dropout(torch.cat([inputs, state], -1), 0.4)))
        return state, state


def recorded(steps: int, *, resets: bool = False) -> Recording:
    """Data for any model here, with something to learn at every other step at least."""
    recording = record(SYSTEMS["lstm"](), steps, masks=True, resets=resets)
    recording.mask[::2, 0] = True
    return recording


def cut(recording: Recording, k1: int) -> Iterator[Window]:
    for begin in range(0, len(recording.inputs), k1):
        parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
        yield Window(*(part[begin : begin + k1] for part in parts), start=begin)


def run(estimator: TBPTT, model: nn.Module, windows: list[Window], carry: Any = None) -> tuple[list[Estimate], Any]:
    carry = estimator.init(model, B) if carry is None else carry
    estimates = []
    for window in windows:
        estimate, carry = estimator.estimate(model, squared, carry, window)
        estimates.append(estimate)
    return estimates, carry


def same(left: Estimate, right: Estimate) -> bool:
    assert left.num_injected
    return torch.equal(left.loss, right.loss) and all(
        torch.equal(left.gradients[name], right.gradients[name]) for name in left.gradients | right.gradients
    )


# Sums and counts


@pytest.mark.parametrize("k2", [5, 2, 8])
def test_lanes_with_unequal_numbers_of_targets_weigh_by_their_targets(k2: int) -> None:
    torch.manual_seed(0)
    model, recording = nn.GRU(D, H).double(), recorded(5)
    recording.mask[:, 0], recording.mask[:, 1] = True, False
    recording.mask[1, 1] = True
    window = Window(recording.inputs, recording.targets, recording.mask)
    estimator = TBPTT(5, k2, losses="all")
    estimate, _ = estimator.estimate(model, squared, estimator.init(model, B), window)

    leaves, state, losses = list(model.parameters()), None, []
    for begin in range(0, 5, k2):
        outputs, state = model(recording.inputs[begin : begin + k2], None if state is None else state.detach())
        losses.append(squared(outputs, recording.targets[begin : begin + k2]))
    loss = torch.cat(losses)
    terms = loss[recording.mask]
    assert (len(terms), estimate.num_terms, estimate.num_injected) == (6, 6, 6)
    torch.testing.assert_close(estimate.loss, terms.mean())
    torch.testing.assert_close(estimate.loss_sum, terms.sum())
    wanted = torch.autograd.grad(terms.mean(), leaves, retain_graph=True)
    lanes = torch.stack([loss[:, 0].mean(), loss[1, 1]]).mean()
    control = torch.autograd.grad(lanes, leaves)
    names = list(estimate.gradients)
    assert relative(estimate.gradients, dict(zip(names, wanted, strict=True))) < 1e-12
    assert relative(estimate.gradients, dict(zip(names, control, strict=True))) > 1e-2  # the mean of unequal means


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize(("k1", "k2"), list(product((1, 3, 8), (1, 2, 7, 13))))
def test_each_loss_is_injected_exactly_once(k1: int, k2: int, replay: str) -> None:
    """The head's bias collects the targets of the injected losses: each of them once, in its own window."""
    torch.manual_seed(1)
    model, recording = Headed().double(), recorded(31, resets=True)

    def product_of(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum(-1)

    for losses in ("tail", "all"):
        estimator = TBPTT(k1, k2, losses=losses, replay=replay)
        carry, counted, collected = estimator.init(model, B), 0, torch.zeros(H).double()
        for window in cut(recording, k1):
            estimate, carry = estimator.estimate(model, product_of, carry, window)
            learned = window[-k2:] if losses == "tail" and k2 < window.steps else window
            assert estimate.num_injected == learned.num_targets
            assert estimate.num_terms == window.num_targets
            counted += estimate.num_injected
            collected += estimate.gradients.get("head.bias", 0.0) * estimate.num_injected
        everything = recording.targets[recording.mask].sum(0)
        if k2 >= k1 or losses == "all":
            assert counted == recording.mask.sum()
            torch.testing.assert_close(collected, everything)
        else:  # the documented exception, and the control: a loss left out shows
            assert counted < recording.mask.sum()
            assert not torch.allclose(collected, everything)


@regimes
def test_a_window_without_targets_teaches_nothing(estimator: TBPTT) -> None:
    torch.manual_seed(2)
    model, recording = Headed().double(), recorded(5 * estimator.k1)
    windows = list(cut(recording, estimator.k1))
    windows[2].mask[:] = False
    windows[3].mask[:, :] = True
    estimates, carry = run(estimator, model, windows[:3])
    assert estimates[2].loss.isnan()
    assert (estimates[2].num_terms, estimates[2].num_injected) == (0, 0)
    assert not any(gradient.any() for gradient in estimates[2].gradients.values())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    for estimate, moves in ((estimates[1], True), (estimates[2], False)):
        estimate.apply(model)
        model.load_state_dict(before)
        optimizer.step()
        moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert moved == moves  # with momentum, weight decay and an earlier gradient: nothing, not nearly nothing
    assert all(parameter.grad is None for parameter in model.parameters())
    [after], _ = run(estimator, model, windows[3:4], carry)
    assert all(torch.isfinite(gradient).all() for gradient in after.gradients.values())


# What the gradients are


@regimes
def test_apply_replaces_whatever_gradient_stood_there(estimator: TBPTT) -> None:
    torch.manual_seed(3)
    model = Headed().double()
    estimates, _ = run(estimator, model, list(cut(recorded(4 * estimator.k1), estimator.k1)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    for estimate in estimates:
        wanted = {name: gradient.clone() for name, gradient in estimate.gradients.items()}
        estimate.apply(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, wanted[name]) if name in wanted else parameter.grad is None


@regimes
def test_each_gradient_has_memory_of_its_own(estimator: TBPTT) -> None:
    class Twins(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.zeros(1, B, H))
            self.right = nn.Parameter(torch.zeros(1, B, H))

        def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            outputs, state = super().forward(inputs, state)
            return outputs + self.left + self.right, state

    torch.manual_seed(4)
    model = Twins().double()
    windows = [window[:1] for window in cut(recorded(4 * estimator.k1), estimator.k1)]
    raw = torch.autograd.grad(model(windows[0].inputs)[0].square().sum(), [model.left, model.right])
    assert raw[0].data_ptr() == raw[1].data_ptr()  # the control: torch hands out one tensor for both
    for estimate in run(estimator, model, windows)[0]:
        before = {name: gradient.clone() for name, gradient in estimate.gradients.items()}
        assert before["left"].any()
        for name, gradient in estimate.gradients.items():
            gradient.mul_(2)
            before[name] *= 2
            assert all(torch.equal(estimate.gradients[each], before[each]) for each in before), name


@regimes
def test_parameters_without_a_gradient(estimator: TBPTT) -> None:
    """Nothing for those that no loss depends on, nor for frozen ones; one entry for tied ones."""

    class Tied(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(H, H)
            self.again.weight = self.head.weight

        def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            outputs, state = super().forward(inputs, state)
            return self.again(outputs), state

    torch.manual_seed(5)
    model = Tied().double()
    windows = list(cut(recorded(4 * estimator.k1), estimator.k1))
    estimates, _ = run(estimator, model, windows)
    names = [name for name, _ in model.named_parameters() if name not in ("frozen", "idle")]
    assert "head.weight" in names
    assert "again.weight" not in names
    assert all(list(estimate.gradients) == names for estimate in estimates)
    # A window of one step at the start, where every regime is plain autograd: both uses of the weight count.
    [estimate], _ = run(estimator, model, [windows[0][:1]])
    outputs, _ = model(windows[0].inputs[:1])
    loss = squared(outputs, windows[0].targets[:1])[windows[0].mask[:1]].mean()
    torch.testing.assert_close(estimate.gradients["head.weight"], torch.autograd.grad(loss, model.head.weight)[0])


@regimes
def test_kept_outputs_are_the_models(estimator: TBPTT) -> None:
    torch.manual_seed(6)
    model, recording = Headed().double(), recorded(23)
    keeping = TBPTT(estimator.k1, estimator.k2, estimator.losses, estimator.replay, keep_outputs=True)
    estimates, _ = run(keeping, model, list(cut(recording, keeping.k1)))
    kept = torch.cat([estimate.outputs for estimate in estimates])
    torch.testing.assert_close(kept, model(recording.inputs)[0].detach(), rtol=1e-12, atol=1e-12)
    assert not kept.requires_grad
    assert run(estimator, model, list(cut(recording, estimator.k1)))[0][0].outputs is None


@pytest.mark.parametrize("estimator", [REPEATED, RETAINED], ids=["recompute", "retain"])
def test_a_learnable_start_learns_at_the_start_and_after_a_reset(estimator: TBPTT) -> None:
    torch.manual_seed(7)
    system = SYSTEMS["leaky"]()
    recording = record(system, 48, masks=False, resets=False)
    recording.reset[25, 1] = True
    recording.reset[37] = True
    estimates, _ = run(estimator, system.model, list(cut(recording, 3)))
    learns = ["cell.start" in estimate.gradients for estimate in estimates]
    # Windows of 3 steps that look back 7: the start is in sight of those that end at 3, 6 (and not 9), and so on.
    assert learns == [any(max(0, end - 7) <= at < end for at in (0, 25, 37)) for end in range(3, 49, 3)]
    assert 0 < sum(learns) < len(learns)


@pytest.mark.parametrize("replay", ["recompute", "retain"])
def test_boundary_norms_are_those_of_the_states_gradient(replay: str) -> None:
    torch.manual_seed(8)
    model, recording = nn.LSTM(D, H).double(), recorded(21)
    estimates, _ = run(TBPTT(3, 9, replay=replay), model, list(cut(recording, 3)))
    states: list[Any] = [None]
    for begin in range(0, 21, 3):
        if begin == 12:
            states[-1] = tuple(leaf.detach() for leaf in states[-1])
        outputs, state = model(recording.inputs[begin : begin + 3], states[-1])
        states.append(state)
    loss = squared(outputs, recording.targets[18:])[recording.mask[18:]].mean()
    newest_first = [
        torch.cat([leaf.flatten() for leaf in torch.autograd.grad(loss, states[index], retain_graph=True)]).norm()
        for index in (6, 5)
    ]
    torch.testing.assert_close(estimates[-1].boundary_norms, torch.stack(newest_first))
    assert not torch.allclose(newest_first[0], newest_first[1])  # the control: the order matters
    assert run(WITHIN, model, list(cut(recording, 4)))[0][-1].boundary_norms.shape == (0,)


# The carry


@regimes
def test_the_carried_state_holds_no_graph(estimator: TBPTT) -> None:
    """A graph in the carry would grow with the stream, whatever the gradients say."""
    model = Headed().double()
    assert estimator.init(model, B).state is None
    _, carry = run(estimator, model, list(cut(recorded(3 * estimator.k1), estimator.k1)))
    outputs, state = model(recorded(3).inputs)
    assert all(leaf.requires_grad for leaf in (outputs, *state))  # the control
    assert [leaf.requires_grad for leaf in tbptt.tree.tensors(carry.state)] == [False, False]


@regimes
def test_an_old_carry_can_be_used_again(estimator: TBPTT) -> None:
    torch.manual_seed(9)
    model = Headed(dropout=0.3).double()
    windows = list(cut(recorded(9 * estimator.k1, resets=True), estimator.k1))
    for early in range(4):
        _, carry = run(estimator, model, windows[:early])
        random = torch.get_rng_state()
        [first], _ = run(estimator, model, windows[early : early + 1], carry)
        torch.set_rng_state(random)
        run(estimator, model, windows[early : early + 3], carry)  # another future
        torch.set_rng_state(random)
        [again], _ = run(estimator, model, windows[early : early + 1], carry)
        assert same(first, again)
        [control], _ = run(estimator, model, windows[early : early + 1], carry)
        assert not same(first, control)  # with other random numbers, as dropout was on


@regimes
@pytest.mark.parametrize("scanned", [False, True])
def test_a_saved_carry_goes_on_bit_for_bit(estimator: TBPTT, scanned: bool) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(10)
        model = (tbptt.scan(Dropping()) if scanned else Headed(dropout=0.3)).double()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, carry: Any, windows: list[Window]) -> Any:
        estimates = []
        for window in windows:
            [estimate], carry = run(estimator, model, [window], carry)
            estimate.apply(model)
            optimizer.step()
            estimates.append(estimate)
        return estimates, carry

    torch.manual_seed(14)
    windows = list(cut(recorded(8 * estimator.k1 + 2, resets=True), estimator.k1))
    windows[3:3] = [windows.pop()]  # the short window in mid-stream
    model, optimizer = start()
    whole, end = go_on(model, optimizer, estimator.init(model, B), windows)
    for stop in range(1, 7):
        model, optimizer = start()
        _, carry = go_on(model, optimizer, estimator.init(model, B), windows[:stop])
        saved, random = copy.deepcopy(carry.state_dict()), torch.get_rng_state()
        torch.rand(3)
        fresh = estimator.init(model, B)
        fresh.load_state_dict(saved)
        torch.set_rng_state(random)
        rest, last = go_on(model, optimizer, fresh, windows[stop:])
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True)), stop
        for a, b in zip(tbptt.tree.tensors(last.state), tbptt.tree.tensors(end.state), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"carry of 5 lanes was expected, but the saved one has {B}"):
        estimator.init(model, 5).load_state_dict(saved)


ENDS = (4, 8, 12, 16, 18)  # k1 = 4 and k2 = 9: the last window is short and looks back to step 9, not to 11


def undisturbed(model: nn.Module, windows: list[Window], cuts: set[int], first: int) -> dict[str, Tensor]:
    """The last window's gradient in one chain that is run once, in the same calls, cut off before `first`."""
    torch.manual_seed(12)
    whole = Window.join(windows)
    state = None
    for begin, end in pairwise(sorted({0, first, *cuts, *ENDS})):
        if begin == first:
            state = tbptt.tree.detach(state)
        outputs, state = model(whole.inputs[begin:end], state)
    loss = squared(outputs, windows[-1].targets)[windows[-1].mask].mean()
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def cut_again(model: nn.Module) -> tuple[dict[str, Tensor], list[Window]]:
    windows = list(cut(recorded(18), 4))
    torch.manual_seed(12)
    estimates, _ = run(TBPTT(4, 9, replay="retain"), model, windows)
    return estimates[-1].gradients, windows


def test_a_retained_segment_cut_again_drops_what_it_dropped() -> None:
    """A short window's look-back ends at a step inside a segment: that is run again, in two."""
    torch.manual_seed(11)
    model = tbptt.scan(Dropping()).double()
    found, windows = cut_again(model)
    assert relative(found, undisturbed(model, windows, set(), 9)) < 1e-10
    assert relative(found, undisturbed(model, windows, set(), 8)) > 1e-6  # the controls: one step more or less
    assert relative(found, undisturbed(model, windows, set(), 10)) > 1e-6


def test_a_layered_dropout_cut_again_drops_what_it_dropped() -> None:
    """Whatever the look-back, it must be the gradient of what was computed: cut where a call began, if need be."""
    torch.manual_seed(11)
    model = nn.LSTM(D, H, num_layers=3, dropout=0.4).double()
    found, windows = cut_again(model)
    foreseen = {3, 7, 11, 15}
    apart = {first: relative(found, undisturbed(model, windows, foreseen, first)) for first in (*foreseen, 8, 12)}
    assert min(apart.values()) < 1e-10, apart
