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

from tbptt.estimators.history import Stretch
from tbptt.estimators.replayable import MOST, Digest, find_out, refuse_other
from tbptt.estimators.revolve import next_kept
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Segment
from tbptt.loss import Counted
from tbptt.rereading import Rereading
from tbptt.side_state import SideState, as_then
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
        context = window.laid_out().without_targets()
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
    side: SideState | None


class ReplayedChain:
    """A chain whose segments are built when they are asked for, newest first; one is there at a time.

    The model is run forward once without a graph, the states before some segments are kept, and the newest segment
    is built. Each other one is run again from the newest state kept before it, as it was run the first time: it draws
    the same random numbers, finds the same buffers, and leaves them alone. With a known number of segments the kept
    states are those of the best (binomial) schedule; without, every second one is dropped whenever all slots are taken.

    Args:
        run: what is being done; losses are counted there, newest first.
        pieces: the steps.
        past: the steps before the window, which are run as they were run then; None for none.
        slots: how many states may be kept at any time, that before the first segment among them; None: all.
        watched: the segment of which it is remembered what it found.

    Attributes:
        state: after the last step, detached.
        counted: the targets of all losses injected.
        num_advances: segments run without a graph so far.
        most_kept: the most states that were kept at one time.
        stretches: the pieces with the states before them, where all are kept; else none.
        side: what the watched segment found.
    """

    def __init__(self, run: Run, pieces: Pieces, past: Stretch | None, slots: int | None, watched: int = 0) -> None:
        self.run, self.pieces, self.slots = run, pieces, slots or sys.maxsize
        self.kept: dict[int, _Kept] = {}
        self._side: SideState | None = None if past is None else past.side
        self.stretches: list[Stretch] = []
        self._watched, self.side = watched, self._side
        self.counted, self.num_advances, self.most_kept = Counted(), 0, 0
        self.digests: list[Digest] = []
        self._planned_ones, self._stride = self._planned(pieces.num), 1
        state, index = run.carry.state if past is None else past.state, 0
        if past is not None:
            with as_then(past.side, run.model, device=run.device):
                while (piece := self._known(index)).losses is None:
                    state = self._forward(index, piece, state)
                    index += 1
        self.news = index  # the first segment of the window
        self._found = SideState.of(run.model, device=run.device)
        piece = self._known(index)
        while (following := pieces.piece(index + 1)) is not None:
            state = self._forward(index, piece, state)
            index, piece = index + 1, following
        self._count(piece)
        self.num = index + 1
        self._note(index, piece, state)
        newest = Stretch(piece.steps, state, self._side)
        self._newest: Segment | None = self._build(index, piece, state)
        self.state = detach(self._newest.end)
        if pieces.num is not None and run.carry.joins is not False:  # there will be look-backs over these steps
            find_out(run, [self._newest], [newest])

    def _forward(self, index: int, piece: Piece, state: Tree | None) -> Tree:
        """Run a segment for the first time; return the state after it."""
        self._count(piece)
        self._note(index, piece, state)
        outputs, state = self._advance(piece, state)
        self.digests.append(Digest(outputs))
        return state

    def _note(self, index: int, piece: Piece, state: Tree | None) -> None:
        """Keep the state before a segment, if it is one of those that are kept."""
        side = SideState.of(self.run.model, device=self.run.device, like=self._side)
        self._side = side
        if index == self._watched:
            self.side = side
        if self._planned_ones is None:
            self._stride = self._thinned(index, self._stride)
        if index % self._stride == 0 if self._planned_ones is None else index in self._planned_ones:
            self._keep(index, state, side)
        if self.slots == sys.maxsize:
            self.stretches.append(Stretch(piece.steps, state, side))

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
        first = begin = max(each for each in self.kept if each <= index)
        kept = self.kept[begin]
        piece = self._known(index)
        with as_then(kept.side, self.run.model, device=self.run.device):
            state, side = kept.state, kept.side
            while begin < index:
                free = self.slots - len(self.kept)
                stop = begin + next_kept(index - begin + 1, free + 1)
                for each in range(begin, stop):
                    state = self._again(each, state)
                if free:
                    side = SideState.of(self.run.model, device=self.run.device, like=side)
                    self._keep(stop, state, side)
                begin = stop
            segment = self._build(index, piece, state)
        self._compare(index, Digest(segment.outputs), begin=first, kept=kept)
        return segment

    def _compare(self, index: int, found: Digest, *, begin: int, kept: _Kept) -> None:
        """Refuse outputs of a segment that are not those of the forward pass.

        With a graph other kernels may round otherwise, which a long segment makes larger: then the same run without
        one must give what it gave the first time.
        """
        if found.agrees(self.digests[index]):
            return
        piece = self._known(index)
        with as_then(kept.side, self.run.model, device=self.run.device):
            state = kept.state
            for each in range(begin, index):
                state = self._again(each, state)
            plain = Digest(self._advance(piece, state)[0])
        if not plain.agrees(self.digests[index]) or not found.agrees(self.digests[index], MOST):
            refuse_other(self.run.model, piece.steps)

    def _again(self, index: int, state: Tree | None) -> Tree:
        """Run a segment again without a graph; return the state after it."""
        state = self._advance(self._known(index), state)[1]
        if index + 1 == self.news:  # what comes now found what was there at the start of the window
            self._found.restore(self.run.model, in_place=False)
        return state

    def _known(self, index: int) -> Piece:
        piece = self.pieces.piece(index)
        assert piece is not None
        return piece

    def _advance(self, piece: Piece, state: Tree | None) -> tuple[Tree, Tree]:
        self.num_advances += 1
        with torch.no_grad():
            outputs, after = unroll(self.run.model, piece.steps, state, self.run.carry.dims)
            return outputs, detach(after)

    def _build(self, index: int, piece: Piece, state: Tree | None) -> Segment:
        segment = Segment.run(self.run.model, piece.steps, state, self.run.carry.dims, track=index > 0)
        return segment if piece.losses is None else self.run.inject(segment, piece.losses)

    def _count(self, piece: Piece) -> None:
        if piece.losses is not None:
            self.counted += self.run.loss.counted(piece.losses)

    def _keep(self, index: int, state: Tree | None, side: SideState | None) -> None:
        self.kept[index] = _Kept(state, side)
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
