"""Gradient estimators; one method a file."""

from tbptt.estimators.base import Carry, Estimate, Estimator
from tbptt.estimators.tbptt import TBPTT, TBPTTCarry

__all__ = ["TBPTT", "Carry", "Estimate", "Estimator", "TBPTTCarry"]
