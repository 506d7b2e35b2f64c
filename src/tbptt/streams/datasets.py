"""The recordings that ship with the package, as streams.

Letters: N rows, T time, B lanes.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tbptt.errors import ConfigError, StreamError
from tbptt.streams.arrays import ArrayStream
from tbptt.streams.text import TextStream

__all__ = ["ecg", "ecg_rows", "shakespeare"]

Split: TypeAlias = Literal["train", "test", "all"]

_DECIMATION = 6
"""From the 360 Hz of the record to 60 Hz."""

_AHEAD = 12
"""Steps in which a beat is looked for: 0.2 s at 60 Hz."""


def ecg_rows(
    split: Split = "all",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the beat-ahead task as arrays: will the heart beat within the next 0.2 s?

    Record 208 at 60 Hz, each sample the mean of 6 (which is the low-pass filter, too). The first 80 % are
    for training. A step's target looks at the 12 steps after it; the last 12 steps of each part would look
    beyond it and do not count.

    Args:
        split: "train", "test", or "all" of it.

    Returns:
        Inputs (N, 2), the signal and its difference, each standardised by the mean and standard deviation of
        the training part; targets (N,), 1 where an R peak comes in the steps t+1 to t+12, else 0; and
        the mask (N,) of targets that count. N is 18000 for all of it.

    Raises:
        ConfigError: no such split.

    Reference: MIT-BIH Arrhythmia Database, PhysioNet, Moody & Mark 2001 (ODC-By 1.0).

    Example:
        >>> inputs, targets, mask = ecg_rows("test")
        >>> inputs.shape, targets.shape, int(mask.sum())
        ((3600, 2), (3600,), 3588)
    """
    with np.load(_path("mitdb208.npz")) as archive:
        millivolt = (archive["ecg"].astype(np.float64) - 1024.0) / 200.0
    with np.load(_path("mitdb208_peaks.npz")) as archive:
        peaks = archive["peaks"].astype(np.int64) // _DECIMATION
    signal = millivolt.reshape(-1, _DECIMATION).mean(1)
    inputs = np.stack([signal, np.diff(signal, prepend=signal[0])], axis=1)
    cut = len(signal) * 4 // 5
    inputs = (inputs - inputs[:cut].mean(0)) / inputs[:cut].std(0)

    beats = np.zeros(len(signal) + 1, dtype=np.int64)
    np.add.at(beats, peaks + 1, 1)
    before = np.cumsum(beats)  # before[t]: the peaks in steps below t
    steps = np.arange(len(signal))
    ahead = before[np.minimum(steps + _AHEAD + 1, len(signal))] - before[steps + 1]
    begin, end = {"train": (0, cut), "test": (cut, len(signal)), "all": (0, len(signal))}[_known(split)]
    mask = steps[begin:end] < end - _AHEAD
    return inputs[begin:end].astype(np.float32), (ahead[begin:end] > 0).astype(np.float32), mask


def ecg(*, lanes: int = 16, split: Split = "train") -> ArrayStream:
    """Return the beat-ahead task as a stream: inputs (T, B, 2), targets (T, B) of 0 and 1.

    With windows much shorter than a beat (0.6 s, 36 steps) it can only be solved with the carried state.

    Args:
        lanes: the number of pieces that the part is cut into, B.
        split: "train" (the first 80 %), "test" (the rest), or "all".

    Raises:
        ConfigError: no such split.

    Reference: MIT-BIH Arrhythmia Database, PhysioNet, Moody & Mark 2001 (ODC-By 1.0); see `ecg_rows`.
    """
    inputs, targets, mask = ecg_rows(split)
    return ArrayStream(inputs, targets, lanes=lanes, mask=mask)


def shakespeare(
    *, lanes: int, split: Split = "train", unit: Literal["characters", "bytes"] = "characters"
) -> TextStream:
    """Return Shakespeare's plays, next symbol by next symbol: 1,115,394 characters, 65 of them distinct.

    Both parts have the vocabulary of the whole text, so that a model fits either.

    Args:
        lanes: the number of pieces, B.
        split: "train" (the first nine tenths), "test" (the last tenth), or "all".
        unit: "characters" or "bytes".

    Raises:
        ConfigError: no such split.
    """
    begin, end = {"train": (0.0, 0.9), "test": (0.9, 1.0), "all": (0.0, 1.0)}[_known(split)]
    return TextStream(_path("shakespeare.txt"), lanes=lanes, unit=unit, begin=begin, end=end)


def _known(split: Split) -> Split:
    if split not in ("train", "test", "all"):
        raise ConfigError(f"split 'train', 'test' or 'all' was expected, but {split!r} came", fix='split="train"')
    return split


def _path(name: str) -> Path:
    path = Path(str(files("tbptt.data") / name))
    if not path.is_file():
        raise StreamError(
            f"the packaged file {name} was expected at {path}, but is missing: the installation is not whole",
            fix="pip install --force-reinstall tbptt",
        )
    return path
