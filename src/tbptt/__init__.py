"""Truncated backpropagation through time for any stateful PyTorch model."""

from tbptt import horizon, streams
from tbptt.adapters import Stateful, stateful
from tbptt.checks import CheckReport, check
from tbptt.codec import registered_class
from tbptt.comparison import Comparison, compare
from tbptt.errors import TbpttError
from tbptt.estimators import (
    ARTBP,
    KFRTRL,
    PES,
    RFLO,
    RTRL,
    TBPTT,
    UORO,
    Carry,
    ClipBoundary,
    ElementwiseRTRL,
    EProp,
    ESSingle,
    Estimate,
    Estimator,
    FullBPTT,
    Mixture,
    SnAp,
    SparseAttentiveBacktracking,
    SyntheticGradients,
    Telescope,
    TruncatedES,
)
from tbptt.evaluate import evaluate
from tbptt.guards import AdaptiveClip, ClipNorm, ClipValue, Guard, NonFinite, SpikeRollback, ZClip
from tbptt.length import Adaptive, Choice, Curriculum, Length, Ramp, RandomLength, scaled_rate
from tbptt.loss import Loss, WindowLoss
from tbptt.model import scan
from tbptt.models import SequenceModel
from tbptt.monitors import Alarms, LagCurves, MetricsFile, Monitor, Progress, StabilityFile, TensorBoard
from tbptt.online import Online
from tbptt.recurrence import Recurrence
from tbptt.streams import ArrayStream, Stream, TextStream
from tbptt.trainer import HeldOut, Saving, Summary, Trainer
from tbptt.tree import Tree
from tbptt.window import Window

__version__ = "0.1.0"

__all__ = [
    "ARTBP",
    "KFRTRL",
    "PES",
    "RFLO",
    "RTRL",
    "TBPTT",
    "UORO",
    "Adaptive",
    "AdaptiveClip",
    "Alarms",
    "ArrayStream",
    "Carry",
    "CheckReport",
    "Choice",
    "ClipBoundary",
    "ClipNorm",
    "ClipValue",
    "Comparison",
    "Curriculum",
    "EProp",
    "ESSingle",
    "ElementwiseRTRL",
    "Estimate",
    "Estimator",
    "FullBPTT",
    "Guard",
    "HeldOut",
    "LagCurves",
    "Length",
    "Loss",
    "MetricsFile",
    "Mixture",
    "Monitor",
    "NonFinite",
    "Online",
    "Progress",
    "Ramp",
    "RandomLength",
    "Recurrence",
    "Saving",
    "SequenceModel",
    "SnAp",
    "SparseAttentiveBacktracking",
    "SpikeRollback",
    "StabilityFile",
    "Stateful",
    "Stream",
    "Summary",
    "SyntheticGradients",
    "TbpttError",
    "Telescope",
    "TensorBoard",
    "TextStream",
    "Trainer",
    "Tree",
    "TruncatedES",
    "Window",
    "WindowLoss",
    "ZClip",
    "check",
    "compare",
    "evaluate",
    "horizon",
    "registered_class",
    "scaled_rate",
    "scan",
    "stateful",
    "streams",
]
