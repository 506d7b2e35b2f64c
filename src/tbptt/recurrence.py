"""What a model says of its element-wise recurrences, for methods that are exact for these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["HasRecurrences", "Recurrence"]


@dataclass(frozen=True)
class Recurrence:
    """An element-wise recurrence: unit k of a tensor of the state depends, of that tensor before, on its unit k only.

    Args:
        leaf: which of the state's tensors, by its place among `tbptt.tree.tensors(state)`. Its units are its last
            dimension.
        parameters: the names, as in `model.named_parameters()`, of those that drive it. Their first dimension is the
            unit.
    """

    leaf: int
    parameters: tuple[str, ...]


@runtime_checkable
class HasRecurrences(Protocol):
    """A model that says which recurrences of its own are element-wise."""

    def recurrences(self) -> tuple[Recurrence, ...]:
        """Return them; empty for none."""
        ...
