"""What every monitor sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt.estimators.base import Estimate
from tbptt.tree import Tree

__all__ = ["Alarm", "Monitor", "Plan", "Update", "Validation"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run is going to do, told to monitors before the first update.

    Args:
        update: the number of updates already made (more than 0 when the run was resumed).
        updates: the number of updates at which it ends, if it is known.
        lanes: sequences side by side.
        weights: the model's trainable parameters as they are now, by name: references, not copies.
    """

    update: int
    updates: int | None
    lanes: int
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


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
        learning_rate: of the first parameter group, with the estimate's `rate_factor`.
        state: what the model carries on after this update, detached; None where it is not known.
        weights: the model's trainable parameters as they are now, by name: references, not copies.
    """

    number: int
    passes: int
    position: int
    steps: int
    lanes: int
    estimate: Estimate
    applied: bool
    learning_rate: float
    state: Tree | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def refused(self) -> bool:
        """Whether a guard left it out; a window without targets is not refused, there is nothing to learn from it."""
        return not self.applied and self.estimate.num_injected > 0

    def gradient_norm(self) -> float | None:
        """Return the norm before clipping, as a guard measured it, or now; None when no loss was injected."""
        estimate = self.estimate
        if not estimate.num_injected:
            return None
        norm = estimate.metrics.get("gradient_norm")
        return estimate.gradient_norm().item() if norm is None else norm

    def to_keep(self) -> Update:
        """Return the update without gradients, state and weights, the gradients' norm measured, to be remembered.

        Whoever keeps the update itself keeps memory as large as the model, through the next backward pass.
        """
        norm = self.gradient_norm()
        measured = {} if norm is None else {"gradient_norm": norm}
        return replace(self, estimate=self.estimate.with_gradients({}, **measured), state=None, weights={})


@dataclass(frozen=True)
class Validation:
    """The metrics on the held-out stream after an update."""

    number: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong, and what to do about it.

    Args:
        name: what kind of thing: one of `tbptt.monitors.alarms.KINDS`, or "exactness", said once when a run begins.
        update: the number of updates made when it was seen.
        message: what was expected, what came, and why it matters.
        fix: what to do, as code.
    """

    name: str
    update: int
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name} at update {self.update}: {self.message}\nhint: {self.fix}"


class Monitor:
    """Observes and records; never changes anything. Every method does nothing unless overridden."""

    def begin(self, plan: Plan) -> None:
        """Hear what the run is going to do."""

    def update(self, update: Update) -> None:
        """See one update."""

    def validation(self, validation: Validation) -> None:
        """See one validation."""

    def alarm(self, alarm: Alarm) -> None:
        """Hear an alarm, after the update that raised it."""

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
