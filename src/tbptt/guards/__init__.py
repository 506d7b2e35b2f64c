"""Guards: what may happen to an estimate before the optimizer sees it."""

from tbptt.estimators.boundary import ClipBoundary
from tbptt.guards.adaptive import AdaptiveClip
from tbptt.guards.base import Guard, RollBack
from tbptt.guards.clip import ClipNorm, ClipValue
from tbptt.guards.nonfinite import NonFinite
from tbptt.guards.spike import SpikeRollback
from tbptt.guards.zclip import ZClip

__all__ = [
    "AdaptiveClip",
    "ClipBoundary",
    "ClipNorm",
    "ClipValue",
    "Guard",
    "NonFinite",
    "RollBack",
    "SpikeRollback",
    "ZClip",
]
