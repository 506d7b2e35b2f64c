"""A detector that watches the loss of the predictions, such as those of river."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import torch

from tbptt.codec import encode
from tbptt.errors import CapabilityError, CheckpointError, CheckpointWarning
from tbptt.loss import StepLoss
from tbptt.model import eval_mode
from tbptt.online.pending import Step
from tbptt.window import Window

__all__ = ["DriftDetector", "DriftWatch"]

_DRIFTS = 1000
"""The newest drifts that are remembered, so that a stream without end fits into memory."""


@runtime_checkable
class DriftDetector(Protocol):
    """What watches a running number for a change; the detectors of river are of this kind."""

    @property
    def drift_detected(self) -> bool:
        """Whether the last number has shown a change."""
        ...

    def update(self, x: float, /) -> Any:
        """See the next number."""
        ...


class DriftWatch:
    """Shows a detector the loss of each prediction, and remembers what it has found.

    Args:
        detector: what was given; None for none.
        loss: of the predictions.

    Attributes:
        found: the steps at whose labels there was a change; the newest 1000.

    Raises:
        CapabilityError: it is no detector.
    """

    def __init__(self, detector: object, loss: StepLoss) -> None:
        if detector is not None and not isinstance(detector, DriftDetector):
            raise CapabilityError(
                f"a drift detector with update(value) and drift_detected was expected, but a "
                f"{type(detector).__name__} came: nothing would be watched",
                fix="drift=river.drift.ADWIN()",
            )
        self.detector, self.loss = detector, loss
        self.found: list[int] = []
        self._warned = False

    def see(self, step: Step) -> str:
        """Show the detector how far a prediction was off; return what is to be said of it, empty for nothing."""
        if self.detector is None or step.targets is None:
            return ""
        window = Window(step.window.inputs, step.targets)
        if step.mask is not None:
            window = Window(step.window.inputs, step.targets, step.mask[None])
        with torch.no_grad(), eval_mode(self.loss.module):  # as the prediction was made
            losses, valid = self.loss.by_step(step.outputs, window)
        if not bool(valid.any()):
            return ""
        loss = float(losses[valid].double().mean())
        if loss - loss != 0:  # a detector's running means would never be numbers again
            return f"the loss of the prediction at step {step.number} is {loss}; the drift detector was not shown it"
        self.detector.update(loss)
        if not self.detector.drift_detected:
            return ""
        self.found = [*self.found, step.number][-_DRIFTS:]
        return (
            f"drift at step {step.number}: {type(self.detector).__name__} finds that the loss of the predictions has "
            f"changed (it is {loss:.6g} now); nothing was done about it"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the detector if it can be saved; else say so, once."""
        return {"found": list(self.found), "detector": self.detector if self._can_be_saved() else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a saved detector takes the place of the one that was given."""
        self.found = list(state["found"])
        if state["detector"] is not None:
            self.detector = state["detector"]

    def _can_be_saved(self) -> bool:
        try:
            encode(self.detector, "drift", {})
        except CheckpointError as error:
            if not self._warned:
                warnings.warn(
                    f"the drift detector cannot be saved, so that a loaded learner begins with a new one: "
                    f"{error.message}",
                    CheckpointWarning,
                    stacklevel=4,
                )
            self._warned = True
            return False
        return True
