"""Real-time recurrent learning: the exact gradient, online.

Letters: B lanes, S numbers of a lane's state, P parameters that the state depends on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tbptt.estimators.forward_mode import CarriedInfluence, Influence, check_size
from tbptt.estimators.lane_segment import LaneSegment

__all__ = ["RTRL"]


@final
@dataclass(frozen=True)
class RTRL(CarriedInfluence):
    """Carry the influence of each weight on each number of the state along: the whole past's gradient at each step.

    J <- D J + I in each lane, with D = d end / d start of a window and I = d end / d weights at a fixed start; a
    window's gradient is that of its own losses within it, and (d losses / d start) J for all that came before. Exact
    like full backpropagation, without going back, and at a cost that does not grow with the age of the sequence.

    Not recommended beyond some hundreds of state numbers: B S P numbers are kept. For element-wise recurrences
    `ElementwiseRTRL` is as exact for B P; for others `UORO` and `SnAp` are cheaper and not exact.

    Args:
        k1: steps of a window, at least 1. The longer, the cheaper a step: D and I are of whole windows.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: a k1 that is no number of steps.

    Exactness: exact at weights that stay (tests/estimators/test_forward_mode.py). While they move J is a mixture of the
        influences of all weights there have been, and the largest stable learning rate is smaller, about in proportion
        to 1 / k1 (benchmarks/quality/stale.py).
    Cost: a window forward and S + 1 times back, all lanes side by side, S^2 P operations and S P numbers in each lane,
        P counting the weights that the state depends on. Refused above 2^28 numbers. Models that `torch.func.vmap`
        cannot run, such as nn.LSTM, are run lane by lane.
    Reference: Williams & Zipser (1989), doi:10.1162/neco.1989.1.2.270.

    Example:
        >>> import tbptt
        >>> model, stream = torch.nn.GRU(1, 4), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 4), lanes=2)
        >>> estimator = RTRL()
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(1):
        ...     estimate, carry = estimator.estimate(model, torch.nn.MSELoss(), carry, window)
        >>> carry.influence["weight_hh_l0"].shape  # lanes, numbers of the state, numbers of the weight
        torch.Size([2, 4, 48])
    """

    kind: ClassVar[str] = "exact"

    @classmethod
    def examples(cls) -> tuple[RTRL, ...]:
        """Return windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4)

    def reach(self, steps: int) -> None:
        """Return None: back to the start of the sequence."""
        del steps  # whatever their number

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return what arrives at the state times the influence on it."""
        return {name: torch.einsum("bs,bsp->p", arrived.to(each.dtype), each) for name, each in influence.items()}

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return D J + I."""
        del draws  # nothing is drawn
        lanes, size = segment.end.shape
        weights = sum(each.numel() for each in segment.parameters)
        check_size(
            lanes * size * weights,
            f"the influences of {weights} weights on the {size} numbers of {lanes} lanes' states",
            "TBPTT(k1, k2), UORO(k1), which keeps a sum of two vectors instead, or ElementwiseRTRL(k1) with a model "
            "whose recurrence is element-wise",
        )
        found, before = segment.jacobians()
        if before is not None:
            for name, each in influence.items():
                moved = torch.bmm(before.to(each.dtype), each)
                found[name] = found[name] + moved if name in found else moved
        return found
