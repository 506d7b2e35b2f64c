"""Monitors: what a run tells, to files and to people."""

from tbptt.monitors.alarms import Alarms
from tbptt.monitors.base import Alarm, Monitor, Plan, Update, Validation
from tbptt.monitors.lags import LagCurves
from tbptt.monitors.metrics import MetricsFile
from tbptt.monitors.progress import Progress
from tbptt.monitors.stability import StabilityFile
from tbptt.monitors.tensorboard import TensorBoard
from tbptt.monitors.timing import TimingFile

__all__ = [
    "Alarm",
    "Alarms",
    "LagCurves",
    "MetricsFile",
    "Monitor",
    "Plan",
    "Progress",
    "StabilityFile",
    "TensorBoard",
    "TimingFile",
    "Update",
    "Validation",
]
