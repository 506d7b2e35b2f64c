"""One long recording, cut into lanes.

Letters: N rows of the recording, T time, B lanes.
"""

from __future__ import annotations

import cmath
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias, cast, final

import numpy as np
import numpy.typing as npt
import optree
import torch
from torch import Tensor

from tbptt.errors import ConfigError, EndOfStream, NonFiniteError, ShapeError, StreamError
from tbptt.streams.base import Stream, check_steps
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["ArrayStream", "Mapped", "split_rows"]

Array: TypeAlias = npt.NDArray[Any]

_RELEASE_BYTES = 1 << 22
"""Bytes copied out of mapped files before their pages are given back: rare enough to cost nothing."""

_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none, and trims by itself


def check_whole(name: str, value: int, least: int) -> int:
    """Return `value`, or refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"{name} was expected to be a whole number, at least {least}, but {value!r} came",
            fix=f"{name}={least}",
        )
    return value


@dataclass(frozen=True, eq=False)
class Mapped:
    """An array whose rows pass through a function when they are read, and not before.

    It keeps a large file small in memory: raw bytes stay mapped, and only a window of them is decoded.

    Args:
        array: the raw rows. Shape (N, ...).
        function: what is made of them, row by row: (T, B, ...) to (T, B, ...), any numpy dtype.
    """

    array: Array
    function: Callable[[Array], Array]


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
        self._inputs = _Leaves("inputs", inputs, dtype)
        self._targets = None if targets is None else _Leaves("targets", targets, dtype)
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
        rows = self._first + np.arange(begin, end)[:, None]
        real = None  # left out while no lane is padded
        if end > self._short:
            real = rows <= self._final
            np.minimum(rows, self._final, out=rows)
        window = self._window(rows, real, begin)
        self._position = end  # only now: a failed read can be repeated
        return window

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
        if self._unreleased > _RELEASE_BYTES:
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


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One array of a tree, and how rows of it become a tensor."""

    name: str
    rows: int
    row_bytes: int
    gather: Callable[[Array], Tensor]  # row numbers (T, B) -> values (T, B, ...), a copy
    array: Array | None  # below it there may be a mapped file

    @staticmethod
    def of(name: str, source: Any, dtype: torch.dtype | None) -> _Leaf:
        """Look at what was given once, so that reading need not.

        Raises:
            ShapeError: it is no array with rows, or of a dtype that no tensor can have.
        """
        function = None
        if isinstance(source, Mapped):
            source, function = source.array, source.function
        if not isinstance(source, Tensor | np.ndarray) or not source.ndim:
            raise ShapeError(
                f"{name} was expected to be a tensor or numpy array of shape (N, ...), but is {source!r:.60}",
                fix="np.asarray(...) around the numbers: a list or tuple is taken as a tree of arrays",
            )
        row_bytes = math.prod(source.shape[1:]) * source.itemsize
        if isinstance(source, Tensor):
            source, dtype = source.detach(), dtype or source.dtype
            if source.device.type != "cpu" or source.dtype == torch.bfloat16:  # numpy cannot look at these
                return _Leaf(name, len(source), row_bytes, _gather_tensor(source, dtype), None)
            source = source.resolve_conj().resolve_neg().numpy()
        gather = _gather_array(name, source, function, dtype or torch.get_default_dtype())
        return _Leaf(name, len(source), row_bytes, gather, source)

    def read(self, rows: Array, counted: Array | None, begin: int) -> Tensor:
        """Return the rows, refusing NaN and infinity where they count.

        Raises:
            NonFiniteError: with the place of the first one.
        """
        values = self.gather(rows)
        if values.is_floating_point() or values.is_complex():
            chosen = values if counted is None else values[torch.from_numpy(counted).to(values.device)]
            # a sum is finite only if all its terms are; where finite terms overflow it, a slow look decides
            if not cmath.isfinite(chosen.sum().item()):
                self._refuse(values, counted, rows, begin)
        return values

    def _refuse(self, values: Tensor, counted: Array | None, rows: Array, begin: int) -> None:
        bad = ~torch.isfinite(values)
        if counted is not None:
            bad[~torch.from_numpy(counted).to(values.device)] = False
        places: list[list[int]] = bad.nonzero()[:1].tolist()
        if not places:
            return
        step, lane, *column = places[0]
        where = f", column {column[0] if len(column) == 1 else tuple(column)}" if column else ""
        inputs_fix = f"fill in or cut out the rows of {self.name} where np.isfinite is False"
        targets_fix = f"mask = np.isfinite({self.name}), one value a row; ArrayStream(..., mask=mask)"
        raise NonFiniteError(
            f"finite numbers were expected, but {self.name} holds {values[tuple(places[0])].item()} at row "
            f"{rows[step, lane]} of the recording (lane {lane}, step {begin + step}{where}): "
            "one such number makes every weight of the model NaN",
            fix=inputs_fix if self.name.startswith("inputs") else targets_fix,
        )


def _gather_tensor(source: Tensor, dtype: torch.dtype) -> Callable[[Array], Tensor]:
    whole = not (source.is_floating_point() or source.is_complex() or source.dtype == torch.bool)
    target = dtype if source.is_floating_point() else torch.int64 if whole else source.dtype
    return lambda rows: source[torch.from_numpy(rows)].to(target)


def _gather_array(
    name: str, source: Array, function: Callable[[Array], Array] | None, dtype: torch.dtype
) -> Callable[[Array], Tensor]:
    view: Array = source.view(np.ndarray)  # indexing a memmap itself goes through Python at every window
    sample = view[:1]
    found = sample.dtype if function is None or not len(sample) else function(sample).dtype
    # of this machine's byte order, and not wider than torch has them
    width = min(found.itemsize, 16 if found.kind == "c" else 8)
    natives = {"b": "?", "i": "i8", "u": "i8", "f": f"f{width}", "c": f"c{width}"}
    if found.kind not in natives:
        raise ShapeError(
            f"numbers were expected in {name}, but its dtype is {found}, which no tensor can have",
            fix="turn it into numbers first, for instance symbols into their ids",
        )
    native = np.dtype(natives[found.kind])

    def gather(rows: Array) -> Tensor:
        values: Array = view.take(rows, axis=0)
        if function is not None:
            values = function(values)
        if values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
            raise StreamError(
                f"{name} holds {values.max()}, which is beyond the largest int64: it would turn negative",
                fix=f"{name} = {name}.astype(np.float64)",
            )
        tensor = torch.from_numpy(values if values.dtype == native else values.astype(native))
        return tensor if native.kind != "f" or tensor.dtype == dtype else tensor.to(dtype)

    return gather


class _Leaves:
    """The leaves of a tree, read together."""

    def __init__(self, name: str, tree: Tree, dtype: torch.dtype | None) -> None:
        leaves, self._spec = optree.tree_flatten(tree)
        paths = ["".join(f"[{part!r}]" for part in path) for path in optree.tree_paths(tree)]
        self.all = [_Leaf.of(name + path, leaf, dtype) for path, leaf in zip(paths, leaves, strict=True)]
        self._bare = self._spec.is_leaf()
        if not self.all:
            raise ShapeError(f"{name} was expected to hold an array of shape (N, ...), but holds none")

    def read(self, rows: Array, counted: Array | None, begin: int) -> Tree:
        if self._bare:  # the common case, and half the time
            return self.all[0].read(rows, counted, begin)
        return optree.tree_unflatten(self._spec, [leaf.read(rows, counted, begin) for leaf in self.all])


def _common_rows(leaves: list[_Leaf]) -> int:
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


def mapped_files(arrays: list[Array | None]) -> list[mmap.mmap]:
    """Return the mapped files below the arrays whose pages can be read again at any time."""
    found: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: object = array
        while isinstance(base, np.ndarray):
            if isinstance(base, np.memmap):
                mapping: mmap.mmap | None = getattr(base, "_mmap", None)
                # mode "c" holds private changes in its pages, which giving back would undo
                if mapping is not None and base.mode != "c":
                    found[id(mapping)] = mapping
            base = base.base
    return list(found.values())


def release(mappings: list[mmap.mmap]) -> None:
    """Give the pages of mapped files back to the system, which reads them again when needed."""
    if _DONTNEED is not None:
        for mapping in mappings:
            mapping.madvise(_DONTNEED)


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
    rows = _common_rows(_Leaves("tree", tree, None).all)
    cut = round(fraction * rows)
    if not 0 < cut < rows:
        raise ConfigError(
            f"a fraction that leaves rows on both sides was expected, but {fraction} of {rows} rows is {cut}",
            fix="split_rows(tree, 0.8)",
        )
    first, rest = slice(None, cut), slice(cut, None)
    return optree.tree_map(itemgetter(first), tree), optree.tree_map(itemgetter(rest), tree)
