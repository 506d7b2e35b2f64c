"""Truncated backpropagation through time for any stateful PyTorch model."""

from tbptt.adapters import Stateful, stateful
from tbptt.checks import CheckReport, check
from tbptt.errors import TbpttError
from tbptt.estimators import TBPTT, Carry, Estimate, Estimator
from tbptt.evaluate import evaluate
from tbptt.guards import ClipNorm, ClipValue, Guard, NonFinite
from tbptt.length import Adaptive, Choice, Length, Ramp, RandomLength, scaled_rate
from tbptt.loss import Loss
from tbptt.model import scan
from tbptt.models import SequenceModel
from tbptt.monitors import MetricsFile, Monitor, Progress, TensorBoard
from tbptt.streams import ArrayStream, Stream, TextStream
from tbptt.trainer import HeldOut, Saving, Summary, Trainer
from tbptt.tree import Tree
from tbptt.window import Window

__version__ = "0.1.0"

__all__ = [
    "TBPTT",
    "Adaptive",
    "ArrayStream",
    "Carry",
    "CheckReport",
    "Choice",
    "ClipNorm",
    "ClipValue",
    "Estimate",
    "Estimator",
    "Guard",
    "HeldOut",
    "Length",
    "Loss",
    "MetricsFile",
    "Monitor",
    "NonFinite",
    "Progress",
    "Ramp",
    "RandomLength",
    "Saving",
    "SequenceModel",
    "Stateful",
    "Stream",
    "Summary",
    "TbpttError",
    "TensorBoard",
    "TextStream",
    "Trainer",
    "Tree",
    "Window",
    "check",
    "evaluate",
    "scaled_rate",
    "scan",
    "stateful",
]
