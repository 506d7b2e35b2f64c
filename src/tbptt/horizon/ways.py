"""The gradient of one loss told apart by the ways in which it goes back: `tbptt.pathways`.

Letters: B lanes, N probes, K lags, L longest lag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tbptt.curve import Floats
from tbptt.estimators.segments import Boundary, Gradients, Segment, walk_back
from tbptt.horizon.statistics import Band, band
from tbptt.pathways import pathways_of
from tbptt.tree import Tree, tensors

__all__ = ["Norm", "Way", "parts_crossing", "ways_back"]


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
    def of(lags: Sequence[int], crossing: Floats, alone: Floats, inputs: Floats | None) -> Way:
        """Return the means and intervals over probes. Shapes (N, K), (N, K) and (N, L)."""
        seen = None if inputs is None else band(range(inputs.shape[1]), inputs)
        return Way(band(lags, crossing), band(lags, alone), seen)


Norm: TypeAlias = Callable[[Gradients, Tree], Tensor]
"""Of a gradient with respect to a state, and that state: 0-dim."""


def ways_back(
    model: nn.Module,
    names: Sequence[str],
    chain: Sequence[Segment],
    weight: Tensor,
    norm: Norm,
    tapped: Sequence[Sequence[Tensor]],
    norms_of_inputs: Callable[[int, Gradients], Tensor] | None,
) -> dict[str, tuple[dict[int, Tensor], Tensor | None]]:
    """Send the loss of a chain back along each way alone.

    Args:
        model: tells which part of the state is which way.
        names: of the ways.
        chain: of pieces in which nothing is to be told apart; their graphs are gone afterwards.
        weight: of the loss.
        norm: of a gradient of a state.
        tapped: for each piece, the inputs to ask about.
        norms_of_inputs: of a piece's inputs, by lag, newest first; None for no inputs.

    Returns:
        By way: the norm at the start of each piece, by its place in the chain; and at the inputs, by lag.

    Cost: a backward pass over the chain for each way.
    """
    found: dict[str, tuple[dict[int, Tensor], Tensor | None]] = {}
    for name in names:
        at_start: dict[int, Tensor] = {}
        pieces: list[Tensor] = []
        keep = name != names[-1]
        for step in walk_back(chain, tapped, weight, keep=keep, to_start=True, boundary=_only(model, name)):
            start = chain[step.index].start
            if start is not None:
                at_start[step.index] = norm(_part(model, name, start, step.cotangent), start)
            if norms_of_inputs is not None:
                norms = norms_of_inputs(step.index, step.gradients)
                pieces.append(norms if step.index < len(chain) - 1 else torch.zeros_like(norms))
        found[name] = at_start, torch.cat(pieces) if pieces else None
    return found


def parts_crossing(
    model: nn.Module, names: Sequence[str], start: Tree, cotangent: Gradients, norm: Norm
) -> dict[str, Tensor]:
    """Return the norm of each way's part of a gradient that arrives at a state."""
    return {name: norm(_part(model, name, start, cotangent), start) for name in names}


def _only(model: nn.Module, name: str) -> Boundary:
    """Let one way's part of the gradient cross a boundary, and stop the others."""

    def only(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
        del index  # whichever it is
        return _part(model, name, start, cotangent)

    return only


def _part(model: nn.Module, name: str, start: Tree, cotangent: Gradients) -> Gradients:
    """Return one way's part of the gradient of a state; all of it is gone where a state has not got that way yet."""
    mine = pathways_of(model, start).get(name, ())
    places = [place for place, leaf in enumerate(tensors(start)) if leaf.requires_grad]
    return [gradient if place in mine else None for place, gradient in zip(places, cotangent, strict=True)]
