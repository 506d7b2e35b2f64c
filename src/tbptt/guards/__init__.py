"""Guards: what may happen to an estimate before the optimizer sees it."""

from tbptt.guards.base import Guard
from tbptt.guards.clip import ClipNorm, ClipValue
from tbptt.guards.nonfinite import NonFinite

__all__ = ["ClipNorm", "ClipValue", "Guard", "NonFinite"]
