"""Sparse attentive backtracking: the gradient jumps along memories that were looked up, and a few steps from there.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary, rule_at
from tbptt.estimators.carry import ChainCarry, check_window
from tbptt.estimators.gradients import Gradients
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Boundary
from tbptt.length.base import check_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.recurrence import memories_of
from tbptt.tree import Tree, detach, differentiable, tensors
from tbptt.window import Window

__all__ = ["SparseAttentiveBacktracking"]

_EXAMPLE = "SparseAttentiveBacktracking(k1=100, k_trunc=5)"
_WRAPPED = (
    "tbptt.models.Attentive(nn.LSTM(inputs, hidden)), or SequenceModel(core='attentive_lstm'); in a model of your own, "
    "def memories(self): return (place,)"
)


@final
@dataclass(frozen=True)
class SparseAttentiveBacktracking(Estimator):
    """Cut the recurrent gradient every k_trunc steps, and let that of the memories pass.

    For a model that keeps states of its past in a memory and looks a few of them up, as `tbptt.models.Attentive` does
    (k_att and k_top are its arguments). From a loss the gradient goes back at most k_trunc steps through the
    recurrence; along each memory that was looked up it jumps to the step that stored it, goes back at most k_trunc
    steps from there, jumps again along what was looked up there, and so on. It is `TBPTT` over segments of
    k_trunc steps with another rule at their boundaries: the recurrent part of the state's gradient stops, that of the
    memory goes on.

    Choose it where credit lies far back in a few steps, and the way there through the recurrence is long: the way along
    a memory is one step, however old it is. Not recommended where nothing is far away, as `TBPTT(k1, k1)` with the same
    model has all of this gradient and the recurrent one, too, in no more time.

    Args:
        k1: steps of a window, at least 1; a whole sequence where that can be paid for, as in the paper.
        k_trunc: steps that the gradient goes back through the recurrence at most, from 1 to k1. The recurrence is cut
            every k_trunc steps, counted from the first step of the window, on both of its sides.
        lookback: how far a gradient goes back along memories at most, its own step included, at least k1; those that
            are older are looked up, and no gradient goes along. Left out: k1, so that it stays within the window.
        keep_outputs: whether estimates hold the window's outputs.
        boundary: what becomes of the gradient that goes on along memories, at each cut: `ClipBoundary(max_norm)` clips
            it there, after the recurrent part is stopped; None: it goes on as it is.

    Raises:
        ConfigError: a number of steps below 1, a k_trunc above k1, or a lookback below it; or a boundary, and nothing
            that could be cut.

    Exactness: biased, by what neither a chosen memory nor k_trunc steps lead back to, and where `boundary` clips; exact
        as the gradient of the graph with the recurrent state detached at each cut
        (tests/estimators/test_sparse_attentive.py). No `reach` is promised: how far a gradient really goes depends on
        which memories are chosen. With a lookback above k1 the steps before the window are run again with today's
        weights, but older memories are as they were when stored.
    Cost: `lookback` steps forward and back, and memory of their graphs: cutting the recurrence saves none of it, as the
        graph of any step may yet be needed. A call of the model for each k_trunc steps.
    Reference: Ke et al. (2018), "Sparse attentive backtracking", arXiv:1809.03702. In the released code the first
        segment of a sequence is one step shorter than the others.

    Example:
        >>> import tbptt, torch
        >>> model = tbptt.models.Attentive(nn.GRU(1, 4), memory=8)
        >>> stream = tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 8), lanes=2)
        >>> estimator = SparseAttentiveBacktracking(k1=20, k_trunc=5)
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(20):
        ...     estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
        >>> len(estimate.boundary_norms)
        3
    """

    k1: int
    k_trunc: int
    lookback: int | None = None
    keep_outputs: bool = False
    boundary: ClipBoundary | None = None

    kind: ClassVar[str] = "biased"

    @classmethod
    def examples(cls) -> tuple[SparseAttentiveBacktracking, ...]:
        """Return settings within the window and beyond it, clipped and not; see `Estimator.examples`."""
        return cls(6, 2), cls(5, 2), cls(4, 2, lookback=9), cls(6, 2, boundary=ClipBoundary(0.01))

    def __post_init__(self) -> None:
        for name in ("k1", "k_trunc") if self.lookback is None else ("k1", "k_trunc", "lookback"):
            check_whole(self, name, _EXAMPLE)
        if self.k_trunc > self.k1:
            raise ConfigError(
                f"a k_trunc of at most k1 was expected, but k1={self.k1} and k_trunc={self.k_trunc} came: the "
                "recurrence is cut where a window begins, so that no gradient could go so far",
                fix=f"k1={self.k_trunc}, or k_trunc={self.k1}",
            )
        if self.lookback is not None and self.lookback < self.k1:
            raise ConfigError(
                f"a lookback of at least k1 was expected, but k1={self.k1} and lookback={self.lookback} came: the "
                "gradient goes back through all of the window",
                fix=f"lookback=None, or lookback={2 * self.k1}",
            )
        if self.boundary is not None:
            owner = f"SparseAttentiveBacktracking(k1={self.k1}, k_trunc={self.k_trunc})"
            crossed = self.k_trunc < (self.lookback or self.k1)
            self.boundary.refuse_unless(crossed, owner, fix=f"lookback={2 * self.k1}")

    def next_steps(self, carry: ChainCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window.

        Raises:
            CapabilityError: the model cannot be trained in windows, or has no memories.
        """
        check_trainable(model)
        if not memories_of(model):
            raise CapabilityError(
                f"a model that names its memories was expected, but {type(model).__name__} names none: with nothing to "
                f"jump along, this would be TBPTT(k1={self.k1}, k2={self.k_trunc}, losses='all')",
                fix=_WRAPPED,
            )
        return ChainCarry(lanes)

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return nothing: how far a gradient goes depends on the memories that are chosen; see `Estimator.reach`."""
        del steps  # whatever their number
        return ()

    def estimate(self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window) -> tuple[Estimate, ChainCarry]:
        """Run the model over `window` and estimate the gradient of its losses.

        `boundary_norms` are of all that arrives at a cut, before clipping, the recurrent part, which stops there,
        included.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss, or a model
                or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state), or whose memories are not where it says.
        """
        check_window(window, carry, self.k1, f"stream.windows({self.k1})")
        carry = carry.for_window(model, window)
        run = Run(model, StepLoss.of(loss), carry, keep_outputs=self.keep_outputs)
        lookback = self.lookback or self.k1
        past = carry.last(model, lookback - window.steps)
        news = 0 if past is None else past.window.steps  # the step at which the window begins
        steps = news + window.steps
        chain, stretches = run.look_back(past, window, range(news % self.k_trunc, steps, self.k_trunc))
        injected = run.counted
        rule = along(_memories(model, chain[-1].end), rule_at(self.boundary, carry.dims))
        pulled = run.pull(chain, injected, boundary=rule)
        if lookback > self.k1:
            carry = replace(carry, past=carry.past.followed_by(stretches, news, lookback))
        return run.estimate(pulled, injected, steps), replace(carry, state=detach(chain[-1].end))


def along(memories: Collection[int], then: Boundary) -> Boundary:
    """Return the rule that stops all of the state's gradient but that of its memories.

    Args:
        memories: their places among the state's tensors.
        then: what becomes of the rest.
    """

    def jump(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
        kept = {id(leaf) for place, leaf in enumerate(tensors(start)) if place in memories}
        passing = [
            gradient if id(leaf) in kept else None
            for leaf, gradient in zip(differentiable(start), cotangent, strict=True)
        ]
        return then(index, start, passing)

    return jump


def _memories(model: nn.Module, state: Tree) -> tuple[int, ...]:
    """Return the places of a model's memories in its state, seen to be there."""
    places, leaves = memories_of(model), tensors(state)
    wrong = [each for each in places if not 0 <= each < len(leaves) or not differentiable(leaves[each])]
    if wrong:
        raise CapabilityError(
            f"memories among the state's tensors, of numbers with a gradient, were expected at the places {places}, "
            f"but there is none at {wrong[0]} of {len(leaves)}: nothing would be sent along it",
            fix="let memories() name places as tbptt.tree.tensors(state) has them",
        )
    return places
