"""The calls that training makes: windows as long as k1 and the look-back, against short chunks of the same steps.

Letters: T time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tbptt.checks.precision import apart, distance
from tbptt.checks.trial import Conditions, Trial, attempt
from tbptt.estimators.base import Estimator

__all__ = ["LONGEST", "Calls", "calls_of", "steps_needed"]

LONGEST = 1024
"""Steps of the longest call that is tried: those of 10 updates would take minutes with longer ones."""


@dataclass(frozen=True)
class Calls:
    """Calls of the model as long as training makes them.

    Args:
        plans: chunks with such a call among them, by the name of the call.
        untried: why some are not tried.
    """

    plans: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    untried: str = ""

    def values(self, trial: Trial, conditions: Conditions) -> dict[str, float | str]:
        """Return how far the outputs are from those of short chunks."""
        found: dict[str, float | str] = {}
        with trial.under(conditions) as runs:
            for label, sizes in self.plans.items():
                window, short = runs.long[: sum(sizes)], _short(sizes, runs)
                found[label] = attempt(
                    lambda w=window, a=short, b=sizes: apart(runs.values(a, window=w), runs.values(b, window=w))
                )
        return found

    def gradients(self, trial: Trial) -> dict[str, float | str]:
        """Return how far the gradients of all outputs are from those through short chunks; conditions are set."""

        def measured(sizes: list[int]) -> float:
            window = trial.long[: sum(sizes)]
            wanted = trial.gradient(trial.chunks(_short(sizes, trial), window=window), 0)
            return distance(wanted, trial.gradient(trial.chunks(sizes, window=window), 0))

        return {label: attempt(lambda sizes=sizes: measured(sizes)) for label, sizes in self.plans.items()}


def calls_of(trial: Trial, estimator: Estimator | None) -> Calls:
    """Return the calls that an estimator makes and that are longer than the chunks are."""
    if estimator is None:
        return Calls()
    short = trial.plans["chunks"][0]
    plans: dict[str, list[int]] = {}
    untried: list[str] = []
    for name, asked in _lengths(estimator, trial).items():
        steps = min(asked, LONGEST)
        if steps < asked:
            untried.append(f"{name} of {asked} steps: {LONGEST} are tried")
        if steps <= short:
            continue
        room = trial.long.steps - short
        if room < steps:
            untried.append(
                f"{name} of {steps} steps: the example has {trial.long.steps}, and {short + steps} are needed"
            )
        else:
            plans[f"{name} of {steps}"] = [short, steps, *([short] if room >= steps + short else [])]
    return Calls(plans, "; ".join(untried))


def steps_needed(estimator: Estimator, steps: int) -> int:
    """Return how long an example must be for windows of `steps` steps and the look-back to be tried."""
    promised = estimator.reach(steps)
    longest = max(steps, *(promised or (steps,)))
    return max(24, 3 * min(steps, LONGEST), 16 + min(longest, LONGEST))


def _lengths(estimator: Estimator, trial: Trial) -> dict[str, int]:
    try:
        estimator.prepare(trial.model, trial.window.inputs)
        carry = estimator.init(trial.model, 1)
        estimator = estimator.fixed(carry)
        steps = estimator.next_steps(carry)
    except Exception:  # where the reach is measured it is said what is wrong
        return {}
    promised = estimator.reach(steps)
    back = max(promised, default=0) if promised else 0
    return {"windows": steps} | ({"a look-back": back} if back > steps else {})


def _short(sizes: list[int], trial: Trial) -> list[int]:
    short = trial.plans["chunks"][0]
    rest = sum(sizes) % short
    return [short] * (sum(sizes) // short) + ([rest] if rest else [])
