"""Short first, and longer when that is learned: stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from tbptt.errors import ConfigError
from tbptt.length.base import Length, LengthState, check_seed, check_whole, is_whole

__all__ = ["Curriculum"]

_EXAMPLE = "Curriculum([1, 2, 4, 8], updates=1000, segment=64)"
_REMEMBERED = 50
"""Updates that the running mean of the loss is over, about; a stage has so many at least before it can be done."""


@final
@dataclass(frozen=True)
class Curriculum(Length):
    """Go through lengths stage by stage: so many updates with each, or until its loss is low enough; then the next.

    As recurrent-memory transformers are trained by hand: on one segment until that is learned, then from there on two,
    three, and so on. As k2 it is how far back the gradient goes, `TBPTT(k1=64, k2=curriculum)`; for both together,
    `TBPTT(k1=curriculum, k2=curriculum)`, a window grows with it. It does not change what is read: a task whose
    sequences have to grow, too, needs a stream that does.

    Choose it where a long look-back does not get going by itself, or costs too much for what the first updates learn.

    Args:
        lengths: of the stages, in segments; the last one goes on for ever.
        updates: of each stage, a number for all, or one for each but the last, in which case the last need not have
            one. With `enough` the most that a stage has; None: no limit.
        segment: steps of a segment; with 1 the lengths are steps.
        enough: the loss at which a stage is done, a running mean over about 50 updates; None: the updates alone say.
            Mind that it is the loss of all steps of the windows.
        mixed: whether each update draws one of the lengths of the stages so far, evenly, as with
            `vary_n_segments` in the code of RMT; False: always that of the stage.
        seed: of these draws, which depend on it and on the number of updates only.

    Raises:
        ConfigError: lengths or numbers of updates that cannot be meant, or nothing that would end a stage.

    Cost: with `enough` the loss is read at each update, which on a GPU waits for it.
    Reference: Bulatov, Kuratov & Burtsev (2022), arXiv:2207.06881, section 4; and their released code.

    Example:
        >>> stages = Curriculum([1, 2, 4], updates=100, segment=16)
        >>> state = stages.start()
        >>> for _ in range(150):
        ...     state = stages.learned(stages.after(state, steps=16))
        >>> stages.now(state), stages.longest, stages.unit
        (32, 64, 16)
    """

    lengths: Sequence[int]
    updates: int | Sequence[int] | None = None
    segment: int = 1
    enough: float | None = None
    mixed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        given = list(self.lengths)
        if not given or any(not is_whole(each) or each < 1 for each in given):
            raise ConfigError(
                f"lengths were expected to be whole numbers, at least 1, one for each stage, but are {self.lengths!r}",
                fix=_EXAMPLE,
            )
        object.__setattr__(self, "lengths", tuple(int(each) for each in given))
        check_whole(self, "segment", _EXAMPLE)
        check_seed(self, _EXAMPLE)
        if self.enough is not None and (isinstance(self.enough, bool) or not math.isfinite(self.enough)):
            raise ConfigError(f"enough was expected to be a loss, but is {self.enough!r}", fix="enough=0.1")
        self._check_updates()

    def _check_updates(self) -> None:
        if self.updates is None:
            if self.enough is None and len(self.lengths) > 1:
                raise ConfigError(
                    "updates or enough was expected, but both are left out: no stage would ever end", fix=_EXAMPLE
                )
            return
        stages = len(self.lengths)
        several = not is_whole(self.updates)
        given = list(self.updates) if isinstance(self.updates, Sequence) else [self.updates] * stages
        if any(not is_whole(each) or each < 1 for each in given) or not stages - 1 <= len(given) <= stages:
            raise ConfigError(
                f"updates were expected to be a whole number, at least 1, or one for each of {stages} stages but the "
                f"last, but are {self.updates!r}",
                fix=_EXAMPLE,
            )
        object.__setattr__(self, "updates", tuple(int(each) for each in given) if several else int(given[0]))

    @property
    def longest(self) -> int:
        """The longest of its stages, steps."""
        return max(self.lengths) * self.segment

    @property
    def shortest(self) -> int:
        """The shortest of its stages, steps."""
        return min(self.lengths) * self.segment

    @property
    def unit(self) -> int:
        """What all of its lengths are multiples of, steps: of a segment, at least."""
        return math.gcd(*self.lengths) * self.segment

    def now(self, state: LengthState) -> int:
        """Return the length of the stage, or one drawn of those so far, in steps."""
        stage = state.stage
        if self.mixed:
            stage = int(np.random.default_rng((self.seed, state.updates)).integers(stage + 1))
        return self.lengths[stage] * self.segment

    @property
    def asks_for_loss(self) -> bool:
        """Whether `enough` is set."""
        return self.enough is not None

    def learned(self, state: LengthState, loss: float | None = None) -> LengthState:
        """Return the state after one more update.

        Args:
            state: before it.
            loss: of its window, where `enough` is set. One that is not finite says nothing of what is learned, and is
                left out of the mean: it is for the guards to deal with.
        """
        staged, mean = state.staged + 1, state.loss
        if loss is not None and math.isfinite(loss):
            weight = max(1 / staged, 1 / _REMEMBERED)
            mean = loss if mean is None else (1 - weight) * mean + weight * loss
        if state.stage < len(self.lengths) - 1 and self._is_done(state.stage, staged, mean):
            return replace(state, stage=state.stage + 1, staged=0, loss=None)
        return replace(state, staged=staged, loss=mean)

    def _is_done(self, stage: int, staged: int, mean: float | None) -> bool:
        if self.enough is not None and mean is not None and staged >= _REMEMBERED and mean <= self.enough:
            return True
        most = self._most(stage)
        return most is not None and staged >= most

    def _most(self, stage: int) -> int | None:
        """Return the updates that a stage has at most; None for no limit."""
        if self.updates is None or isinstance(self.updates, int):
            return self.updates
        return self.updates[stage]
