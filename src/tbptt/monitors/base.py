"""What every monitor sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tbptt.estimators.base import Estimate

__all__ = ["Monitor", "Plan", "Update", "Validation"]


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, told to monitors before the first update.

    Args:
        update: the number of updates already made (more than 0 when the run was resumed).
        updates: the number of updates at which it ends, if it is known.
        lanes: sequences side by side.
    """

    update: int
    updates: int | None
    lanes: int


@dataclass(frozen=True, eq=False)
class Update:
    """One update, as monitors see it.

    Args:
        number: the number of updates made, this one included.
        passes: the number of passes over the stream completed before this update.
        position: the index, in its pass, of the step after the window.
        steps: the number of steps in the window.
        lanes: the number of lanes.
        estimate: the estimate after the guards; the one before them if the update was refused.
        applied: False when a guard refused it or there was no target in the window.
        learning_rate: of the first parameter group.
    """

    number: int
    passes: int
    position: int
    steps: int
    lanes: int
    estimate: Estimate
    applied: bool
    learning_rate: float

    def to_keep(self) -> Update:
        """Return the update without its gradients, their norm measured, for a monitor that remembers it.

        Whoever keeps the update itself keeps memory as large as the model, through the next backward pass.
        """
        estimate = self.estimate
        measured = {}
        if estimate.num_injected and "gradient_norm" not in estimate.metrics:
            measured["gradient_norm"] = float(estimate.gradient_norm())
        return replace(self, estimate=estimate.with_gradients({}, **measured))


@dataclass(frozen=True)
class Validation:
    """The metrics on the held-out stream after an update."""

    number: int
    metrics: dict[str, float]


class Monitor:
    """Observes and records; never changes anything. Every method does nothing unless overridden."""

    def begin(self, plan: Plan) -> None:
        """Hear what the run is going to do."""

    def update(self, update: Update) -> None:
        """See one update."""

    def validation(self, validation: Validation) -> None:
        """See one validation."""

    def message(self, text: str) -> None:
        """Hear of something that a person should know: a checkpoint written, an update refused."""

    def end(self) -> None:
        """The run has stopped, for whatever reason: write what is left, give the terminal back."""

    def state_dict(self) -> dict[str, Any]:
        """Write everything down durably, and return what is needed to go on from here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        del state  # nothing is remembered
