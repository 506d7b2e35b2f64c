"""Monitors: what a run tells, to files and to people."""

from tbptt.monitors.base import Monitor, Plan, Update, Validation
from tbptt.monitors.metrics import MetricsFile, TimingFile
from tbptt.monitors.progress import Progress
from tbptt.monitors.tensorboard import TensorBoard

__all__ = [
    "MetricsFile",
    "Monitor",
    "Plan",
    "Progress",
    "TensorBoard",
    "TimingFile",
    "Update",
    "Validation",
]
