"""Which weights reach which numbers of the state, as far as it has been seen, and how to see it in few backward passes.

Letters: B lanes, S numbers of a lane's state, P parameters that the state depends on, K numbers that one of them
reaches at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.perlane import PerLane, check_single_steps
from tbptt.estimators.segments import Segment
from tbptt.model import initial_state, trainable_parameters
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, detach, differentiable, replace_tensors, tensors, time_slice
from tbptt.window import Window

__all__ = [
    "Pattern",
    "Reached",
    "coloured",
    "initial_segment",
    "moved_at_random",
    "probe",
    "rounding",
    "seeds_of",
    "seen_in",
    "tried_step",
]

_PROBES = 4
"""Random states and inputs that are tried, in each lane; what shows at none of them is seen when it first does."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """What depends on what within a step, as far as it has been seen.

    Args:
        state: whether number i of the state after depends on number j before. Shape (S, S).
        weights: whether number i of the state after a step depends on each number of a weight, at a fixed state before
            it, by name. (S, p) each.
        starts: whether number i of the model's initial state does. (S, p) each.
    """

    state: Tensor
    weights: Mapping[str, Tensor]
    starts: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        """The weights that reach the state."""
        return [*self.weights, *(name for name in self.starts if name not in self.weights)]

    def size_of(self, name: str) -> int:
        """Return how many numbers a weight has."""
        return (self.weights if name in self.weights else self.starts)[name].shape[1]

    def reached(self, steps: int) -> dict[str, Tensor]:
        """Return which numbers a weight reaches in so many steps at most, its own step the first. (S, p) each.

        A weight of the initial state has its own step there.
        """
        found = {name: _either(self.weights.get(name), self.starts.get(name)) for name in self.names}
        for _ in range(steps - 1):
            found = {name: each | _product(self.state, each) for name, each in found.items()}
        return found

    def joined(self, later: Pattern, begun: Mapping[str, Tensor]) -> Pattern:
        """Return what is known once a step has been seen.

        Args:
            later: what was seen of it, in lanes that went on from the state before; it has no starts.
            begun: what each weight reached, (S, p) each, in lanes that began at the step. There the way by the initial
                state and the way by the step cannot be told apart: what the initial state does not explain is put down
                to the step.
        """
        state, weights = self.state | later.state, dict(self.weights)
        for name, each in begun.items():
            start = self.starts.get(name)
            if start is not None:
                own = weights.get(name, torch.zeros_like(each))
                open_ = each & ~own & ~_product(state, start) & start.any(0)
                state = state | _product(open_, start.T)
        for seen, fresh in ((later.weights, False), (begun, True)):
            for name, each in seen.items():
                start = self.starts.get(name)
                own = each & ~start.any(0) if fresh and start is not None else each
                if bool(own.any()):
                    weights[name] = _either(weights.get(name), own)
        return Pattern(state, weights, self.starts)

    def count(self) -> int:
        """Return how many dependences are known."""
        return sum(int(each.sum()) for each in (self.state, *self.weights.values()))


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
    def of(masks: Mapping[str, Tensor], size: int, device: torch.device) -> Reached:
        """Return the table of masks, (S, p) each, by name; `size` is S."""
        none = torch.zeros(size, 0, dtype=torch.bool, device=device)
        whole = torch.cat([none, *masks.values()], 1)
        most = int(whole.sum(0).max()) if masks else 0
        order = torch.argsort(whole.to(torch.int8), dim=0, descending=True, stable=True)[:most]
        known = torch.gather(whole, 0, order)
        return Reached(torch.where(known, order, 0), known, {name: each.shape[1] for name, each in masks.items()})

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """Return what belongs to each weight, of a tensor whose last dimension is P."""
        parts = joined.split(list(self.sizes.values()), -1) if self.sizes else ()
        return dict(zip(self.sizes, parts, strict=True))

    def chosen(self, masks: Mapping[str, Tensor], size: int) -> Tensor:
        """Return masks, (S, p) each, at the places of the table; a weight without one has none. Shape (K, P)."""
        whole = torch.zeros(size, self.rows.shape[1], dtype=torch.bool, device=self.rows.device)
        for name, each in self.split(whole).items():
            if name in masks:
                each.copy_(masks[name])  # a view of the whole
        return torch.gather(whole, 0, self.rows) & self.known

    def spread(self, chosen: Tensor, size: int) -> dict[str, Tensor]:
        """Return masks, (S, p) each, of one at the places of the table: `chosen` the other way round."""
        whole = torch.zeros(size, self.rows.shape[1], dtype=torch.int8, device=self.rows.device)
        whole.scatter_add_(0, self.rows, chosen.to(torch.int8))
        return {name: each > 0 for name, each in self.split(whole).items() if bool(each.any())}

    def moved(self, values: Tensor, to: Reached, size: int) -> Tensor:
        """Return what stands in this table, (B, K, P), in another one; 0 at its new places."""
        lanes, most = values.shape[:2]
        mine = dict(
            zip(
                self.sizes,
                zip(*(self.split(each).values() for each in (self.rows, self.known, values)), strict=True),
                strict=True,
            )
        )
        parts = [values.new_zeros(lanes, len(to.rows), 0)]
        for name, known in to.split(to.known).items():
            if name not in mine:
                parts.append(values.new_zeros(lanes, *known.shape))
                continue
            rows, there, old = mine[name]
            # where each number stands in the old table; what does not stands in a row of zeros after its last
            at = torch.full((size + 1, rows.shape[1]), most, device=rows.device)
            places = torch.arange(most, device=rows.device)[:, None].expand_as(rows)
            at.scatter_(0, torch.where(there, rows, size), torch.where(there, places, most))
            wanted = torch.where(known, at.gather(0, to.split(to.rows)[name]), most)
            padded = torch.cat([old, values.new_zeros(lanes, 1, rows.shape[1])], 1)
            parts.append(padded.gather(1, wanted.expand(lanes, *wanted.shape)))
        return torch.cat(parts, 2)


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
    """Find the pattern of a model's step by its derivatives at random states and inputs: where to begin, not all of it.

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
    with preserved(model, device=window.mask.device):
        torch.manual_seed(seed)
        none = torch.zeros(window.lanes, dtype=torch.bool, device=window.mask.device)
        found, _ = seen_in(tried_step(model, window.inputs, 0, dims, moved=1.0), none)
        first = initial_segment(model, dims)
        if first is not None:
            found = replace(found, starts=seen_in(first, ~none[:1])[1])
        for index in range(1, _PROBES):
            segment = tried_step(model, window.inputs, index % window.steps, dims, moved=1.0)
            found = found.joined(*seen_in(segment, none))
    return found


def seen_in(segment: LaneSegment, begun: Tensor) -> tuple[Pattern, dict[str, Tensor]]:
    """Return what depended on what in a step, as `Pattern.joined` takes it.

    Args:
        segment: the step.
        begun: the lanes that began at it. Shape (B,), bool.

    Cost: S backward passes, all lanes side by side.
    """
    size = segment.end.shape[1]
    state = torch.zeros(size, size, dtype=torch.bool, device=segment.end.device)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for index, seed in enumerate(segment.unit_seeds()):
        own, before = segment.pulled(seed)
        if before is not None:
            state[index] = (before != 0).any(0)
        for name, each in own.items():
            for masks, lanes in zip(found, (~begun, begun), strict=True):
                row = (each[lanes] != 0).any(0)
                if bool(row.any()):
                    masks.setdefault(name, torch.zeros(size, len(row), dtype=torch.bool, device=row.device))[index] = (
                        row
                    )
    return Pattern(state, found[0], {}), found[1]


def initial_segment(model: nn.Module, dims: LaneDims | None) -> LaneSegment | None:
    """Return the initial state of one lane as a stretch of no steps; None for a model without one of its own."""
    state = initial_state(model, 1)
    if state is None:
        return None
    parameters = trainable_parameters(model)
    one = next(iter(parameters.values())).real.new_ones(())
    weights = list(parameters.values())
    return LaneSegment(Segment(one.new_zeros(0, 1), None, state, 0), list(parameters), weights, dims, one, weights)


def tried_step(model: nn.Module, inputs: Tree, at: int, dims: LaneDims | None, *, moved: float) -> LaneSegment:
    """Run one step of an example from a state like those to come, each lane with weights of its own.

    Args:
        model: the model, which may be left in another state.
        inputs: an example, leaves (T, B, ...).
        at: which of its steps.
        dims: the lane dimensions of the state.
        moved: how large the random numbers are that are added to the state; unless 0, there are some added to the
            inputs, too.
    """
    step = Window(time_slice(inputs, at, at + 1))
    step = Window(moved_at_random(step.inputs)) if moved else step
    parameters = trainable_parameters(model)
    lanes = PerLane(model, parameters, step.lanes, dims, vectorized=False)
    first = detach(Segment.run(lanes, step, None, dims, track=False).end)
    run = Segment.run(lanes, step, moved_at_random(first, moved) if moved else first, dims, track=True)
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


def rounding(segment: LaneSegment) -> float:
    """Return the relative rounding of the coarsest numbers in a stretch of steps."""
    parts = [*differentiable(segment.segment.end), *segment.weights]
    return max(torch.finfo(each.dtype).eps for each in parts)


def moved_at_random(tree: Tree, by: float = 1.0) -> Tree:
    """Return a tree with random numbers of a size added to those that are not whole."""
    leaves = [
        each + by * torch.randn_like(each) if each.is_floating_point() or each.is_complex() else each
        for each in tensors(tree)
    ]
    return replace_tensors(tree, leaves)


def _either(left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is None or right is None:
        found = right if left is None else left
        assert found is not None
        return found
    return left | right


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return which pairs are joined by something in between. Shapes (S, R) and (R, p), bool."""
    return (left.float() @ right.float()) > 0
