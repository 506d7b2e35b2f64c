"""Arrays from .npy and .npz files as streams: looked through once, before anything is trained.

Letters: N rows, D columns.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from tbptt.cli.rundir import Facts, fingerprint
from tbptt.cli.settings import did_you_mean
from tbptt.errors import NonFiniteError, ShapeError, StreamError
from tbptt.streams import ArrayStream, split_rows
from tbptt.streams.leaves import Mapped, mapped_files, release

__all__ = ["Recording", "facts_of", "load", "split", "stream_of"]

Array: TypeAlias = npt.NDArray[Any]

_KEYS = ("inputs", "targets", "mask", "reset")
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class Recording:
    """What a file holds.

    Args:
        arrays: "inputs" (N, D); with them, for an .npz, "targets", and "mask" and "reset" if it has them. Without
            targets the next row is to be predicted.
    """

    arrays: dict[str, Array]

    @property
    def inputs(self) -> Array:
        """What the model is fed. Shape (N, D)."""
        return self.arrays["inputs"]


def load(path: Path) -> Recording:
    """Read a file; an .npy stays where it is, and is mapped.

    Raises:
        StreamError: no file, an empty or damaged one, or one without the keys.
        ShapeError: arrays of other shapes than agreed.
        NonFiniteError: NaN or infinity, with its place in the file.
    """
    arrays = _read(path)
    for name in ("inputs", "targets"):
        if name in arrays:
            arrays[name] = _columns(arrays[name], name, path)
    _check_flags(arrays, path)
    for name in ("inputs", "targets"):
        if name in arrays:
            _check_finite(arrays[name], name, arrays.get("mask") if name == "targets" else None, path)
    return Recording(arrays)


def split(recording: Recording, share: float) -> tuple[Recording, Recording | None]:
    """Return the part to train on, and the `share` at the end that is held out; None for a share of 0."""
    if not share:
        return recording, None
    first, rest = split_rows(recording.arrays, 1.0 - share)
    return Recording(cast("dict[str, Array]", first)), Recording(cast("dict[str, Array]", rest))


def facts_of(train: Recording, path: Path, standardize: bool, whole: Recording) -> Facts:
    """Return what a model must know of the data."""
    sha256, num_bytes = fingerprint(path)
    targets = whole.arrays.get("targets")
    inputs = train.inputs.shape[1]
    loss, outputs, metrics = "mse", inputs, dict[str, str]()
    if targets is not None:
        outputs = targets.shape[1]
        if targets.dtype.kind == "b":
            loss, metrics = "bce", {"auc": "auc"} if outputs == 1 else {}
        elif targets.dtype.kind in "iu":
            loss, outputs, metrics = "cross_entropy", _num_classes(targets, path), {"accuracy": "accuracy"}
    mean, std = _moments(train.inputs) if standardize else (None, None)
    return Facts(
        inputs=inputs,
        outputs=outputs,
        symbols=False,
        loss=loss,
        metrics=metrics,
        mean=mean,
        std=std,
        sha256=sha256,
        num_bytes=num_bytes,
    )


def stream_of(recording: Recording, facts: Facts, lanes: int) -> ArrayStream:
    """Return a recording as a stream, standardised as the facts say.

    Raises:
        ShapeError: it has another number of columns than the data of the run.
        StreamError: fewer rows than lanes.
    """
    inputs = recording.inputs
    if inputs.shape[1] != facts.inputs:
        raise ShapeError(
            f"inputs of {facts.inputs} columns were expected, as the model was trained on, but {inputs.shape[1]} came",
            fix="give the same quantities, in the same columns",
        )
    targets = recording.arrays.get("targets")
    if targets is not None:
        flat = targets[:, 0] if targets.shape[1] == 1 else targets
        return ArrayStream(
            _scaled(inputs, facts),
            flat,
            lanes=lanes,
            mask=recording.arrays.get("mask"),
            reset=recording.arrays.get("reset"),
        )
    following = _scaled(inputs[1:], facts, flat=facts.outputs == 1)
    return ArrayStream(_scaled(inputs[:-1], facts), following, lanes=lanes)


def _read(path: Path) -> dict[str, Array]:
    _, num_bytes = (0, path.stat().st_size) if path.is_file() else fingerprint(path)
    if not num_bytes:
        raise StreamError(f"{path} was expected to hold arrays, but is empty", fix="look at how it was written")
    try:
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"inputs": cast(Array, loaded)}
        with loaded as archive:
            names: list[str] = list(archive.files)
            for name in ("inputs", "targets"):
                if name not in names:
                    raise StreamError(
                        f"the arrays inputs and targets were expected in {path}, but it has {names}",
                        fix=f"np.savez({path.name!r}, inputs=..., targets=...); "
                        "an .npy of one array is for predicting its next row",
                    )
            unknown = [name for name in names if name not in _KEYS]
            if unknown:
                raise StreamError(
                    f"the arrays {', '.join(_KEYS)} were expected in {path}, but {unknown[0]!r} is there too: "
                    "leaving it out might be a mistake",
                    fix=did_you_mean(unknown[0], _KEYS) or "write the file without it",
                )
            return {name: archive[name] for name in names}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StreamError(
            f"{path} was expected to be a file of numpy, but cannot be read: {error}",
            fix="np.save(path, array) or np.savez(path, inputs=..., targets=...) writes one; objects are refused",
        ) from error


def _columns(array: Array, name: str, path: Path) -> Array:
    if array.ndim not in (1, 2) or array.dtype.kind not in "biuf" or 0 in array.shape[1:]:
        raise ShapeError(
            f"real numbers of shape (N,) or (N, D) were expected, but {name} of {path} is {array.dtype} of shape "
            f"{array.shape}",
            fix="array.reshape(len(array), -1): one row a step",
        )
    if len(array) < 2:
        raise StreamError(f"at least two rows were expected, but {name} of {path} has {len(array)}")
    return array[:, None] if array.ndim == 1 else array


def _check_flags(arrays: dict[str, Array], path: Path) -> None:
    rows = len(arrays["inputs"])
    for name in arrays:
        if len(arrays[name]) != rows:
            raise ShapeError(
                f"{name} of {rows} rows was expected, as inputs have in {path}, but it has {len(arrays[name])}: steps "
                "would be paired wrongly",
                fix="cut all arrays to the same rows",
            )
        if name in ("mask", "reset") and (arrays[name].dtype != np.bool_ or arrays[name].ndim != 1):
            raise ShapeError(
                f"{name} was expected to be bool of shape ({rows},), but in {path} it is {arrays[name].dtype} of "
                f"shape {arrays[name].shape}",
                fix=f"{name}.astype(bool), one value a row",
            )


def _chunks(array: Array) -> Iterator[tuple[int, Array]]:
    """Yield rows, and the number of the first; a mapped file's pages are given back."""
    files = mapped_files([array])
    for begin in range(0, len(array), _CHUNK_ROWS):
        yield begin, array[begin : begin + _CHUNK_ROWS].view(np.ndarray)
        release(files)


def _check_finite(array: Array, name: str, mask: Array | None, path: Path) -> None:
    if array.dtype.kind != "f":
        return
    for begin, rows in _chunks(array):
        bad: Array = ~np.isfinite(rows)
        if mask is not None:
            bad[~mask[begin : begin + len(rows)]] = False
        if bad.any():
            row, column = np.argwhere(bad)[0]
            fix = "np.savez(..., mask=np.isfinite(targets))" if name == "targets" else "fill it in, or cut it out"
            raise NonFiniteError(
                f"finite numbers were expected, but {name} of {path} holds {rows[row, column]} at row {begin + row}, "
                f"column {column} (counted from 0): one such number makes every weight of the model NaN",
                fix=fix,
            )


def _num_classes(targets: Array, path: Path) -> int:
    if targets.shape[1] != 1 or targets.min() < 0:
        raise ShapeError(
            f"whole-numbered targets were expected to be classes of shape (N,), from 0, but those of {path} are "
            f"of shape {targets.shape}, from {targets.min()}",
            fix="targets.astype(np.float32), if they are quantities",
        )
    return max(2, int(targets.max()) + 1)


def _moments(array: Array) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each column, as plain numbers; 1 for a column that is constant."""
    mean: Array = np.zeros(array.shape[1])
    for _, rows in _chunks(array):
        mean += rows.sum(0, dtype=np.float64) / len(array)
    variance: Array = np.zeros(array.shape[1])
    for _, rows in _chunks(array):
        variance += np.square(rows - mean).sum(0, dtype=np.float64) / len(array)
    std = np.sqrt(variance)
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


def _scaled(array: Array, facts: Facts, *, flat: bool = False) -> Mapped:
    mean, std = np.zeros(facts.inputs), np.ones(facts.inputs)
    if facts.mean is not None and facts.std is not None:
        mean, std = np.asarray(facts.mean), np.asarray(facts.std)
    return Mapped(array, partial(_standardised, mean=mean, std=std, flat=flat))


def _standardised(rows: Array, *, mean: Array, std: Array, flat: bool) -> Array:
    scaled = (rows - mean) / std
    return scaled[..., 0] if flat else scaled
