"""Where the steps come from: resumable streams of windows, of bounded memory."""

from tbptt.streams.arrays import ArrayStream, split_rows
from tbptt.streams.base import Stream
from tbptt.streams.datasets import ecg, ecg_rows, shakespeare
from tbptt.streams.tasks import Adding, CopyTask, DelayedRecall, InfluenceBalancing, SyntheticStream
from tbptt.streams.text import TextStream, Vocabulary

__all__ = [
    "Adding",
    "ArrayStream",
    "CopyTask",
    "DelayedRecall",
    "InfluenceBalancing",
    "Stream",
    "SyntheticStream",
    "TextStream",
    "Vocabulary",
    "ecg",
    "ecg_rows",
    "shakespeare",
    "split_rows",
]
