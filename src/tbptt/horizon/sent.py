"""One loss at one place of a stream, sent back as far as was asked for.

Letters: T time, B lanes, K lags or look-backs, L longest lag, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tbptt.estimators.gradients import Gradients, add
from tbptt.estimators.history import Stretch
from tbptt.estimators.probe import run_chain
from tbptt.estimators.segments import Step, lane_norms, walk_back
from tbptt.horizon.inputs import InputTap
from tbptt.horizon.statistics import Sketch
from tbptt.horizon.ways import OneWay, only, part_of
from tbptt.loss import StepLoss
from tbptt.tree import LaneDims, Tree
from tbptt.window import Window

__all__ = ["Place", "Plan", "Sent"]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        lags: where the state's gradient is, rising to the longest, L.
        lookbacks: whose gradients are compared, rising to L; each is one of the lags.
        gradients: whether they are.
        context: whether the loss with little context is measured.
        ways: by which the past comes, to be told apart; none for all as one.
    """

    lags: tuple[int, ...]
    lookbacks: tuple[int, ...]
    gradients: bool = True
    context: bool = True
    ways: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """The longest lag, L."""
        return self.lags[-1]


@dataclass(frozen=True, eq=False)
class Place:
    """A place in the stream where a loss is sent back from.

    Args:
        window: L steps.
        state: the state before them, carried from the stream's beginning; None for the model's initial state.
        dims: the lane dimension of each tensor of the state.
        early: how many steps before the last of them the loss is that counts; less than the resolution.
    """

    window: Window
    state: Tree | None
    dims: LaneDims | None
    early: int = 0


class Sent:
    """One loss on its way back, all together and then along each way alone.

    Attributes:
        loss: its mean over the lanes that have a target.
        state: norm of the state's gradient at the plan's lags. Shape (K,).
        inputs: norm of the input's gradient at lags 0..L-1. Shape (L,); None where there is none to ask about.
        gradients: sketches of the parameters' gradient for each look-back, rising.
        ways: what crosses by each way, and what comes along it alone.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: StepLoss,
        place: Place,
        plan: Plan,
        parameters: list[Tensor],
        tap: InputTap | None,
        sketch: Sketch,
    ) -> None:
        self._model, self._dims, self._plan, self._tap = model, place.dims, plan, tap
        news, longest = plan.lags[0], plan.longest
        past = Stretch(place.window[: longest - news].without_targets(), place.state)
        newest, self._lanes, self._count = _one_loss(loss, place.window[longest - news :], place.early)
        # inside of a piece ways cannot be told apart, so that it must be as short as it can be
        lags = range(news, longest + 1, news) if plan.ways else plan.lags
        enter = nullcontext if tap is None else tap.enter
        cuts = [longest - lag for lag in lags]
        self._chain, begins = run_chain(model, loss, past, newest, place.dims, cuts, enter)
        self._lags = [longest - begin for begin in begins]
        self._tapped = [list(tap.tapped[index]) if tap else [] for index in range(len(begins))]
        last = self._chain[-1].loss
        assert last is not None
        self._one = torch.ones_like(last)
        self.loss = float(last.detach()) / self._count
        self.gradients: list[Tensor] = []
        crossing = self._all_together(parameters, sketch)
        self.ways: dict[str, OneWay] = {}
        for name in plan.ways:
            self.ways[name] = self._along(name, crossing[name])

    def _all_together(self, parameters: list[Tensor], sketch: Sketch) -> dict[str, dict[int, Tensor]]:
        """Send it back by all ways; return the norm of each way's part at each lag."""
        asked = [[*parameters, *each] for each in self._tapped]
        total: Gradients = [None] * len(parameters)
        state: dict[int, Tensor] = {}
        crossing: dict[str, dict[int, Tensor]] = {name: {} for name in self._plan.ways}
        pieces: list[Tensor] = []
        for step in walk_back(self._chain, asked, self._one, to_start=True, keep=bool(self._plan.ways)):
            start, lag = self._chain[step.index].start, self._lags[step.index]
            total = add(total, step.gradients[: len(parameters)])
            if parameters and lag in self._plan.lookbacks:
                known = [
                    torch.zeros_like(each) if gradient is None else gradient / self._count
                    for each, gradient in zip(parameters, total, strict=True)
                ]
                self.gradients.append(sketch(known))
            if start is not None:
                state[lag] = self._norm(step.cotangent, start)
                for name, found in crossing.items():
                    found[lag] = self._norm(part_of(self._model, name, start, step.cotangent), start)
            pieces += self._of_inputs(step, len(parameters))
        self.state = self._at_lags(state)
        self.inputs = torch.cat(pieces).cpu() if pieces else None
        return crossing

    def _along(self, name: str, crossing: Mapping[int, Tensor]) -> OneWay:
        """Send it back along one way alone."""
        alone: dict[int, Tensor] = {}
        pieces: list[Tensor] = []
        keep = name != self._plan.ways[-1]  # the graphs, for the ways that follow
        rule = only(self._model, name)
        for step in walk_back(self._chain, self._tapped, self._one, to_start=True, keep=keep, boundary=rule):
            start = self._chain[step.index].start
            if start is not None:
                alone[self._lags[step.index]] = self._norm(part_of(self._model, name, start, step.cotangent), start)
            newest = step.index == len(self._chain) - 1
            pieces += [torch.zeros_like(each) if newest else each for each in self._of_inputs(step)]
        inputs = torch.cat(pieces).cpu() if pieces else None
        return OneWay(self._at_lags(crossing), self._at_lags(alone), inputs)

    def _of_inputs(self, step: Step, skipped: int = 0) -> list[Tensor]:
        """Return the norms at the inputs of a piece, newest first; nothing where there is none to ask about."""
        if self._tap is None:
            return []
        norms = self._tap.norms(step.index, step.gradients[skipped:], self._chain[step.index].steps)
        return [norms[:, self._lanes].mean(1).flip(0)]

    def _norm(self, cotangent: Gradients, start: Tree) -> Tensor:
        """Return the mean norm over the lanes that have a target."""
        norms = lane_norms(cotangent, start, self._dims)
        if len(norms) == len(self._lanes):
            return norms[self._lanes].mean()
        return norms.mean() / self._count**0.5

    def _at_lags(self, found: Mapping[int, Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([found.get(lag, zero).cpu() for lag in self._plan.lags])


def _one_loss(loss: StepLoss, newest: Window, early: int) -> tuple[Window, Tensor, int]:
    """Return the window with the targets of one step only, the lanes that have one, (B,), and their number."""
    at = newest.steps - 1 - early
    mask = torch.zeros_like(newest.mask)
    mask[at] = newest.mask[at]
    newest = replace(newest, mask=mask)
    valid, count = loss.valid(newest)
    return newest, valid[at], count
