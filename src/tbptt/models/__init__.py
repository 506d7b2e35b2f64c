"""Stateful models of our own: only what no library has."""

from tbptt.models.attentive import Attentive
from tbptt.models.elstm import ELSTM
from tbptt.models.influence import InfluenceBalancingModel
from tbptt.models.lru import LRU
from tbptt.models.segmented import SegmentState, SegmentTransformer
from tbptt.models.sequence import SequenceModel
from tbptt.recurrence import Recurrence

__all__ = [
    "ELSTM",
    "LRU",
    "Attentive",
    "InfluenceBalancingModel",
    "Recurrence",
    "SegmentState",
    "SegmentTransformer",
    "SequenceModel",
]
