"""Other weights in the place of a model's own."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["in_place"]


@contextmanager
def in_place(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Generator[None]:
    """Let parameters have other values within the block, whoever reaches them and however: the very same objects.

    Args:
        parameters: of a model, a loss, or both.
        values: one for each, of its shape, type and device. What the block writes into a parameter is written there.
    """
    own = [each.data for each in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.detach()
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
