"""Is what is computed in chunks what is computed in one pass: values, gradients, and training cut at each chunk?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tbptt.checks import causes
from tbptt.checks.crossing import Crossing, measure_crossing, without_influence
from tbptt.checks.derivative import find_mismatch
from tbptt.checks.precision import distance
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial, attempt, row
from tbptt.checks.values import Facts, Values, exceeds
from tbptt.checks.windows import Calls
from tbptt.pathways import pathways_of
from tbptt.side_state import SideState
from tbptt.tree import Tree, clone, detach, leaf_names, tensors

__all__ = ["detached_training", "gradient_carry", "value_carry"]

_MANY = 2.0**20
"""A backward pass is linear: so many times the loss is so many times the gradient, to the last bit but for clipping."""


def value_carry(trial: Trial, facts: Facts, calls: Calls) -> CheckItem:
    """Compare the outputs of one pass with those of chunks, in eval and in training mode."""
    name, notes = "value carry", list[str]()
    for found in (facts.still, facts.training):
        fault, note = _values_in(trial, found)
        if fault is not None:
            return fault
        notes += [note] if note else []
    measured = dict(facts.still.found)
    for found in (facts.still, facts.training) if calls.plans else ():
        if not found.agree:
            continue
        more = calls.values(trial, found.conditions)
        wrong = [label for label, value in more.items() if exceeds(value, trial.value_tolerance)]
        if wrong:
            with trial.under(found.conditions) as runs:
                sizes = calls.plans[wrong[0]]
                cause, fix = causes.of_values(runs, runs.long[: sum(sizes)], sizes, "")
            return CheckItem(name, "fail", row(more), _where(found) + cause, fix, more)
        measured |= more
    notes += [_refused(measured)] if _refused(measured) else []
    if isinstance(facts.still.forgotten, float) and facts.still.forgotten <= trial.value_tolerance:
        notes.append(
            f"without its state the outputs are the same ({facts.still.forgotten:.0e}): it makes no difference"
        )
    return CheckItem(name, "note" if notes else "ok", "; ".join([row(measured), *notes]), measured=measured)


def _values_in(trial: Trial, values: Values) -> tuple[CheckItem | None, str]:
    """Return what is wrong in one mode; and what is to be noted of it."""
    name, where, found = "value carry", _where(values), values.found
    if not values.finite:
        cause, fix = causes.NOT_FINITE
        return CheckItem(name, "fail", "NaN or infinity in one pass", where + cause, fix), ""
    if values.aside.apart and not values.aside.statistic:
        cause, fix = causes.keeps(values.aside)
        return CheckItem(name, "fail", row(found), where + cause, fix, found), ""
    note = ""
    if values.aside.statistic:
        kept = ", ".join(values.aside.names)
        note = f"{where}each call moves {kept}, which all lanes share: held still here"
        if values.aside.calls:
            note = f"{where}{kept} depends on how many calls there were, and so on k1: held still here"
    refused = found["chunks"] if isinstance(found["chunks"], str) else ""
    if not values.wrong and not refused:
        return None, note
    others = [each for each in values.draws if each != "torch"]
    why = f"draw other random numbers, of {', '.join(others)}"
    if values.aside.statistic and values.conditions.train:
        others, why = list(values.aside.places), f"compute other statistics: {note.removeprefix(where)}"
    with trial.under(values.conditions) as runs:
        if others and not refused and _goes_on(runs):
            return None, (
                f"{where}one pass and chunks {why}; asked instead whether the second chunk depends on each part of the "
                "state that it is given, which it does"
            )
        label = "chunks" if "chunks" in values.wrong or refused else values.wrong[0]
        cause, fix = causes.of_values(runs, runs.window, runs.plans[label], refused)
    if "steps" not in values.wrong and isinstance(found.get("steps"), float) and "unknown" not in cause and not refused:
        fix = "tbptt.stateful(model, max_steps=1): in single steps it is right"
    if values.wrong == ("steps",):
        fix = "windows of two steps or more, in which it is right"
    return CheckItem(name, "fail", row(found), where + cause, fix, found), ""


def _goes_on(trial: Trial) -> bool:
    first, second = trial.plans["chunks"][:2]
    trial.restart()
    _, state = trial.run(trial.window[:first], None)
    there = SideState.of(trial.model, device=trial.device)
    return not without_influence(trial, trial.window[first : first + second], clone(state), there)


def _where(values: Values) -> str:
    return "in training mode, " if values.conditions.train else ""


def gradient_carry(trial: Trial, facts: Facts, calls: Calls) -> CheckItem:
    """Compare the gradient of one pass with that through chunks, and with the derivative."""
    name, chunks = "gradient carry", trial.plans["chunks"]
    begin, limit = _last_third(chunks), trial.gradient_tolerance
    if not facts.conditions.train:
        with trial.under(facts.training.conditions) as runs:
            cut = measure_crossing(runs)
            if not cut.crosses and cut.cut and _differentiated(runs, cut):
                cause, fix = causes.of_gradients(cut, values_agree=True, detail="")
                return CheckItem(name, "fail", "training mode: no gradient crosses", f"in training mode, {cause}", fix)
    with trial.under(facts.conditions) as runs:
        found = {label: attempt(lambda sizes=sizes: _through(runs, sizes)) for label, sizes in runs.plans.items()}
        if causes.overwritten(found):
            return CheckItem(name, "fail", row(found), *causes.overwrites(causes.overwritten(found)), found)
        outputs = runs.whole()
        if not any(leaf.requires_grad for leaf in tensors(outputs)):
            return CheckItem(name, "fail", "no graph", *causes.unknown("its outputs come without a graph"))
        wanted = runs.gradient(outputs, begin, keep=True)
        if not all(bool(torch.isfinite(each).all()) for each in wanted):
            return CheckItem(name, "fail", "NaN or infinity in one pass", *causes.not_finite(runs, begin))
        many = attempt(lambda: _scaled(runs, outputs, wanted, begin))
        detached = attempt(lambda: distance(wanted, runs.gradient(runs.chunks(chunks, cut=True), begin)))
        tells = isinstance(detached, float) and detached > limit  # the past is more than rounding
        crossing = measure_crossing(runs)
        found |= calls.gradients(runs) if calls.plans else {}
        wrong = {label: value for label, value in found.items() if exceeds(value, limit)}
        if wrong:
            agree = facts.training.agree
            return CheckItem(
                name, "fail", row(found), *causes.of_gradients(crossing, values_agree=agree, detail=row(wrong)), found
            )
        if isinstance(many, float) and many > limit:
            cause = (
                f"the gradient is clipped or normalised inside: of {_MANY:.0e} times the loss it is not as many times"
            )
            fix = "no clipping inside: tbptt.guards.ClipNorm, or TBPTT(..., boundary=ClipBoundary(1.0))"
            return CheckItem(name, "fail", f"{row(found)}, scaled {many:.0e}", cause, fix, found | {"scaled": many})
        if isinstance(found["chunks"], str):
            return CheckItem(name, "fail", row(found), *causes.refuses(found["chunks"]), found)
        return _crossed(runs, facts, crossing, found, tells=tells)


def _crossed(
    trial: Trial, facts: Facts, crossing: Crossing, found: dict[str, float | str], *, tells: bool
) -> CheckItem:
    """Judge gradients that are the same in one pass and in chunks: is there one, and is it the derivative?"""
    name, notes = "gradient carry", [_refused(found)] if _refused(found) else list[str]()
    used = [each for each in crossing.trained if each not in crossing.unused]
    if not used:
        why = "no trained weight is upstream of the state" if not crossing.trained else "its state makes no difference"
        return CheckItem(name, "note", f"{row(found)}; {why}: no gradient can cross, and none has to", measured=found)
    if not crossing.crosses and not tells:
        cause, fix = causes.of_gradients(crossing, values_agree=True, detail="")
        inside = cause.replace(
            "takes or returns", "takes or returns, and so it detaches its state inside, in one pass, too"
        )
        return CheckItem(name, "fail", row(found), inside, fix, found)
    if not tells:
        notes.append("what crosses a boundary is less than rounding")
    names = _differentiated(trial, crossing)
    if names:
        wrong = find_mismatch(trial, names)
        if wrong is not None and (facts.training.thresholds or facts.still.thresholds):
            notes.append("it has thresholds, so that central differences do not tell whether all of it crosses")
        elif wrong is not None:
            cause, fix = causes.undifferentiable(wrong.step, wrong.autograd, wrong.differences)
            measured = {"autograd": wrong.autograd, "differences": wrong.differences}
            return CheckItem(name, "fail", row(found | measured), cause, fix, found | measured)
    return CheckItem(name, "note" if notes else "ok", "; ".join([row(found), *notes]), measured=found)


def _differentiated(trial: Trial, crossing: Crossing) -> tuple[str, ...]:
    """Return the tensors of the state to differentiate by; none where one of its ways is detached, and noted so."""
    first = trial.plans["chunks"][0]
    trial.restart()
    _, state = trial.run(trial.window[:first], None)
    names, ways = leaf_names(state), pathways_of(trial.model, state)
    told = {names[place] for places in ways.values() for place in places}
    return () if told.intersection(crossing.cut) else crossing.trained


def _scaled(trial: Trial, outputs: Tree, wanted: list[Tensor], begin: int) -> float:
    many = trial.gradient(outputs, begin, _MANY)
    return distance(wanted, [each / _MANY for each in many])


def detached_training(trial: Trial, facts: Facts) -> CheckItem:
    """Back-propagate chunk by chunk, the state detached between, and compare with chunks run by themselves."""
    name = "detached training"
    with trial.under(facts.conditions) as runs:
        found = {label: attempt(lambda sizes=sizes: _by_chunk(runs, sizes)) for label, sizes in runs.plans.items()}
        if any(isinstance(value, float) and value != value for value in found.values()):
            return CheckItem(name, "fail", row(found), *causes.not_finite(runs, 0), found)
    if causes.overwritten(found):
        return CheckItem(name, "fail", row(found), *causes.overwrites(causes.overwritten(found)), found)
    if any(exceeds(value, trial.gradient_tolerance) for value in found.values()):
        kept = next((each.aside for each in (facts.still, facts.training) if each.aside.apart), None)
        measured = (
            "a chunk trained after others is another than the same chunk by itself, from a copy of the same state"
        )
        return CheckItem(name, "fail", row(found), *(causes.keeps(kept) if kept else causes.unknown(measured)), found)
    if isinstance(found["chunks"], str):
        return CheckItem(
            name, "fail", row(found), *causes.cannot_train(trial, facts.conditions, found["chunks"]), found
        )
    return CheckItem(name, "note" if _refused(found) else "ok", row(found) + _refused(found, "; "), measured=found)


def _refused(found: dict[str, float | str], before: str = "") -> str:
    words = {"uneven": "other lengths than these", "steps": "single steps"}
    said = [
        f"it takes no {words.get(label, label)}: {value}"
        for label, value in found.items()
        if isinstance(value, str) and label not in ("chunks", "elsewhere")
    ]
    return before + "; ".join(said) if said else ""


def _last_third(sizes: Sequence[int]) -> int:
    return sum(sizes) - max(1, sum(sizes) // 3)


def _through(trial: Trial, sizes: Sequence[int]) -> float:
    """Return the distance of the gradient through chunks from that of one pass over the same steps."""
    begin = _last_third(sizes)
    found = trial.gradient(trial.chunks(sizes), begin)
    return distance(trial.gradient(trial.whole(trial.window[: sum(sizes)]), begin), found)


def _by_chunk(trial: Trial, sizes: Sequence[int]) -> float:
    """Return the distance of training with a state passed on from training with copies of the same states."""
    kept: list[tuple[Tree, SideState]] = []
    trial.restart()
    state, total = None, None
    for begin, end in pairwise([0, *accumulate(sizes)]):
        kept.append((clone(state), SideState.of(trial.model, device=trial.device)))
        outputs, new = trial.run(trial.window[begin:end], state)
        total = _plus(total, trial.gradient(outputs, 0))
        state = detach(new)
    apart_total = None
    for (begin, end), (start, there) in zip(pairwise([0, *accumulate(sizes)]), kept, strict=True):
        there.restore(trial.model, in_place=False)
        apart_total = _plus(apart_total, trial.gradient(trial.run(trial.window[begin:end], start)[0], 0))
    assert total is not None
    assert apart_total is not None
    return distance(apart_total, total)


def _plus(left: list[Tensor] | None, right: list[Tensor]) -> list[Tensor]:
    return right if left is None else [a + b for a, b in zip(left, right, strict=True)]
