"""The window: what a model is shown between two updates.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tbptt.errors import ShapeError
from tbptt.tree import Tree, tensors, time_cat, time_slice, to, tree_map

__all__ = ["Window"]

_TRUE, _FALSE = torch.tensor(True), torch.tensor(False)


@dataclass(frozen=True, eq=False)
class Window:
    """The consecutive steps, of all lanes, between two updates.

    Args:
        inputs: what the model is fed. Leaves (T, B, ...).
        targets: what the loss compares with. Leaves (T, B, ...), or None.
        mask: the targets that count. Shape (T, B), bool; left out: all of them.
        reset: where a lane starts a new sequence, AT that step. Shape (T, B), bool; left out: nowhere.
        start: the index of its first step in the stream.

    Raises:
        ShapeError: a leaf, the mask or the resets do not have the same T and B, or are not bool.

    Example:
        >>> window = Window(torch.zeros(5, 2, 3), torch.zeros(5, 2))
        >>> window.steps, window.lanes, window[1:3].steps
        (5, 2, 2)
    """

    inputs: Tree
    targets: Tree | None = None
    mask: Tensor = cast(Tensor, None)  # noqa: RUF009 - None is what may be given, and never what is there
    reset: Tensor = cast(Tensor, None)  # noqa: RUF009
    start: int = 0

    def __post_init__(self) -> None:
        leaves = tensors(self.inputs)
        if not leaves or leaves[0].ndim < 2:
            came = f"shape {tuple(leaves[0].shape)}" if leaves else "no tensor"
            raise ShapeError(
                f"inputs of shape (T, B, ...) were expected, time first, but {came} came",
                fix="add a lane dimension: inputs.unsqueeze(1) makes one lane of one sequence",
            )
        first = leaves[0]
        size = first.shape[:2]
        if 0 in size:
            raise ShapeError(
                f"a window needs at least one step and one lane, but its inputs are (T, B) = {tuple(size)}"
            )
        for name, tree in (("inputs", self.inputs), ("targets", self.targets)):
            for leaf in tensors(tree):
                if leaf.shape[:2] != size:
                    raise ShapeError(
                        f"{name} of shape (T, B, ...) = {tuple(size)} + (...) were expected, as the inputs have, "
                        f"but a tensor of shape {tuple(leaf.shape)} came: steps and targets would be paired wrongly",
                        fix="cut inputs and targets at the same steps, time first",
                    )
        # What is left out is known, and need not be looked for in every window. It is one value, expanded:
        # torch refuses to write into such a tensor, which would be too late to be noticed.
        if self.mask is None:  # pyright: ignore[reportUnnecessaryComparison]
            self.__dict__["mask"] = (_TRUE if first.is_cpu else _TRUE.to(first.device)).expand(size)
            self.__dict__["num_targets"] = self.mask.numel()
        if self.reset is None:  # pyright: ignore[reportUnnecessaryComparison]
            self.__dict__["reset"] = (_FALSE if first.is_cpu else _FALSE.to(first.device)).expand(size)
            self.__dict__["resets"] = {}
        for name, flags in (("mask", self.mask), ("reset", self.reset)):
            if flags.shape != size or flags.dtype != torch.bool:
                raise ShapeError(
                    f"{name} was expected to be bool of shape (T, B) = {tuple(size)}, "
                    f"but is {flags.dtype} of shape {tuple(flags.shape)}",
                    fix=f"{name} = {name}.bool(), one value for each step and lane",
                )

    @property
    def steps(self) -> int:
        """The number of steps, T."""
        return self.mask.shape[0]

    @property
    def lanes(self) -> int:
        """The number of lanes, B."""
        return self.mask.shape[1]

    @cached_property
    def resets(self) -> dict[int, bool]:
        """The steps at which a lane starts anew, in order; True where all lanes do."""
        if not bool(self.reset.any()):
            return {}
        some, every = self.reset.any(1).tolist(), self.reset.all(1).tolist()
        return {step: every[step] for step, hit in enumerate(some) if hit}

    @cached_property
    def num_targets(self) -> int:
        """The number of targets that count."""
        return int(self.mask.sum())

    def __getitem__(self, steps: slice) -> Window:
        begin, end, stride = steps.indices(self.steps)
        if stride != 1:
            raise ShapeError("a window can only be cut into consecutive steps", fix="window[begin:end]")
        if (begin, end) == (0, self.steps):
            return self
        return Window(
            time_slice(self.inputs, begin, end),
            None if self.targets is None else time_slice(self.targets, begin, end),
            self.mask[begin:end],
            self.reset[begin:end],
            self.start + begin,
        )

    def laid_out(self) -> Window:
        """Return the window with its inputs in memory as those of windows that were joined: step after step.

        Random numbers like an input (`torch.randn_like`, dropout) depend on how it lies in memory.
        """
        if all(leaf.is_contiguous() for leaf in tensors(self.inputs)):
            return self
        return replace(self, inputs=tree_map(torch.Tensor.contiguous, self.inputs))

    def without_targets(self) -> Window:
        """Return the window as context: its inputs and resets, with nothing to learn from."""
        nothing = _FALSE.to(self.mask.device).expand(self.mask.shape)
        return Window(self.inputs, None, nothing, self.reset, self.start)

    def to(self, device: torch.device | str) -> Window:
        """Return the window with all its tensors on `device`."""
        if self.mask.device == torch.device(device):
            return self
        moved = [to(part, device) for part in (self.inputs, self.targets, self.mask, self.reset)]
        return Window(*moved, start=self.start)

    def state_dict(self) -> dict[str, Any]:
        """Return the window as a dict of plain values and trees."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def join(windows: Sequence[Window]) -> Window:
        """Return consecutive windows as one; targets survive only where all have them."""
        if len(windows) == 1:
            return windows[0]
        with_targets = all(window.targets is not None for window in windows)
        return Window(
            time_cat([window.inputs for window in windows]),
            time_cat([window.targets for window in windows]) if with_targets else None,
            torch.cat([window.mask for window in windows]),
            torch.cat([window.reset for window in windows]),
            windows[0].start,
        )
