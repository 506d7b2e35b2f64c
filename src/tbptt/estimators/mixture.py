"""A mixture of truncated and full backpropagation: short look-backs mostly, a long one now and then."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
from torch import nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, unit_of
from tbptt.estimators.drawn import Drawn, check_lookbacks, drawn_estimate
from tbptt.length.base import check_seed, check_whole
from tbptt.loss import Loss
from tbptt.model import check_trainable
from tbptt.window import Window

__all__ = ["Mixture"]

_EXAMPLE = "Mixture(k1=16, short=32, long=512, p=0.1)"


@final
@dataclass(frozen=True)
class Mixture(Estimator):
    """Look back a short way mostly, and a long way, or all of it, with probability p.

    With B = 1 when the long look-back is drawn, the gradient is g_short + (B / p) (g_long - g_short): its mean is
    g_long. With `unbiased=False` it is g_short or g_long as they are, whose mean lies in between,
    (1 - p) g_short + p g_long, with far less variance: the rare long look-back then corrects the direction, and does
    not make up for its rareness.

    Not recommended unbiased with a small p where g_long is far from g_short: one update in 1 / p is 1 / p times too
    long.

    Args:
        k1: steps run forward between updates.
        short: the usual look-back, at least k1.
        long: the other one, longer than `short`; None: back to the start of the sequence.
        p: how often the long one is drawn, above 0, at most 1.
        unbiased: whether what the long one adds is weighed by 1 / p.
        segment: steps run with a graph at a time, the look-back being run once more, for one that does not fit into
            memory; None: all of it at once.
        seed: of the draws.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: lengths that do not rise, or numbers that cannot be meant.

    Exactness: unbiased for the gradient with the long look-back, the full one with `long=None`, at weights that stay
        (tests/estimators/test_unbiased.py); biased towards the short one with `unbiased=False`. With p = 1 it is the
        long one.
    Cost: (1 - p) that of `TBPTT(k1, short)` and p that of `TBPTT(k1, long)`; the inputs of the long look-back in
        memory, all of the sequence with `long=None`.
    Reference: the two-term telescope of Beatson & Adams (2019), arXiv:1905.07006; the biased form is common practice.

    Example:
        >>> Mixture(k1=8, short=8, long=64, p=0.2).kind
        'unbiased'
    """

    k1: int
    short: int
    long: int | None = None
    p: float = 0.1
    unbiased: bool = True
    segment: int | None = None
    seed: int = 0
    keep_outputs: bool = False

    kind: ClassVar[str] = "unbiased"

    @classmethod
    def examples(cls) -> tuple[Mixture, ...]:
        """Return settings with a long and a full look-back, unbiased and not; see `Estimator.examples`."""
        return cls(3, 4, 9, 0.5), cls(4, 4, None, 0.5, segment=3), cls(3, 3, 8, 0.5, unbiased=False)

    def __post_init__(self) -> None:
        for name in ("k1", "short", "long", "segment"):
            if getattr(self, name) is not None or name in ("k1", "short"):
                check_whole(self, name, _EXAMPLE)
        check_seed(self)
        if isinstance(self.p, bool) or not 0 < self.p <= 1:
            raise ConfigError(
                f"a probability p above 0 and at most 1 was expected, but it is {self.p!r}: a long look-back that is "
                "never drawn is TBPTT(k1, short)",
                fix=_EXAMPLE,
            )
        check_lookbacks("Mixture", self.k1, self.lookbacks, _EXAMPLE)
        if not self.unbiased:
            object.__setattr__(self, "kind", "biased")

    @property
    def lookbacks(self) -> tuple[int, int]:
        """The two look-backs, in steps; more than any sequence has for all of it."""
        return self.short, sys.maxsize if self.long is None else self.long

    def draw(self, carry: ChainCarry) -> Drawn:
        """Return the look-back of the next window, and the weights of its parts."""
        draw = float(np.random.default_rng((self.seed, carry.draws)).random())
        if draw >= self.p:
            return Drawn(0, (1.0,))
        return Drawn(1, (1.0, 1 / self.p if self.unbiased else 1.0))

    def next_steps(self, carry: ChainCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def fixed(self, carry: ChainCarry) -> Mixture:
        """Return the estimator that always goes back over the long look-back."""
        del carry  # always the same
        return replace(self, p=1.0)

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        unit = unit_of(model, k1=self.k1, short=self.short, long=self.long, segment=self.segment)
        return ChainCarry(lanes, unit=unit)

    def reach(self, steps: int) -> tuple[int, ...] | None:
        """Return how far each loss of a window reaches at most; see `Estimator.reach`."""
        if self.long is None:
            return None
        return tuple(self.long - (steps - 1 - step) for step in range(steps))

    def estimate(self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window) -> tuple[Estimate, ChainCarry]:
        """Run the model over the look-back that is drawn, and estimate the gradient of the window's losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss, or a model
                or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        estimate, after, _ = drawn_estimate(
            model,
            loss,
            carry,
            window,
            k1=self.k1,
            lookbacks=self.lookbacks,
            drawn=self.draw(carry),
            segment=self.segment,
            keep_outputs=self.keep_outputs,
        )
        return estimate, after
