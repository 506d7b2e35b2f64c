"""What the models here are given: sizes, inputs and states, looked at before they are used.

Letters: T time, B lanes, M inputs, N units, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError, ShapeError, StreamError

__all__ = ["check_dropout", "check_numbers", "check_sizes", "embedded", "states_of_layers"]


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are no whole numbers from 1 on.

    Raises:
        ConfigError: one is not.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"{name} was expected to be a whole number, at least 1, but {value!r} came", fix=f"{name}=1"
            )


def check_dropout(dropout: float) -> None:
    """Refuse a dropout that is no probability, or leaves nothing.

    Raises:
        ConfigError: it is not from 0 to below 1.
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"a dropout from 0 to below 1 was expected, but {dropout} came: nothing would be left",
            fix="dropout=0.2",
        )


def check_numbers(inputs: Tensor, size: int, instead: str = "") -> None:
    """Refuse inputs that are not (T, B, size).

    Raises:
        ShapeError: they are not; `instead` is a further fix.
    """
    if inputs.ndim != 3 or inputs.shape[-1] != size:
        raise ShapeError(
            f"numbers of shape (T, B, {size}) were expected, time first, but {tuple(inputs.shape)} came",
            fix=f"inputs.unsqueeze(-1) for one number a step{instead}",
        )


def embedded(ids: Tensor, embedding: nn.Embedding, model: str) -> Tensor:
    """Look up ids, shape (T, B); `model` is the name of the model's class.

    Raises:
        ShapeError: numbers, or ids of another shape.
        StreamError: an id that is none of the symbols (on the CPU; a GPU has torch's own error).
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(
            f"ids of shape (T, B) were expected, int64, but {ids.dtype} of shape {tuple(ids.shape)} came",
            fix=f"{model}(..., embedding=None) for numbers; inputs.long() for ids kept as numbers",
        )
    try:
        return embedding(ids)
    except IndexError as error:  # looked into only now: good windows pay nothing
        symbols = embedding.num_embeddings
        step, lane = ((ids < 0) | (ids >= symbols)).nonzero()[0].tolist()
        raise StreamError(
            f"ids from 0 to {symbols - 1} were expected, but {int(ids[step, lane])} came at step {step} of the "
            f"window, lane {lane}: the model has {symbols} symbols",
            fix=f"{model}({int(ids.max()) + 1}, ...), or encode with the vocabulary of the model",
        ) from error


def states_of_layers(state: Any, layers: int, size: tuple[int, int], dtype: torch.dtype, like: Tensor) -> Any:
    """Return the states to start from: those given, looked at, or zeros.

    Args:
        state: a tuple with one tensor a layer; None for zeros.
        layers: how many, L.
        size: of each, (B, N).
        dtype: of each.
        like: a tensor on the device of new ones.

    Raises:
        ShapeError: it is no state of these layers and lanes.
    """
    if state is None:
        return tuple(like.new_zeros(size, dtype=dtype) for _ in range(layers))
    given = state if isinstance(state, tuple) else (state,)
    if not isinstance(state, tuple) or len(given) != layers:
        raise ShapeError(
            f"a state of {layers} tensors was expected, a tuple with one for each layer, but {len(given)} came, "
            f"in a {type(state).__name__}",
            fix="outputs, state = model(inputs, state)",
        )
    for layer, leaf in enumerate(given):
        if leaf.shape != size or leaf.dtype != dtype:
            raise ShapeError(
                f"a state of shape (B, N) = {size}, {dtype}, was expected for layer {layer}, "
                f"but {leaf.dtype} of shape {tuple(leaf.shape)} came: it belongs to other lanes, or to another model",
                fix="state=None at the start, and then what the model returned for the same lanes",
            )
    return given
