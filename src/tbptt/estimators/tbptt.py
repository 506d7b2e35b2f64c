"""Truncated backpropagation through time, for every k1 and k2.

Letters: T time, B lanes, L steps of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.history import History, Stretch
from tbptt.estimators.lengths import Lengths, States, states_from
from tbptt.estimators.retained import RetainedSegment, kept_for, newest
from tbptt.estimators.segments import Pulled, Segment, add, own, pull_back
from tbptt.length import Length, LengthState
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable, find_lane_dims, trainable_parameters
from tbptt.tree import LaneDims, Tree, detach, time_cat
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["TBPTT", "TBPTTCarry"]

_NONE_CROSSED = torch.zeros(0)


@dataclass(eq=False)
class TBPTTCarry:
    """What `TBPTT` carries from window to window.

    Attributes:
        lanes: the number of sequences side by side.
        state: the model's state after the last window, detached; None before the first.
        dims: the lane dimension of each tensor of the state, once it has been found out.
        past: the steps that the next look-back or probe may re-run.
        retained: the segments whose graphs the next look-back may use, oldest first.
        lengths: how far the policies of k1 and k2 have come.
    """

    lanes: int
    state: Tree | None = None
    dims: LaneDims | None = None
    past: History = field(default_factory=History)
    retained: tuple[RetainedSegment, ...] = ()
    lengths: States = field(default_factory=dict[str, LengthState])
    looked: bool = field(default=False, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors; graphs are left out and built again when needed."""
        return {
            "lanes": self.lanes,
            "state": self.state,
            "dims": self.dims,
            "looked": self.looked,
            "past": [stretch.state_dict() for stretch in self.past.stretches],
            "retained": [segment.state_dict() for segment in self.retained],
            "lengths": {name: each.state_dict() for name, each in self.lengths.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: it was saved with another number of lanes.
        """
        if state["lanes"] != self.lanes:
            raise ShapeError(
                f"a carry of {self.lanes} lanes was expected, but the saved one has {state['lanes']}: "
                "each lane's state belongs to that lane's sequence",
                fix=f"go on with {state['lanes']} lanes",
            )
        self.state, self.looked = state["state"], state["looked"]
        self.dims = None if state["dims"] is None else tuple(state["dims"])
        self.past = History(tuple(Stretch.from_state_dict(each) for each in state["past"]))
        self.lengths = states_from(state["lengths"])
        self.retained = tuple(RetainedSegment.from_state_dict(each) for each in state["retained"])


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

    kind: ClassVar[str] = "biased"

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

    def next_steps(self, carry: TBPTTCarry) -> int:
        """Return k1, as long as it is now."""
        return self.lengths.now(carry.lengths)[0]

    def fixed(self, carry: TBPTTCarry) -> TBPTT:
        """Return the estimator with the lengths that it has now, for good."""
        k1, k2 = self.lengths.now(carry.lengths)
        return replace(self, k1=k1, k2=k2)

    def init(self, model: nn.Module, lanes: int) -> TBPTTCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        return TBPTTCarry(lanes, lengths=self.lengths.start())

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

    def estimate(self, model: nn.Module, loss: Loss, carry: TBPTTCarry, window: Window) -> tuple[Estimate, TBPTTCarry]:
        """Run the model over `window` and estimate the gradient of its losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        lengths = self.lengths
        k1, k2 = lengths.now(carry.lengths)
        self._check(carry, window, k1)
        if not carry.looked:
            carry = replace(carry, dims=find_lane_dims(model, window.inputs), looked=True)
        run = _Run(self, k1, k2, model, StepLoss.of(loss), carry, window)
        if k2 <= k1:
            estimate, after = run.within()
        else:
            estimate, after = run.recompute() if self.replay == "recompute" else run.retain()
        if not lengths.vary:
            return estimate, after
        states, measured = lengths.after(
            carry.lengths, model, run.loss, carry.past, window, carry.dims, estimate.lookback
        )
        measured = {"k1": float(k1), "k2": float(k2), **measured}
        estimate = replace(
            estimate, rate_factor=lengths.rate_factor(carry.lengths), metrics=estimate.metrics | measured
        )
        return estimate, replace(after, lengths=states)

    def _check(self, carry: TBPTTCarry, window: Window, k1: int) -> None:
        if window.steps > k1:
            fix = f"stream.windows({k1}), or TBPTT(k1={window.steps}, k2={self.k2})"
            raise ShapeError(
                f"a window of at most k1 = {k1} steps was expected, but {window.steps} came: "
                "there would be fewer updates than k1 says",
                fix="stream.read(estimator.next_steps(carry))" if self.lengths.vary else fix,
            )
        if window.lanes != carry.lanes:
            raise ShapeError(
                f"a window of {carry.lanes} lanes was expected, as the carry has, but {window.lanes} came: "
                "each lane's state belongs to that lane's sequence",
                fix=f"estimator.init(model, lanes={window.lanes}) when the sequences are other ones",
            )


class _Run:
    """One call of `TBPTT.estimate`: the parts that its three regimes share."""

    def __init__(
        self, setting: TBPTT, k1: int, k2: int, model: nn.Module, loss: StepLoss, carry: TBPTTCarry, window: Window
    ) -> None:
        self.setting, self.k1, self.k2, self.model = setting, k1, k2, model
        self.loss, self.carry, self.window = loss, carry, window
        self.names, self.parameters = zip(*trainable_parameters(model).items(), strict=True)
        self.outputs: list[Tree] = []
        self.sums: list[Tensor] = []
        self.num_terms = 0

    def within(self) -> tuple[Estimate, TBPTTCarry]:
        """k2 <= k1: the look-back ends inside the window."""
        pieces = self._pieces()
        injected = sum(self.loss.valid(self.window[begin:end])[1] for begin, end, learn in pieces if learn)
        state, total, lookback = self.carry.state, None, 0
        for begin, end, learn in pieces:
            piece = self.window[begin:end]
            if not learn:
                state = self._report(piece, state)
                continue
            segment = self._inject(Segment.run(self.model, piece, state, self.carry.dims, track=False), piece)
            pulled = self._pull([segment], [self.parameters], injected)
            total = pulled if total is None else Pulled(add(total.gradients, pulled.gradients), [])
            state, lookback = detach(segment.end), max(lookback, end - begin)
        assert total is not None
        past = self._past([Stretch(self.window.without_targets(), self.carry.state)], 0)
        return self._estimate(total, injected, lookback), replace(self.carry, state=state, past=past)

    def recompute(self) -> tuple[Estimate, TBPTTCarry]:
        """k2 > k1: the steps before the window are run again from the state k2 steps back."""
        k1, k2, dims = self.k1, self.k2, self.carry.dims
        past = self.carry.past.last(self.model, k2 - self.window.steps, dims)
        news = 0 if past is None else past.window.steps  # the step at which the window begins
        context = self.window.without_targets()
        whole = context if past is None else Window.join([past.window, context])
        mark = max(0, whole.steps + k1 - k2)  # where the next look-back begins, if its window is full
        state = self.carry.state if past is None else past.state
        chain: list[Segment] = []
        stretches: list[Stretch] = []
        for begin, end in pairwise(sorted({0, news, mark, whole.steps})):
            stretches.append(Stretch(whole[begin:end], state))
            segment = Segment.run(self.model, whole[begin:end], state, dims, track=begin > 0)
            if begin >= news:
                segment = self._inject(segment, self.window[begin - news : end - news])
            state = detach(segment.end)
            chain.append(segment)
        injected = self.num_terms
        pulled = self._pull(chain, [self.parameters] * len(chain), injected)
        carry = replace(self.carry, state=state, past=self._past(stretches, news))
        return self._estimate(pulled, injected, whole.steps), carry

    def retain(self) -> tuple[Estimate, TBPTTCarry]:
        """k2 > k1: the graphs of the steps before the window are still there."""
        k1, k2, dims = self.k1, self.k2, self.carry.dims
        weights = {
            name: value.detach().clone().requires_grad_()
            for name, value in zip(self.names, self.parameters, strict=True)
        }
        state, steps = self.carry.state, self.window.steps
        news: list[RetainedSegment] = []
        cut = -k2 % k1  # a later look-back will begin here, if every window is full
        for begin, end in pairwise(sorted({0, min(cut, steps), steps})):
            piece = self.window[begin:end]
            segment = RetainedSegment.run(self.model, piece, state, weights, dims)
            assert segment.live is not None
            news.append(replace(segment, live=self._inject(segment.live, piece)))
            state = detach(segment.live.end)
        if any(segment.weights.keys() != weights.keys() for segment in self.carry.retained):
            raise CapabilityError(
                "the parameters that require a gradient are not those of the windows whose graphs were retained: "
                "through these there is no gradient for a parameter that was frozen then",
                fix='TBPTT(k1, k2, replay="recompute"), which runs them again',
            )
        chain = [*newest(self.model, self.carry.retained, self.carry.state, k2 - steps, dims), *news]
        live = [segment.live for segment in chain if segment.live is not None]
        injected = self.num_terms
        pulled = self._pull(
            live, [[segment.weights[name] for name in self.names] for segment in chain], injected, keep=True
        )
        lookback = sum(segment.steps for segment in chain)
        carry = replace(self.carry, state=state, retained=kept_for(chain, k1, k2))
        return self._estimate(pulled, injected, lookback), carry

    def _pieces(self) -> list[tuple[int, int, bool]]:
        steps, k2 = self.window.steps, self.k2
        if steps <= k2:
            return [(0, steps, True)]
        if self.setting.losses == "tail":
            return [(0, steps - k2, False), (steps - k2, steps, True)]
        return [(begin, min(begin + k2, steps), True) for begin in range(0, steps, k2)]

    def _report(self, piece: Window, state: Tree | None) -> Tree:
        """Run steps whose losses are reported and not learned from; return the state after them."""
        with torch.no_grad():
            outputs, state = unroll(self.model, piece, state, self.carry.dims)
            self._count(outputs, *self.loss.total(outputs, piece))
        return state

    def _inject(self, segment: Segment, piece: Window) -> Segment:
        loss_sum, count = self.loss.total(segment.outputs, piece)
        self._count(segment.outputs, loss_sum, count)
        return segment.injecting(loss_sum) if count else segment

    def _count(self, outputs: Tree, loss_sum: Tensor, count: int) -> None:
        if self.setting.keep_outputs:
            self.outputs.append(detach(outputs))
        self.sums.append(loss_sum.detach())
        self.num_terms += count

    def _pull(
        self, chain: Sequence[Segment], parameters: Sequence[Sequence[Tensor]], injected: int, *, keep: bool = False
    ) -> Pulled:
        if not injected:  # sum / count of nothing: no gradient, rather than 0 / 0
            return Pulled([None] * len(self.names), [])
        return pull_back(chain, parameters, torch.full_like(self.sums[-1], 1 / injected), keep=keep)

    def _past(self, news: list[Stretch], replaced: int) -> History:
        """Return what is remembered for the next look-back: these stretches, and older ones if they may be needed."""
        keep = self.setting.lengths.remembered
        return self.carry.past.followed_by(news, replaced, keep) if keep else self.carry.past

    def _estimate(self, pulled: Pulled, injected: int, lookback: int) -> Estimate:
        loss_sum = self.sums[0] if len(self.sums) == 1 else torch.stack(self.sums).sum()
        norms = pulled.boundary_norms
        return Estimate(
            outputs=time_cat(self.outputs) if self.setting.keep_outputs else None,
            loss=loss_sum / self.num_terms,
            loss_sum=loss_sum,
            num_terms=self.num_terms,
            gradients=own(self.names, self.parameters, pulled.gradients),
            lookback=lookback,
            boundary_norms=torch.stack(norms) if norms else _NONE_CROSSED,
            num_injected=injected,
        )
