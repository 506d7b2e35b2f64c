"""Stateful models of our own: only what no library has."""

from tbptt.models.influence import InfluenceBalancingModel
from tbptt.models.sequence import SequenceModel

__all__ = ["InfluenceBalancingModel", "SequenceModel"]
