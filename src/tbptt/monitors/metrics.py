"""What a run measured, as JSON lines: one file that repeats bit for bit, and one of times that cannot."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError
from tbptt.monitors.base import Monitor, Plan, Update, Validation

__all__ = ["MetricsFile", "TimingFile"]

_to_json = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make one anew for every line
_FLUSH_S = 1.0  # for whoever follows the file while it grows
_MOST_PENDING = 256  # losses kept as tensors, so that a device is not waited for at every update


class MetricsFile(Monitor):
    """Append one JSON line every few updates, and one for each validation.

    The file holds nothing that depends on the clock or the machine's load: that of a run which was killed
    and resumed equals, byte for byte, that of one which never stopped. A line of an update has

        kind, update, passes, position, loss (sum / count since the last line), terms (that count),
        gradient_norm (of the last update, before clipping), lookback, learning_rate,
        refused (updates that a guard left out, since the last line; their losses are counted in)

    and one of a validation has kind, update and its metrics. JSON has no NaN and no infinity: they are the
    strings "nan", "inf" and "-inf". null says that there was nothing to measure.

    Args:
        path: the file. A run that starts at update 0 empties it; one that resumes cuts it back to where its
            checkpoint was taken.
        every: updates to a line, 1 or more. What is left over at the end gets a shorter one.

    Cost: for an update without a line a few Python additions; the device is not waited for.
    """

    def __init__(self, path: str | Path, every: int = 1) -> None:
        self.path = Path(path)
        self.every = _positive_int("every", every, "MetricsFile(path, every=10)")
        self._file: BinaryIO | None = None
        self._resume: dict[str, Any] | None = None  # where to go on, until the file is open
        self._buffer = bytearray()
        self._flushed_s = 0.0
        self._is_warned = False
        self._last: Update | None = None
        self._clear()

    def _clear(self) -> None:
        self._pending: list[Tensor] = []
        self._loss_sum = 0.0
        self._num_terms = 0
        self._num_updates = 0
        self._num_refused = 0

    def begin(self, plan: Plan) -> None:
        """Open the file: emptied for a new run, cut back for a resumed one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            # Unbuffered: the lines that a full disk refuses stay in our own buffer, to be tried again.
            self._file = self.path.open("ab", buffering=0)
        self._clear()
        if plan.update == 0:
            self._buffer.clear()
            self._file.truncate(0)
        elif self._resume is not None:
            self._go_back(self._file, self._resume)
        self._resume = None

    def update(self, update: Update) -> None:
        """Count one update, and write a line if it is time."""
        estimate = update.estimate
        self._last = update.to_keep()
        self._pending.append(estimate.loss_sum)
        self._num_terms += estimate.num_terms
        self._num_updates += 1
        if not update.applied and estimate.num_injected:
            self._num_refused += 1
        if self._num_updates >= self.every:
            self._write_update()
        elif len(self._pending) >= _MOST_PENDING:
            self._settle()

    def validation(self, validation: Validation) -> None:
        """Write a line."""
        line: dict[str, Any] = {"kind": "validation", "update": validation.number}
        for name, value in validation.metrics.items():
            line[f"{name}_" if name in line else name] = _number(value)
        self._write(line)

    def end(self) -> None:
        """Write what is left and close the file."""
        if self._file is None:
            return
        self._flush(self._file)
        # Should the same run go on, the shorter last line gives way to a whole one.
        resume = self._position(self._file)
        if self._num_updates:
            self._write_update()
            self._flush(self._file)
        self._file.close()
        self._file, self._resume = None, resume
        self._buffer.clear()

    def state_dict(self) -> dict[str, Any]:
        """Make the file durable, and return its length and what the next line has so far.

        Raises:
            CheckpointError: the disk did not take the lines; they are kept and tried again.
        """
        if self._file is None:
            return self._resume or {"offset": 0, "loss_sum": 0.0, "terms": 0, "updates": 0, "refused": 0}
        try:
            self._drain(self._file)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} was expected to be made durable for a checkpoint, but that failed: {error}. A "
                "run resumed from this checkpoint would have a gap in it",
                fix=f"make room there (df -h {self.path.parent})",
            ) from error
        return self._position(self._file)

    def _position(self, file: BinaryIO) -> dict[str, Any]:
        self._settle()
        return {
            "offset": os.fstat(file.fileno()).st_size,
            "loss_sum": self._loss_sum,
            "terms": self._num_terms,
            "updates": self._num_updates,
            "refused": self._num_refused,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to where `state` was taken, now or once it is open."""
        if self._file is None:
            self._resume = dict(state)
        else:
            self._go_back(self._file, state)

    def _go_back(self, file: BinaryIO, state: dict[str, Any]) -> None:
        self._buffer.clear()
        size = os.fstat(file.fileno()).st_size
        if size < state["offset"]:
            warnings.warn(
                f"{self.path} was expected to have at least {state['offset']} bytes, as at the "
                "checkpoint, but has "
                f"{size}: the lines between are lost, and it goes on from here",
                CheckpointWarning,
                stacklevel=3,
            )
        file.truncate(min(size, state["offset"]))
        self._clear()
        self._loss_sum = state["loss_sum"]
        self._num_terms = state["terms"]
        self._num_updates = state["updates"]
        self._num_refused = state["refused"]

    def _settle(self) -> None:
        # One transfer for all, then Python's additions in order: when it happens changes no bit of the sum.
        if self._pending:
            for value in _values(self._pending):
                self._loss_sum += value
            self._pending.clear()

    def _write_update(self) -> None:
        update = cast(Update, self._last)
        estimate = update.estimate
        self._settle()
        norm = None
        if estimate.num_injected:  # as the guard measured it, or now
            norm = estimate.metrics.get("gradient_norm")
            norm = estimate.gradient_norm().item() if norm is None else norm
        self._write(
            {
                "kind": "update",
                "update": update.number,
                "passes": update.passes,
                "position": update.position,
                "loss": _number(self._loss_sum / self._num_terms if self._num_terms else None),
                "terms": self._num_terms,
                "gradient_norm": _number(norm),
                "lookback": estimate.lookback,
                "learning_rate": _number(update.learning_rate),
                "refused": self._num_refused,
            }
        )
        self._clear()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise ConfigError(
                f"{self.path} was expected to be open, but begin() has not been called: it would not be "
                "known whether "
                "to start the file anew",
                fix="monitor.begin(Plan(update=0, updates=None, lanes=lanes)) before the first update",
            )
        self._buffer += _to_json(line).encode() + b"\n"
        now_s = time.monotonic()
        if now_s - self._flushed_s >= _FLUSH_S:
            self._flush(self._file)
            self._flushed_s = now_s

    def _flush(self, file: BinaryIO) -> None:
        """Hand the lines to the system; a full disk is told of, once, and does not stop the training."""
        try:
            self._drain(file)
        except OSError as error:
            if not self._is_warned:
                self._is_warned = True
                _warn_unwritten(self.path, error)

    def _drain(self, file: BinaryIO) -> None:
        while self._buffer:
            written = file.write(self._buffer)
            del self._buffer[:written]
        self._is_warned = False


class TimingFile(Monitor):
    """Append a JSON line of speed and memory every few seconds.

    Apart from `MetricsFile`, because no two runs agree on it. A line has update, elapsed_s (since this
    process began the run), steps_per_s, lane_steps_per_s (both since the last line) and peak_rss_bytes (null
    where the system does not tell).

    Args:
        path: the file; never emptied.
        every_s: seconds between lines, 0 or more; one more is written at the end.
    """

    def __init__(self, path: str | Path, every_s: float = 10.0) -> None:
        number = cast(object, every_s)  # whatever a caller without a type checker gave
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf:
            raise ConfigError(
                f"every_s was expected to be a number of seconds, 0 or more, but is {every_s!r}: no line "
                "would ever "
                "be due",
                fix="TimingFile(path, every_s=10)",
            )
        self.path = Path(path)
        self.every_s = every_s
        self._begun_s = self._written_s = time.monotonic()
        self._number = self._steps = self._lane_steps = 0

    def begin(self, plan: Plan) -> None:
        """Start the clock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._begun_s = self._written_s = time.monotonic()
        self._number, self._steps, self._lane_steps = plan.update, 0, 0

    def update(self, update: Update) -> None:
        """Count one update, and write a line if it is time."""
        self._number = update.number
        self._steps += update.steps
        self._lane_steps += update.steps * update.lanes
        if time.monotonic() - self._written_s >= self.every_s:
            self._write()

    def end(self) -> None:
        """Write the last line."""
        if self._steps:
            self._write()

    def _write(self) -> None:
        now_s = time.monotonic()
        since_s = max(now_s - self._written_s, 1e-9)  # two updates may share one tick of a coarse clock
        line = {
            "update": self._number,
            "elapsed_s": round(now_s - self._begun_s, 6),
            "steps_per_s": round(self._steps / since_s, 3),
            "lane_steps_per_s": round(self._lane_steps / since_s, 3),
            "peak_rss_bytes": _peak_rss_bytes(),
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            _warn_unwritten(self.path, error)
        self._written_s = now_s
        self._steps = self._lane_steps = 0


def _warn_unwritten(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path} could not be written ({error}); training goes on. Make room there (df -h {path.parent})",
        CheckpointWarning,
        stacklevel=3,
    )


def _values(scalars: list[Tensor]) -> list[float]:
    return [scalars[0].item()] if len(scalars) == 1 else torch.stack(scalars).tolist()


def _number(value: float | None) -> float | int | str | None:
    """Return `value` as JSON can hold it; what is no finite number under its name."""
    if value is None or math.isfinite(value):
        return value
    return str(float(value))


def _positive_int(name: str, value: int, fix: str) -> int:
    number = cast(object, value)  # whatever a caller without a type checker gave
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(
            f"{name} was expected to be a whole number of updates, 1 or more, but is {number!r}: no line "
            "would ever "
            "be due",
            fix=fix,
        )
    return number


def _peak_rss_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
