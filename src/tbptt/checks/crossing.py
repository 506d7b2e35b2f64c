"""What of its state a model goes on from, and what of it a gradient comes back through: leaf by leaf, by experiment.

Letters: B lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbptt.checks.precision import apart, project
from tbptt.checks.trial import Trial
from tbptt.model import trainable_parameters
from tbptt.side_state import SideState
from tbptt.tree import Tree, as_leaves, clone, detach, leaf_names, replace_tensors, tensors
from tbptt.window import Window

__all__ = ["Crossing", "disturbed", "measure_crossing", "without_influence"]


@dataclass(frozen=True)
class Crossing:
    """The floating-point tensors of a state, by name, at a boundary.

    Args:
        names: all of them.
        trained: those whose numbers depend on a weight that is trained.
        written: those that come with a graph.
        arrived: those through which a gradient comes back out of the next chunk.
        unused: those that make no difference to the next chunk.
    """

    names: tuple[str, ...]
    trained: tuple[str, ...]
    written: tuple[str, ...]
    arrived: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def crosses(self) -> bool:
        """Whether a gradient gets from one chunk into the one before, through any of them."""
        return any(name in self.arrived for name in self.written)

    @property
    def cut(self) -> tuple[str, ...]:
        """Those that matter and depend on what is trained, and through which no gradient crosses."""
        used = [name for name in self.trained if name not in self.unused]
        return tuple(name for name in used if name not in self.written or name not in self.arrived)


def measure_crossing(trial: Trial) -> Crossing:
    """Run two chunks, and see what comes across the boundary between them."""
    first, second = trial.plans["chunks"][:2]
    following = trial.window[first : first + second]
    trial.restart()
    _, state = trial.run(trial.window[:first], None)
    there = SideState.of(trial.model, device=trial.device)
    places = [(place, name) for place, name in enumerate(leaf_names(state)) if _differentiable(tensors(state)[place])]
    written = tuple(name for place, name in places if tensors(state)[place].requires_grad)
    given = as_leaves(state)
    outputs, _ = trial.run(following, given)
    total, leaves = project(outputs, 0), [tensors(given)[place] for place, _ in places]
    found = [None] * len(leaves)
    if total.requires_grad and leaves:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    arrived = tuple(name for (_, name), each in zip(places, found, strict=True) if each is not None and each.any())
    del outputs, total, given
    trained = _trained(trial, first, clone(state), [place for place, _ in places])
    return Crossing(
        tuple(name for _, name in places),
        tuple(name for place, name in places if place in trained),
        written,
        arrived,
        tuple(without_influence(trial, following, clone(state), there)),
    )


def without_influence(trial: Trial, following: Window, state: Tree, there: SideState) -> list[str]:
    """Return the tensors of `state` that the chunk after it does not look at, with the same random numbers."""

    def outputs_from(start: Tree) -> Tree:
        there.restore(trial.model, in_place=False)
        trial.model.train(trial.conditions.train)
        return detach(trial.run(following, start)[0])

    usual = outputs_from(clone(state))  # some models write into what they are given
    leaves, names, found = tensors(state), leaf_names(state), list[str]()
    for index, leaf in enumerate(leaves):
        if _differentiable(leaf):
            changed = [disturbed(each) if at == index else each.clone() for at, each in enumerate(leaves)]
            try:
                same = apart(usual, outputs_from(replace_tensors(state, changed))) == 0
            except Exception:  # it takes certain numbers only, so that it looks at them
                same = False
            found += [names[index]] if same else []
    return found


def disturbed(leaf: Tensor) -> Tensor:
    """Return other numbers of about the same size."""
    return leaf + torch.randn_like(leaf) * (leaf.abs().mean() + 0.1)


def _trained(trial: Trial, steps: int, state: Tree, places: list[int]) -> set[int]:
    """Return the places of the tensors of the state that are others with other weights."""
    weights = list(trainable_parameters(trial.model).values())
    before = [value.detach().clone() for value in weights]
    try:
        with torch.no_grad():
            for value in weights:
                value.add_(torch.randn_like(value) * (value.abs().mean() + 0.01))
        trial.restart()
        _, other = trial.run(trial.window[:steps], None)
    except Exception:  # not with other weights: they matter, then
        return set(places)
    finally:
        with torch.no_grad():
            for value, old in zip(weights, before, strict=True):
                value.copy_(old)
    pairs = list(zip(tensors(state), tensors(other), strict=True))
    return {place for place in places if pairs[place][0].shape != pairs[place][1].shape or _differ(*pairs[place])}


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other.detach())


def _differentiable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()
