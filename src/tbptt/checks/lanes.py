"""The state itself, in-place safety, and whether lanes are what they should be: alone, and able to start anew."""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt.adapters import Stateful
from tbptt.checks import causes
from tbptt.checks.precision import apart, project
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial, row
from tbptt.checks.values import Facts, exceeds
from tbptt.side_state import SideState
from tbptt.tree import Tree, as_leaves, clone, detach, leaf_names, num_bytes, replace_tensors, tensors, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["batch_norm", "in_place_safety", "lane_independence", "randomness", "reset", "state"]


def state(trial: Trial) -> CheckItem:
    """Ask whether it returns a state at all, and of what."""
    trial.restart()
    _, found = trial.run(trial.window, None)
    if not tensors(found):
        return CheckItem("state", "fail", "none", *causes.NO_STATE)
    dims = trial.dims or ("?",) * len(tensors(found))
    shapes = [
        f"{name} {tuple(leaf.shape)} lanes in {'-' if dim is None else dim}"
        for name, leaf, dim in zip(leaf_names(found), tensors(found), dims, strict=False)
    ]
    shown = "; ".join(shapes[:3]) + (f"; and {len(shapes) - 3} more" if len(shapes) > 3 else "")
    size = num_bytes(found) / trial.window.lanes / 1024
    return CheckItem("state", "ok", f"{type(found).__name__}, {size:.1f} KiB a lane here: {shown}")


def in_place_safety(trial: Trial, facts: Facts) -> CheckItem:
    """Run two chunks before one backward pass, as a look-back over several windows does."""
    name, detail = "in-place safety", "two chunks, then both backward"
    half = trial.window.steps - trial.plans["chunks"][-1]
    with trial.under(facts.conditions) as runs:
        parameters = list(runs.parameters.values())
        runs.restart()
        outputs, found = runs.run(runs.window[:half], None)
        later, _ = runs.run(runs.window[half:], as_leaves(found))
        try:
            for each in (outputs, later):
                torch.autograd.grad(project(each, 0), parameters, allow_unused=True)
        except RuntimeError as error:
            first = f"RuntimeError: {str(error).splitlines()[0]}"
            cause = causes.overwrites(first) if causes.overwritten({"": first}) else causes.unknown(first)
            return CheckItem(name, "fail", detail, *cause)
        model = runs.model
        kinds = [kind for kind, yes in model.overwrites.items() if yes] if isinstance(model, Stateful) else []
    if kinds:
        detail += f"; protected, as it overwrites what its backward pass needs, in calls of {' and '.join(kinds)}"
    return CheckItem(name, "ok", detail)


def lane_independence(trial: Trial, facts: Facts) -> CheckItem:
    """Change the inputs of lane 0 and look at the others."""
    name = "lane independence"
    if trial.wide.lanes == 1:
        return CheckItem(name, "ok", "one lane in the example: nothing to mix")
    found: dict[str, float | str] = {}
    for label, values in (("eval", facts.still), ("train", facts.training)):
        with trial.under(values.conditions) as runs:
            found[label] = _mixing(runs)
    if all(isinstance(value, float) and value <= trial.value_tolerance for value in found.values()):
        return CheckItem(name, "ok", row(found), measured=found)
    cause, fix = causes.MIXES_LANES
    still = not exceeds(found["eval"], trial.value_tolerance)
    if still and facts.training.aside.statistic:
        kept = ", ".join(facts.training.aside.names)
        why = f"in training mode lanes share {kept}, which each call moves, as batch normalisation does"
        return CheckItem(name, "note", f"{row(found)}; {why}", measured=found)
    only = "in training mode, " if still else ""
    return CheckItem(name, "fail", row(found), only + cause, fix, found)


def _mixing(trial: Trial) -> float:
    """Return how far the other lanes are from what they were, with other inputs in lane 0."""
    results: list[list[Tensor]] = []
    for window in (trial.wide, Window(tree_map(_disturb_lane_0, trial.wide.inputs))):
        trial.restart()  # the same random numbers in both
        results.append(_other_lanes(trial, *detach(trial.run(window, None))))
    return apart(*results)


def batch_norm(trial: Trial, facts: Facts) -> CheckItem | None:
    """Say what batch normalisation means for training in windows; None for a model without any."""
    del trial  # it has been seen while values were measured
    if not facts.training.batch_norm:
        return None
    return CheckItem(
        "batch norm",
        "note",
        "in training mode it mixes the lanes and the steps of a call: its mean and variance are those of all of them, "
        "so that k1 and the number of lanes are part of what is computed; its running statistics move once for a step "
        "of the stream. All else is asked with the running statistics",
    )


def randomness(trial: Trial, facts: Facts) -> CheckItem | None:
    """Say where random numbers come from; None for a model that draws none."""
    del trial  # it has been seen while values were measured
    still, training = facts.still, facts.training
    if not still.draws and not training.draws:
        return None
    said = [
        f"in {mode} mode from {', '.join(values.draws)}"
        + (", held still to compare" if values.conditions.steady else "")
        for mode, values in (("eval", still), ("training", training))
        if values.draws
    ]
    detail = "; ".join(said)
    if still.dropout:
        cause = f"its outputs are random even in eval mode: a dropout that is always on ({still.dropout})"
        return CheckItem("randomness", "fail", detail, cause, "torch.nn.functional.dropout(x, p, self.training)")
    if still.draws:
        detail += ": its outputs are random even in eval mode, so that an evaluation is one sample"
    return CheckItem("randomness", "note" if still.draws else "ok", detail)


def reset(trial: Trial, facts: Facts) -> CheckItem:
    """Reset lane 0 in the middle and compare it with a fresh start there, in both modes."""
    name = "reset"
    if trial.window.lanes > 1 and (trial.dims is None or None in trial.dims):
        why = "part of its state has no lanes of its own, or grows with every step"
        return CheckItem(name, "note", f"all lanes together only: {why}")
    found: dict[str, float | str] = {}
    for where, values in (("", facts.still), ("in training ", facts.training)):
        with trial.under(values.conditions) as runs:
            lane, others = _reset_in(runs)
            found |= {f"{where}reset lane": lane, f"{where}others": others}
            if not max(lane, others) <= trial.value_tolerance:
                if runs.window.lanes > 1 and _mixing(runs) > trial.value_tolerance:
                    why = "lanes mix (lane independence), so that a lane's reset is not its own"
                    return CheckItem(name, "note", f"{row(found)}; {why}", measured=found)
                cause, fix = _why_not(runs, lane, others)
                return CheckItem(
                    name, "fail", row(found), where.replace("training ", "training mode, ") + cause, fix, found
                )
    return CheckItem(name, "ok", row(found), measured=found)


def _reset_in(trial: Trial) -> tuple[float, float]:
    """Return how far the lane that is reset is from a fresh start, and the others from what they are without it."""
    middle, window = trial.plans["chunks"][0], trial.window
    flags = torch.zeros_like(window.reset)
    flags[middle, 0] = True
    trial.restart()
    before, start = trial.run(window[:middle], None)  # in two calls, as the reset makes it
    there = SideState.of(trial.model, device=trial.device)
    uncut = detach(trial.run(window[middle:], clone(start))[0])
    _with_numbers_of(trial, there)
    fresh = detach(trial.run(window[middle:], None)[0])
    trial.restart()
    cut, _ = unroll(trial.model, Window(window.inputs, reset=flags), None, trial.dims)
    del before
    cut = detach(cut)
    lane = apart(tree_map(lambda leaf: leaf[:, :1], fresh), tree_map(lambda leaf: leaf[middle:, :1], cut))
    others = apart(tree_map(lambda leaf: leaf[:, 1:], uncut), tree_map(lambda leaf: leaf[middle:, 1:], cut))
    return lane, others


def _with_numbers_of(trial: Trial, there: SideState) -> None:
    """Go back to where the second chunk begins, with its random numbers."""
    there.restore(trial.model, in_place=False)
    trial.model.train(trial.conditions.train)


def _why_not(trial: Trial, lane: float, others: float) -> causes.Cause:
    """Return why a lane does not start anew, or what becomes of the others."""
    middle, window = trial.plans["chunks"][0], trial.window
    trial.restart()
    _, old = trial.run(window[:middle], None)
    there = SideState.of(trial.model, device=trial.device)
    _with_numbers_of(trial, there)
    fresh = detach(trial.run(window[middle:], None)[0])
    if others > trial.value_tolerance:
        return causes.unknown(f"the lanes that go on change when another is reset ({others:.0e})")
    zeros = tree_map(torch.zeros_like, clone(old))
    _with_numbers_of(trial, there)
    from_zeros = apart(fresh, detach(trial.run(window[middle:], replace_tensors(old, tensors(zeros)))[0]))
    if from_zeros > trial.value_tolerance:
        return causes.STARTS_ELSEWHERE
    return causes.unknown(f"a lane that is reset is not one that starts anew ({lane:.0e}), though zeros are its start")


def _other_lanes(trial: Trial, outputs: Tree, found: Tree) -> list[Tensor]:
    kept = [leaf[:, 1:] for leaf in tensors(outputs)]
    for leaf, dim in zip(tensors(found), trial.dims or (), strict=False):
        kept += [] if dim is None else [leaf.narrow(dim, 1, leaf.shape[dim] - 1)]
    return kept


def _disturb_lane_0(leaf: Tensor) -> Tensor:
    """Return inputs in which lane 0 is fed its own past in reverse, and twice as large if it has a size."""
    other = leaf.clone()
    other[:, 0] = leaf[:, 0].flip(0) * 2 + 1 if leaf.is_floating_point() else leaf[:, 0].flip(0)
    return other
