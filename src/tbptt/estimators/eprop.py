"""Eligibility propagation.

Letters: B lanes, N units, L numbers of a unit's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.local_rules import LocalRule
from tbptt.estimators.units import Units, followed

__all__ = ["EProp"]


@final
@dataclass(frozen=True)
class EProp(LocalRule):
    """Follow, for each weight, an eligibility trace through the hidden numbers of its own unit.

    The trace says how a weight has influenced its own unit, by way of that unit alone: e <- d e + I, with d the
    derivative of the unit's numbers, such as potential and threshold of a spiking neuron, by the same unit's before.
    The gradient is q e, with q what the step's loss says of the unit. What a unit tells others, as by its spikes, is
    left out, the recurrent weight of a unit to itself included: a number of the state is taken as a function of those
    that it is made of, tensors of the state before and after, such as a spike of its potential and threshold, and what
    depends by any of these on other units is left out, which `limits` names. That is looked for by derivatives at
    random weights and states when training begins, and tested at each step.

    For spiking networks, and as a model of learning; for others `SnAp(n=1)` follows a unit's own past more exactly.

    Args:
        k1: steps of a window, at least 1; the rule is applied step by step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        feedback: "symmetric": q is the gradient of the step's loss with respect to the state after it. "random": the
            error at the outputs times fixed random weights.
        seed: of the random weights.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased, by all that goes round by other units; the published traces for integrate-and-fire neurons with
        and without adaptive thresholds, in each spelling whose potential, threshold and spike are tensors of the state
        and that returns the very ones it computes with, whatever the reset (tests/estimators/test_published_traces.py).
        A unit's own part of what mixes units is lost with it: a potential whose recurrent input is made of spikes that
        are not in the state is followed in no step. A network of one unit has no others, and all of it is followed.
        Weights whose rows are no units are learned from each step alone.
    Cost: a step run twice, and 3 L + 3 times back; B L P numbers, L being the numbers of a unit.
    Reference: Bellec et al. (2020), doi:10.1038/s41467-020-17236-y.

    Example:
        >>> EProp(k1=1).kind
        'biased'
    """

    @classmethod
    def examples(cls) -> tuple[EProp, ...]:
        """Return both kinds of feedback, in windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4), cls(feedback="random")

    def local(self, units: Units, step: LaneSegment, draws: int) -> tuple[Units, Tensor]:
        """Return the derivatives of a unit's numbers by its own, by ways that stay within it."""
        return followed(units, step, draws)

    def left_out(self, units: Units, places: Sequence[str]) -> str:
        """Return the ways between the state's tensors by which units depend on each other."""
        layers, kept = units.layers, units.kept.tolist()
        ways = [
            f"{places[source % layers]} to {places[layer]}{'' if source < layers else ' within a step'}"
            for layer in range(layers)
            for source in range(2 * layers)
            if not kept[layer][source]
        ]
        if not ways:
            return ""
        return f"units depend on each other by {', '.join(ways)}: left out, with what they depend on themselves by it"
