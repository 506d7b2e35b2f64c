"""The one loop: a model over a window, with resets applied.

Letters: T time, B lanes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from tbptt.errors import CapabilityError
from tbptt.model import check_outputs, initial_state, split_result
from tbptt.tree import LaneDims, Tree, check_lanes, copy, time_cat, time_slice, where_lanes
from tbptt.window import Window

__all__ = ["state_at_reset", "unroll"]


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
        CapabilityError: a single lane is to be reset and the lane dimensions are not known.
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
        outputs, state = split_result(model, model(inputs, state))
        check_outputs(model, outputs, end - begin, window.lanes)
        pieces.append(outputs)
    if dims is not None:
        check_lanes(state, dims, window.lanes)
    return time_cat(pieces), state


def state_at_reset(
    model: nn.Module, window: Window, step: int, state: Tree | None, dims: LaneDims | None
) -> Tree | None:
    """Return the state that a step begins with, of which some lane starts anew; None if all do, or it is None.

    Raises:
        CapabilityError: a single lane is to be reset and the lane dimensions are not known.
    """
    if state is None or window.resets[step]:
        return None
    if dims is None:
        raise CapabilityError(
            f"single lanes are to be reset at step {step} of the window, but the model could not be run with "
            "one lane more, so it is not known which dimension of its state holds the lanes",
            fix="let the model take any number of lanes, or reset all lanes at the same step",
        )
    return where_lanes(window.reset[step], initial_state(model, window.lanes), state, dims)
