"""Is a model of 16 bits as near to the exact result in chunks as it is in one pass?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tbptt.checks.precision import apart, distance, half_precision
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial, attempt, row
from tbptt.tree import time_slice

__all__ = ["rounding"]

_TIMES = 4
"""How much farther from the exact result chunks may be than one pass: they run other kernels, in another order."""


def rounding(trial: Trial) -> CheckItem:
    """Compare the model in its own 16 bits, in one pass and in chunks, with the copy in double precision.

    To be asked of a model that has passed everything else: the copy has shown whether the state is carried at all.
    Here is seen what the model's own types do to it: a state handed on in a narrower type than it is computed in, or
    in one that the next chunk does not take.
    """
    half = trial.half
    if half is None:
        return CheckItem("rounding", "ok", "")
    eps = torch.finfo(half_precision(half.model) or torch.float16).eps
    with trial.mode(train=False), half.mode(train=False):
        values = _errors(trial, half, lambda sizes: _value(trial, half, sizes))
        gradients = _errors(trial, half, lambda sizes: _gradient(trial, half, sizes))
    measured = {
        f"{what} {label}": each
        for what, found in (("value", values), ("gradient", gradients))
        for label, each in found.items()
    }
    detail = f"from float64: values {row(values)}; gradients {row(gradients)}"
    refused = next((each for each in measured.values() if isinstance(each, str)), "")
    if refused:
        cause = f"in float64 it goes on from its own state, in its own precision not: {refused}"
        return CheckItem(
            "rounding", "fail", detail, cause, "return the state in the type in which it is taken", measured
        )
    if _worse(values, eps) or _worse(gradients, eps):
        cause = (
            "in chunks it is farther from the exact result than rounding explains: its state loses digits on the way"
        )
        return CheckItem(
            "rounding", "fail", detail, cause, "return the state in the type in which it is computed", measured
        )
    return CheckItem("rounding", "ok", detail, measured=measured)


def _errors(trial: Trial, half: Trial, error: Callable[[Sequence[int]], float]) -> dict[str, float | str]:
    """Return how far from the exact result one pass is, and each way in chunks that the copy takes."""
    found = {"one pass": attempt(lambda: error([half.window.steps]))}
    for label, sizes in half.plans.items():
        each = attempt(lambda sizes=sizes: error(sizes))
        if isinstance(each, float) or isinstance(attempt(lambda sizes=sizes: _runs(trial, sizes)), float):
            found[label] = each
    return found


def _runs(trial: Trial, sizes: Sequence[int]) -> float:
    with torch.no_grad():
        trial.chunks(sizes)
    return 0.0


def _value(trial: Trial, half: Trial, sizes: Sequence[int]) -> float:
    with torch.no_grad():
        exact = time_slice(trial.run(trial.window, None)[0], 0, sum(sizes))
        return apart(exact, half.chunks(sizes))


def _gradient(trial: Trial, half: Trial, sizes: Sequence[int]) -> float:
    """Return the distance of the gradient of the last third from that of one pass of the copy."""
    steps = sum(sizes)
    begin = steps - max(1, steps // 3)
    exact = trial.gradient(trial.run(trial.window[:steps], None)[0], begin)
    return distance(exact, [each.double() for each in half.gradient(half.chunks(sizes), begin)])


def _worse(found: Mapping[str, float | str], eps: float) -> bool:
    one = found["one pass"]
    limit = max(2 * eps, _TIMES * one) if isinstance(one, float) else 0.0
    return any(isinstance(each, float) and not each <= limit for each in found.values())
