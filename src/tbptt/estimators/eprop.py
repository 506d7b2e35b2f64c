"""Eligibility propagation.

Letters: B lanes, N units, L numbers of a unit's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tbptt.estimators.local_rules import LocalRule

__all__ = ["EProp"]


@final
@dataclass(frozen=True)
class EProp(LocalRule):
    """Follow, for each weight, an eligibility trace through the hidden numbers of its own unit.

    The trace says how a weight has influenced its own unit, by way of that unit alone: e <- d e + I, with d the
    derivative of the unit's numbers, such as potential and threshold of a spiking neuron, by the same unit's before.
    The gradient is q e, with q what the step's loss says of the unit. What a unit tells others, as by its spikes, is
    left out: of any two tensors of the state it is found out, when training begins, whether units depend on themselves
    alone.

    For spiking networks, and as a model of learning; for others `SnAp(n=1)` follows a unit's own past more exactly.

    Args:
        k1: steps of a window, at least 1; the rule is applied step by step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        feedback: "symmetric": q is the gradient of the step's loss with respect to the state after it. "random": the
            error at the outputs times fixed random weights.
        seed: of the random weights.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased, by all that goes round by other units (tests/estimators/test_local_rules.py has the published
        traces of a spiking network with adaptive thresholds). Weights whose rows are no units are learned from each
        step alone.
    Cost: a step run twice, and L + 2 times back; B L P numbers, L being the numbers of a unit.
    Reference: Bellec et al. (2020), doi:10.1038/s41467-020-17236-y.

    Example:
        >>> EProp(k1=1).kind
        'biased'
    """

    @classmethod
    def examples(cls) -> tuple[EProp, ...]:
        """Return both kinds of feedback, in windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4), cls(feedback="random")

    def local(self, slopes: Tensor, kept: Tensor) -> Tensor:
        """Return the derivatives of a unit's numbers by its own, and nothing where units depend on each other."""
        return torch.where(kept, slopes, 0.0)
