"""Gradient estimators; one method a file."""

from tbptt.estimators.base import Carry, Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary
from tbptt.estimators.carry import ChainCarry
from tbptt.estimators.tbptt import TBPTT

__all__ = ["TBPTT", "Carry", "ChainCarry", "ClipBoundary", "Estimate", "Estimator"]
