"""What of a step stays within a unit: of the state's numbers, and of the rows of the weights.

A dependence is a unit's own if by it each unit depends on itself alone. It is seen by pulling back a gradient that is
1 at all units, and one that is different at each: what stays within units is scaled by each one's own factor. It is
tested at each step, as what has slope 0 at one, such as a spike far from its threshold, shows at another.

Letters: B lanes, N units, L numbers of a unit's state, one in each tensor of it, G gates, r columns of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.gradients import Gradients, gradients_of
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.perlane import check_single_steps
from tbptt.estimators.random_products import spread
from tbptt.estimators.rows import cotangent_of, rows_of
from tbptt.estimators.sparsity import initial_segment, rounding, tried_step
from tbptt.model import trainable_parameters, with_parameters
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, differentiable, leaf_names, tensors, tree_map

__all__ = ["Units", "find_units", "followed", "rows_driven", "stopped_at"]

_ROUNDINGS = 256
"""How many roundings of the largest number two derivatives may lie apart that are the same."""
_SCALES = (0.1, 1.0, 10.0, 100.0) * 3
"""How far the states are moved that are tried before the first step; potentials may be volts or millivolts."""
_PURPOSE = 0x554E4954
"""Keeps the factors that tell units apart from all else that is drawn."""


@dataclass(frozen=True, eq=False)
class Units:
    """What is known of a model's units; it only ever shrinks.

    Args:
        layers: tensors of the state, L; each has a number for each unit.
        gates: of each weight whose rows may be units, how many rows a unit has, G; by name.
        kept: whether a number of a unit follows from its own number m alone, of the state before for m < L, else of
            that after, as a spike follows from the potential. Shape (L, 2 L).
    """

    layers: int
    gates: Mapping[str, int]
    kept: Tensor

    @staticmethod
    def before(state: Tree, dims: LaneDims | None, parameters: Mapping[str, Tensor]) -> Units:
        """Return what there may be before a step has been seen.

        Raises:
            CapabilityError: a state whose tensors are not of one size, or complex.
        """
        leaves = differentiable(state)
        rows = rows_of(state, dims)
        if len({leaf.numel() for leaf in leaves}) > 1 or any(leaf.is_complex() for leaf in leaves):
            raise CapabilityError(
                "a state of real tensors with one number for each unit was expected, but they are of several sizes, or "
                "complex: it cannot be told which numbers are of one unit",
                fix="UORO(k1), which takes any model; or ElementwiseRTRL(k1), where the recurrence is element-wise",
            )
        layers, size = len(leaves), rows.shape[1] // len(leaves)
        gates = {name: _num_rows(each) // size for name, each in parameters.items() if not _num_rows(each) % size}
        return Units(layers, gates, torch.ones(layers, 2 * layers, dtype=torch.bool, device=rows.device))


def _num_rows(weight: Tensor) -> int:
    """Return the size of its first dimension that is not 1, as of an initial state of shape (1, 1, N)."""
    return next((size for size in weight.shape if size != 1), 1)


def rows_driven(units: Units, segment: LaneSegment, draws: int) -> tuple[Units, dict[str, Tensor], set[str]]:
    """Return the influence of each weight's rows on their own unit within a step, at a fixed state before it.

    Args:
        units: what is known.
        segment: the step.
        draws: its number, which the factors that tell units apart are drawn by.

    Returns:
        What is known now; the influence, (B, L, G, N, r) each, by name; and the names of all weights that there are.

    Cost: L + 1 times back.
    """
    end, layers = segment.end, units.layers
    lanes, size = len(end), end.shape[1] // layers
    scale, near = spread((draws, _PURPOSE), size, end), _nearness(segment)
    pulled = [segment.pulled(seed)[0] for seed in _seeds(end, layers, torch.ones_like(scale))]
    scaled, _ = segment.pulled(scale.repeat(layers).expand_as(end))
    gates, news = dict(units.gates), dict[str, Tensor]()
    for name, other in scaled.items():
        if name not in gates:
            continue
        parts = [found.get(name, torch.zeros_like(other)).view(lanes, gates[name], size, -1) for found in pulled]
        rows = torch.stack(parts, 1)
        if _apart(rows.sum(1), other.view_as(parts[0]), scale[:, None], near):
            del gates[name]
        else:
            news[name] = rows
    return replace(units, gates=gates), news, set(scaled)


def followed(units: Units, segment: LaneSegment, draws: int) -> tuple[Units, Tensor]:
    """Return what is known now, and how a unit's numbers follow from its own before the step. Shape (B, N, L, L).

    A number is first taken as a function of those that it is made of: tensors of the state before, and of that after,
    as a spike is made of a potential. What of these mixes units is left out, the rest put together by the chain rule.

    Args:
        units: what is known.
        segment: the step, run with shared weights, its start tracked.
        draws: its number.

    Cost: 2 L times back, none of them into the weights.
    """
    shared, dims, layers = segment.shared, segment.dims, units.layers
    assert shared is not None
    assert shared.start is not None
    ends, starts = differentiable(shared.end), differentiable(shared.start)
    like = rows_of(shared.end, dims)
    scale, near = spread((draws, _PURPOSE), like.shape[1] // layers, like), _nearness(segment)

    def direct(layer: int, seed: Tensor) -> Tensor:  # (B, 2 L, N)
        if not ends[layer].requires_grad:
            return like.new_zeros(len(like), 2 * layers, len(scale))
        arriving = cotangent_of(seed, shared.end, dims)[layer]
        assert arriving is not None
        others = [end if end is not ends[layer] else None for end in ends]
        before, after = stopped_at(others, ends[layer], arriving, starts)
        rows = [rows_of(shared.start, dims, before), rows_of(shared.end, dims, after)]
        return torch.cat(rows, 1).view(len(like), 2 * layers, -1)

    kept, slopes = units.kept.clone(), list[Tensor]()
    plain, scaled = _seeds(like, layers, torch.ones_like(scale)), _seeds(like, layers, scale)
    for layer in range(layers):
        ones, other = direct(layer, plain[layer]), direct(layer, scaled[layer])
        for source in range(2 * layers):
            if _apart(ones[:, source], other[:, source], scale, near):
                kept[layer, source] = False
        slopes.append(ones)
    partial_ = torch.where(kept, torch.stack(slopes, 1).permute(0, 3, 1, 2), 0.0)  # (B, N, L, 2 L)
    from_before, from_after = partial_.chunk(2, -1)
    own = from_before
    for _ in range(layers - 1):  # no longer chain leads from one of L numbers to another
        own = from_before + from_after @ own
    return replace(units, kept=kept), own


def stopped_at(
    ends: Sequence[Tensor | None], root: Tensor, arriving: Tensor, inputs: Sequence[Tensor]
) -> tuple[Gradients, Gradients]:
    """Return the gradients of a tensor by some that it is made of, others of them held still.

    Args:
        ends: those that the gradient goes no further than; None for one that it passes.
        root: where it begins.
        arriving: the gradient there.
        inputs: those beyond.

    Returns:
        The gradients of the inputs, by other ways than through the ends; and those of the ends.
    """
    found: dict[int, Tensor] = {}
    if not root.requires_grad:
        return [None] * len(inputs), [None] * len(ends)

    def stop(index: int, gradient: Tensor) -> Tensor:
        found[index] = gradient
        return torch.zeros_like(gradient)

    hooks = [
        end.register_hook(partial(stop, at)) for at, end in enumerate(ends) if end is not None and end.requires_grad
    ]
    try:
        beyond = gradients_of([root], [arriving], inputs, keep=True)
    finally:
        for hook in hooks:
            hook.remove()
    return beyond, [found.get(index) for index in range(len(ends))]


def find_units(model: nn.Module, inputs: Tree, dims: LaneDims | None) -> tuple[Units, tuple[str, ...], list[str]]:
    """Find out by derivatives at random weights, states and inputs what stays within a unit; nothing remains.

    Returns:
        What is known; the weights that reach the state and whose rows are no units; the places of the state's tensors.

    Raises:
        CapabilityError: a state whose tensors are not of one size, or a model that takes no single steps.
    """
    check_single_steps(model, inputs)
    steps, lanes = tensors(inputs)[0].shape[:2]
    with preserved(model, device=tensors(inputs)[0].device):
        torch.manual_seed(0)
        first = tried_step(model, _lane(inputs, 0), 0, dims, moved=0.0)
        end = first.segment.end
        units, reached = Units.before(end, dims, trainable_parameters(model)), set[str]()
        initial = initial_segment(model, dims)
        if initial is not None:
            units, _, reached = rows_driven(units, initial, 0)
        for index, scale in enumerate((0.0, *_SCALES)):
            weights = trainable_parameters(model)
            if scale:
                weights = {name: _moved(each) for name, each in weights.items()}
            one = _lane(inputs, index % lanes)

            def seen(one: Tree = one, index: int = index, scale: float = scale, units: Units = units):
                step = tried_step(model, one, index % steps, dims, moved=scale)
                known, _, names = rows_driven(units, step, index)
                return followed(known, replace(step, shared=step.segment), index)[0], names

            units, names = with_parameters(model, weights, seen)
            reached |= names
    others = tuple(name for name in trainable_parameters(model) if name in reached and name not in units.gates)
    places = [name for name, leaf in zip(leaf_names(end), tensors(end), strict=True) if leaf.is_floating_point()]
    return units, others, places


def _lane(inputs: Tree, lane: int) -> Tree:
    return tree_map(lambda leaf: leaf[:, lane : lane + 1], inputs)


def _moved(weight: Tensor) -> Tensor:
    """Return a weight moved at random by about its own size, so that one that is an identity or 0 is none any more."""
    size = weight.detach().abs().square().mean().sqrt()
    return (weight.detach() + torch.randn_like(weight) * torch.where(size > 0, size, 1.0)).requires_grad_()


def _seeds(like: Tensor, layers: int, values: Tensor) -> list[Tensor]:
    """Return gradients of the end state that are `values`, (N,), at one of its tensors. L of shape (B, S)."""
    found: list[Tensor] = []
    for layer in range(layers):
        seed = torch.zeros_like(like)
        seed.chunk(layers, 1)[layer].copy_(values)
        found.append(seed)
    return found


def _nearness(segment: LaneSegment) -> float:
    return min(_ROUNDINGS * rounding(segment), 0.1)  # in half precision there is not much to tell apart by


def _apart(ones: Tensor, scaled: Tensor, scale: Tensor, near: float) -> bool:
    """Tell whether what was pulled back from all units mixes them. Shapes (B, ..., N, ...)."""
    wanted = ones * scale
    most = wanted.abs().flatten(1).amax(1) if wanted.numel() else wanted.real.new_zeros(len(wanted))
    return bool(((scaled - wanted).abs().flatten(1) > near * most[:, None]).any())
