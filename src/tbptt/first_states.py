"""What a model's states are made of, before there are any: the model is run on the first steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt.errors import EndOfStream
from tbptt.streams.base import Stream
from tbptt.unroll import states_of

__all__ = ["first_states"]

_MOST = 1024  # steps that are read of a longer window


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
