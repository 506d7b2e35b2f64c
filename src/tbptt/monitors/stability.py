"""Whether a run is healthy, as JSON lines that repeat bit for bit: norms at the boundaries, state, weights, lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tbptt.monitors.base import Alarm, Monitor, Plan, Update
from tbptt.monitors.lines import Lines, check_every, json_number
from tbptt.monitors.readings import Running, movement, read_state

__all__ = ["StabilityFile"]

_NEWEST = 0.1
"""The weight of the newest line in the mean that `state_drift` is against."""


class StabilityFile(Monitor):
    """Append a JSON line of what tells a healthy run from an unhealthy one, every few updates.

    As `metrics.jsonl`, the file holds nothing that depends on the clock: that of a run which was killed and resumed
    equals, byte for byte, that of one which never stopped. A line of kind "stability" has

        update, position, steps (of the update's window, k1), lookback, rate_factor; for lengths that change k1 and k2
        gradient_norm: of the update, before clipping
        boundary_norms: of the gradient with respect to the state at each boundary crossed, newest first
        state_norm: sqrt(sum |v|^2 / count) over all floating-point values v of the carried state, all lanes together
        state_drift: state_norm / mean - 1, the mean being that of the lines before: a plain one of the first ten,
            from then on each newer line weighs 0.1; null in the first line, and where the mean is 0
        saturated: the share of values with |v| > 0.97 among those state tensors whose values all lie in [-1, 1], as
            those of an LSTM's or a GRU's output do; null when there is none. A tensor that only happens to lie there,
            such as an LSTM's cell before it has learned, is counted in as long as it does
        update_ratio: norm of the change of all weights by this update, over their norm before it; 0 when the update
            was refused. Around 0.001 is usual; far more is restless, far less does not move
        largest_update_ratio, largest_update: the largest such ratio of one parameter, those of norm 0 left out, and
            that parameter's name

    At each update that ends with a probe of an `Adaptive` length there is one of kind "length", with update, k1, k2,
    needed_lookback, decay_rate; see `tbptt.curve`. And each alarm that the monitor hears makes one of kind "alarm",
    with update, name, message, fix. JSON has no NaN and no infinity: they are the strings "nan", "inf" and "-inf".
    null says that there was nothing to measure.

    Args:
        path: the file. A run that starts at update 0 empties it; one that resumes cuts it back to where its
            checkpoint was taken.
        every: updates to a line, 1 or more: there is one at each update whose number is a multiple.

    Cost: one copy of the weights, made one update before a line is due and let go with it, and another while the line
        is written; some passes over weights and state for each line, and nothing else for the updates between.
    """

    def __init__(self, path: str | Path, every: int = 10) -> None:
        self.path = Path(path)
        self.every = check_every(every, "StabilityFile(path, every=10)")
        self._lines = Lines(path)
        self._norm = Running(_NEWEST)
        self._before: dict[str, Tensor] = {}

    def begin(self, plan: Plan) -> None:
        """Open the file: emptied for a new run, cut back for a resumed one."""
        self._recall(self._lines.begin(plan))
        self._copy_if_due(plan.update, plan.weights)

    def update(self, update: Update) -> None:
        """Write the lines that are due, and remember the weights if the next update's is."""
        metrics = update.estimate.metrics
        if "needed_lookback" in metrics:
            self._lines.write(
                {
                    "kind": "length",
                    "update": update.number,
                    **_lengths(metrics),
                    "needed_lookback": int(metrics["needed_lookback"]),
                    "decay_rate": json_number(metrics.get("decay_rate")),
                }
            )
        if update.number % self.every == 0:
            self._lines.write(self._line(update))
        self._copy_if_due(update.number, update.weights)

    def alarm(self, alarm: Alarm) -> None:
        """Write a line."""
        self._lines.write(
            {
                "kind": "alarm",
                "update": alarm.update,
                "name": alarm.name,
                "message": alarm.message,
                "fix": alarm.fix,
            }
        )

    def end(self) -> None:
        """Write what is left and close the file."""
        self._lines.end(self._norm.state_dict())
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        """Make the file durable, and return its length and the mean of the state's norm.

        Raises:
            CheckpointError: the disk did not take the lines; they are kept and tried again.
        """
        return self._lines.state_dict(self._norm.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to where `state` was taken, now or once it is open."""
        self._lines.load_state_dict(state)
        self._recall(state)

    def _recall(self, state: dict[str, Any]) -> None:
        self._norm = Running(_NEWEST, state.get("mean", 0.0), state.get("count", 0))

    def _copy_if_due(self, number: int, weights: Mapping[str, Tensor]) -> None:
        due = (number + 1) % self.every == 0
        self._before = {name: value.detach().clone() for name, value in weights.items()} if due else {}

    def _line(self, update: Update) -> dict[str, Any]:
        estimate, state = update.estimate, read_state(update.state)
        moved = movement(self._before, update.weights)
        drift = state.norm / self._norm.mean - 1 if state.norm is not None and self._norm.mean else None
        if state.norm is not None and math.isfinite(state.norm):  # what is not would stay in the mean for ever
            self._norm.add(state.norm)
        return {
            "kind": "stability",
            "update": update.number,
            "position": update.position,
            "steps": update.steps,
            "lookback": estimate.lookback,
            **_lengths(estimate.metrics),
            "rate_factor": json_number(estimate.rate_factor),
            "gradient_norm": json_number(update.gradient_norm()),
            "boundary_norms": [json_number(norm) for norm in estimate.boundary_norms.tolist()],
            "boundary_lags": list(estimate.boundary_lags),
            "state_norm": json_number(state.norm),
            "state_drift": json_number(drift),
            "saturated": state.saturated,
            "update_ratio": json_number(moved.ratio),
            "largest_update_ratio": json_number(moved.largest),
            "largest_update": moved.parameter,
        }


def _lengths(metrics: Mapping[str, float]) -> dict[str, int]:
    """Return k1 and k2 where they change."""
    return {name: int(metrics[name]) for name in ("k1", "k2") if name in metrics}
