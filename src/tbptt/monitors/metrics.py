"""What a run measured, as JSON lines that repeat bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbptt.monitors.base import Monitor, Plan, Update, Validation
from tbptt.monitors.lines import Lines, check_every, json_number
from tbptt.monitors.readings import LossSum

__all__ = ["MetricsFile"]


class MetricsFile(Monitor):
    """Append one JSON line every few updates, and one for each validation.

    The file holds nothing that depends on the clock or the machine's load: that of a run which was killed
    and resumed equals, byte for byte, that of one which never stopped. A line of an update has

        kind; of the last update: update, passes, position, steps (of its window, k1), gradient_norm (before
        clipping), lookback, learning_rate; since the last line: loss (sum / count), terms (that count),
        refused (updates that a guard left out; their losses are counted in)

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
        self.every = check_every(every, "MetricsFile(path, every=10)")
        self._lines = Lines(path)
        self._recall({})

    def begin(self, plan: Plan) -> None:
        """Open the file: emptied for a new run, cut back for a resumed one."""
        self._recall(self._lines.begin(plan))

    def update(self, update: Update) -> None:
        """Count one update, and write a line if it is time."""
        self._losses.add(update.estimate)
        self._last = {
            "update": update.number,
            "passes": update.passes,
            "position": update.position,
            "steps": update.steps,
            "gradient_norm": json_number(update.gradient_norm()),
            "lookback": update.estimate.lookback,
            "learning_rate": json_number(update.learning_rate),
        }
        self._num_updates += 1
        self._num_refused += update.refused
        if self._num_updates >= self.every:
            self._lines.write(self._line())
            self._recall({})

    def validation(self, validation: Validation) -> None:
        """Write a line."""
        line: dict[str, Any] = {"kind": "validation", "update": validation.number}
        for name, value in validation.metrics.items():
            line[f"{name}_" if name in line else name] = json_number(value)
        self._lines.write(line)

    def end(self) -> None:
        """Write what is left and close the file."""
        if self._lines.is_open:
            self._lines.end(self._remembered(), self._line() if self._last else None)
            self._recall({})

    def state_dict(self) -> dict[str, Any]:
        """Make the file durable, and return its length and what the next line has so far.

        Raises:
            CheckpointError: the disk did not take the lines; they are kept and tried again.
        """
        return self._lines.state_dict(self._remembered())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to where `state` was taken, now or once it is open."""
        self._lines.load_state_dict(state)
        self._recall(state)

    def _remembered(self) -> dict[str, Any]:
        return {
            **self._losses.state_dict(),
            "updates": self._num_updates,
            "refused": self._num_refused,
            "last": self._last,
        }

    def _recall(self, state: dict[str, Any]) -> None:
        self._losses = LossSum.from_state_dict(state)
        self._num_updates: int = state.get("updates", 0)
        self._num_refused: int = state.get("refused", 0)
        self._last: dict[str, Any] = state.get("last", {})  # what a line says of its last update alone

    def _line(self) -> dict[str, Any]:
        losses = {"loss": json_number(self._losses.mean()), "terms": self._losses.num_terms}
        return {"kind": "update", **self._last, **losses, "refused": self._num_refused}
