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
from tbptt.estimators.segments import Pulled, RetainedSegment, Segment, add, own, pull_back
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable, find_lane_dims, trainable_parameters
from tbptt.tree import LaneDims, Tree, detach, differentiable, time_cat
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["TBPTT", "TBPTTCarry"]

_NONE_CROSSED = torch.zeros(0)


@dataclass(frozen=True, eq=False)
class _Past:
    """The steps before the window that the next look-back may need (replay="recompute").

    Args:
        window: those steps, without targets.
        state: the state before the first of them; None for the model's initial state.
        mark: the step of `window` at which the next look-back will start, if the next window is a full one.
        marked: the state before that step.
    """

    window: Window
    state: Tree | None
    mark: int
    marked: Tree | None

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window.state_dict(), "state": self.state, "mark": self.mark, "marked": self.marked}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> _Past:
        return _Past(Window(**state["window"]), state["state"], state["mark"], state["marked"])


@dataclass(eq=False)
class TBPTTCarry:
    """What `TBPTT` carries from window to window.

    Attributes:
        lanes: the number of sequences side by side.
        state: the model's state after the last window, detached; None before the first.
        dims: the lane dimension of each tensor of the state, once it has been found out.
        past: the steps that the next look-back may re-run; None where nothing is re-run.
        retained: the segments whose graphs the next look-back may use, oldest first.
    """

    lanes: int
    state: Tree | None = None
    dims: LaneDims | None = None
    past: _Past | None = None
    retained: tuple[RetainedSegment, ...] = ()
    looked: bool = field(default=False, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors; graphs are left out and built again when needed."""
        return {
            "lanes": self.lanes,
            "state": self.state,
            "dims": self.dims,
            "looked": self.looked,
            "past": None if self.past is None else self.past.state_dict(),
            "retained": [segment.state_dict() for segment in self.retained],
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
        self.past = None if state["past"] is None else _Past.from_state_dict(state["past"])
        self.retained = tuple(RetainedSegment.from_state_dict(each) for each in state["retained"])


@dataclass(frozen=True)
class TBPTT(Estimator):
    """Run forward k1 steps, send the gradient back k2 steps, carry the state on.

    Each loss is injected into exactly one update, that of its own window ending at step s:
    b_0 = q_s, b_k = b_{k-1} D_{s-k+1} + [k < k1] q_{s-k}, gradient = sum_k b_k I_{s-k} over k < k2.
    Choose k2 by the dependency that the task has, k1 by how often to update; k1 = k2 is the cheapest, and
    k2 = 2 k1 gives every loss at least k1 steps of look-back.

    Args:
        k1: steps run forward between updates (Williams & Peng's h'), at least 1.
        k2: look-back: the gradient of a loss reaches at most k2 steps back, its own included (their h).
        losses: for k2 < k1, what becomes of the first k1 - k2 losses. "tail": they are reported, not
            learned from, and their steps run without a graph. "all": the window is cut into pieces of k2
            steps whose gradients add up to one update. For k2 >= k1 all losses are injected either way.
        replay: for k2 > k1, what becomes of the steps before the window. "recompute": they are run again,
            with today's weights, from the state k2 steps back, and the state carried on is the re-run one.
            "retain": their graphs are kept, with the weights that they were run with; a short window may need
            a graph cut where it was not, and then runs those steps once more.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: a length that is not a whole number of at least 1, or an unknown choice.

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

    k1: int
    k2: int
    losses: Literal["tail", "all"] = "tail"
    replay: Literal["recompute", "retain"] = "recompute"
    keep_outputs: bool = False

    kind: ClassVar[str] = "biased"

    def __post_init__(self) -> None:
        for name in ("k1", "k2"):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
                raise ConfigError(
                    f"{name} was expected to be a whole number of steps, at least 1, but is {value!r}",
                    fix="TBPTT(k1=64, k2=64)",
                )
            object.__setattr__(self, name, int(value))  # numpy's whole numbers become Python's
        for name, choices in (("losses", ("tail", "all")), ("replay", ("recompute", "retain"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f'{name} was expected to be "{choices[0]}" or "{choices[1]}", but is {getattr(self, name)!r}',
                    fix=f'TBPTT({self.k1}, {self.k2}, {name}="{choices[0]}")',
                )

    def next_steps(self, carry: TBPTTCarry) -> int:
        """Return k1."""
        del carry  # the length does not depend on what has been seen
        return self.k1

    def init(self, model: nn.Module, lanes: int) -> TBPTTCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        return TBPTTCarry(lanes)

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return how far each loss of a window of `steps` steps reaches; see `Estimator.reach`."""
        if self.k2 >= steps:
            oldest = self.k2 if self.k2 > self.k1 else steps
            return tuple(oldest - (steps - 1 - step) for step in range(steps))
        if self.losses == "all":
            return tuple(step % self.k2 + 1 for step in range(steps))
        return tuple(max(0, step + 1 - (steps - self.k2)) for step in range(steps))

    def estimate(self, model: nn.Module, loss: Loss, carry: TBPTTCarry, window: Window) -> tuple[Estimate, TBPTTCarry]:
        """Run the model over `window` and estimate the gradient of its losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        self._check(carry, window)
        if not carry.looked:
            carry = replace(carry, dims=find_lane_dims(model, window.inputs), looked=True)
        run = _Run(self, model, StepLoss.of(loss), carry, window)
        if self.k2 <= self.k1:
            return run.within()
        return run.recompute() if self.replay == "recompute" else run.retain()

    def _check(self, carry: TBPTTCarry, window: Window) -> None:
        if window.steps > self.k1:
            raise ShapeError(
                f"a window of at most k1 = {self.k1} steps was expected, but {window.steps} came: "
                "there would be fewer updates than k1 says",
                fix=f"stream.windows({self.k1}), or TBPTT(k1={window.steps}, k2={self.k2})",
            )
        if window.lanes != carry.lanes:
            raise ShapeError(
                f"a window of {carry.lanes} lanes was expected, as the carry has, but {window.lanes} came: "
                "each lane's state belongs to that lane's sequence",
                fix=f"estimator.init(model, lanes={window.lanes}) when the sequences are other ones",
            )


class _Run:
    """One call of `TBPTT.estimate`: the parts that its three regimes share."""

    def __init__(self, setting: TBPTT, model: nn.Module, loss: StepLoss, carry: TBPTTCarry, window: Window) -> None:
        self.setting, self.model, self.loss, self.carry, self.window = setting, model, loss, carry, window
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
        return self._estimate(total, injected, lookback), replace(self.carry, state=state)

    def recompute(self) -> tuple[Estimate, TBPTTCarry]:
        """k2 > k1: the steps before the window are run again from the state k2 steps back."""
        k1, k2, dims = self.setting.k1, self.setting.k2, self.carry.dims
        past = self.carry.past
        whole = self.window if past is None else Window.join([past.window, self.window.without_targets()])
        first = max(0, whole.steps - k2)
        start = None if past is None else self._state_at(past, first)
        whole = whole[first:]
        news = whole.steps - self.window.steps  # the step at which the window begins
        mark = max(0, whole.steps + k1 - k2)  # where the next look-back begins, if its window is full
        marked, state = start, start
        chain: list[Segment] = []
        for begin, end in pairwise(sorted({0, news, mark, whole.steps})):
            segment = Segment.run(self.model, whole[begin:end], state, dims, track=begin > 0)
            if begin >= news:
                segment = self._inject(segment, self.window[begin - news : end - news])
            state = detach(segment.end)
            marked = state if end == mark else marked
            chain.append(segment)
        injected = self.num_terms
        pulled = self._pull(chain, [self.parameters] * len(chain), injected)
        past = _Past(whole.without_targets(), start, mark, marked)
        return self._estimate(pulled, injected, whole.steps), replace(self.carry, state=state, past=past)

    def retain(self) -> tuple[Estimate, TBPTTCarry]:
        """k2 > k1: the graphs of the steps before the window are still there."""
        k1, k2, dims = self.setting.k1, self.setting.k2, self.carry.dims
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
        chain = [*_last(self.model, self.carry, k2 - steps), *news]
        live = [segment.live for segment in chain if segment.live is not None]
        injected = self.num_terms
        pulled = self._pull(
            live, [[segment.weights[name] for name in self.names] for segment in chain], injected, keep=True
        )
        lookback = sum(segment.steps for segment in chain)
        carry = replace(self.carry, state=state, retained=_kept(chain, k1, k2))
        return self._estimate(pulled, injected, lookback), carry

    def _pieces(self) -> list[tuple[int, int, bool]]:
        steps, k2 = self.window.steps, self.setting.k2
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

    def _state_at(self, past: _Past, step: int) -> Tree | None:
        """Return the state before `step` of the past: kept, or run anew when the window is a short one."""
        if step in (0, past.mark):
            return past.state if step == 0 else past.marked
        with torch.no_grad():
            return detach(unroll(self.model, past.window[:step], past.state, self.carry.dims)[1])

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


def _last(model: nn.Module, carry: TBPTTCarry, steps: int) -> list[RetainedSegment]:
    """Return the last `steps` steps of the retained segments, built; one that sticks out is cut.

    A model that draws its random numbers in another order when it is run in two pieces (dropout between the
    layers of one module) cannot be cut: the piece would not lead to the state that was carried. It is left
    out then, and the look-back of this one update is shorter.
    """
    found: list[RetainedSegment] = []
    after = carry.state
    for segment in reversed(carry.retained):
        if steps <= 0:
            break
        if segment.steps > steps:
            segment = segment.split(model, segment.steps - steps, carry.dims)[1]
            if not _agree(segment, after):
                break
        found.append(segment.built(model, carry.dims))
        after = segment.begin
        steps -= segment.steps
    return found[::-1]


def _agree(segment: RetainedSegment, after: Tree) -> bool:
    assert segment.live is not None
    pairs = zip(differentiable(segment.live.end), differentiable(after), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def _kept(chain: Sequence[RetainedSegment], k1: int, k2: int) -> tuple[RetainedSegment, ...]:
    """Return the segments that the next look-back may need.

    A full next window needs the last k2 - k1 steps; a short one needs more, which are kept asleep.
    """
    kept: list[RetainedSegment] = []
    age = 0
    for segment in reversed(chain):
        if age >= k2 - 1:
            break
        kept.append(segment.past() if age < k2 - k1 else segment.asleep())
        age += segment.steps
    return tuple(kept[::-1])
