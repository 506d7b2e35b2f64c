"""The k1 and k2 of one update, each a number or a policy.

Letters: B lanes, R the longest lag of a probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tbptt.curve import decay_rate, dense
from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate
from tbptt.estimators.probe import probe, spread
from tbptt.estimators.run import Run
from tbptt.length import Adaptive, Length, LengthState
from tbptt.length.base import States
from tbptt.tree import LaneDims
from tbptt.window import Window

__all__ = ["Lengths"]


@dataclass(frozen=True)
class Lengths:
    """The k1 and k2 of an estimator.

    An `Adaptive` k2 is what every loss is to reach at least: the look-back is k1 - 1 steps longer; but for plain
    windows, where it is k1.

    Raises:
        ConfigError: neither a whole number from 1 nor a policy, two different `Adaptive` ones, or one with
            plain windows alone.
    """

    k1: int | Length
    k2: int | Length

    def __post_init__(self) -> None:
        adaptive = [each for each in (self.k1, self.k2) if isinstance(each, Adaptive)]
        if len(adaptive) == 1 and adaptive[0].windows == "plain":
            raise ConfigError(
                'an Adaptive with windows="plain" was expected for k1 and k2 both, as those windows have k1 = k2, but '
                "came for one of them",
                fix='plain = Adaptive(windows="plain"); TBPTT(k1=plain, k2=plain)',
            )
        if isinstance(self.k1, Adaptive) and isinstance(self.k2, Adaptive) and self.k1 != self.k2:
            raise ConfigError(
                "one Adaptive was expected for k1 and k2 together, but two different ones came: both would follow the "
                "same curve, in other ways",
                fix="adaptive = Adaptive(tolerance=0.1); TBPTT(k1=adaptive, k2=adaptive)",
            )

    @property
    def vary(self) -> bool:
        """Whether one of them is a policy."""
        return not (isinstance(self.k1, int) and isinstance(self.k2, int))

    @property
    def policies(self) -> dict[str, Length]:
        """The policies, by name; one that stands for both lengths once."""
        found = {name: each for name, each in (("k1", self.k1), ("k2", self.k2)) if isinstance(each, Length)}
        return {"k1": self.k1} if len(found) == 2 and self.k1 == self.k2 and isinstance(self.k1, Length) else found

    @property
    def remembered(self) -> int:
        """How many steps before a window must be known: for the longest look-back, and for probes."""
        if isinstance(self.k2, int):
            longest = self.k2
        else:
            longest = self.k2.longest + (_longest(self.k1) - self.k2.unit if self._is_reached_by_all else 0)
        least = self.k1 if isinstance(self.k1, int) else self.k1.shortest
        probed = [each.max + spread(each.multiple) for each in self.policies.values() if isinstance(each, Adaptive)]
        return max([longest if longest > least else 0, *probed])

    @property
    def _is_reached_by_all(self) -> bool:
        """Whether k2 is what every loss is to reach, so that the look-back is k1 - 1 steps longer."""
        return isinstance(self.k2, Adaptive) and self.k2.windows == "overlapping"

    def start(self) -> States:
        """Return the policies' states before the first update."""
        return {name: policy.start() for name, policy in self.policies.items()}

    def now(self, states: States) -> tuple[int, int]:
        """Return k1 and k2 of the next update."""
        k1 = self.k1 if isinstance(self.k1, int) else self.k1.now(states["k1"])
        k2 = self.k2 if isinstance(self.k2, int) else self.k2.now(states.get("k2") or states["k1"])
        if isinstance(self.k2, Adaptive) and self._is_reached_by_all:
            k2 += k1 - self.k2.multiple
        return k1, k2

    def rate_factor(self, states: States) -> float:
        """Return what the learning rate is multiplied by in the next update."""
        factor = 1.0
        for name, policy in self.policies.items():
            factor *= policy.rate(policy.now(states[name]))
        return factor

    def after(
        self,
        states: States,
        run: Run,
        window: Window,
        dims: LaneDims | None,
        estimate: Estimate,
    ) -> tuple[States, dict[str, float]]:
        """Return the states after an update, and what was measured; a probe is made where it is due.

        Args:
            run: of the update, with the steps before the window.
            window: that it was made of.
            dims: the lane dimensions of the state.
            estimate: that it gave.
        """
        after: States = {}
        measured: dict[str, float] = {}
        for name, policy in self.policies.items():
            loss = float(estimate.loss) if policy.asks_for_loss else None
            state = policy.learned(policy.after(states[name], estimate.lookback), loss)
            if isinstance(policy, Adaptive) and policy.is_due(state):
                state, found = self._probed(policy, state, run, window, dims)
                measured |= found
            after[name] = state
        return after, measured

    def _probed(
        self,
        policy: Adaptive,
        state: LengthState,
        run: Run,
        window: Window,
        dims: LaneDims | None,
    ) -> tuple[LengthState, dict[str, float]]:
        past = run.carry.past.last(run.model, policy.max + spread(policy.multiple) - window.steps, dims)
        draws = np.random.default_rng((state.updates, state.probes))
        asked = policy.asked(state)
        seen = probe(run.model, run.loss, past, window, dims, policy.lags, draws, policy.multiple, asked)
        if seen is None:  # too early in the stream, or no target: tried again at the next update
            return state, {}
        state, kappa = policy.probed(state, seen.norms.mean(1).tolist(), seen.weights.tolist(), seen.missed)
        rate = decay_rate(dense(policy.lags, state.norms)) if state.norms else float("nan")
        measured = {"needed_lookback": float(kappa), "decay_rate": rate, "probed_lags": float(policy.max)}
        return state, measured | {"missed_share": state.missed}


def _longest(length: int | Length) -> int:
    return length if isinstance(length, int) else length.longest
