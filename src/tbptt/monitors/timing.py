"""Speed and memory, as JSON lines: what no two runs agree on."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import cast

import torch

from tbptt.errors import ConfigError
from tbptt.monitors.base import Monitor, Plan, Update
from tbptt.monitors.lines import warn_unwritten

__all__ = ["TimingFile"]


class TimingFile(Monitor):
    """Append a JSON line of speed and memory every few seconds.

    Apart from `MetricsFile`, because no two runs agree on it. A line has

        update, elapsed_s (since this process began the run), steps_per_s, lane_steps_per_s (both since the last
        line), peak_rss_bytes (of the process; null where the system does not tell), peak_device_bytes (most that
        torch has had allocated at one time on the CUDA device that the losses are on, since the process began or
        torch.cuda.reset_peak_memory_stats was called; null on any other device)

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
        self._device = torch.device("cpu")

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
        self._device = update.estimate.loss_sum.device
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
            "peak_device_bytes": torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            warn_unwritten(self.path, error)
        self._written_s = now_s
        self._steps = self._lane_steps = 0


def _peak_rss_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
