"""The mechanism of every reverse-mode method: a chain of segments, pulled back from newest to oldest.

A segment is a stretch of steps run with a graph, from a start state cut off from what came before. It can
give its vector-Jacobian product: from the gradients of its losses and of its end state to those of the
parameters and of its start state. Methods differ in what they put into the chain and what they do at the
boundaries between two segments.

Letters: T time, B lanes, K boundaries, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tbptt.estimators.gradients import Gradients, add, gradients_of
from tbptt.tree import LaneDims, Tree, as_leaves, differentiable, tensors
from tbptt.unroll import unroll
from tbptt.weights import KeptWeights
from tbptt.window import Window

__all__ = [
    "Boundary",
    "Chain",
    "Pulled",
    "Segment",
    "Step",
    "lane_norms",
    "norm_of",
    "pass_on",
    "pull_back",
    "walk_back",
]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of steps with its graph.

    Args:
        outputs: of the model, in the graph. Leaves (T, B, ...).
        start: the state before, as leaves of the graph; None for the model's initial state.
        end: the state after, in the graph.
        steps: their number, T.
        loss: the sum of the losses that this segment injects, 0-dim, in the graph; None for none.
        weights: those that it was run with, where the graph is kept while an optimizer changes them.
    """

    outputs: Tree
    start: Tree | None
    end: Tree
    steps: int
    loss: Tensor | None = None
    weights: KeptWeights | None = None

    @staticmethod
    def run(model: nn.Module, window: Window, start: Tree | None, dims: LaneDims | None, *, track: bool) -> Segment:
        """Run `model` over `window` from `start`, whose past stays out of the graph.

        Args:
            model: the model.
            window: the steps.
            start: the state before them, detached; None for the model's initial state.
            dims: the lane dimensions of the state.
            track: whether the gradient of the start state will be asked for.
        """
        begin = as_leaves(start) if track else start
        outputs, end = unroll(model, window, begin, dims)
        return Segment(outputs, begin if track else None, end, window.steps)

    def injecting(self, loss: Tensor) -> Segment:
        """Return the segment with the sum of its losses."""
        return replace(self, loss=loss)

    def vjp(
        self, parameters: Sequence[Tensor], weight: Tensor, cotangent: Gradients, *, start: bool, keep: bool
    ) -> tuple[Gradients, Gradients]:
        """Pull the gradients of the loss and of the end state back to the parameters and the start state.

        Args:
            parameters: the tensors that the graph was built with.
            weight: what the injected loss sum is multiplied by, 0-dim.
            cotangent: gradient of each differentiable tensor of the end state; empty for none.
            start: whether to go on to the start state.
            keep: whether the graph will be used again.
        """
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        if self.loss is not None and self.loss.requires_grad:
            roots.append(self.loss)
            seeds.append(weight if weight.dtype is self.loss.dtype else weight.to(self.loss.dtype))
        for leaf, gradient in zip(differentiable(self.end), cotangent, strict=True) if cotangent else ():
            if gradient is not None and leaf.requires_grad:
                roots.append(leaf)
                seeds.append(gradient)
        before = differentiable(self.start) if start else []
        if not roots or not (parameters or before):
            return [None] * len(parameters), [None] * len(before)
        with nullcontext() if self.weights is None else self.weights.in_place():
            found = gradients_of(roots, seeds, [*parameters, *before], keep=keep)
        return found[: len(parameters)], found[len(parameters) :]


@dataclass(frozen=True, eq=False)
class Pulled:
    """What came out of a chain: the parameters' gradients, and the norm at each boundary, newest first."""

    gradients: Gradients
    boundary_norms: list[Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """What one segment gave, on the way back through a chain.

    Args:
        index: the segment's place in the chain.
        gradients: of the tensors it was asked about.
        cotangent: gradient of each differentiable tensor of its start state, from all losses after it, as it arrives:
            before anything is made of it at the boundary.
    """

    index: int
    gradients: Gradients
    cotangent: Gradients


class Chain(Protocol):
    """Consecutive segments, oldest first: a list, or what builds each of them when it is asked for, newest first."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Segment: ...


class Boundary(Protocol):
    """What becomes of the gradient at the boundary between a segment and the one before."""

    def __call__(self, index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
        """Return what goes on to the segment before.

        Args:
            index: the place in the chain of the segment that the gradient comes from, 1 at least.
            start: the start state of that segment.
            cotangent: gradient of each differentiable tensor of that state.
        """
        ...


def pass_on(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
    """Let the gradient cross a boundary as it is."""
    del index, start  # whichever it is
    return cotangent


def walk_back(
    chain: Chain,
    parameters: Sequence[Sequence[Tensor]],
    weight: Tensor,
    *,
    keep: bool = False,
    to_start: bool = False,
    boundary: Boundary = pass_on,
    arriving: Gradients | None = None,
) -> Iterator[Step]:
    """Send the gradient of the chain's losses back through it, segment by segment, newest first.

    Args:
        chain: consecutive segments, oldest first.
        parameters: for each segment, the tensors that are asked about, in its graph.
        weight: what each injected loss sum is multiplied by, 0-dim.
        keep: whether the graphs will be used again.
        to_start: whether to go on to the start state of the oldest segment, too, if that was tracked.
        boundary: what becomes of the gradient at each boundary.
        arriving: gradient of each differentiable tensor of the last end state, from what comes after; None for none.

    Cost: one backward pass through each segment.
    """
    cotangent: Gradients = arriving or []
    for index in reversed(range(len(chain))):
        segment = chain[index]
        start = index > 0 or (to_start and segment.start is not None)
        found, cotangent = segment.vjp(parameters[index], weight, cotangent, start=start, keep=keep)
        begin = segment.start
        del segment  # one that is built when it is asked for need not wait for the next
        yield Step(index, found, cotangent)
        if index > 0:
            cotangent = boundary(index, begin, cotangent)


def pull_back(
    chain: Chain,
    parameters: Sequence[Sequence[Tensor]],
    weight: Tensor,
    *,
    keep: bool = False,
    boundary: Boundary = pass_on,
    counts: Callable[[int], bool] = lambda index: True,
) -> Pulled:
    """Return the gradient of the chain's losses with respect to the parameters; see `walk_back`.

    Args:
        counts: whether the boundary before a segment, by its place in the chain, is one that the method promises:
            there `boundary` acts and the norm is reported. A cut that only the mechanism needs, as where the next
            look-back will begin, lets the gradient pass unseen.
    """

    def act(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
        return boundary(index, start, cotangent) if counts(index) else cotangent

    total: Gradients = [None] * len(parameters[-1])
    norms: list[Tensor] = []
    for step in walk_back(chain, parameters, weight, keep=keep, boundary=act):
        total = add(total, step.gradients)
        if step.index > 0 and counts(step.index):
            norms.append(norm_of(step.cotangent, weight))
    return Pulled(total, norms)


def norm_of(cotangent: Gradients, like: Tensor) -> Tensor:
    """Return the 2-norm of all parts of a gradient together, 0-dim, of the type of `like`."""
    arrived = [gradient for gradient in cotangent if gradient is not None]
    if not arrived:
        return torch.zeros_like(like)
    norms = [torch.linalg.vector_norm(gradient) for gradient in arrived]
    return (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))).to(like.dtype)


def lane_norms(cotangent: Gradients, state: Tree, dims: LaneDims | None) -> Tensor:
    """Return the norm of each lane's part of a gradient, in float64.

    Args:
        cotangent: of each differentiable tensor of the state, as `walk_back` gives it.
        state: the state.
        dims: the lane dimension of each tensor of it.

    Returns:
        Shape (B,); (1,) for all lanes together where a tensor has no lane dimension.
    """
    known = [dim for leaf, dim in zip(tensors(state), dims or (), strict=False) if leaf.requires_grad]
    by_lane = len(known) == len(cotangent) and all(dim is not None for dim in known)
    total: Tensor | None = None
    for index, gradient in enumerate(cotangent):
        if gradient is None:
            continue
        squares = gradient.detach().abs().double().square()
        dim = known[index] if by_lane else None
        part = squares.sum()[None] if dim is None else squares.movedim(dim, 0).reshape(squares.shape[dim], -1).sum(1)
        total = part if total is None else total + part
    if total is None:
        leaf = next(leaf for leaf in tensors(state) if leaf.requires_grad)
        lanes = leaf.shape[known[0]] if by_lane and known[0] is not None else 1
        return leaf.new_zeros(lanes, dtype=torch.float64)
    return total.sqrt()
