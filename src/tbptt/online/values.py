"""From the values of one step to the leaves of a window, and back.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError, ShapeError
from tbptt.tree import Tree, leaf_names, tensors, tree_map

__all__ = ["Entry", "Lift", "check_whole"]


@dataclass(frozen=True)
class Lift:
    """Makes windows' leaves of what a user has: tensors, arrays, numbers, or trees of them.

    Numbers and arrays of floating-point type take the type of the model's weights; whole numbers become int64; tensors
    keep the type that they have. What comes out is a copy, so that the caller may use its buffers again.

    Args:
        lanes: the number of sequences side by side, B. With one, values have no lane dimension.
        dtype: of the model's weights.
        device: of the model's weights.
    """

    lanes: int
    dtype: torch.dtype
    device: torch.device

    def step(self, name: str, value: Any) -> Tree:
        """Return what one step is, as leaves (1, B, ...).

        Args:
            name: what errors call it.
            value: leaves (...) with one lane, else (B, ...).

        Raises:
            ShapeError: no tensor, array or number, or another number of lanes.
        """
        tree = _mapped(lambda leaf: self._tensor(name, leaf), value)
        return tree_map(lambda leaf: self._with_lanes(name, leaf[None], 0), tree)

    def stretch(self, name: str, value: Any) -> Tree:
        """Return what several steps are, as leaves (T, B, ...), of leaves (T, ...) with one lane, else (T, B, ...).

        Raises:
            ShapeError: as for one step; or leaves of different T.
        """
        tree = _mapped(lambda leaf: self._tensor(name, leaf), value)
        lifted = tree_map(lambda leaf: self._with_lanes(name, leaf, 1), tree)
        lengths = {leaf.shape[0] for leaf in tensors(lifted)}
        if len(lengths) != 1:
            raise ShapeError(
                f"{name} was expected to have one number of steps, but its tensors have {sorted(lengths)}",
                fix="time first: one row for each step",
            )
        return lifted

    def down(self, outputs: Tree) -> Tree:
        """Return the outputs of one step, leaves (1, B, ...), without time; with one lane without lanes, too."""
        return tree_map((lambda leaf: leaf[0, 0]) if self.lanes == 1 else (lambda leaf: leaf[0]), outputs)

    def lane_mask(self, name: str, mask: Any) -> Tensor:
        """Return which lanes are meant, shape (B,), bool.

        Raises:
            ShapeError: another shape or type.
        """
        flags = torch.as_tensor(mask)
        if flags.dtype != torch.bool or flags.shape != (self.lanes,):
            raise ShapeError(
                f"{name} was expected to be bool of shape (B,) = ({self.lanes},), but is {flags.dtype} of shape "
                f"{tuple(flags.shape)}",
                fix=f"{name}=torch.zeros({self.lanes}, dtype=torch.bool), and True for the lanes that are meant",
            )
        return flags.to(self.device, copy=True)

    def _tensor(self, name: str, leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf.detach().to(self.device, copy=True)
        try:
            made = torch.tensor(leaf)
        except (TypeError, ValueError, RuntimeError):
            raise ShapeError(
                f"{name} was expected to be a tensor, an array, a number, or a tree of them, but a "
                f"{type(leaf).__name__} came",
                fix="numbers for words: one id for each, or one-hot vectors",
            ) from None
        return made.to(self.device, self.dtype if made.is_floating_point() else made.dtype)

    def _with_lanes(self, name: str, leaf: Tensor, time: int) -> Tensor:
        """Return a leaf (T, ...) as (T, B, ...); `time` is 1 where the caller gave T, for messages."""
        if self.lanes == 1:
            if not leaf.ndim:
                raise ShapeError(f"{name} was expected to be of shape (T, ...), one row for each step, but is a number")
            return leaf.unsqueeze(1)
        if leaf.ndim < 2 or leaf.shape[1] != self.lanes:
            wanted = f"(T, B, ...) = (T, {self.lanes}, ...)" if time else f"(B, ...) = ({self.lanes}, ...)"
            raise ShapeError(
                f"{name} of shape {wanted} was expected, one value for each lane, but "
                f"{tuple(leaf.shape[1 - time :])} came",
                fix="stack what belongs to one step of all lanes; or lanes=1 for one sequence",
            )
        return leaf


def _mapped(function: Callable[[Any], Tensor], value: Any) -> Tree:
    """Apply `function` to every leaf of a tree whose leaves need not be tensors yet."""
    if isinstance(value, Tensor | np.ndarray | Number | np.generic):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in cast("dict[Any, Any]", value).items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its fields one by one
        return type(value)(*[_mapped(function, each) for each in cast("tuple[Any, ...]", value)])
    if isinstance(value, tuple | list):
        kind = cast("type[Any]", tuple if isinstance(value, tuple) else list)
        return kind([_mapped(function, each) for each in cast("list[Any]", value)])
    return function(value)


class Entry:
    """Where steps and labels come in: nothing passes that a model or a loss could stumble over later.

    Args:
        lift: what makes leaves of values.
    """

    def __init__(self, lift: Lift) -> None:
        self.lift = lift
        self.shapes: list[torch.Size] | None = None  # of a step's inputs, leaves (1, B, ...), once there was one

    def step(self, x: Any, number: int) -> Tree:
        """Return the inputs of step `number`, leaves (1, B, ...)."""
        return self.checked(self.lift.step("x", x), number)

    def checked(self, inputs: Tree, number: int) -> Tree:
        """Return inputs that fit those before them, and are finite.

        Raises:
            ShapeError: they have other shapes.
            NonFiniteError: they hold NaN or infinity.
        """
        shapes = [leaf.shape for leaf in tensors(inputs)]
        if self.shapes is not None and shapes != self.shapes:
            raise ShapeError(
                f"x of shape {_shown(self.shapes)} was expected, as at the steps before, but at step {number} "
                f"{_shown(shapes)} came: they are run together",
                fix="the same numbers in the same order at each step",
            )
        _check_finite(
            "x",
            inputs,
            None,
            f"step {number} would leave the state without a number, and all predictions after it",
            "leave the step out, or fill it in by what you know; online.reset() if the sequence is broken there",
        )
        return inputs

    def label(self, y: Any, mask: Any) -> tuple[Tree | None, Tensor | None]:
        """Return a step's targets, leaves (1, B, ...), and the lanes in which they count, shape (B,)."""
        return self.checked_label(None if y is None else self.lift.step("y", y), mask)

    def checked_label(self, targets: Tree | None, mask: Any) -> tuple[Tree | None, Tensor | None]:
        """Return targets that are finite where they count, and where that is; None: in all lanes.

        Raises:
            ConfigError: a mask of nothing.
            NonFiniteError: they hold NaN or infinity.
        """
        if targets is None:
            if mask is not None:
                raise ConfigError(
                    "no mask was expected where there is no label, but one came: it would mask nothing",
                    fix="y=... for the lanes that have one; leave the mask out where none has",
                )
            return None, None
        counts = None if mask is None else self.lift.lane_mask("mask", mask)
        why = "its gradient would make the weights NaN for good"
        _check_finite("y", targets, counts, why, "y=None, or a mask, for a label that is missing")
        return targets, counts


def _shown(shapes: list[torch.Size]) -> str:
    return ", ".join(f"(B, ...) = {tuple(each[1:])}" for each in shapes) or "nothing"


def _check_finite(name: str, tree: Tree, counts: Tensor | None, why: str, fix: str) -> None:
    """Refuse NaN and infinity in leaves (1, B, ...); in the lanes that count, shape (B,), None for all.

    Raises:
        NonFiniteError: one of them stands there; says where.
    """
    for index, leaf in enumerate(tensors(tree)):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        looked_at = leaf if counts is None else leaf[:, counts]
        # One number tells for all, but for a sum that overflows: a quarter of the time of asking each element.
        total = looked_at.sum().item()
        if total - total == 0 or bool(torch.isfinite(looked_at).all()):
            continue
        wrong = ~torch.isfinite(looked_at)
        place = wrong.nonzero()[0].tolist()[1:]
        part = f" at {leaf_names(tree)[index]}" if len(tensors(tree)) > 1 else ""
        raise NonFiniteError(
            f"finite numbers were expected, but {name}{part} holds {looked_at[wrong][0].item()} at (lane, ...) = "
            f"{tuple(place)}: {why}",
            fix=fix,
        )


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse a setting that is not a whole number from `least`.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name} was expected to be a whole number, at least {least}, but is {value!r}", fix=f"{name}={least}"
        )
