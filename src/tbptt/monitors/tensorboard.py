"""Curves for TensorBoard."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tbptt.errors import CapabilityError, ConfigError
from tbptt.monitors.base import Monitor, Plan, Update, Validation
from tbptt.monitors.readings import LossSum

__all__ = ["TensorBoard"]


class TensorBoard(Monitor):
    """Write loss, gradient norm, look-back, learning rate and every other metric for TensorBoard.

    For looking at a run while it goes; `MetricsFile` is the record. The loss is sum / count since the last
    point. A resumed run hides the points beyond its checkpoint.

    Args:
        directory: where the event files go, such as runs/a/tensorboard.
        every: updates to a point, 1 or more.

    Raises:
        CapabilityError: tensorboard is not installed; told at once, not after hours of training.
    """

    def __init__(self, directory: str | Path, every: int = 10) -> None:
        number = cast(object, every)  # whatever a caller without a type checker gave
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(
                f"every was expected to be a whole number of updates, 1 or more, but is {number!r}: no "
                "point would "
                "ever be due",
                fix="TensorBoard(directory, every=10)",
            )
        try:
            self._module: Any = import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise CapabilityError(
                f"TensorBoard needs the package tensorboard, which cannot be imported ({error}): no curve "
                "could be "
                "written",
                fix="pip install 'tbptt[tensorboard]'",
            ) from error
        self.directory = Path(directory)
        self.every = every
        self._writer: Any = None
        self._losses = LossSum()

    def begin(self, plan: Plan) -> None:
        """Open a new event file."""
        self.end()
        purge = plan.update + 1 if plan.update else None
        self._writer = self._module.SummaryWriter(str(self.directory), purge_step=purge)

    def update(self, update: Update) -> None:
        """Count one update, and write a point if it is time."""
        estimate = update.estimate
        self._losses.add(estimate)
        if update.number % self.every or self._writer is None:
            return
        points: dict[str, float] = {
            "lookback": estimate.lookback,
            "learning_rate": update.learning_rate,
            "refused": float(update.refused),
        }
        for name, value in (("loss", self._losses.mean()), ("gradient_norm", update.gradient_norm())):
            if value is not None:
                points[name] = value
        self._losses = LossSum()
        self._add("train", estimate.metrics | points, update.number)

    def validation(self, validation: Validation) -> None:
        """Write the metrics of one validation."""
        if self._writer is not None:
            self._add("validation", validation.metrics, validation.number)

    def end(self) -> None:
        """Write what is left and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Write everything down; nothing needs to be remembered."""
        if self._writer is not None:
            self._writer.flush()
        return {}

    def _add(self, group: str, points: dict[str, float], number: int) -> None:
        for name, value in points.items():
            self._writer.add_scalar(f"{group}/{name}", float(value), number)
