"""Random feedback local online learning.

Letters: B lanes, N units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.forward_mode import Influence
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.local_rules import LocalRule
from tbptt.estimators.units import Units
from tbptt.tree import LaneDims
from tbptt.window import Window

__all__ = ["RFLO"]


@final
@dataclass(frozen=True)
class RFLO(LocalRule):
    """Follow, for each weight, its own unit's past through the unit's leak alone.

    For leaky units, h' = (1 - leak) h + leak phi(W (h, x, 1)): P <- (1 - leak) P + I, where I is the step's own
    influence, and the gradient is q P with q what the loss says of the unit. Without a leak that is truncation after
    one step.

    A model of learning that a circuit could do, more than a way to train: see `feedback`.

    Args:
        k1: steps of a window, at least 1; the rule is applied step by step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        feedback: "symmetric": q is the gradient of the step's loss with respect to the state after it. "random": the
            error at the outputs times fixed random weights, as a circuit has it that cannot send back.
        seed: of the random weights.
        leak: the share of a unit's state that is new at each step, above 0; 1 for none.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased: what goes round by other units is left out, and the slope of phi in the unit's own past. Equal to
        `TBPTT(1, 1)` without a leak (tests/estimators/test_local_rules.py), and to the published recursion
        (tests/estimators/test_published_traces.py); a learned initial state is carried on by it like any influence.
        Weights whose rows are no units, such as an embedding, are learned from each step alone.
    Cost: a step run twice, and four times back; B P numbers.
    Reference: Murray (2019), doi:10.7554/eLife.43299.

    Example:
        >>> RFLO(leak=0.2).kind
        'biased'
    """

    leak: float = 1.0

    @classmethod
    def examples(cls) -> tuple[RFLO, ...]:
        """Return a leak and none, in windows of one step and of several; see `Estimator.examples`."""
        return cls(leak=0.3), cls(k1=4), cls(leak=0.3, feedback="random")

    def __post_init__(self) -> None:
        LocalRule.__post_init__(self)
        if isinstance(self.leak, bool) or not 0 < self.leak <= 1:
            raise ConfigError(
                f"a leak above 0 and at most 1 was expected, but is {self.leak!r}: it is the share of a unit's state "
                "that is new at each step",
                fix="RFLO(leak=0.1); 1.0 for none",
            )

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Find out what is local to a unit.

        Raises:
            CapabilityError: the state has more than one tensor.
        """
        found = LocalRule.begin(self, model, window, dims)
        if found["layers"] != 1:
            raise CapabilityError(
                f"a state of one tensor, one number for each unit, was expected, but it has {found['layers']}: a leak "
                "is that of one number",
                fix="EProp(k1), which follows all numbers of a unit",
            )
        return found

    def local(self, units: Units, step: LaneSegment, draws: int) -> tuple[Units, Tensor]:
        """Return 1 - leak, whatever else a unit's state depends on."""
        del draws  # nothing is tried
        end = step.end
        return units, end.new_full((*end.shape, 1, 1), 1.0 - self.leak)

    def left_out(self, units: Units, places: Sequence[str]) -> str:
        """Return nothing: the leak alone is followed, as the method says of itself."""
        del units, places  # whatever they are
        return ""
