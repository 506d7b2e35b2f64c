"""Estimators side by side: what their gradients are worth, what they cost, and how far training gets with them."""

from tbptt.comparison.result import Comparison, Curve, Row
from tbptt.comparison.side_by_side import compare

__all__ = ["Comparison", "Curve", "Row", "compare"]
