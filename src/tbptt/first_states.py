"""What a model's states are made of, before there are any: the model is run on the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tbptt.errors import EndOfStream
from tbptt.model import initial_state, split_result
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.tree import Tree, detach, time_slice
from tbptt.window import Window

__all__ = ["first_states", "states_of"]

_MOST = 1024  # steps that are read of a longer window
_CALLS = 2  # a state may get its final classes when it is gone on from


def first_states(model: nn.Module, stream: Stream, steps: int) -> Any:
    """Return the first window of a stream, and the states that the model has in it.

    Neither the model nor the stream is changed, and no random number is drawn.

    Args:
        model: what is trained.
        stream: what it is trained on; afterwards it is where it was.
        steps: of a window.
    """
    place = stream.state_dict()
    stream.rewind()
    try:
        window = stream.read(min(steps, _MOST))
    except EndOfStream:
        return None
    finally:
        stream.load_state_dict(place)
    return states_of(model, window)


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
