"""The gradient of one loss told apart by the ways in which it goes back: `tbptt.pathways`.

Letters: B lanes, N probes, K lags, L longest lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tbptt.estimators.gradients import Gradients
from tbptt.estimators.segments import Boundary
from tbptt.horizon.statistics import Band, band
from tbptt.pathways import pathways_of
from tbptt.tree import Tree, tensors

__all__ = ["OneWay", "Way", "only", "part_of"]


@dataclass(frozen=True, eq=False)
class OneWay:
    """What one loss gave along one way; see `Way`.

    Args:
        crossing: by lag. Shape (K,).
        alone: by lag. Shape (K,).
        inputs: by lag from 0. Shape (L,); None where there is none to ask about.
    """

    crossing: Tensor
    alone: Tensor
    inputs: Tensor | None


@dataclass(frozen=True)
class Way:
    """How far the gradient goes by one way.

    Args:
        crossing: norm of the gradient with respect to this part of the state, by lag: all that arrives there, by
            whichever ways it came so far.
        alone: the same, of what has come so far through this part alone: where it crossed from one piece of the
            sequence to the one before, all other parts of the state were stopped.
        inputs: norm of what arrives so at the input, by lag from 0; zero in the newest piece, which nothing crosses.
            None where a model has nothing of the kind.
    """

    crossing: Band
    alone: Band
    inputs: Band | None

    @staticmethod
    def of(lags: Sequence[int], probes: Sequence[OneWay]) -> Way:
        """Return the means and intervals over probes, N."""
        crossing = torch.stack([each.crossing for each in probes]).numpy()
        alone = torch.stack([each.alone for each in probes]).numpy()
        arrived = [each.inputs for each in probes if each.inputs is not None]
        inputs = torch.stack(arrived).numpy() if len(arrived) == len(probes) else None
        seen = None if inputs is None else band(range(inputs.shape[1]), inputs)
        return Way(band(lags, crossing), band(lags, alone), seen)


def only(model: nn.Module, name: str) -> Boundary:
    """Return the rule that lets one way's part of the gradient cross a boundary, and stops the others."""

    def rule(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
        del index  # whichever it is
        return part_of(model, name, start, cotangent)

    return rule


def part_of(model: nn.Module, name: str, start: Tree, cotangent: Gradients) -> Gradients:
    """Return one way's part of the gradient of a state; all of it is gone where a state has not got that way yet."""
    mine = pathways_of(model, start).get(name, ())
    places = [place for place, leaf in enumerate(tensors(start)) if leaf.requires_grad]
    return [gradient if place in mine else None for place, gradient in zip(places, cotangent, strict=True)]
