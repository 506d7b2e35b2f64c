"""What a model says of the recurrences in it, for estimators that make use of their form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tbptt.errors import ConfigError

__all__ = ["HasMemories", "HasRecurrences", "Recurrence"]


@dataclass(frozen=True)
class Recurrence:
    """An element-wise recurrence: unit k of a tensor of the state depends, of the state before, on its own unit k only.

    A model with such recurrences declares them by a method `recurrences() -> tuple[Recurrence, ...]`. Row k of each
    parameter drives unit k and no other, so that the influence of all of them on the state has as many numbers as they
    have themselves, and can be carried along exactly.

    Args:
        leaf: which of the state's tensors, by its place among `tbptt.tree.tensors(state)`. Its shape is (B, N), real
            or complex, for N units.
        parameters: the names, as in `model.named_parameters()`, of those that drive it. Their first dimension is the
            unit, of size N.

    Raises:
        ConfigError: a place below 0, or no parameter.
    """

    leaf: int
    parameters: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.leaf < 0 or not self.parameters:
            raise ConfigError(
                "a place from 0 on and at least one parameter were expected, but "
                f"leaf={self.leaf} and parameters={self.parameters} came: there would be nothing to learn",
                fix='Recurrence(0, ("layers.0.F", "layers.0.w_f"))',
            )


@runtime_checkable
class HasRecurrences(Protocol):
    """A model that says which of its recurrences are element-wise."""

    def recurrences(self) -> tuple[Recurrence, ...]:
        """Return them; empty for none."""
        ...


@runtime_checkable
class HasMemories(Protocol):
    """A model that keeps states of old in its state, to look them up: a gradient may take the same way back.

    What is written into a memory stays in the graph: a model that detaches it leaves nothing to go back along.
    """

    def memories(self) -> tuple[int, ...]:
        """Return which of the state's tensors they are, by their places among `tbptt.tree.tensors(state)`."""
        ...
