"""What a model says of its form: by which ways the past comes to a step, and where alone a sequence may be cut.

Letters: B lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from tbptt.errors import ShapeError
from tbptt.tree import Tree, leaf_names, tensors
from tbptt.wrappers import method_of

__all__ = ["HasPathways", "HasSegments", "in_segments", "pathways_of", "segment_steps"]


@runtime_checkable
class HasPathways(Protocol):
    """A model whose past comes to a step by ways of several kinds, told apart by parts of its state.

    Names that say most: "attention", what is looked up, as remembered hidden states or a cache of keys and values;
    "memory", tokens or slots that are written and read; "recurrence", what goes on from step to step.
    """

    def pathways(self, state: Tree) -> Mapping[str, Tree]:
        """Return, for a state of the model, its parts by the name of the way: tensors of that state as they are.

        Each tensor of numbers belongs to one of them; counters may be left out. A part without tensors is no way.
        """
        ...


@runtime_checkable
class HasSegments(Protocol):
    """A model whose sequences may be cut at multiples of so many steps only: where it is cut is part of the model."""

    def segment_steps(self) -> int | None:
        """Return the steps of a segment; None where any cut will do."""
        ...


def segment_steps(model: nn.Module) -> int:
    """Return the steps that every cut of a sequence must be a multiple of: 1 for a model that says nothing else."""
    own = method_of(model, "segment_steps")
    return 1 if own is None else own() or 1


def in_segments(steps: int, segment: int) -> int:
    """Return a number of steps, rounded up to whole segments.

    Example:
        >>> in_segments(5, 4), in_segments(8, 4), in_segments(5, 1)
        (8, 8, 5)
    """
    return -(-steps // segment) * segment


def pathways_of(model: nn.Module, state: Tree) -> dict[str, tuple[int, ...]]:
    """Return the ways by which the past comes, each as places among `tbptt.tree.tensors(state)`.

    Empty for a model that has, or tells, one way only.

    Raises:
        ShapeError: a tensor of numbers belongs to no way, or to two, or a way names what is not in the state.

    Example:
        >>> import tbptt
        >>> model = tbptt.models.SegmentTransformer(3, 2, 8, heads=2, layers=2, memory=4, memory_tokens=1, segment=4)
        >>> pathways_of(model, model.initial_state(lanes=2))
        {'attention': (0, 1), 'memory': (3,)}
    """
    own = method_of(model, "pathways")
    if own is None:
        return {}
    leaves, names = tensors(state), leaf_names(state)
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    found: dict[str, tuple[int, ...]] = {}
    for name, part in own(state).items():
        mine = [places.get(id(leaf)) for leaf in tensors(part)]
        if None in mine:
            raise ShapeError(
                f"tensors of the state were expected as the pathway {name!r} of {type(model).__name__}, but one came "
                "that is none of them: its gradient would be looked for in the wrong place",
                fix=f"return state[...] itself, not a copy or a slice; the state has {', '.join(names)}",
            )
        if mine:
            found[name] = tuple(place for place in mine if place is not None)
    claimed = [place for each in found.values() for place in each]
    numbers = [place for place, leaf in enumerate(leaves) if leaf.is_floating_point() or leaf.is_complex()]
    wrong = [place for place in numbers if claimed.count(place) != 1]
    if found and wrong:
        raise ShapeError(
            f"each tensor of the state was expected in one pathway of {type(model).__name__}, but {names[wrong[0]]} is "
            f"in {claimed.count(wrong[0])}: what it carries would be missing, or counted twice",
            fix="def pathways(self, state): return {'recurrence': ..., 'attention': ...}, all of the state once",
        )
    return found if len(found) > 1 else {}
