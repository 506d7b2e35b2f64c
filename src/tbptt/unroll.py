"""The one loop: a model over a window, with resets applied.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tbptt.errors import CapabilityError
from tbptt.model import check_outputs, folded_lanes, initial_state, split_result
from tbptt.side_state import preserved
from tbptt.tree import (
    LaneDims,
    Tree,
    check_lanes,
    copy,
    detach,
    plain_values,
    refuse_shared,
    replace_tensors,
    tensors,
    time_cat,
    time_slice,
    where_lanes,
)
from tbptt.window import Window

__all__ = ["state_at_reset", "states_of", "unroll"]

_CALLS = 2  # a state may get its final classes when it is gone on from


def unroll(model: nn.Module, window: Window, state: Tree | None, dims: LaneDims | None) -> tuple[Tree, Tree]:
    """Run `model` over the steps of `window`, starting from `state`.

    The model sees the longest stretches between resets. At a reset the lane's state becomes the model's
    initial state, and no gradient crosses for that lane; where all lanes are reset nothing of the old
    state is kept.

    Args:
        model: the model, time first.
        window: its inputs and resets are used.
        state: the state before the first step, which stays as it is; None for the model's initial state.
        dims: the lane dimension of each tensor of the state; needed to reset single lanes.

    Returns:
        The outputs, leaves (T, B, ...), and the state after the last step.

    Raises:
        CapabilityError: a single lane is to be reset and the lane dimensions are not known, or a number in the state,
            which all lanes share, is not the one that a sequence starts with.
        CapabilityError: batch normalisation over one step of one lane.
        ShapeError: the state's lanes have changed, or an output has no value for each step and lane.

    Cost: one call of the model, and a copy of the state, for each stretch between resets.
    """
    torch.clear_autocast_cache()  # weights may have changed: under autocast around a whole loop it holds old casts
    resets = window.resets
    cuts = sorted({0, *resets, window.steps})
    pieces: list[Tree] = []
    for begin, end in pairwise(cuts):
        if begin in resets:
            state = state_at_reset(model, window, begin, state, dims)
        # a copy: the model may write into it, and both the caller and the graph of the stretch before need theirs
        state = initial_state(model, window.lanes) if state is None else copy(state)
        inputs = time_slice(window.inputs, begin, end) if len(cuts) > 2 else window.inputs
        outputs, after = split_result(model, _called(model, inputs, state, end - begin, window.lanes))
        state = _of_its_own_types(model, after, state)
        check_outputs(model, outputs, end - begin, window.lanes)
        pieces.append(outputs)
    if dims is not None:
        check_lanes(state, dims, window.lanes)
    return time_cat(pieces), state


def _called(model: nn.Module, inputs: Tree, state: Tree | None, steps: int, lanes: int) -> Any:
    try:
        return model(inputs, state)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise CapabilityError(
            f"a stretch of more steps or lanes was expected for the batch normalisation of {type(model).__name__}, but "
            f"it came to {steps} step{'s' * (steps > 1)} of {lanes} lane{'s' * (lanes > 1)}, as where a sequence ends "
            "or begins at a window's edge: there is no variance of one value",
            fix="more lanes; windows whose edges do not lie one step beside a reset; or nn.GroupNorm or nn.LayerNorm, "
            "which look at one step",
        ) from error


def _of_its_own_types(model: nn.Module, after: Tree, before: Tree | None) -> Tree:
    """Return the state that came back, in the graph, with no number in a narrower type than is its own.

    That is the type in which it was given, or, where autocast has narrowed it, that of the model's weights: what is
    carried over many windows is not to lose digits at each of them, and a checkpoint is to hold one type.
    """
    leaves, given = tensors(after), tensors(before)
    device = leaves[0].device.type if leaves else "cpu"
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    kinds = [leaf.dtype for leaf in leaves]
    if not narrowed and kinds == [leaf.dtype for leaf in given]:
        return after
    if len(given) == len(leaves):
        kinds = [_wider(kind, own.dtype) for kind, own in zip(kinds, given, strict=True)]
    if narrowed:
        narrow = torch.get_autocast_dtype(device)
        weights = [value.dtype for value in model.parameters() if value.is_floating_point()]
        own = min(weights, key=lambda dtype: dtype.itemsize, default=narrow)
        kinds = [_wider(kind, own) if kind is narrow else kind for kind in kinds]
    return replace_tensors(after, [leaf.to(kind) for leaf, kind in zip(leaves, kinds, strict=True)])


def _wider(dtype: torch.dtype, own: torch.dtype) -> torch.dtype:
    """Return `own` where it is a wider floating-point type than `dtype`, which is one as well; else `dtype`."""
    both = dtype.is_floating_point and own.is_floating_point
    return own if both and own.itemsize > dtype.itemsize else dtype


def state_at_reset(
    model: nn.Module, window: Window, step: int, state: Tree | None, dims: LaneDims | None
) -> Tree | None:
    """Return the state that a step begins with, of which some lane starts anew; None if all do, or it is None.

    Raises:
        CapabilityError: a single lane is to be reset and the lane dimensions are not known, or a number in the state,
            which all lanes share, is not the one that a sequence starts with.

    Cost: a copy of the state; where it has plain numbers and the model no initial state, once a few calls of it, too.
    """
    if state is None or window.resets[step]:
        return None
    if dims is None:
        raise CapabilityError(
            f"single lanes are to be reset at step {step} of the window, but the model could not be run with "
            "one lane more, so it is not known which dimension of its state holds the lanes",
            fix="let the model take any number of lanes, or reset all lanes at the same step",
        )
    if None in dims:
        _refuse_folded(model, window, state)
    fresh = initial_state(model, window.lanes)
    if fresh is None and plain_values(state):
        refuse_shared(state, _unchanging(model, window, step))
    return where_lanes(window.reset[step], fresh, state, dims)


def _refuse_folded(model: nn.Module, window: Window, state: Tree) -> None:
    leaves, lanes = tensors(state), window.lanes
    for index, (dim, each) in folded_lanes(model, window.inputs).items():
        if index < len(leaves):
            shape = tuple(leaves[index].shape)
            raise CapabilityError(
                f"a state with a dimension of {lanes} lanes was expected, as one lane is to begin a new sequence, but "
                f"state tensor {index} of shape {shape} has them folded into dimension {dim}, {each} entries for each "
                "lane: it is not known which of them are whose",
                fix=f"return it with a dimension for the lanes, such as state.unflatten({dim}, ({lanes}, {each})), and "
                "fold it where it is used; or reset all lanes at the same step",
            )


def _unchanging(model: nn.Module, window: Window, step: int) -> dict[str, Any]:
    """Return the plain values of the state that are the same after the first and the second call of a sequence."""
    model = getattr(model, "held", [model])[0]  # `PerLane` has the model itself aside, with all that it keeps
    if model not in _unchanging_values:
        _unchanging_values[model] = _found_unchanging(model, window, step)
    return _unchanging_values[model]


_unchanging_values: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def _found_unchanging(model: nn.Module, window: Window, step: int) -> dict[str, Any]:
    for piece in (window[step : step + 1], window):  # some models take no single step
        seen = [plain_values(state) for state in states_of(model, piece)[-1] if state is not None]
        if len(seen) > 1:
            first, *others = seen
            return {place: each for place, each in first.items() if all(each == o.get(place) for o in others)}
    return {}


def states_of(model: nn.Module, window: Window) -> Any:
    """Return the steps of a window, and the states that the model has in it: of one step at a time, or of all."""
    device = next(model.parameters()).device
    window = window.to(device)
    found: list[Tree] = []
    with preserved(model, device=device), torch.no_grad():
        for inputs in (time_slice(window.inputs, 0, 1), window.inputs):  # some models take no single step
            try:
                found += _states(model, inputs, window.lanes)
            except Exception:  # whatever a model says to a length it does not take; what is not found is refused
                continue
    return window.inputs, window.targets, found


def _states(model: nn.Module, inputs: Tree, lanes: int) -> Iterator[Tree]:
    state = initial_state(model, lanes)
    yield state
    for _ in range(_CALLS):
        state = detach(split_result(model, model(inputs, state))[1])
        yield state
