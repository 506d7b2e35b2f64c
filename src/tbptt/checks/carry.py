"""Is what is computed in chunks what is computed in one pass: values, gradients, and training cut at each chunk?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tbptt.checks import causes
from tbptt.checks.precision import apart, distance, project
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial, attempt, row
from tbptt.model import trainable_parameters
from tbptt.tree import Tree, all_finite, as_leaves, clone, detach, differentiable, time_slice

__all__ = ["detached_training", "gradient_carry", "value_carry"]


def value_carry(trial: Trial) -> CheckItem:
    """Compare the outputs of one pass with those of chunks."""
    name = "value carry"
    with trial.mode(train=False), torch.no_grad():
        whole = _seeded(trial, 0)
        if not all_finite(whole):
            return CheckItem(name, "fail", "NaN or infinity in one pass", *causes.NOT_FINITE)
        again = {"again": apart(whole, _seeded(trial, 0)), "with other random numbers": apart(whole, _seeded(trial, 1))}
        found = {
            label: attempt(lambda sizes=sizes: apart(time_slice(whole, 0, sum(sizes)), trial.chunks(sizes)))
            for label, sizes in trial.plans.items()
        }
        forgotten = attempt(lambda: apart(whole, trial.chunks(trial.plans["chunks"], forget=True)))
    if any(_exceeds(value, trial.value_tolerance) for value in again.values()):
        more = _exceeds(again["again"], trial.value_tolerance)  # the same start and the same random numbers
        return CheckItem(name, "fail", row(again), *(causes.KEEPS_MORE if more else causes.RANDOM), again)
    wrong = [label for label, value in found.items() if _exceeds(value, trial.value_tolerance)]
    if wrong or isinstance(found["chunks"], str):
        return CheckItem(name, "fail", row(found), *causes.of_values(trial, found, wrong), found)
    refused = _refused(found)
    if isinstance(forgotten, float) and forgotten <= trial.value_tolerance:
        refused += f"; without its state the outputs are the same ({forgotten:.0e}): it makes no difference"
    return CheckItem(name, "note" if refused else "ok", row(found) + refused, measured=found)


def gradient_carry(trial: Trial) -> CheckItem:
    """Compare the gradient of the last third of the outputs in one pass with that through chunks."""
    name, chunks = "gradient carry", trial.plans["chunks"]
    with trial.mode(train=False):
        found = {label: attempt(lambda sizes=sizes: _through(trial, sizes)) for label, sizes in trial.plans.items()}
        if causes.overwritten(found):
            return CheckItem(name, "fail", row(found), *causes.overwrites(causes.overwritten(found)), found)
        begin = _last_third(chunks)
        wanted = trial.gradient(trial.run(trial.window, None)[0], begin)
        detached = attempt(lambda: distance(wanted, trial.gradient(trial.chunks(chunks, cut=True), begin)))
        crosses = _crosses(trial)
    wrong = [label for label, value in found.items() if _exceeds(value, trial.gradient_tolerance)]
    tells = isinstance(detached, float) and detached > trial.gradient_tolerance  # the past is more than rounding
    if not wrong and isinstance(found["chunks"], float) and (crosses or tells):
        share = "" if tells else "; what crosses a boundary is less than rounding"
        return CheckItem(name, "note" if _refused(found) else "ok", row(found) + share, measured=found)
    if not tells and not wrong:
        return CheckItem(name, "fail", row(found), *causes.DETACHES_INSIDE, found)
    return CheckItem(name, "fail", row(found), *causes.of_gradients(crosses=crosses), found)


def detached_training(trial: Trial) -> CheckItem:
    """Back-propagate chunk by chunk, the state detached between, and compare with chunks run by themselves."""
    name = "detached training"
    with trial.mode(train=False):
        found = {label: attempt(lambda sizes=sizes: _by_chunk(trial, sizes)) for label, sizes in trial.plans.items()}
    if causes.overwritten(found):
        return CheckItem(name, "fail", row(found), *causes.overwrites(causes.overwritten(found)), found)
    if any(_exceeds(value, trial.gradient_tolerance) for value in found.values()):
        return CheckItem(name, "fail", row(found), *causes.KEEPS_MORE, found)
    if isinstance(found["chunks"], str):
        return CheckItem(name, "fail", row(found), *causes.refuses(found["chunks"]), found)
    return CheckItem(name, "note" if _refused(found) else "ok", row(found), measured=found)


def _seeded(trial: Trial, seed: int) -> Tree:
    """Return the outputs of one pass from the start of a sequence, with these random numbers."""
    torch.manual_seed(seed)
    return trial.run(trial.window, None)[0]


def _exceeds(value: float | str, tolerance: float) -> bool:
    return isinstance(value, float) and not value <= tolerance  # NaN exceeds everything


def _refused(found: dict[str, float | str]) -> str:
    words = {"uneven": "other lengths than these", "steps": "single steps"}
    said = [
        f"; it takes no {words[label]}: {value}"
        for label, value in found.items()
        if isinstance(value, str) and label in words
    ]
    return "".join(said)


def _last_third(sizes: Sequence[int]) -> int:
    return sum(sizes) - max(1, sum(sizes) // 3)


def _through(trial: Trial, sizes: Sequence[int]) -> float:
    """Return the distance of the gradient through chunks from that of one pass over the same steps."""
    begin = _last_third(sizes)
    found = trial.gradient(trial.chunks(sizes), begin)
    return distance(trial.gradient(trial.run(trial.window[: sum(sizes)], None)[0], begin), found)


def _crosses(trial: Trial) -> bool:
    """Tell whether a gradient gets through a boundary: out of a chunk into its start state, and on from there."""
    sizes = trial.plans["chunks"]
    _, state = trial.run(trial.window[: sizes[0]], None)
    if not any(leaf.requires_grad for leaf in differentiable(state)):
        return False
    given = as_leaves(state)
    outputs, _ = trial.run(trial.window[sizes[0] : sizes[0] + sizes[1]], given)
    total = project(outputs, 0)
    if not total.requires_grad:
        return False
    arrived = torch.autograd.grad(total, differentiable(given), materialize_grads=True)
    return any(bool(each.any()) for each in arrived)


def _by_chunk(trial: Trial, sizes: Sequence[int]) -> float:
    """Return the distance of training with a state passed on from training with copies of the same states."""
    state, kept, total = None, [], None
    for begin, end in pairwise([0, *accumulate(sizes)]):
        kept.append(clone(state))
        outputs, new = trial.run(trial.window[begin:end], state)
        total = _plus(total, _project_back(trial, outputs))
        state = detach(new)
    apart_total = None
    for (begin, end), start in zip(pairwise([0, *accumulate(sizes)]), kept, strict=True):
        apart_total = _plus(apart_total, _project_back(trial, trial.run(trial.window[begin:end], start)[0]))
    assert total is not None
    assert apart_total is not None
    return distance(apart_total, total)


def _project_back(trial: Trial, outputs: Tree) -> list[Tensor]:
    parameters = list(trainable_parameters(trial.model).values())
    return list(torch.autograd.grad(project(outputs, 0), parameters, materialize_grads=True))


def _plus(left: list[Tensor] | None, right: list[Tensor]) -> list[Tensor]:
    return right if left is None else [a + b for a, b in zip(left, right, strict=True)]
