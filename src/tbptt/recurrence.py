"""What a model says of the recurrences in it, for estimators that make use of their form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import nn

from tbptt.errors import ConfigError
from tbptt.wrappers import bare, method_of

__all__ = ["HasMemories", "HasRecurrences", "Recurrence", "memories_of", "recurrences_of"]


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


def recurrences_of(model: nn.Module) -> tuple[Recurrence, ...]:
    """Return the element-wise recurrences that a model declares, its weights by their names in `model`; () for none."""
    own = method_of(model, "recurrences")
    if own is None:
        return ()
    declared: tuple[Recurrence, ...] = own()
    here = {id(value): name for name, value in model.named_parameters()}
    names = {name: here[id(value)] for name, value in bare(model).named_parameters()}
    return tuple(
        replace(each, parameters=tuple(names.get(name, name) for name in each.parameters)) for each in declared
    )


def memories_of(model: nn.Module) -> tuple[int, ...]:
    """Return the places of a model's memories among the state's tensors; () for a model that names none."""
    own = method_of(model, "memories")
    return () if own is None else own()
