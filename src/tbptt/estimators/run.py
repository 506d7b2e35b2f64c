"""One call of `estimate`, as far as it is the same for every method over a chain of segments.

Letters: T time, B lanes, K boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from tbptt.coupling import refuse_coupled
from tbptt.errors import CapabilityError
from tbptt.estimators.base import LOSS_PREFIX, Estimate, by_owner
from tbptt.estimators.carry import ChainCarry
from tbptt.estimators.gradients import after_hooks, own
from tbptt.estimators.history import Stretch
from tbptt.estimators.replayable import cuts_between, find_out
from tbptt.estimators.segments import Boundary, Chain, Pulled, Segment, pass_on, pull_back
from tbptt.loss import Counted, StepLoss, Summed
from tbptt.model import trainable_parameters
from tbptt.side_state import SideState, as_then
from tbptt.tree import Tree, detach, time_cat
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Run"]

_NONE_CROSSED = torch.zeros(0)


class Run:
    """The model run over a window and what lies before it, its losses counted.

    Attributes:
        names: of the model's parameters that are trained.
        parameters: these.
        trained: they and the loss's own, by the names of `Estimate.all_gradients`.
        asked: all of these, as autograd is asked about them.
        device: of the model.
        outputs: of the window's pieces, detached; empty unless they are to be kept.
        sums: of the pieces' losses, 0-dim each.
        counted: the targets in them.
        terms: the same sums of each term by name, where the loss returns a dict of them.
    """

    def __init__(self, model: nn.Module, loss: StepLoss, carry: ChainCarry, *, keep_outputs: bool) -> None:
        self.model, self.loss, self.carry, self.keep_outputs = model, loss, carry, keep_outputs
        self.trained = trainable_parameters(model)
        self.names, self.parameters = zip(*self.trained.items(), strict=True)
        self.trained |= {LOSS_PREFIX + name: each for name, each in loss.own_parameters(model).items()}
        self.asked = tuple(self.trained.values())
        self.device = self.parameters[0].device
        self.outputs: list[Tree] = []
        self.sums: list[Tensor] = []
        self.counted, self._first = Counted(), 0
        self._like = torch.zeros((), dtype=torch.float64, device=self.device)  # until a loss was called
        self.terms: dict[str, list[Tensor]] = {}

    def report(self, piece: Window, state: Tree | None) -> Tree:
        """Run steps whose losses are reported and not learned from; return the state after them."""
        with torch.no_grad():
            outputs, state = unroll(self.model, piece, state, self.carry.dims)
            self._count(outputs, self._summed(outputs, piece))
        return state

    def inject(self, segment: Segment, piece: Window) -> Segment:
        """Return a segment with the losses of its steps, which are counted."""
        summed = self._summed(segment.outputs, piece)
        self._count(segment.outputs, summed)
        return segment.injecting(summed.total) if summed.counted.num else segment

    def look_back(
        self, past: Stretch | None, window: Window, cuts: Iterable[int], *, needed: bool = True
    ) -> tuple[list[Segment], list[Stretch]]:
        """Run what lies before a window again, as it was run then, and the window after it, whose losses are injected.

        Args:
            past: the steps before the window; None for none. What lies before them stays out of the graph.
            window: the steps after them.
            cuts: where a segment begins, counted from the first step of the past; one begins with the window, too.
            needed: whether the estimate depends on the cuts before the window; if not, those within a call of a model
                that cannot be cut there are left out.

        Returns:
            The segments, oldest first, and their steps with the states before them.

        Raises:
            CapabilityError: the model cannot be run again as it was run; or a cut is needed within one of its calls.
        """
        news = 0 if past is None else past.window.steps
        context = window.laid_out().without_targets()
        whole = context if past is None else Window.join([past.window, context])
        state = self.carry.state if past is None else past.state
        spans = list(pairwise(sorted({0, news, *cuts_between(self, past, cuts, needed), whole.steps})))
        chain: list[Segment] = []
        stretches: list[Stretch] = []

        def run(state: Tree | None, side: SideState | None) -> Tree:
            """Run the next segment; return the state after it."""
            begin, end = spans[len(chain)]
            stretches.append(Stretch(whole[begin:end], state, side))
            chain.append(Segment.run(self.model, whole[begin:end], state, self.carry.dims, track=begin > 0))
            return detach(chain[-1].end)

        side = now = self._side(None if past is None else past.side)
        if past is not None:
            # where all is as it was then, and a model moves nothing, there is nothing to put back
            still = bool(self.carry.joins) and now is past.side
            with nullcontext() if still else as_then(past.side, self.model, device=self.device):
                found = past.side
                while spans[len(chain)][0] < news:
                    state = run(state, found)
                    found = found if still else self._side(found)
            side = self._side(now)
            if side is not now and still:  # it does by now
                self.carry.joins = False
                now.restore(self.model, in_place=False)
                side = now
        for begin, end in spans[len(chain) :]:
            state = run(state, side)
            chain[-1] = self.inject(chain[-1], window[begin - news : end - news])
            side = side if self.carry.joins else self._side(side)
        if self.carry.joins is not False:
            find_out(self, chain, stretches)
        return chain, stretches

    def cuts(self, cuts: Iterable[int], news: int) -> list[int]:
        """Return where segments may begin: not within a window whose losses are to be in one piece.

        Args:
            cuts: where they would, none of which changes the estimate.
            news: where the window begins.
        """
        return [at for at in cuts if at <= news] if self.loss.whole else list(cuts)

    def newest_first(self) -> None:
        """Put what was counted from the newest segment to the oldest into the order of time."""
        self.outputs.reverse()
        self.sums.reverse()

    def weight(self, denominator: float) -> Tensor:
        """Return 1 / denominator in the type of the losses, 0-dim."""
        return torch.full_like(self._like, 1 / denominator)

    def pull(
        self,
        chain: Chain,
        injected: Counted,
        *,
        denominator: float | None = None,
        keep: bool = False,
        boundary: Boundary = pass_on,
        counts: Callable[[int], bool] = lambda index: True,
    ) -> Pulled:
        """Return the gradient of the mean over the losses in a chain.

        Args:
            chain: consecutive segments, oldest first.
            injected: the targets of the losses injected into this update.
            denominator: what the sum is divided by instead of their weight; None: by that.
            keep: whether the graphs will be used again.
            boundary: what becomes of the gradient at each boundary that counts.
            counts: see `pull_back`.
        """
        if not injected:  # sum / count of nothing: no gradient, rather than 0 / 0
            return Pulled([None] * len(self.asked), [])
        weight = self.weight(denominator or injected.weight)
        return pull_back(chain, [self.asked] * len(chain), weight, keep=keep, boundary=boundary, counts=counts)

    def estimate(
        self,
        pulled: Pulled,
        injected: Counted,
        lookback: int,
        *,
        denominator: float | None = None,
        metrics: Mapping[str, float] | None = None,
        boundary_lags: tuple[int, ...] = (),
    ) -> Estimate:
        """Return what came out of all that was run; see `Estimate`.

        Args:
            pulled: the gradients, in the order of `asked`, before any hooks on parameters.
            injected: the number of losses injected.
            lookback: the steps that they were sent back.
            denominator: what the sum was divided by instead of their number.
            metrics: whatever else was measured.
        """
        gradients, of_loss = after_hooks(self.trained, own(self.trained, pulled.gradients)), dict[str, Tensor]()
        if len(self.asked) > len(self.names):
            gradients, of_loss = by_owner(gradients)
        loss_sum = self.sums[0] if len(self.sums) == 1 else torch.stack(self.sums).sum()
        norms = pulled.boundary_norms
        counted, by_term = self.counted, dict[str, float]()
        for name, each in self.terms.items():
            by_term[f"loss/{name}"] = float(torch.stack(each).sum()) / counted.weight if counted else math.nan
        return Estimate(
            outputs=time_cat(self.outputs) if self.keep_outputs else None,
            loss=loss_sum / counted.weight if counted else torch.full_like(loss_sum, math.nan),
            loss_sum=loss_sum,
            num_terms=counted.num if counted else 0,
            loss_denominator=counted.denominator,
            gradients=gradients,
            loss_gradients=of_loss,
            lookback=lookback,
            boundary_norms=torch.stack(norms) if norms else _NONE_CROSSED,
            boundary_lags=boundary_lags if norms else (),
            num_injected=injected.num if injected else 0,
            denominator=injected.denominator if denominator is None else denominator,
            metrics=by_term | dict(metrics or {}),
        )

    def _side(self, like: SideState | None) -> SideState:
        return SideState.of(self.model, device=self.device, like=like)

    def _summed(self, outputs: Tree, piece: Window) -> Summed:
        """Return the sum of a piece's losses, the first time after a look at whether they are of single steps."""
        if self.loss.whole and self.sums:
            raise CapabilityError(
                "a window in one piece was expected for a WindowLoss, but the estimator cuts it, into a first piece of "
                f"{self._first} steps: of each piece it would be another loss",
                fix="TBPTT(k1, k2) with k2 >= k1, FullBPTT(k1, segment=k1), or a loss of single steps",
            )
        summed = self.loss.total(outputs, piece)
        self._first = piece.steps
        if summed.counted.num and not self.carry.loss_looked:
            refuse_coupled(self.loss, outputs, piece, self.model)
            self.carry.loss_looked = True
        return summed

    def _count(self, outputs: Tree, summed: Summed) -> None:
        if self.keep_outputs:
            self.outputs.append(detach(outputs))
        self.sums.append(summed.total.detach())
        if summed.counted.num:
            self._like = self.sums[-1]  # without a target there is no loss that would say its type
        self.counted += summed.counted
        for name, each in summed.terms.items():
            self.terms.setdefault(name, []).append(each)
