"""Gradient estimators; one method a file."""

from tbptt.estimators.artbp import ARTBP
from tbptt.estimators.base import Carry, Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary
from tbptt.estimators.carry import ChainCarry
from tbptt.estimators.elementwise_rtrl import ElementwiseRTRL
from tbptt.estimators.eprop import EProp
from tbptt.estimators.es_single import ESSingle
from tbptt.estimators.full_bptt import FullBPTT
from tbptt.estimators.kfrtrl import KFRTRL
from tbptt.estimators.mixture import Mixture
from tbptt.estimators.pes import PES
from tbptt.estimators.rflo import RFLO
from tbptt.estimators.rtrl import RTRL
from tbptt.estimators.snap import SnAp
from tbptt.estimators.sparse_attentive_backtracking import SparseAttentiveBacktracking
from tbptt.estimators.synthetic_gradients import SyntheticGradients
from tbptt.estimators.tbptt import TBPTT
from tbptt.estimators.telescope import Telescope
from tbptt.estimators.truncated_es import TruncatedES
from tbptt.estimators.uoro import UORO

__all__ = [
    "ARTBP",
    "KFRTRL",
    "PES",
    "RFLO",
    "RTRL",
    "TBPTT",
    "UORO",
    "Carry",
    "ChainCarry",
    "ClipBoundary",
    "EProp",
    "ESSingle",
    "ElementwiseRTRL",
    "Estimate",
    "Estimator",
    "FullBPTT",
    "Mixture",
    "SnAp",
    "SparseAttentiveBacktracking",
    "SyntheticGradients",
    "Telescope",
    "TruncatedES",
]
