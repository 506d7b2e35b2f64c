"""Truncated backpropagation through time for any stateful PyTorch model."""

from tbptt.checks import CheckReport, check
from tbptt.errors import TbpttError
from tbptt.estimators import TBPTT, Carry, Estimate, Estimator
from tbptt.loss import Loss
from tbptt.model import scan
from tbptt.tree import Tree
from tbptt.window import Window

__version__ = "0.1.0"

__all__ = [
    "TBPTT",
    "Carry",
    "CheckReport",
    "Estimate",
    "Estimator",
    "Loss",
    "TbpttError",
    "Tree",
    "Window",
    "check",
    "scan",
]
