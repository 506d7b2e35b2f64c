"""Anticipated reweighted truncated backpropagation: random cuts, and weights that make up for them.

Letters: T time, B lanes, L0 mean length of a segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np
from torch import nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.gradients import Gradients, scaled
from tbptt.estimators.history import History
from tbptt.estimators.run import Run
from tbptt.length.base import check_seed, check_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.tree import Tree, detach
from tbptt.window import Window

__all__ = ["ARTBP"]

_EXAMPLE = "ARTBP(mean_length=16, alpha=4)"


@final
@dataclass(frozen=True)
class ARTBP(Estimator):
    """Cut the sequence at random places, and scale the gradient up where it was not cut: unbiased, at the usual cost.

    After each block of steps the sequence is cut with probability c_t, which depends on the time since the last cut
    only. Where it is not, the gradient that crosses is multiplied by 1 / (1 - c_t):
    d_t = q_t if cut after t, else q_t + d_{t+1} D_{t+1} / (1 - c_t); gradient = sum_t d_t I_t. A path over many steps
    survives seldom and then counts for all that did not, so that the mean is the full gradient. Only what flows
    back through the state is scaled, never a loss. A window is the stretch between two cuts.

    Not recommended where the gradient decays slowly or not at all: the weights grow with the length, and one long
    stretch may outweigh thousands of short ones. Use a learning rate well below that of `TBPTT`, and no clipping.

    Args:
        mean_length: L0, mean number of steps between two cuts; a whole multiple of `block`, or more than it. Infinite:
            never cut, but at `longest`.
        alpha: of the heavy-tailed rate c_t = alpha / ((alpha - 1) L0 + t), t blocks after the last cut, above 1: the
            weights grow like a power of t. "constant": the rate 1 / L0, whose weights grow exponentially.
        block: steps between places where it may be cut, which are run in one call of the model.
        longest: the most steps between two cuts; there it is always cut, which bounds the memory and makes the
            estimate biased: what lies farther back is missing. None: no bound.
        seed: of the cuts.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: numbers that cannot be meant, alone or together.

    Exactness: unbiased at weights that stay (tests/estimators/test_unbiased.py); biased with `longest`. Gradients are
        of the *sum* of a window's losses over L0 B, the mean number of steps and lanes: divided by the window's own
        number of losses, long windows would count too little.
    Cost: a forward and a backward pass over each step. Memory of the longest stretch, which is random: in 10^5 steps
        with L0 = 16 and alpha = 4 several hundred steps.
    Reference: Tallec & Ollivier (2017), "Unbiasing truncated backpropagation through time", arXiv:1705.08209; cuts
        are common to all lanes here.

    Example:
        >>> ARTBP(mean_length=16).next_steps(ARTBP(mean_length=16).init(torch.nn.GRU(1, 1), 1)) >= 1
        True
    """

    mean_length: float
    alpha: float | Literal["constant"] = 4.0
    block: int = 1
    longest: int | None = None
    seed: int = 0
    keep_outputs: bool = False

    kind: ClassVar[str] = "unbiased"

    @classmethod
    def examples(cls) -> tuple[ARTBP, ...]:
        """Return settings of both rates, with blocks, and bounded; see `Estimator.examples`."""
        return cls(4), cls(6, alpha="constant", block=2), cls(5, alpha=6.0, longest=9)

    def __post_init__(self) -> None:
        for name in ("block", "longest"):
            if getattr(self, name) is not None:
                check_whole(self, name, _EXAMPLE)
        check_seed(self)
        if isinstance(self.mean_length, bool) or not self.mean_length >= self.block:
            raise ConfigError(
                f"a mean_length of at least one block of {self.block} steps was expected, but it is "
                f"{self.mean_length!r}: it is not cut within a block",
                fix=_EXAMPLE,
            )
        if math.isinf(self.mean_length) and self.longest is None:
            raise ConfigError(
                "longest was expected together with an infinite mean_length, but is None: it would never be cut",
                fix="ARTBP(mean_length=math.inf, longest=1000)",
            )
        known = self.alpha == "constant" if isinstance(self.alpha, str) else 1 < self.alpha < math.inf
        if isinstance(self.alpha, bool) or not known:
            raise ConfigError(
                f'alpha was expected to be a number above 1, or "constant", but is {self.alpha!r}: with 1 or less the '
                "mean length would not be finite",
                fix='alpha=4, or alpha="constant"',
            )
        if self.longest is not None:
            if self.longest % self.block:
                raise ConfigError(
                    f"longest was expected to be a multiple of block = {self.block}, but is {self.longest}: it is cut "
                    "between blocks",
                    fix=f"longest={self.longest // self.block * self.block or self.block}",
                )
            object.__setattr__(self, "kind", "biased")

    def rate(self, blocks: int) -> float:
        """Return the probability of a cut so many blocks after the last one, c_t; `blocks` is 1 at least."""
        if math.isinf(self.mean_length):
            return 0.0
        mean = self.mean_length / self.block
        return 1 / mean if isinstance(self.alpha, str) else min(1.0, self.alpha / ((self.alpha - 1) * mean + blocks))

    def length(self, number: int) -> int:
        """Return the steps between two cuts; `number` counts the stretches from 0."""
        draws = np.random.default_rng((self.seed, number))
        blocks = 1
        while draws.random() >= self.rate(blocks) and (self.longest is None or blocks * self.block < self.longest):
            blocks += 1
        return blocks * self.block

    def next_steps(self, carry: ChainCarry) -> int:
        """Return the steps to the next cut."""
        return self.length(carry.draws) - carry.past.steps

    def fixed(self, carry: ChainCarry) -> ARTBP:
        """Return the estimator that cuts after as many steps each time as it does next."""
        return replace(self, mean_length=math.inf, longest=self.length(carry.draws))

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        return ChainCarry(lanes, unit=unit_of(model, block=self.block, longest=self.longest))

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return how far each loss of a window between two cuts reaches; see `Estimator.reach`."""
        return tuple(range(1, steps + 1))

    def estimate(self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window) -> tuple[Estimate, ChainCarry]:
        """Run the model over `window` and estimate the gradient of its losses.

        A window that ends before the cut, as at the end of a pass, leaves the stretch open: the next one begins with
        what is left of it, and its losses are sent back through the steps of before, which are run again. Where it
        ends within a segment of the model nothing can go on, so that the next stretch is a new one.

        Raises:
            ShapeError: a window that goes beyond the cut or has another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        check_window(window, carry, self.next_steps(carry))
        carry = carry.with_dims(model, window)
        run = Run(model, StepLoss.of(loss), carry, keep_outputs=self.keep_outputs)
        past = carry.last(model, carry.past.steps)
        steps = carry.past.steps + window.steps
        chain, stretches = run.look_back(past, window, range(0, steps, self.block))
        begins = np.cumsum([0, *(segment.steps for segment in chain)]).tolist()

        def reweigh(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
            del start  # whatever the state
            blocks, inside = divmod(begins[index], self.block)
            return cotangent if inside else scaled(cotangent, 1 / (1 - self.rate(blocks)))

        injected, denominator = run.counted, self._mean_steps * carry.lanes
        pulled = run.pull(chain, injected, denominator=denominator, boundary=reweigh)
        # nothing goes on from within a segment of the model: the sequence has ended there
        cut = steps == self.length(carry.draws) or carry.missing(window) > 0
        after = replace(
            carry,
            state=detach(chain[-1].end),
            past=History() if cut else History(tuple(stretches)),
            draws=carry.draws + cut,
        )
        return run.estimate(pulled, injected, steps, denominator=denominator), after

    @property
    def _mean_steps(self) -> float:
        return float(self.longest or 0) if math.isinf(self.mean_length) else float(self.mean_length)
