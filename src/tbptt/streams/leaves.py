"""Arrays, mapped files and tensors as rows that can be gathered into windows.

Letters: N rows of the recording, T time, B lanes.
"""

from __future__ import annotations

import cmath
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import optree
import torch
from torch import Tensor

from tbptt.errors import NonFiniteError, ShapeError, StreamError
from tbptt.tree import Tree

__all__ = ["RELEASE_BYTES", "Array", "Leaf", "Leaves", "Mapped", "mapped_files", "release"]

Array: TypeAlias = npt.NDArray[Any]

RELEASE_BYTES = 1 << 22
"""Bytes copied out of mapped files before their pages are given back: rare enough to cost nothing."""

_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none, and trims by itself


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


@dataclass(frozen=True, eq=False)
class Leaf:
    """One array of a tree, and how rows of it become a tensor."""

    name: str
    rows: int
    row_bytes: int
    gather: Callable[[Array], Tensor]  # row numbers (T, B) -> values (T, B, ...), a copy
    array: Array | None  # below it there may be a mapped file

    @staticmethod
    def of(name: str, source: Any, dtype: torch.dtype | None) -> Leaf:
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
                return Leaf(name, len(source), row_bytes, _gather_tensor(source, dtype), None)
            source = source.resolve_conj().resolve_neg().numpy()
        gather = _gather_array(name, source, function, dtype or torch.get_default_dtype())
        return Leaf(name, len(source), row_bytes, gather, source)

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
        values: Array = view[rows]  # not take(), which first copies the whole of a file that is cut by columns
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


class Leaves:
    """The leaves of a tree, read together."""

    def __init__(self, name: str, tree: Tree, dtype: torch.dtype | None) -> None:
        leaves, self._spec = optree.tree_flatten(tree)
        paths = ["".join(f"[{part!r}]" for part in path) for path in optree.tree_paths(tree)]
        self.all = [Leaf.of(name + path, leaf, dtype) for path, leaf in zip(paths, leaves, strict=True)]
        self._bare = self._spec.is_leaf()
        if not self.all:
            raise ShapeError(f"{name} was expected to hold an array of shape (N, ...), but holds none")

    def read(self, rows: Array, counted: Array | None, begin: int) -> Tree:
        """Return the tree of the leaves' rows; see `Leaf.read`."""
        if self._bare:  # the common case, and half the time
            return self.all[0].read(rows, counted, begin)
        return optree.tree_unflatten(self._spec, [leaf.read(rows, counted, begin) for leaf in self.all])


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
