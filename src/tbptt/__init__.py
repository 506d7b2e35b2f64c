"""Truncated backpropagation through time for any stateful PyTorch model."""

from tbptt import horizon, streams
from tbptt.adapters import Stateful, stateful
from tbptt.checks import CheckReport, check
from tbptt.comparison import Comparison, compare
from tbptt.errors import TbpttError
from tbptt.estimators import TBPTT, Carry, Estimate, Estimator
from tbptt.evaluate import evaluate
from tbptt.guards import ClipNorm, ClipValue, Guard, NonFinite
from tbptt.length import Adaptive, Choice, Length, Ramp, RandomLength, scaled_rate
from tbptt.loss import Loss
from tbptt.model import scan
from tbptt.models import SequenceModel
from tbptt.monitors import Alarms, LagCurves, MetricsFile, Monitor, Progress, StabilityFile, TensorBoard
from tbptt.streams import ArrayStream, Stream, TextStream
from tbptt.trainer import HeldOut, Saving, Summary, Trainer
from tbptt.tree import Tree
from tbptt.window import Window

__version__ = "0.1.0"

__all__ = [
    "TBPTT",
    "Adaptive",
    "Alarms",
    "ArrayStream",
    "Carry",
    "CheckReport",
    "Choice",
    "ClipNorm",
    "ClipValue",
    "Comparison",
    "Estimate",
    "Estimator",
    "Guard",
    "HeldOut",
    "LagCurves",
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
    "StabilityFile",
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
    "compare",
    "evaluate",
    "horizon",
    "scaled_rate",
    "scan",
    "stateful",
    "streams",
]
