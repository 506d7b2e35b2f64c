"""The state itself, in-place safety, and whether lanes are what they should be: alone, and able to start anew."""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt.adapters import Stateful
from tbptt.checks import causes
from tbptt.checks.precision import apart, project
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial, row
from tbptt.model import trainable_parameters
from tbptt.tree import Tree, as_leaves, differentiable, leaf_names, num_bytes, tensors, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["in_place_safety", "lane_independence", "reset", "state"]


def state(trial: Trial) -> CheckItem:
    """Ask whether it returns a state at all, and of what."""
    with trial.mode(train=False), torch.no_grad():
        _, found = trial.run(trial.window, None)
    if not differentiable(found):
        return CheckItem("state", "fail", "none", *causes.NO_STATE)
    dims = trial.dims or ("?",) * len(tensors(found))
    shapes = [
        f"{name} {tuple(leaf.shape)} lanes in {'-' if dim is None else dim}"
        for name, leaf, dim in zip(leaf_names(found), tensors(found), dims, strict=False)
    ]
    shown = "; ".join(shapes[:3]) + (f"; and {len(shapes) - 3} more" if len(shapes) > 3 else "")
    size = num_bytes(found) / trial.window.lanes / 1024
    return CheckItem("state", "ok", f"{type(found).__name__}, {size:.1f} KiB a lane here: {shown}")


def in_place_safety(trial: Trial) -> CheckItem:
    """Run two chunks before one backward pass, as a look-back over several windows does."""
    name, detail = "in-place safety", "two chunks, then both backward"
    half = trial.window.steps - trial.plans["chunks"][-1]
    parameters = list(trainable_parameters(trial.model).values())
    with trial.mode(train=True):
        outputs, found = trial.run(trial.window[:half], None)
        later, _ = trial.run(trial.window[half:], as_leaves(found))
        try:
            for each in (outputs, later):
                torch.autograd.grad(project(each, 0), parameters, allow_unused=True)
        except RuntimeError as error:
            first = f"RuntimeError: {str(error).splitlines()[0]}"
            return CheckItem(name, "fail", detail, *causes.overwrites(first))
    kinds = [kind for kind, yes in trial.model.overwrites.items() if yes] if isinstance(trial.model, Stateful) else []
    if kinds:
        detail += f"; protected, as it overwrites what its backward pass needs, in calls of {' and '.join(kinds)}"
    return CheckItem(name, "ok", detail)


def lane_independence(trial: Trial) -> CheckItem:
    """Change the inputs of lane 0 and look at the others."""
    name = "lane independence"
    if trial.window.lanes == 1:
        return CheckItem(name, "ok", "one lane in the example: nothing to mix")
    other = tree_map(_disturb_lane_0, trial.window.inputs)
    found: dict[str, float | str] = {}
    for label, train in (("eval", False), ("train", True)):
        results: list[list[Tensor]] = []
        for inputs in (trial.window.inputs, other):
            with trial.mode(train=train), torch.no_grad():
                torch.manual_seed(0)  # the same dropout in both
                results.append(_other_lanes(trial, *trial.run(Window(inputs), None)))
        found[label] = apart(*results)
    if all(isinstance(value, float) and value <= trial.value_tolerance for value in found.values()):
        return CheckItem(name, "ok", row(found), measured=found)
    return CheckItem(name, "fail", row(found), *causes.MIXES_LANES, found)


def reset(trial: Trial) -> CheckItem:
    """Reset lane 0 in the middle and compare it with a fresh start there."""
    name, middle = "reset", trial.plans["chunks"][0]
    if trial.window.lanes > 1 and (trial.dims is None or None in trial.dims):
        why = "part of its state has no lanes of its own, or grows with every step"
        return CheckItem(name, "note", f"all lanes together only: {why}")
    flags = torch.zeros_like(trial.window.reset)
    flags[middle, 0] = True
    with trial.mode(train=False), torch.no_grad():
        uncut = trial.chunks([middle, trial.window.steps - middle])  # in two calls, as the reset makes it
        fresh, _ = trial.run(trial.window[middle:], None)
        cut, _ = unroll(trial.model, Window(trial.window.inputs, reset=flags), None, trial.dims)
    lane = apart(tree_map(lambda leaf: leaf[:, :1], fresh), tree_map(lambda leaf: leaf[middle:, :1], cut))
    others = apart(tree_map(lambda leaf: leaf[:, 1:], uncut), tree_map(lambda leaf: leaf[:, 1:], cut))
    found: dict[str, float | str] = {"reset lane": lane, "others": others}
    if max(lane, others) <= trial.value_tolerance:
        return CheckItem(name, "ok", row(found), measured=found)
    return CheckItem(name, "fail", row(found), *causes.STARTS_ELSEWHERE, found)


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
