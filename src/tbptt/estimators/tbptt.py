"""Truncated backpropagation through time, for every k1 and k2.

Letters: T time, B lanes, L steps of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral
from typing import ClassVar, Literal

from torch import nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary, rule_at
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.gradients import add
from tbptt.estimators.history import History, Stretch
from tbptt.estimators.lengths import Lengths
from tbptt.estimators.retained import RetainedSegment, kept_for, newest
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Pulled, Segment
from tbptt.length import Length
from tbptt.loss import Counted, Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.side_state import SideState
from tbptt.tree import detach
from tbptt.weights import KeptWeights
from tbptt.window import Window

__all__ = ["TBPTT"]

_BOUNDARIES = 8
"""Up to so many boundaries their norms are told; of more, at the 1st, 2nd, 4th, 8th, ... and the last."""
_EVERY = 10
"""A look-back that is run again, and that nobody clips, is cut at all of these at every so many-th update only: each
cut costs a call of the model, which made an update of TBPTT(8, 64) 1.6 times as long. At the others it tells the norms
where it is cut anyway: at the newest boundary, and at the oldest where k2 is a multiple of k1."""


@dataclass(frozen=True)
class TBPTT(Estimator):
    """Run forward k1 steps, send the gradient back k2 steps, carry the state on.

    Each loss is injected into exactly one update, that of its own window ending at step s:
    b_0 = q_s, b_k = b_{k-1} D_{s-k+1} + [k < k1] q_{s-k}, gradient = sum_k b_k I_{s-k} over k < k2.
    Choose k2 by the dependency that the task has, k1 by how often to update; k1 = k2 is the cheapest, and
    k2 = 2 k1 gives every loss at least k1 steps of look-back.

    Args:
        k1: steps run forward between updates (Williams & Peng's h'), at least 1; or a `Length` that changes.
        k2: look-back: the gradient of a loss reaches at most k2 steps back, its own included (their h); or a
            `Length` that changes. With `Adaptive` it is the length that every loss is to reach at least: the
            look-back is k1 - 1 steps longer.
        losses: for k2 < k1, what becomes of the first k1 - k2 losses. "tail": they are reported, not
            learned from, and their steps run without a graph. "all": the window is cut into pieces of k2
            steps whose gradients add up to one update. For k2 >= k1 all losses are injected either way.
        replay: for k2 > k1, what becomes of the steps before the window. "recompute": they are run again,
            with today's weights, from the state k2 steps back, and the state carried on is the re-run one.
            "retain": their graphs are kept, with the weights that they were run with; a short window may need
            a graph cut where it was not, and then runs those steps once more. Not with lengths that change.
        keep_outputs: whether estimates hold the window's outputs.
        boundary: what becomes of the gradient at each boundary between windows that it crosses (k2 > k1), k1, 2 k1, ...
            steps back: `ClipBoundary(max_norm)` clips it there, and the look-back is run in as many pieces; None: it
            goes on as it is. `Estimate.boundary_norms` are those at the same boundaries, of more than 8 at the 1st,
            2nd, 4th, 8th, ... and the last; `boundary_lags` says where. With "recompute" and without clipping they are
            told so at every 10th update; at the others at the newest boundary, and the oldest if k2 is a multiple of
            k1.

    Raises:
        ConfigError: a length that is neither a whole number from 1 nor a `Length`, an unknown choice, or
            choices that do not go together.

    Exactness: biased, by the gradient that lies more than k2 steps back; exact as the gradient of the same
        losses with the states at the boundaries frozen (tests/estimators/test_gradients.py).
    Cost: with F and B the cost of one step forward and backward. k2 <= k1: k1 F + k2 B a window ("tail"),
        k1 (F + B) ("all"); memory of k2 steps. k2 > k1: k2 (F + B) ("recompute"), k1 F + k2 B plus a copy
        of the weights ("retain"); memory of k2 steps.
    Reference: Williams & Peng (1990), BPTT(h; h'), doi:10.1162/neco.1990.2.4.490; Sutskever (2013), section 2.8.6.

    Example:
        >>> TBPTT(k1=4, k2=6).reach(4)
        (3, 4, 5, 6)
    """

    k1: int | Length
    k2: int | Length
    losses: Literal["tail", "all"] = "tail"
    replay: Literal["recompute", "retain"] = "recompute"
    keep_outputs: bool = False
    boundary: ClipBoundary | None = None

    kind: ClassVar[str] = "biased"

    @classmethod
    def examples(cls) -> tuple[TBPTT, ...]:
        """Return one setting of each regime; see `Estimator.examples`."""
        clipped = cls(2, 6, boundary=ClipBoundary(0.01))
        return cls(4, 4), cls(5, 2), cls(5, 2, losses="all"), cls(3, 7), cls(3, 7, replay="retain"), clipped

    def __post_init__(self) -> None:
        for name in ("k1", "k2"):
            value: object = getattr(self, name)
            if isinstance(value, Length):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
                raise ConfigError(
                    f"{name} was expected to be a whole number of steps, at least 1, or a Length, but is {value!r}",
                    fix="TBPTT(k1=64, k2=64), or TBPTT(k1=64, k2=Adaptive(tolerance=0.1))",
                )
            object.__setattr__(self, name, int(value))  # numpy's whole numbers become Python's
        for name, choices in (("losses", ("tail", "all")), ("replay", ("recompute", "retain"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f'{name} was expected to be "{choices[0]}" or "{choices[1]}", but is {getattr(self, name)!r}',
                    fix=f'TBPTT({self.k1}, {self.k2}, {name}="{choices[0]}")',
                )
        if self.boundary is not None and isinstance(self.k1, int) and isinstance(self.k2, int):
            self.boundary.refuse_unless(self.k2 > self.k1, f"TBPTT(k1={self.k1}, k2={self.k2})")
        if self.lengths.vary and self.replay == "retain":
            raise ConfigError(
                'replay="retain" was expected with a k1 and a k2 that stay, but one of them changes: the weights of '
                "then would have to be kept for each window of the longest look-back there may be",
                fix='replay="recompute"',
            )

    @property
    def lengths(self) -> Lengths:
        """The two lengths, with what they have in common."""
        return Lengths(self.k1, self.k2)

    def next_steps(self, carry: ChainCarry) -> int:
        """Return k1, as long as it is now."""
        return self.lengths.now(carry.lengths)[0]

    def fixed(self, carry: ChainCarry) -> TBPTT:
        """Return the estimator with the lengths that it has now, for good."""
        k1, k2 = self.lengths.now(carry.lengths)
        return replace(self, k1=k1, k2=k2)

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        return ChainCarry(lanes, lengths=self.lengths.start(), unit=unit_of(model, k1=self.k1, k2=self.k2))

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return how far each loss of a window of `steps` steps reaches; see `Estimator.reach`.

        Where the lengths change: with those of the first update.
        """
        k1, k2 = self.lengths.now(self.lengths.start())
        if k2 >= steps:
            oldest = k2 if k2 > k1 else steps
            return tuple(oldest - (steps - 1 - step) for step in range(steps))
        if self.losses == "all":
            return tuple(step % k2 + 1 for step in range(steps))
        return tuple(max(0, step + 1 - (steps - k2)) for step in range(steps))

    def estimate(self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window) -> tuple[Estimate, ChainCarry]:
        """Run the model over `window` and estimate the gradient of its losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        lengths = self.lengths
        k1, k2 = lengths.now(carry.lengths)
        self._check(carry, window, k1)
        run = Run(model, StepLoss.of(loss), carry.for_window(model, window), keep_outputs=self.keep_outputs)
        regimes = _Regimes(self, k1, k2, run, window)
        if k2 <= k1:
            estimate, after = regimes.within()
        else:
            estimate, after = regimes.recompute() if self.replay == "recompute" else regimes.retain()
        if not lengths.vary:
            return estimate, after
        states, measured = lengths.after(carry.lengths, run, window, after.dims, estimate)
        measured = {"k1": float(k1), "k2": float(k2), **measured}
        estimate = replace(
            estimate, rate_factor=lengths.rate_factor(carry.lengths), metrics=estimate.metrics | measured
        )
        return estimate, replace(after, lengths=states)

    def _check(self, carry: ChainCarry, window: Window, k1: int) -> None:
        fix = f"stream.windows({k1}), or TBPTT(k1={window.steps}, k2={self.k2})"
        check_window(window, carry, k1, "" if self.lengths.vary else fix)


class _Regimes:
    """One call of `TBPTT.estimate`, in each of its three regimes."""

    def __init__(self, setting: TBPTT, k1: int, k2: int, run: Run, window: Window) -> None:
        self.setting, self.k1, self.k2, self.run = setting, k1, k2, run
        self.carry, self.window = run.carry, window.laid_out() if setting.lengths.remembered else window
        self.boundary = rule_at(setting.boundary, self.carry.dims)

    def within(self) -> tuple[Estimate, ChainCarry]:
        """k2 <= k1: the look-back ends inside the window."""
        run, pieces = self.run, self._pieces()
        injected = sum((run.loss.counted(self.window[a:b]) for a, b, learn in pieces if learn), Counted())
        state, total, lookback = self.carry.state, None, 0
        side = None if not self.setting.lengths.remembered else SideState.of(run.model, device=run.device)
        for begin, end, learn in pieces:
            piece = self.window[begin:end]
            if not learn:
                state = run.report(piece, state)
                continue
            segment = run.inject(Segment.run(run.model, piece, state, self.carry.dims, track=False), piece)
            pulled = run.pull([segment], injected)
            total = pulled if total is None else Pulled(add(total.gradients, pulled.gradients), [])
            state, lookback = detach(segment.end), max(lookback, end - begin)
        assert total is not None
        past = self._past([Stretch(self.window.without_targets(), self.carry.state, side)], 0)
        return run.estimate(total, injected, lookback), self._after(replace(self.carry, state=state, past=past))

    def recompute(self) -> tuple[Estimate, ChainCarry]:
        """k2 > k1: the steps before the window are run again from the state k2 steps back."""
        run = self.run
        missing = self.carry.missing(self.window)
        past = self.carry.last(run.model, self.k2 - self.window.steps - missing)
        news = 0 if past is None else past.window.steps  # the step at which the window begins
        steps = news + self.window.steps
        mark = max(0, steps + missing + self.k1 - self.k2)  # where the next look-back begins, if its window is full
        boundaries = self.carry.boundaries(news)
        told = _told(boundaries)
        if self.setting.boundary is not None:
            seen = boundaries  # to clip, every one of them
        elif (self.carry.draws + 1) % _EVERY == 0:
            seen = told
        else:
            seen = told = [each for each in boundaries if each in (news, mark)]
        cuts = [mark, *seen]
        if not self.carry.joins:  # a later look-back will begin here, and calls are to stay as they are
            cuts += [each for each in [news + -self.k2 % self.k1] if each < steps]
        chain, stretches = run.look_back(past, self.window, run.cuts(cuts, news), needed=False)
        injected = run.counted
        pulled = run.pull(chain, injected, boundary=self.boundary, counts=_beginning_at(chain, seen))
        carry = replace(self.carry, state=detach(chain[-1].end), past=self._past(stretches, news))
        lags = tuple(steps - each for each in told)
        return run.estimate(_telling(pulled, seen, told), injected, steps, boundary_lags=lags), self._after(carry)

    def retain(self) -> tuple[Estimate, ChainCarry]:
        """k2 > k1: the graphs of the steps before the window are still there."""
        run, k1, k2, dims = self.run, self.k1, self.k2, self.carry.dims
        weights = KeptWeights.of(dict(zip(run.names, run.parameters, strict=True)))
        state, steps = self.carry.state, self.window.steps
        news: list[RetainedSegment] = []
        cut = 0 if run.loss.whole else -k2 % k1  # a later look-back will begin here, if every window is full
        for begin, end in pairwise(sorted({0, min(cut, steps), steps})):
            piece = self.window[begin:end]
            segment = RetainedSegment.run(run.model, piece, state, weights, dims)
            assert segment.live is not None
            news.append(replace(segment, live=run.inject(segment.live, piece)))
            state = detach(segment.live.end)
        if any(segment.weights.values.keys() != weights.values.keys() for segment in self.carry.retained):
            raise CapabilityError(
                "the parameters that require a gradient are not those of the windows whose graphs were retained: "
                "through these there is no gradient for a parameter that was frozen then",
                fix='TBPTT(k1, k2, replay="recompute"), which runs them again',
            )
        before = k2 - steps - self.carry.missing(self.window)
        chain = [*newest(run.model, self.carry.retained, self.carry.state, before, dims), *news]
        live = [segment.live for segment in chain if segment.live is not None]
        injected = run.counted
        lookback = sum(segment.steps for segment in chain)
        seen = self.carry.boundaries(lookback - steps)
        counts = _beginning_at(chain, seen)
        pulled = run.pull(live, injected, keep=True, boundary=self.boundary, counts=counts)
        carry = replace(self.carry, state=state, retained=kept_for(chain, k1, k2))
        told = _told(seen)
        lags = tuple(lookback - each for each in told)
        return run.estimate(_telling(pulled, seen, told), injected, lookback, boundary_lags=lags), self._after(carry)

    def _pieces(self) -> list[tuple[int, int, bool]]:
        steps, k2 = self.window.steps, self.k2
        if steps <= k2:
            return [(0, steps, True)]
        if self.setting.losses == "tail":
            begin = steps + self.carry.missing(self.window) - k2
            return [(0, begin, False), (begin, steps, True)]
        return [(begin, min(begin + k2, steps), True) for begin in range(0, steps, k2)]

    def _after(self, carry: ChainCarry) -> ChainCarry:
        """Return the carry with this window among those whose boundaries are known."""
        keep = self.setting.lengths.remembered
        windows = carry.windows_with(self.window.steps, keep) if keep else ()
        return replace(carry, windows=windows, draws=carry.draws + 1)

    def _past(self, news: list[Stretch], replaced: int) -> History:
        """Return what is remembered for the next look-back: these stretches, and older ones if they may be needed."""
        keep = self.setting.lengths.remembered
        return self.carry.past.followed_by(news, replaced, keep) if keep else self.carry.past


def _told(boundaries: Sequence[int]) -> list[int]:
    """Return the boundaries whose norms are told, newest first."""
    num = len(boundaries)
    if num <= _BOUNDARIES:
        return list(boundaries)
    numbers = {2**power for power in range(num.bit_length())} | {num}
    return [each for number, each in enumerate(boundaries, 1) if number in numbers]


def _telling(pulled: Pulled, seen: Sequence[int], told: Sequence[int]) -> Pulled:
    """Return what came out of a chain with the norms at some of the boundaries that were seen, newest first."""
    if len(pulled.boundary_norms) != len(seen):  # with no loss injected nothing was sent back
        return pulled
    norms = [norm for norm, each in zip(pulled.boundary_norms, seen, strict=True) if each in told]
    return Pulled(pulled.gradients, norms)


def _beginning_at(chain: Sequence[Segment | RetainedSegment], steps: Collection[int]) -> Callable[[int], bool]:
    """Return whether a segment of a look-back, by its place, begins at one of these steps."""
    begins = [0, *accumulate(segment.steps for segment in chain)]
    return lambda index: begins[index] in steps
