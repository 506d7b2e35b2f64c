"""Gradient estimators; one method a file."""

from tbptt.estimators.artbp import ARTBP
from tbptt.estimators.base import Carry, Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary
from tbptt.estimators.carry import ChainCarry
from tbptt.estimators.es_single import ESSingle
from tbptt.estimators.full_bptt import FullBPTT
from tbptt.estimators.mixture import Mixture
from tbptt.estimators.pes import PES
from tbptt.estimators.synthetic_gradients import SyntheticGradients
from tbptt.estimators.tbptt import TBPTT
from tbptt.estimators.telescope import Telescope
from tbptt.estimators.truncated_es import TruncatedES

__all__ = [
    "ARTBP",
    "PES",
    "TBPTT",
    "Carry",
    "ChainCarry",
    "ClipBoundary",
    "ESSingle",
    "Estimate",
    "Estimator",
    "FullBPTT",
    "Mixture",
    "SyntheticGradients",
    "Telescope",
    "TruncatedES",
]
