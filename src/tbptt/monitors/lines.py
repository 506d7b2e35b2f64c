"""Files of JSON lines with which a killed and resumed run goes on, byte for byte."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError
from tbptt.monitors.base import Plan

__all__ = ["Lines", "check_every", "json_number", "warn_unwritten"]

_to_json = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make one anew for every line
_FLUSH_S = 1.0  # for whoever follows the file while it grows


class Lines:
    """The file of a monitor: appended to, and cut back to where a checkpoint was taken when a run goes on there.

    Its place and what else the monitor remembers make one state, so that the two cannot come apart.

    Args:
        path: the file. A run that starts at update 0 empties it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._resume: dict[str, Any] | None = None  # where to go on, until the file is open
        self._buffer = bytearray()
        self._flushed_s = 0.0
        self._is_warned = False

    @property
    def is_open(self) -> bool:
        """Whether it can be written to."""
        return self._file is not None

    def begin(self, plan: Plan) -> dict[str, Any]:
        """Open the file: emptied for a new run, cut back for a resumed one.

        Returns:
            What the monitor is to remember; empty for nothing.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            # Unbuffered: the lines that a full disk refuses stay in our own buffer, to be tried again.
            self._file = self.path.open("ab", buffering=0)
        resume, self._resume = self._resume, None
        if plan.update == 0:
            self._buffer.clear()
            self._file.truncate(0)
            return {}
        if resume is None:
            return {}
        self._go_back(self._file, resume["offset"])
        return resume

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; every second or so the system gets them.

        Raises:
            ConfigError: the file is not open.
        """
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

    def end(self, remembered: dict[str, Any], last: dict[str, Any] | None = None) -> None:
        """Write what is left and close the file.

        Args:
            remembered: what the monitor remembers before its last line.
            last: a line that gives way to a whole one, should the same run go on.
        """
        if self._file is None:
            return
        self._flush(self._file)
        resume = self._place(self._file, remembered)
        if last is not None:
            self.write(last)
            self._flush(self._file)
        self._file.close()
        self._file, self._resume = None, resume
        self._buffer.clear()

    def state_dict(self, remembered: dict[str, Any]) -> dict[str, Any]:
        """Make the file durable, and return its length and what the monitor remembers.

        Raises:
            CheckpointError: the disk did not take the lines; they are kept and tried again.
        """
        if self._file is None:
            return self._resume or {"offset": 0, **remembered}
        try:
            self._drain(self._file)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} was expected to be made durable for a checkpoint, but that failed: {error}. A "
                "run resumed from this checkpoint would have a gap in it",
                fix=f"make room there (df -h {self.path.parent})",
            ) from error
        return self._place(self._file, remembered)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to where `state` was taken, now or once it is open."""
        if self._file is None:
            self._resume = dict(state)
        else:
            self._go_back(self._file, state["offset"])

    def _place(self, file: BinaryIO, remembered: dict[str, Any]) -> dict[str, Any]:
        return {"offset": os.fstat(file.fileno()).st_size, **remembered}

    def _go_back(self, file: BinaryIO, offset: int) -> None:
        self._buffer.clear()
        size = os.fstat(file.fileno()).st_size
        if size < offset:
            warnings.warn(
                f"{self.path} was expected to have at least {offset} bytes, as at the checkpoint, but has "
                f"{size}: the lines between are lost, and it goes on from here",
                CheckpointWarning,
                stacklevel=4,
            )
        file.truncate(min(size, offset))

    def _flush(self, file: BinaryIO) -> None:
        """Hand the lines to the system; a full disk is told of, once, and does not stop the training."""
        try:
            self._drain(file)
        except OSError as error:
            if not self._is_warned:
                self._is_warned = True
                warn_unwritten(self.path, error)

    def _drain(self, file: BinaryIO) -> None:
        while self._buffer:
            written = file.write(self._buffer)
            del self._buffer[:written]
        self._is_warned = False


def warn_unwritten(path: Path, error: OSError) -> None:
    """Tell that lines could not be written."""
    warnings.warn(
        f"{path} could not be written ({error}); training goes on. Make room there (df -h {path.parent})",
        CheckpointWarning,
        stacklevel=3,
    )


def json_number(value: float | None) -> float | int | str | None:
    """Return `value` as JSON can hold it; what is no finite number under its name."""
    if value is None or math.isfinite(value):
        return value
    return str(float(value))


def check_every(every: int, fix: str) -> int:
    """Return a number of updates, or refuse what cannot be one."""
    number = cast(object, every)  # whatever a caller without a type checker gave
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(
            f"every was expected to be a whole number of updates, 1 or more, but is {number!r}: no line would ever "
            "be due",
            fix=fix,
        )
    return number
