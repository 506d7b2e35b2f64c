"""k2 > k1 while an optimizer changes the weights inside the look-back: what is each replay the gradient of?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import pytest
import torch
from systems import SYSTEMS, B, System, record, relative, squared
from torch import Tensor, nn
from torch.func import functional_call

from tbptt import TBPTT, Window
from tbptt.model import initial_state
from tbptt.testing import Recording

K1, K2 = 3, 7  # no multiple: the oldest window inside the look-back counts only its last steps
FULL = (3, 3, 3, 3, 3, 3, 3, 2)  # a short last window, as at the end of every pass
RAGGED = (3, 1, 3, 3, 2, 3, 3, 3, 1, 3)  # short windows in mid-stream: the cuts are not where they were foreseen
Weights = dict[str, Tensor]


@dataclass
class Run:
    """A training run, as it happened: the weights before each update, and the estimated gradients."""

    recording: Recording
    bounds: list[tuple[int, int]]
    weights: list[Weights] = field(default_factory=list)
    found: list[Weights] = field(default_factory=list)

    def count(self, index: int) -> int:
        begin, end = self.bounds[index]
        return int(self.recording.mask[begin:end].sum())


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.8)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def train(
    system: System,
    replay: str,
    sizes: tuple[int, ...],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = momentum,
) -> Run:
    recording = record(system, sum(sizes), masks=True, resets=True)
    run = Run(recording, list(pairwise(accumulate(sizes, initial=0))))
    for begin, _ in run.bounds:
        recording.mask[begin, 0] = True  # something to learn in each window
    estimator = TBPTT(K1, K2, replay=replay)
    carry = estimator.init(system.model, B)
    descend = optimizer(list(system.model.parameters()))
    for begin, end in run.bounds:
        parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
        window = Window(*(part[begin:end] for part in parts), start=begin)
        run.weights.append({name: p.detach().clone() for name, p in system.model.named_parameters()})
        estimate, carry = estimator.estimate(system.model, squared, carry, window)
        run.found.append({name: value.clone() for name, value in estimate.gradients.items()})
        estimate.apply(system.model)
        descend.step()
    return run


def as_it_was_run(run: Run, index: int, *, mixed: bool = False) -> Weights:
    """The gradient of the computation done: every window of the look-back with leaves of its own.

    With `mixed` the states are still those that were seen, but all steps use today's weights.
    """
    begin, end = run.bounds[index]
    leaves = [{name: w.clone().requires_grad_() for name, w in each.items()} for each in run.weights[: index + 1]]
    by_step = [leaves[n] for n, (b, e) in enumerate(run.bounds[: index + 1]) for _ in range(b, e)]
    first = max(0, end - K2)
    with torch.no_grad():
        start = run.recording.run(by_step, None, 0, first, [])[1][-1] if first else None
    if mixed:
        by_step = [leaves[index]] * end
    total, _ = run.recording.run(by_step, start, first, end, range(begin, end))
    flat = [leaf for each in leaves for leaf in each.values()]
    parts = torch.autograd.grad(total / run.count(index), flat, allow_unused=True, materialize_grads=True)
    names = list(leaves[0])
    return {name: sum(parts[i :: len(names)], torch.zeros(())) for i, name in enumerate(names)}


def as_it_is_run_again(run: Run, *, original: bool = False) -> list[Weights]:
    """The gradients of re-running the last k2 steps with today's weights, for all windows.

    The oracle keeps the state before every step, as it last came out of a re-run. A window shorter than k1
    looks back to a step that no full window would have: its start state is run anew, from the start of the
    re-run before. With `original` it starts from the states of the first run instead.
    """
    states: dict[int, tuple[Tensor, ...] | None] = {0: None}
    gradients: list[Weights] = []
    before = 0  # where the previous re-run began
    for index, (begin, end) in enumerate(run.bounds):
        leaves = {name: w.clone().requires_grad_() for name, w in run.weights[index].items()}
        first = max(0, end - K2)
        if first and end - begin < K1 and not original:
            with torch.no_grad():
                again = run.recording.run([leaves] * first, states[before], before, first, [])[1]
            states[first] = again[-1]
        total, seen = run.recording.run([leaves] * end, states[first], first, end, range(begin, end))
        for step, state in enumerate(seen[1:], first + 1):
            if not original or step > begin:
                states[step] = tuple(leaf.detach() for leaf in state)
        found = torch.autograd.grad(
            total / run.count(index), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        gradients.append(dict(zip(leaves, found, strict=True)))
        before = first
    return gradients


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("sizes", [FULL, RAGGED], ids=["full", "ragged"])
def test_retain_is_the_gradient_of_what_was_computed(name: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    run = train(SYSTEMS[name](), "retain", sizes)
    for index in range(len(sizes)):
        assert relative(run.found[index], as_it_was_run(run, index)) < 1e-10, index
    # The control: old activations with new weights, the gradient of nothing, is another number.
    assert max(relative(run.found[n], as_it_was_run(run, n, mixed=True)) for n in range(len(sizes))) > 1e-2


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("sizes", [FULL, RAGGED], ids=["full", "ragged"])
def test_recompute_is_the_gradient_of_running_the_look_back_again(name: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    run = train(SYSTEMS[name](), "recompute", sizes)
    wanted = as_it_is_run_again(run)
    for index in range(len(sizes)):
        assert relative(run.found[index], wanted[index]) < 1e-10, index
    # The control: from the states of the first run, which are older, another number comes out.
    control = as_it_is_run_again(run, original=True)
    apart = [relative(run.found[index], control[index]) for index in range(len(sizes))]
    assert apart[0] < 1e-10
    assert max(apart) > 1e-3


def test_the_two_replays_are_one_while_the_weights_rest_and_two_once_they_move() -> None:
    def still(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    apart = []
    for optimizer in (still, momentum):
        torch.manual_seed(5)
        kept = train(SYSTEMS["lstm"](), "retain", RAGGED, optimizer)
        torch.manual_seed(5)
        again = train(SYSTEMS["lstm"](), "recompute", RAGGED, optimizer)
        apart.append(max(relative(a, b) for a, b in zip(kept.found, again.found, strict=True)))
    assert apart[0] < 1e-10
    assert apart[1] > 1e-3


@pytest.mark.parametrize("name", SYSTEMS)
def test_retained_graphs_survive_adam_in_place(name: str) -> None:
    torch.manual_seed(7)
    system = SYSTEMS[name]()
    addresses = [p.data_ptr() for p in system.model.parameters()]
    run = train(system, "retain", RAGGED, adam)
    last = len(RAGGED) - 1
    assert relative(run.found[last], as_it_was_run(run, last)) < 1e-10
    # The steps really were in place, and the model ends up with its own weights, not with a retained copy.
    assert [p.data_ptr() for p in system.model.parameters()] == addresses
    own = {name: p.detach() for name, p in system.model.named_parameters()}
    given = (run.recording.inputs, initial_state(system.model, B))
    torch.testing.assert_close(system.model(*given)[0], functional_call(system.model, own, given)[0])


def test_without_copies_torch_would_have_refused() -> None:
    """The control of the Adam test: a graph kept by hand does not survive the same step."""
    torch.manual_seed(0)
    model = nn.GRU(2, 3).double()
    outputs, state = model(torch.randn(4, B, 2).double())
    model.weight_hh_l0.grad = torch.ones_like(model.weight_hh_l0)
    torch.optim.Adam(model.parameters()).step()
    later, _ = model(torch.randn(4, B, 2).double(), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (outputs.sum() + later.sum()).backward()
