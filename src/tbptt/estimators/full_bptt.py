"""Full backpropagation through time, from states kept at checkpoints.

Letters: T time, B lanes, P parameters, S checkpoints.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, final

from torch import nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary, rule_at
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.history import History, Stretch
from tbptt.estimators.replayable import cuts_between
from tbptt.estimators.replayed import HeldPieces, ReplayedChain, RereadPieces
from tbptt.estimators.run import Run
from tbptt.length.base import check_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.pathways import in_segments
from tbptt.rereading import Readable, Rereading
from tbptt.window import Window

__all__ = ["FullBPTT"]

_PIECE = 256
"""Steps of a segment where the length of the whole is not known."""
_CHECKED = 32
"""Steps of a window with which `tbptt.check` tries it, where a window is a whole pass."""
_EXAMPLE = "FullBPTT(k1=4096, checkpoints=16)"


@final
@dataclass(frozen=True)
class FullBPTT(Estimator):
    """Send the gradient back to the start of the sequence, over any length, in little memory.

    The sequence is run in segments, the states between them are kept, and each segment is run again, with a graph,
    when the gradient comes to it. Nothing is cut off: this is what truncation is measured against. With windows
    shorter than the sequence each update runs all of it again, with the weights of today, so that not even a state is
    stale; their cost grows with the age of the sequence.

    Not recommended where the sequence has no end, as with one long recording: an update then costs as much as all of
    the stream so far. Take `TBPTT`, or make the whole pass one update.

    Args:
        k1: steps between updates. "pass": one update for each pass over the stream; its steps are read again from the
            stream when they are needed, and not held in memory.
        segment: steps run with a graph at a time. Left out: the square root of all steps, 256 where their number is
            not known beforehand.
        checkpoints: the most states kept at any time, S, that of the start among them. Left out: one for each segment,
            which is the square-root schedule: one more forward pass. Fewer: the binomial schedule (Revolve), optimal
            for a number of segments known beforehand; with k1="pass" every second one is dropped when all are taken.
        boundary: what becomes of the gradient between segments: `ClipBoundary(max_norm)` clips it there.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: a number of steps or checkpoints below 1, or that is none.

    Exactness: exact, to rounding, for every schedule (tests/estimators/test_full_bptt.py); biased where
        `boundary` clips.
    Cost: with N segments a forward pass without a graph over each of t(N, S) of them (`revolve.num_advances`; N - 1
        when all are kept), one with a graph and one back over all. Memory of one segment's graph, S states and random
        generators, and the inputs of the sequence unless k1="pass".
    Reference: Chen, Xu, Zhang & Guestrin (2016), arXiv:1604.06174; Griewank & Walther (2000),
        doi:10.1145/347837.347846; states only, unlike Gruslys et al. (2016), arXiv:1606.03401.

    Example:
        >>> FullBPTT(k1=1000, checkpoints=8).kind
        'exact'
    """

    k1: int | Literal["pass"] = "pass"
    segment: int | None = None
    checkpoints: int | None = None
    boundary: ClipBoundary | None = None
    keep_outputs: bool = False

    kind: ClassVar[str] = "exact"

    @classmethod
    def examples(cls) -> tuple[FullBPTT, ...]:
        """Return settings with few and with all checkpoints; see `Estimator.examples`."""
        return cls(5), cls(5, segment=2, checkpoints=2), cls(7, segment=3, checkpoints=1)

    def __post_init__(self) -> None:
        for name in ("k1", "segment", "checkpoints"):
            if getattr(self, name) not in (None, "pass") or (name, getattr(self, name)) == ("k1", None):
                check_whole(self, name, _EXAMPLE)
        for name in ("segment", "checkpoints"):
            if getattr(self, name) == "pass":
                raise ConfigError(f'{name} was expected to be a whole number, but is "pass"', fix=_EXAMPLE)
        if self.boundary is not None:
            object.__setattr__(self, "kind", "biased")

    def next_steps(self, carry: ChainCarry) -> int:
        """Return k1; more than any stream has where it is a whole pass."""
        del carry  # always the same
        return sys.maxsize if self.k1 == "pass" else self.k1

    def read(self, stream: Readable, carry: ChainCarry) -> Window:
        """Return the next window; for a whole pass, what reads its steps from the stream whenever they are needed."""
        if self.k1 != "pass":
            return stream.read(self.next_steps(carry))
        return cast(
            Window, Rereading(stream, self.segment or in_segments(_PIECE, carry.unit))
        )  # which only `estimate` here looks into

    def fixed(self, carry: ChainCarry) -> FullBPTT:
        """Return the estimator with windows of a few steps, where they are whole passes: for `tbptt.check`."""
        if self.k1 != "pass":
            return self
        segment = in_segments(min(self.segment or 8, 8), carry.unit)
        return replace(self, k1=in_segments(max(_CHECKED, 2 * segment), carry.unit), segment=segment)

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        of_window = None if self.k1 == "pass" else self.k1
        return ChainCarry(lanes, unit=unit_of(model, k1=of_window, segment=self.segment))

    def reach(self, steps: int) -> None:
        """Return None: back to the start of the sequence."""
        del steps  # whatever their number

    def estimate(
        self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window | Rereading
    ) -> tuple[Estimate, ChainCarry]:
        """Run the model over the sequence to the end of `window`, and send the window's losses back to its start.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss, or a model
                or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state); or steps that would have to be gone back
                over were read from a stream and not held.
        """
        check_window(window, carry, self.k1 if isinstance(window, Window) and isinstance(self.k1, int) else None)
        first = window if isinstance(window, Window) else window.first
        carry = carry.with_dims(model, first)
        past = None if first.resets.get(0) else self._past(carry)
        run = Run(model, StepLoss.of(loss), carry, keep_outputs=self.keep_outputs)
        if isinstance(window, Window):
            news = 0 if past is None else past.window.steps
            size = self.segment or in_segments(math.ceil(math.sqrt(news + window.steps)), carry.unit)
            anew = news + max((step for step, every in window.resets.items() if every), default=0)
            cuts = {*range(0, news, size), anew, *range(news, news + window.steps, size)}
            pieces = HeldPieces(past, window, cuts_between(run, past, cuts, needed=False))
            since = next(index for index, (begin, _) in enumerate(pieces.spans) if begin == anew) if anew > news else 0
        else:
            pieces, since = RereadPieces(window), 0
        chain = ReplayedChain(run, pieces, past, self.checkpoints, since)
        pulled = run.pull(chain, chain.counted, boundary=rule_at(self.boundary, carry.dims))
        if self.keep_outputs and not chain.counted:  # then nothing was pulled, and only the newest outputs are there
            for index in reversed(range(len(chain))):
                chain[index]
        run.newest_first()
        held = History()
        if isinstance(pieces, HeldPieces):
            begin = pieces.spans[since][0]
            calls = tuple(first - begin for first, _ in pieces.spans[since:])
            state = None if begin else (carry.state if past is None else past.state)
            held = History((Stretch(pieces.whole[begin:], state, chain.side, calls),))
        steps = window.steps if isinstance(pieces, RereadPieces) else pieces.whole.steps
        counted = {"checkpoints": float(chain.most_kept), "advances": float(chain.num_advances)}
        estimate = run.estimate(pulled, chain.counted, steps, metrics=counted)
        return estimate, replace(carry, state=chain.state, past=held)

    def _past(self, carry: ChainCarry) -> Stretch | None:
        """Return the sequence so far."""
        if carry.past.steps:
            return carry.past.stretches[0]
        if carry.state is not None:
            raise CapabilityError(
                "a new sequence was expected in all lanes, but this window goes on with the last one, whose steps were "
                "read from the stream and not held: the gradient could not go back to its start",
                fix="FullBPTT(k1=...) with windows that are held, or a stream that resets at the start of a pass",
            )
        return None
