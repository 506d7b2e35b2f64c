"""How far back do the gradients of an estimator really go?

The model is given other weights at each step t, theta + delta_t V with delta_t = 0 and V random: the
estimator then returns the gradient with respect to delta_t, which is zero exactly where no gradient arrives.

Letters: T time, B lanes, N steps of the whole experiment, G groups of steps.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial
from tbptt.estimators.base import Carry, Estimator
from tbptt.model import copy_model, fork_random, initial_state, trainable_parameters, with_parameters
from tbptt.pathways import segment_steps
from tbptt.tree import Tree, tensors, time_cat, time_slice, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Reach", "measure_reach", "reach"]

FINE = 400
"""Up to so many steps each is probed by itself; beyond, only those where a look-back should begin."""
REACH_BUDGET = 40_000
"""The most model steps that measuring the reach may take before it is left out, and said so."""
WEIGHTS_BUDGET = 2**28
"""The most numbers that the copies of the weights may have, of which each step that is probed has one."""


@dataclass(frozen=True)
class Reach:
    """How far the loss of one step reaches, its own step included; 0 where it is not injected.

    Args:
        asked: what the estimator promises.
        model: how far, of that, it reaches in a graph that is cut nowhere; less where the model sends back less.
        measured: how far it reaches in the estimator.
    """

    asked: int
    model: int
    measured: int

    @property
    def agrees(self) -> bool:
        """Whether the estimator keeps its promise, as far as the model has anything to send back."""
        return self.measured == self.model


def reach(trial: Trial, estimator: Estimator, *, takes_steps: bool) -> CheckItem:
    """Measure how far the gradients of `estimator` go with the model of a trial."""
    estimator.prepare(trial.model, trial.window.inputs)
    estimator = estimator.fixed(estimator.init(trial.model, 1))
    steps = estimator.next_steps(estimator.init(trial.model, 1))
    asked, _ = _asked(estimator, steps)
    if not asked:
        return CheckItem("reach", "note", "not measured: this estimator's gradient does not show it")
    longest = max(asked)
    unit = segment_steps(trial.model)
    if not takes_steps and unit == 1:
        return CheckItem("reach", "note", "not measured: the model takes no single steps")
    if (longest // steps + 3) * (longest + steps) > REACH_BUDGET:
        return CheckItem("reach", "ok", f"not measured here: {longest} steps back would take minutes")
    copies = min((longest + 2 * steps) // unit, FINE)
    if copies * sum(each.numel() for each in trainable_parameters(trial.model).values()) > WEIGHTS_BUDGET:
        return CheckItem("reach", "ok", f"not measured here: it takes {copies} copies of the weights")
    one_lane = tree_map(lambda leaf: leaf[:, :1], trial.window.inputs)
    trial.restart()
    trial.model.eval()
    injected = [step for step, each in enumerate(asked) if each]
    found = measure_reach(trial.model, one_lane, estimator, sorted({injected[0], injected[-1]}))
    detail = "; ".join(f"{each.asked} steps asked, {each.measured} measured" for each in found)
    detail += f", in segments of {unit}" if unit > 1 else ""
    if all(each.agrees for each in found):
        short = any(each.model < each.asked for each in found)
        return CheckItem("reach", "ok", detail + (" (the model itself sends back no more)" if short else ""))
    cause = "the gradient does not reach as far as the estimator says"
    return CheckItem("reach", "fail", detail, cause, "use another estimator, and report this one")


class _Probe(nn.Module):
    """The model with weights of its own in each group of steps."""

    def __init__(self, model: nn.Module, groups: int) -> None:
        super().__init__()
        self.held = [copy_model(model)]  # in a list: its parameters are not this module's
        self.weights = {name: value.detach() for name, value in trainable_parameters(model).items()}
        scale = {name: value.abs().mean() + 1e-3 for name, value in self.weights.items()}
        self.direction = {name: torch.randn_like(value) * scale[name] for name, value in self.weights.items()}
        some = next(iter(self.weights.values()))
        self.delta = nn.Parameter(some.new_zeros(groups))

    def forward(self, inputs: tuple[Tree, Tensor], state: Tree | None = None) -> tuple[Tree, Tree]:
        """Run the model over inputs (T, B, ...), group by group."""
        values, groups = inputs
        begin, pieces = 0, []
        for group, members in groupby(groups[:, 0].tolist()):
            end = begin + len(list(members))
            weights = {name: value + self.delta[group] * self.direction[name] for name, value in self.weights.items()}
            piece = time_slice(values, begin, end)
            output, state = with_parameters(
                self.held[0], weights, lambda piece=piece, state=state: self.held[0](piece, state)
            )
            pieces.append(output)
            begin = end
        return time_cat(pieces), state

    def initial_state(self, lanes: int) -> Tree:
        """Return the model's own initial state, or None as at the start."""
        return initial_state(self.held[0], lanes)

    def segment_steps(self) -> int:
        """Return the steps of the model's own segments, or 1."""
        return segment_steps(self.held[0])


def measure_reach(
    model: nn.Module, inputs: Tree, estimator: Estimator, positions: list[int] | None = None
) -> list[Reach]:
    """Measure how far the losses at some steps of a window reach.

    The estimator is run, window after window, until the stream is older than its look-back; the losses of the
    next window are then injected one at a time. With a model that is cut into segments it is known to a segment.

    Args:
        model: the model; in double precision a gradient can vanish much further before it is lost.
        inputs: an example, leaves (T, B, ...), repeated as often as needed.
        estimator: the estimator.
        positions: steps of the window; left out: all of them.

    Cost: about N / k1 + len(positions) estimates, N = k1 + the longest reach asked for, rounded up.
    """
    model = copy_model(model)
    estimator.prepare(model, inputs)
    steps = estimator.next_steps(estimator.init(model, tensors(inputs)[0].shape[1]))
    asked, before = _asked(estimator, steps)
    chosen = range(steps) if positions is None else positions
    unit = segment_steps(model)
    begins = [before + at + 1 - asked[at] for at in chosen]  # the first step that each is to reach
    edges = {begin // unit * unit + extra * unit for begin in begins for extra in (-1, 0, 1)}
    cuts = sorted(edges if (before + steps) // unit > FINE else range(0, before + steps, unit))
    group_of, firsts = _group(before + steps, cuts)
    with fork_random(tensors(inputs)[0].device):
        torch.manual_seed(0)
        probe = _Probe(model, len(firsts))
        loss = _Projection()
        whole = Window((_repeated(inputs, before + steps), group_of.expand(tensors(inputs)[0].shape[1], -1).T))
        estimator.prepare(probe, whole[:steps].inputs)
        carry: Carry = estimator.init(probe, whole.lanes)
        for begin in range(0, before, steps):
            _, carry = estimator.estimate(probe, loss, carry, whole[begin : begin + steps])
        uncut = loss(unroll(probe, whole, None, None)[0], None)
        found: list[Reach] = []
        nothing = torch.zeros_like(probe.delta)  # no loss was injected, or none of them reaches a weight
        for at in chosen:
            only = torch.zeros(steps, whole.lanes, dtype=torch.bool)
            only[at] = True
            last = Window(whole[before:].inputs, mask=only.to(whole.mask.device), start=before)
            estimate, _ = estimator.estimate(probe, loss, carry, last)
            measured = _reach(before + at, estimate.gradients.get("delta", nothing), firsts)
            full = torch.autograd.grad(uncut[before + at].sum(), probe.delta, retain_graph=True)[0]
            full[: bisect_left(firsts, before + at + 1 - asked[at])] = 0  # older than what is asked for
            found.append(Reach(asked[at], _reach(before + at, full, firsts), measured))
    return found


def _asked(estimator: Estimator, steps: int) -> tuple[tuple[int, ...], int]:
    """Return how far the losses of a window are to reach, and how many steps are run before it, in whole windows.

    Where all of the past is promised, that is two windows.
    """
    promised = estimator.reach(steps)
    if promised is None:
        return tuple(2 * steps + at + 1 for at in range(steps)), 2 * steps
    return promised, -(-max(promised, default=0) // steps) * steps


class _Projection:
    """A loss that is a random direction of the outputs: no part of them goes unnoticed."""

    def __call__(self, outputs: Tree, targets: Tree) -> Tensor:
        del targets  # any direction will do
        generator = torch.Generator().manual_seed(1)
        total: list[Tensor] = []
        for leaf in tensors(outputs):
            direction = torch.randn(leaf.shape[2:], generator=generator).to(leaf)
            total.append((leaf * direction).flatten(2).sum(2) if leaf.ndim > 2 else leaf * direction)
        return torch.stack(total).sum(0)


def _group(steps: int, cuts: list[int]) -> tuple[Tensor, list[int]]:
    """Return the group of each step, shape (1, N), and the first step of each group."""
    firsts = sorted({0, *(cut for cut in cuts if 0 <= cut < steps)})
    sizes = torch.tensor([*firsts, steps]).diff()
    return torch.repeat_interleave(torch.arange(len(firsts)), sizes)[None], firsts


def _reach(step: int, gradient: Tensor, firsts: list[int]) -> int:
    arrived = gradient.nonzero().flatten().tolist()
    return step + 1 - firsts[arrived[0]] if arrived else 0


def _repeated(inputs: Tree, steps: int) -> Tree:
    def longer(leaf: Tensor) -> Tensor:
        return leaf.repeat(-(-steps // len(leaf)), *[1] * (leaf.ndim - 1))[:steps]

    return tree_map(longer, inputs)
