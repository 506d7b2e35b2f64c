"""From a measured horizon to k1 and k2.

Letters: K look-back in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tbptt.curve import Floats, dense, needed_lookback
from tbptt.errors import ConfigError
from tbptt.estimators import TBPTT
from tbptt.horizon.costs import Costs
from tbptt.horizon.statistics import Band, bootstrap
from tbptt.pathways import in_segments

__all__ = ["Limits", "Need", "Recommendation", "check_tolerance", "choose", "need"]


@dataclass(frozen=True)
class Recommendation:
    """A k1 and a k2, and why.

    Args:
        k1: steps between updates.
        k2: look-back, so that every loss reaches `needed` steps back at least: needed + k1 - 1; of a model with
            segments of S steps all three are multiples of S, and it is needed + k1 - S.
        needed: the look-back that a loss needs, its own step included; None when the curve is too short to say.
        low: lower end of needed's 95 % interval over probes; None where what is needed follows from the context, or
            from the mean gradient's bias: these have no such interval.
        high: upper end; None likewise, and where some of the resampled curves were too short to say.
        tolerance: of the relative bias.
        met: whether k2 meets it, within the limits that were given.
        lower_bound: whether the model has not learned yet to use its past, so that more may be needed later.
        why: the reasons, a sentence each.
    """

    k1: int
    k2: int
    needed: int | None
    low: int | None
    high: int | None
    tolerance: float
    met: bool
    lower_bound: bool
    why: tuple[str, ...]

    def estimator(self) -> TBPTT:
        """Return `TBPTT(k1, k2)`."""
        return TBPTT(self.k1, self.k2)

    def __str__(self) -> str:
        head = f"TBPTT(k1={self.k1}, k2={self.k2})" + ("" if self.met else "  - does not meet the tolerance")
        return "\n".join([head, *(f"  {reason}" for reason in self.why)])


@dataclass(frozen=True)
class Need:
    """The look-back that a loss needs, by each of four measures.

    Args:
        by_mass: the shortest that cuts off less than the tolerance of the norm of the state's gradient, summed over
            lags; None beyond those measured.
        low: lower end of the 95 % interval of `by_losses`; the longest lag for "beyond".
        high: upper end; None for "beyond".
        by_bias: the shortest from which on no look-back is shown (at 95 %) to bias the parameters' gradient by more;
            0 where that was not measured or cannot be told from noise; None where even the longest but one is.
        by_context: the shortest with which the model, seeing no more than that, has all but the tolerance of what its
            past is worth to its loss; 0 where that was not measured, or is nothing; None where the longest is not
            enough.
        longest: the longest lag measured.
        trained: whether the loss is lower than with fresh weights, or that is not known.
        by_weights: the shortest that leaves out less than the tolerance of the parameters' gradient of single losses,
            in norm, as each longer one does; 0 where that was not measured; None where even the longest but one is too
            short.
    """

    by_mass: int | None
    low: int
    high: int | None
    by_bias: int | None
    by_context: int | None
    longest: int
    trained: bool
    by_weights: int | None = 0

    @property
    def by_losses(self) -> int | None:
        """What single losses need, by the state's gradient and by the parameters'; None for "beyond"."""
        return None if self.by_mass is None or self.by_weights is None else max(self.by_mass, self.by_weights)

    @property
    def is_settled(self) -> bool:
        """Whether the model is trained, uses its past, and its expected gradient is lost in the noise: near a minimum.

        A relative bias means nothing there: what is cut off is noise as well.
        """
        return self.trained and self.by_context != 0 and self.by_bias == 0

    @property
    def steps(self) -> int | None:
        """The longest of those that say something; None where one of them is beyond what was measured."""
        if self.is_settled:
            return self.by_context
        if self.by_losses is None or self.by_bias is None or self.by_context is None:
            return None
        return max(self.by_losses, self.by_bias, self.by_context)


@dataclass(frozen=True)
class Limits:
    """What is given beforehand; None for no such limit.

    Args:
        k1: steps between updates.
        memory: bytes that autograd may hold.
        time: seconds that a step of the stream may take, forward and back.
    """

    k1: int | None = None
    memory: float | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        for name in ("k1", "memory", "time"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 0 < value < math.inf):
                raise ConfigError(
                    f"{name} was expected to be a number above 0, but is {value!r}",
                    fix="report.recommend(0.1, memory=2e9)",
                )


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that cannot be meant.

    Raises:
        ConfigError: it is not above 0 and below 1.
    """
    if isinstance(tolerance, bool) or not 0 < tolerance < 1:
        raise ConfigError(f"a tolerance above 0 and below 1 was expected, but {tolerance!r} came", fix="0.1")


def need(
    lags: Sequence[int],
    samples: Floats,
    bias: Band | None,
    context: Band | None,
    loss: float,
    tolerance: float,
    *,
    trained: bool,
    single: Floats | None = None,
) -> Need:
    """Return how long a look-back must be.

    Args:
        lags: where the state's gradient was measured.
        samples: its norm, one curve a probe. Shape (N, K).
        bias: by look-back, of the parameters' gradient; the last of it is the reference.
        context: loss by the steps that the model sees; None where its past is worth nothing to it.
        loss: of the same steps with all of their past.
        tolerance: of the relative bias.
        trained: whether that loss is lower than with fresh weights, or that is not known.
        single: of each probe, the squared norm of what each look-back leaves out of the parameters' gradient, and last
            that of all of it; at the look-backs of `bias`. Shape (N, K + 1); None where it was not measured.
    """
    longest = lags[-1]
    known = len(lags)

    def by_mass(chosen: Floats) -> int:
        norms = chosen[:, :known].mean(0)
        found = needed_lookback(dense(lags, norms), tolerance) if norms.any() else 1
        return longest + 1 if found is None else found

    def by_weights(chosen: Floats) -> int:
        if bias is None or single is None:
            return 0
        *parts, whole = chosen[:, known:].sum(0).tolist()
        found = _last_above([part > tolerance**2 * whole for part in parts], bias.at)
        return longest + 1 if found is None else found

    joined = samples if single is None else np.concatenate([samples, single], 1)
    both = bootstrap(joined, lambda chosen: np.array(max(by_mass(chosen), by_weights(chosen))))
    low, high = np.rint(np.quantile(both, [0.025, 0.975])).astype(int).tolist()
    mass, weights = by_mass(joined), by_weights(joined)
    return Need(
        by_mass=None if mass > longest else mass,
        by_weights=None if weights > longest else weights,
        low=min(low, longest),
        high=None if high > longest else high,
        by_bias=0 if bias is None else _by_bias(bias, tolerance),
        by_context=0 if context is None else _by_context(context, loss, tolerance),
        longest=longest,
        trained=trained,
    )


def _by_bias(bias: Band, tolerance: float) -> int | None:
    if math.isnan(bias.mean[0]):
        return 0
    return _last_above([not low <= tolerance for low in bias.low], bias.at)


def _last_above(too_short: Sequence[bool], at: Sequence[int]) -> int | None:
    """Return the shortest look-back from which on none is too short; None where the longest but one is."""
    wrong = [index for index, each in enumerate(too_short) if each]
    if not wrong:
        return at[0]
    # the longest is the reference, 0 by definition: it says nothing of itself
    return None if wrong[-1] >= len(at) - 2 else at[wrong[-1] + 1]


def _by_context(context: Band, loss: float, tolerance: float) -> int | None:
    worth = context.mean[0] - loss
    too_short = [index for index, mean in enumerate(context.mean) if not mean - loss <= tolerance * worth]
    return None if too_short[-1] == len(context.at) - 1 else context.at[too_short[-1] + 1]


def choose(
    needed: Need, costs: Costs | None, limits: Limits, tolerance: float, learned: bool | None, segment: int = 1
) -> Recommendation:
    """Return k1 and k2, both in multiples of a segment.

    Without limits k1 is half of what is needed: two updates in the time that a dependency lasts, at three times the
    cost of the plainest windows.

    Raises:
        ConfigError: the curve is too short to say what is needed, and no memory limit says where to stop; or a k1 was
            given that is no multiple of a segment.
    """
    why = _reasons(needed, tolerance)
    cap = _cap(costs, limits, segment, why)
    steps = None if needed.steps is None else in_segments(needed.steps, segment)
    if steps is None and cap is None:
        raise ConfigError(
            f"a dependency that ends within the {needed.longest} lags measured was expected, but beyond lies more "
            f"of it than a tolerance of {tolerance:g} allows: any k2 would be a guess",
            fix=f"measured again with max_lag={2 * needed.longest}; or memory=..., for the longest that fits",
        )
    if limits.k1 is not None and limits.k1 % segment:
        raise ConfigError(
            f"a k1 in multiples of the model's segments of {segment} steps was expected, but {limits.k1} came",
            fix=f"k1={in_segments(limits.k1, segment)}",
        )
    target = steps if steps is not None else cap
    assert target is not None
    k1 = limits.k1 or in_segments(max(1, math.ceil(target / 2)), segment)
    met = steps is not None
    if cap is not None and target + k1 - segment > cap:
        if limits.k1 is None:
            k1 = max(segment, cap - target + segment)
        if target + k1 - segment > cap:
            met = False
            why.append(f"The memory allows for {cap} steps, and {target + k1 - segment} would be needed.")
    k2 = target + k1 - segment if cap is None else min(cap, target + k1 - segment)
    if limits.time is not None:
        k1, k2, fast = _fast_enough(_of(costs, "time"), limits, target, k1, k2, cap, segment, why)
        met = met and fast
    if segment > 1:
        why.append(f"In whole segments of {segment} steps, which the model cannot be cut within.")
    if learned is False:
        why.append(
            f"The model makes no use of its past yet: with {'one step' if segment == 1 else 'one segment'} of context "
            "its loss is as low. The curve of such a model is a lower bound; train on with a longer k2 or "
            "Adaptive(min=...), and measure again."
        )
    else:
        why.append("Measured at these weights: as the model learns, more may be needed; measure again then.")
    sure = needed.steps is None or needed.steps == needed.by_losses  # else it has no interval
    low, high = (needed.low, needed.high) if sure else (None, None)
    return Recommendation(k1, k2, steps, low, high, tolerance, met, learned is False, tuple(why))


def _reasons(needed: Need, tolerance: float) -> list[str]:
    why: list[str] = []
    high = f"more than {needed.longest}" if needed.high is None else str(needed.high)
    of = (
        "the state's gradient"
        if needed.by_weights == 0
        else "the gradient of single losses, the state's or the parameters'"
    )
    if needed.by_losses is None:
        mass = f"More than {tolerance:g} of {of} lies beyond the longest lag measured, {needed.longest}"
    else:
        mass = (
            f"A look-back of {needed.by_losses} steps (95 %: {needed.low} to {high}) cuts off less than {tolerance:g} "
            f"of {of}"
        )
    if needed.by_weights == 0:
        mass += ", which says nothing of weights that act at the far end of a delay alone (gradients=True would)"
    elif needed.by_mass is not None and needed.by_weights is not None and needed.by_weights > needed.by_mass:
        mass += f"; of the state's alone {needed.by_mass} steps would do: some weights act at the far end only"
    if needed.by_context is None:
        why.append(f"The model makes use of more context than the longest measured, {needed.longest} steps.")
    elif needed.by_context:
        why.append(
            f"With {needed.by_context} steps of context the model's loss is within {tolerance:g} of what all of its "
            "past is worth."
        )
    if needed.is_settled:
        why.append(
            f"{mass}; but the expected gradient does not stand out of the noise, as near a minimum, so that its bias "
            "decides nothing: the context does."
        )
        return why
    why.append(f"{mass}.")
    if needed.by_bias is None:
        why.append("The parameters' gradient still changes by more than that at the longest look-backs.")
    elif needed.by_losses is not None and needed.by_bias > needed.by_losses:
        why.append(
            f"The parameters' gradient is shown to be biased by more than {tolerance:g} up to look-backs just below "
            f"{needed.by_bias}: its parts cancel, so that small ones count."
        )
    return why


def _cap(costs: Costs | None, limits: Limits, segment: int, why: list[str]) -> int | None:
    if limits.memory is None:
        return None
    cap = _of(costs, "memory").longest_within(limits.memory) // segment * segment
    if cap < 1:
        one = "one step" if segment == 1 else f"one segment of {segment} steps"
        raise ConfigError(
            f"memory for {one} at least was expected, {_of(costs, 'memory').bytes_at(segment):.0f} bytes, but "
            f"{limits.memory:.0f} came",
            fix="more memory, or fewer lanes",
        )
    why.append(f"Memory of {limits.memory:.3g} bytes holds {cap} steps.")
    return cap


def _fast_enough(
    costs: Costs, limits: Limits, target: int, k1: int, k2: int, cap: int | None, segment: int, why: list[str]
) -> tuple[int, int, bool]:
    """Lengthen k1, so that the look-back is run less often, until a step is fast enough."""
    assert limits.time is not None
    while costs.seconds_at(k2) / k1 > limits.time:
        longer = in_segments(k1 + max(1, k1 // 8), segment)
        if limits.k1 is not None or (cap is not None and target + longer - segment > cap) or longer > 64 * target:
            why.append(f"A step takes {costs.seconds_at(k2) / k1:.3g} s, longer than the {limits.time:.3g} s allowed.")
            return k1, k2, False
        k1, k2 = longer, target + longer - segment
    why.append(f"A step takes {costs.seconds_at(k2) / k1:.3g} s.")
    return k1, k2, True


def _of(costs: Costs | None, limit: str) -> Costs:
    if costs is None:
        raise ConfigError(
            f"measured costs were expected for a {limit} limit, but they were left out", fix="measure(..., costs=True)"
        )
    return costs
