"""A chain of segments too long to hold: few states are kept, and each segment is run again when it is needed.

Letters: B lanes, N segments, S slots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tbptt.estimators.history import Stretch
from tbptt.estimators.revolve import next_kept
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Segment
from tbptt.loss import Counted
from tbptt.model import left_as_it_was, random_from, random_states
from tbptt.rereading import Rereading
from tbptt.tree import Tree, detach
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["HeldPieces", "Piece", "Pieces", "ReplayedChain", "RereadPieces"]


@dataclass(frozen=True, eq=False)
class Piece:
    """The steps of one segment.

    Args:
        steps: what the model is run over.
        losses: the same steps with the targets to learn from; None where nothing is injected.
    """

    steps: Window
    losses: Window | None


class Pieces(Protocol):
    """The steps of a chain, in pieces.

    Attributes:
        num: how many there are, N; None where that is not known before the last has been asked for.
    """

    num: int | None

    def piece(self, index: int, /) -> Piece | None:
        """Return a piece; None behind the last."""
        ...


class HeldPieces:
    """A window, and the steps before it, cut into pieces.

    Args:
        past: the steps before the window; None for none.
        window: the steps whose losses are injected.
        cuts: where a piece begins, counted from the first step of the past; one begins with the window, too.
    """

    num: int | None

    def __init__(self, past: Stretch | None, window: Window, cuts: Iterable[int]) -> None:
        context = window.without_targets()
        self.window = window
        self.whole = context if past is None else Window.join([past.window, context])
        self.news = self.whole.steps - window.steps
        self.spans = list(pairwise(sorted({0, self.news, *cuts, self.whole.steps})))
        self.num = len(self.spans)

    def piece(self, index: int, /) -> Piece | None:
        """Return a piece; None behind the last."""
        if index >= len(self.spans):
            return None
        begin, end = self.spans[index]
        losses = self.window[begin - self.news : end - self.news] if begin >= self.news else None
        return Piece(self.whole[begin:end], losses)


class RereadPieces:
    """The pieces of a stream, read again each time; all losses are injected."""

    num: int | None = None

    def __init__(self, source: Rereading) -> None:
        self.source = source

    def piece(self, index: int, /) -> Piece | None:
        """Return a piece; None behind the last."""
        window = self.source.piece(index)
        return None if window is None else Piece(window, window)


@dataclass(frozen=True, eq=False)
class _Kept:
    state: Tree | None
    random: list[Tensor]


class ReplayedChain:
    """A chain whose segments are built when they are asked for, newest first; one is there at a time.

    The model is run forward once without a graph, the states before some segments are kept, and the newest segment
    is built. Each other one is run again from the newest state kept before it. What is run again draws the random
    numbers that it drew the first time, and leaves the model's buffers alone. With a known number of segments the kept
    states are those of the best (binomial) schedule; without, every second one is dropped whenever all slots are taken.

    Args:
        run: what is being done; losses are counted there, newest first.
        pieces: the steps.
        start: the state before them; None for the model's initial state.
        slots: how many states may be kept at any time, that before the first segment among them; None: all.

    Attributes:
        state: after the last step, detached.
        counted: the targets of all losses injected.
        num_advances: segments run without a graph so far.
        most_kept: the most states that were kept at one time.
        stretches: the pieces with the states before them, where all are kept; else none.
    """

    def __init__(self, run: Run, pieces: Pieces, start: Tree | None, slots: int | None) -> None:
        self.run, self.pieces, self.slots = run, pieces, slots or sys.maxsize
        self.kept: dict[int, _Kept] = {}
        self.stretches: list[Stretch] = []
        self.counted, self.num_advances, self.most_kept = Counted(), 0, 0
        state, index = start, 0
        planned = self._planned(pieces.num)
        stride = 1
        piece = self._known(0)
        self._keep(0, state, piece)
        while (following := pieces.piece(index + 1)) is not None:
            self._count(piece)
            state = self._advance(piece, state)
            index, piece = index + 1, following
            if planned is None:
                stride = self._thinned(index, stride)
            if index % stride == 0 if planned is None else index in planned:
                self._keep(index, state, piece)
            if slots is None:
                self.stretches.append(Stretch(piece.steps, state))
        self._count(piece)
        self.num = index + 1
        if slots is None:
            self.stretches.insert(0, Stretch(self._known(0).steps, start))
        self._newest: Segment | None = self._build(index, piece, state)
        self.state = detach(self._newest.end)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int, /) -> Segment:
        if self._newest is not None:
            segment, self._newest = self._newest, None
            assert index == self.num - 1, "segments are there newest first, each once"
        else:
            segment = self._rebuilt(index)
        self.kept.pop(index, None)
        return segment

    def _rebuilt(self, index: int) -> Segment:
        begin = max(each for each in self.kept if each <= index)
        kept = self.kept[begin]
        piece = self._known(index)
        with left_as_it_was(self.run.model), random_from(kept.random, piece.steps.mask.device):
            state = kept.state
            while begin < index:
                free = self.slots - len(self.kept)
                stop = begin + next_kept(index - begin + 1, free + 1)
                for each in range(begin, stop):
                    state = self._advance(self._known(each), state)
                if free:
                    self._keep(stop, state, piece)
                begin = stop
            return self._build(index, piece, state)

    def _known(self, index: int) -> Piece:
        piece = self.pieces.piece(index)
        assert piece is not None
        return piece

    def _advance(self, piece: Piece, state: Tree | None) -> Tree:
        self.num_advances += 1
        with torch.no_grad():
            return detach(unroll(self.run.model, piece.steps, state, self.run.carry.dims)[1])

    def _build(self, index: int, piece: Piece, state: Tree | None) -> Segment:
        segment = Segment.run(self.run.model, piece.steps, state, self.run.carry.dims, track=index > 0)
        return segment if piece.losses is None else self.run.inject(segment, piece.losses)

    def _count(self, piece: Piece) -> None:
        if piece.losses is not None:
            self.counted += self.run.loss.counted(piece.losses)

    def _keep(self, index: int, state: Tree | None, piece: Piece) -> None:
        random = random_states(piece.steps.mask.device)
        for before in self.kept.values():  # a model that draws nothing needs no copy of the same 5 KB for each
            if all(torch.equal(a, b) for a, b in zip(before.random, random, strict=True)):
                random = before.random
            break
        self.kept[index] = _Kept(state, random)
        self.most_kept = max(self.most_kept, len(self.kept))

    def _planned(self, num: int | None) -> set[int] | range | None:
        """Return the segments before which the state is kept on the way forward; None: not known."""
        if num is None:
            return None
        if self.slots >= num:
            return range(num)
        planned = {0}
        at = 0
        while at < num - 1 and len(planned) < self.slots:
            at += next_kept(num - at, self.slots - len(planned) + 1)
            planned.add(at)
        return planned

    def _thinned(self, index: int, stride: int) -> int:
        """Make room where every `stride`-th state is kept and all slots are taken; return the stride from now on."""
        while index % stride == 0 and len(self.kept) >= self.slots > 1:
            stride *= 2
            self.kept = {each: kept for each, kept in self.kept.items() if each % stride == 0}
        return stride if self.slots > 1 else sys.maxsize
