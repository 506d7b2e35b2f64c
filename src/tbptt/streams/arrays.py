"""One long recording, cut into lanes.

Letters: N rows of the recording, T time, B lanes.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, cast, final

import numpy as np
import optree
import torch
from torch import Tensor

from tbptt.errors import ConfigError, EndOfStream, ShapeError, StreamError
from tbptt.streams.base import Stream, check_steps
from tbptt.streams.leaves import RELEASE_BYTES, Array, Leaf, Leaves, mapped_files, release
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["ArrayStream", "split_rows"]


def check_whole(name: str, value: int, least: int) -> int:
    """Return `value`, or refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"{name} was expected to be a whole number, at least {least}, but {value!r} came",
            fix=f"{name}={least}",
        )
    return value


@final
class ArrayStream(Stream):
    """Read ONE long recording as `lanes` contiguous pieces side by side.

    Lane b covers the rows b*N//B to (b+1)*N//B, so that nothing is lost: lanes differ by at most one
    step, and the shorter ones are padded with their last row, masked out. Every pass starts with a reset
    of all lanes. A window owns its tensors; memory is that of one window, also for a `np.memmap`, whose
    pages are given back to the system as the cursor moves on.

    Integers become int64, which embeddings and losses want. Tensors keep their floating dtype, while
    numpy's (most often float64, by numpy's default rather than by choice) become `dtype`.

    Args:
        inputs: what the model is fed, in time order. A tensor, numpy array or memmap, or tuples, lists and
            dicts of them. Leaves (N, ...).
        targets: what the loss compares with, as `inputs`; None for windows without targets.
        lanes: the number of pieces, B.
        mask: the rows whose target counts. Shape (N,), bool; None: all of them.
        reset: the rows at which a new sequence starts. Shape (N,), bool; None: none but the first of a lane.
        dtype: of all floating leaves; None: a tensor's own, `torch.get_default_dtype()` for numpy's.

    Raises:
        ConfigError: `lanes` or `dtype` cannot be meant.
        ShapeError: leaves of different lengths, or of a dtype that no tensor can have.
        StreamError: fewer rows than lanes.

    Cost:
        Time and memory of copying T*B rows; at least one copy, as windows never alias the recording.

    Example:
        >>> stream = ArrayStream(np.arange(7), lanes=2)
        >>> [window.inputs.tolist() for window in stream.windows(3)]
        [[[0, 3], [1, 4], [2, 5]], [[2, 6]]]
        >>> stream.steps, stream.read(4).mask[3].tolist()
        (4, [False, True])
    """

    def __init__(
        self,
        inputs: Tree,
        targets: Tree | None = None,
        *,
        lanes: int,
        mask: Tensor | Array | None = None,
        reset: Tensor | Array | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lanes = check_whole("lanes", lanes, 1)
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"a floating dtype was expected, but {dtype} came", fix="dtype=torch.float32")
        self._inputs = Leaves("inputs", inputs, dtype)
        self._targets = None if targets is None else Leaves("targets", targets, dtype)
        leaves = self._inputs.all + (self._targets.all if self._targets else [])
        self.rows = _common_rows(leaves)
        if self.rows < lanes:
            raise StreamError(
                f"at least one row for each of the {lanes} lanes was expected, but the recording has "
                f"{self.rows}: a lane without a step cannot be read",
                fix=f"lanes={self.rows}" if self.rows else "look where it comes from: it is empty",
            )
        self._mask = _flags("mask", mask, self.rows)
        self._reset = _flags("reset", reset, self.rows)
        bounds = np.arange(lanes + 1, dtype=np.int64) * self.rows // lanes
        self._first, self._final = bounds[:-1], bounds[1:] - 1
        self._short = self.rows // lanes  # the steps that every lane has
        self._mappings = mapped_files([leaf.array for leaf in leaves])
        self._row_bytes = sum(leaf.row_bytes for leaf in leaves)
        self._unreleased = 0
        self._first_rows = self._first[None]
        self._device = leaves[0].gather(self._first[:, None]).device
        self._position = 0

    @property
    def steps(self) -> int:
        """The steps of one pass: the length of the longest lane."""
        return self._short + (self.rows % self.lanes > 0)

    def read(self, steps: int) -> Window:
        """Return the next `steps` steps, fewer at the end of a pass.

        Raises:
            EndOfStream: the pass is over.
            NonFiniteError: NaN or infinity in an input, or in a target that counts; the cursor stays.
        """
        check_steps(steps)
        begin = self._position
        if begin >= self.steps:
            raise EndOfStream(f"the pass of {self.steps} steps is over", fix="stream.rewind()")
        end = min(begin + steps, self.steps)
        rows = self._offsets(end - begin) + begin
        real = None  # left out while no lane is padded
        if end > self._short:
            real = rows <= self._final
            np.minimum(rows, self._final, out=rows)
        window = self._window(rows, real, begin)
        self._position = end  # only now: a failed read can be repeated
        return window

    def _offsets(self, steps: int) -> Array:
        """Return the row numbers of a window of `steps` steps at the beginning; shape (T, B)."""
        if len(self._first_rows) != steps:  # nearly all windows are of one length
            self._first_rows = self._first + np.arange(steps)[:, None]
        return self._first_rows

    def _window(self, rows: Array, real: Array | None, begin: int) -> Window:
        mask = reset = None
        if self._mask is not None or real is not None:
            mask = np.ones(rows.shape, np.bool_) if self._mask is None else self._mask[rows]
            mask = mask if real is None else mask & real
        if self._reset is not None or begin == 0:
            reset = np.zeros(rows.shape, np.bool_) if self._reset is None else self._reset[rows]
            reset = reset if real is None else reset & real  # a padded step starts nothing
            if begin == 0:
                reset[0] = True
        inputs = self._inputs.read(rows, None, begin)
        targets = None if self._targets is None else self._targets.read(rows, mask, begin)
        self._unreleased += rows.size * self._row_bytes
        if self._unreleased > RELEASE_BYTES:
            release(self._mappings)
            self._unreleased = 0
        flags = [None if each is None else torch.from_numpy(each).to(self._device) for each in (mask, reset)]
        return Window(inputs, targets, *cast("list[Tensor]", flags), start=begin)  # None: the window knows

    def rewind(self) -> None:
        """Go back to the first step: the next pass over the same rows."""
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, and what it is a cursor into."""
        return {"position": self._position, "rows": self.rows, "lanes": self.lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the cursor where `state_dict` found it.

        Raises:
            StreamError: the state belongs to a recording of another length or cut, or is no state.
        """
        for name, mine in (("rows", self.rows), ("lanes", self.lanes)):
            if state.get(name) != mine:
                raise StreamError(
                    f"a place in a recording with {name}={mine} was expected, but the state has "
                    f"{name}={state.get(name)}: the same position would be another row",
                    fix="resume with the recording and the number of lanes that the run began with",
                )
        position = state.get("position")
        if not isinstance(position, int) or not 0 <= position <= self.steps:
            raise StreamError(f"a position from 0 to {self.steps} was expected, but {position!r} came")
        self._position = position


def _common_rows(leaves: list[Leaf]) -> int:
    first = leaves[0]
    for leaf in leaves:
        if leaf.rows != first.rows:
            raise ShapeError(
                f"{leaf.name} of {first.rows} rows was expected, as {first.name} has, but it has "
                f"{leaf.rows}: inputs and targets would be paired wrongly",
                fix="cut all of them to the same rows, the same instant in the same row",
            )
    return first.rows


def _flags(name: str, flags: Tensor | Array | None, rows: int) -> Array | None:
    if flags is None:
        return None
    values: Array = flags.detach().cpu().numpy() if isinstance(flags, Tensor) else np.asarray(flags)
    if values.shape != (rows,) or values.dtype != np.bool_:
        raise ShapeError(
            f"{name} was expected to be bool of shape ({rows},), one value a row, "
            f"but is {values.dtype} of shape {values.shape}",
            fix=f"{name} = np.asarray({name}, dtype=bool)",
        )
    return values


def split_rows(tree: Tree, fraction: float) -> tuple[Tree, Tree]:
    """Cut a recording in two, in time order: to learn from the first and be judged on the rest.

    Args:
        tree: leaves (N, ...), tensors or numpy arrays.
        fraction: the part of the rows that comes first; above 0 and below 1.

    Returns:
        The first round(fraction * N) rows and the others, as views.

    Raises:
        ConfigError: one part would be empty.
        ShapeError: the leaves have different lengths.

    Example:
        >>> train, test = split_rows(np.arange(10), 0.8)
        >>> len(train), test.tolist()
        (8, [8, 9])
    """
    rows = _common_rows(Leaves("tree", tree, None).all)
    cut = round(fraction * rows)
    if not 0 < cut < rows:
        raise ConfigError(
            f"a fraction that leaves rows on both sides was expected, but {fraction} of {rows} rows is {cut}",
            fix="split_rows(tree, 0.8)",
        )
    first, rest = slice(None, cut), slice(cut, None)
    return optree.tree_map(itemgetter(first), tree), optree.tree_map(itemgetter(rest), tree)
