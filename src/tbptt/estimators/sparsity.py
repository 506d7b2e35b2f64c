"""Which weights reach which numbers of the state, found out by trying, and how to see all of it in few backward passes.

Letters: B lanes, S numbers of a lane's state, P parameters that the state depends on, K numbers that one of them
reaches at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.perlane import PerLane, check_single_steps
from tbptt.estimators.segments import Segment
from tbptt.model import fork_random, left_as_it_was, trainable_parameters
from tbptt.tree import LaneDims, Tree, detach, replace_tensors, tensors, time_slice
from tbptt.window import Window

__all__ = ["Pattern", "Reached", "coloured", "moved_at_random", "probe", "seeds_of", "tried_step"]

_PROBES = 4
"""Random states and inputs that are tried, in each lane; what depends on another number does so at one of them."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """What depends on what within a step.

    Args:
        state: whether number i of the state after depends on number j before. Shape (S, S).
        weights: whether number i of the state depends on each number of a weight, by name. (S, p) each.
    """

    state: Tensor
    weights: dict[str, Tensor]

    def reached(self, steps: int) -> dict[str, Tensor]:
        """Return which numbers a weight reaches in so many steps at most, its own step the first. (S, p) each."""
        found = dict(self.weights)
        for _ in range(steps - 1):
            found = {name: each | ((self.state.float() @ each.float()) > 0) for name, each in found.items()}
        return found


@dataclass(frozen=True, eq=False)
class Reached:
    """The numbers of the state that each weight reaches, as a table.

    Args:
        rows: of each number of the weights, all names one after another, those it reaches; 0 where there are fewer.
            Shape (K, P).
        known: whether they are. Shape (K, P).
        sizes: how many numbers each weight has, by name.
    """

    rows: Tensor
    known: Tensor
    sizes: dict[str, int]

    @staticmethod
    def of(masks: Mapping[str, Tensor]) -> Reached:
        """Return the table of masks, (S, p) each, by name."""
        whole = torch.cat(list(masks.values()), 1)
        most = int(whole.sum(0).max())
        order = torch.argsort(whole.to(torch.int8), dim=0, descending=True, stable=True)[:most]
        known = torch.gather(whole, 0, order)
        return Reached(torch.where(known, order, 0), known, {name: each.shape[1] for name, each in masks.items()})

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """Return what belongs to each weight, of a tensor whose last dimension is P."""
        return dict(zip(self.sizes, joined.split(list(self.sizes.values()), -1), strict=True))


def coloured(conflicts: Tensor) -> list[list[int]]:
    """Return groups of numbers no two of which are in conflict, greedily. `conflicts`: shape (S, S)."""
    groups: list[list[int]] = []
    met: list[Tensor] = []
    for index in range(len(conflicts)):
        for group, blocked in zip(groups, met, strict=True):
            if not blocked[index]:
                group.append(index)
                blocked |= conflicts[index]
                break
        else:
            groups.append([index])
            met.append(conflicts[index].clone())
    return groups


def probe(model: nn.Module, window: Window, dims: LaneDims | None, seed: int = 0) -> Pattern:
    """Find the pattern of a model's step by its derivatives at random states and inputs.

    Numbers that are not whole are moved at random, the states' and the inputs'; what is whole, such as symbols, stays
    as it is in the window. Nothing remains in the model or the random generators.

    Args:
        model: the model.
        window: an example; its first few steps are used.
        dims: the lane dimensions of the state.
        seed: of the probes.

    Raises:
        CapabilityError: a model that takes no single steps.

    Cost: S backward passes through one step for each probe, all lanes side by side.
    """
    check_single_steps(model, window.inputs)
    with fork_random(window.mask.device), left_as_it_was(model):
        torch.manual_seed(seed)
        state: Tensor | None = None
        weights: dict[str, Tensor] = {}
        for index in range(_PROBES):
            own, before = tried_step(model, window.inputs, index % window.steps, dims, moved=True).jacobians()
            assert before is not None
            state = _either(state, (before != 0).any(0))
            for name, each in own.items():
                weights[name] = _either(weights.get(name), (each != 0).any(0))
    assert state is not None
    return Pattern(state, {name: weights[name] for name in trainable_parameters(model) if name in weights})


def tried_step(model: nn.Module, inputs: Tree, at: int, dims: LaneDims | None, *, moved: bool) -> LaneSegment:
    """Run one step of an example from a state like those to come, each lane with weights of its own.

    Args:
        model: the model, which may be left in another state.
        inputs: an example, leaves (T, B, ...).
        at: which of its steps.
        dims: the lane dimensions of the state.
        moved: whether random numbers are added to the inputs and the state.
    """
    step = Window(time_slice(inputs, at, at + 1))
    step = Window(moved_at_random(step.inputs)) if moved else step
    parameters = trainable_parameters(model)
    lanes = PerLane(model, parameters, step.lanes, dims, vectorized=False)
    first = detach(Segment.run(lanes, step, None, dims, track=False).end)
    run = Segment.run(lanes, step, moved_at_random(first) if moved else first, dims, track=True)
    one = next(iter(parameters.values())).real.new_ones(())
    weights, shared = list(lanes.weights.values()), list(parameters.values())
    return LaneSegment(run, list(parameters), weights, dims, one, shared)


def seeds_of(groups: Sequence[Sequence[int]], like: Tensor) -> list[Tensor]:
    """Return a gradient of the end state for each group, 1 at its numbers. (B, S) each."""
    found: list[Tensor] = []
    for group in groups:
        seed = torch.zeros_like(like)
        seed[:, list(group)] = 1.0
        found.append(seed)
    return found


def _either(before: Tensor | None, news: Tensor) -> Tensor:
    return news if before is None else before | news


def moved_at_random(tree: Tree) -> Tree:
    """Return a tree with random numbers added to those that are not whole."""
    leaves = [
        each + torch.randn_like(each) if each.is_floating_point() or each.is_complex() else each
        for each in tensors(tree)
    ]
    return replace_tensors(tree, leaves)
