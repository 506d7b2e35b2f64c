"""Why a model fails, and what to do about it: pairs of cause and fix.

A cause is named where an experiment of its own has shown it; else it is "cause unknown", with what was measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt.checks.crossing import Crossing, without_influence
from tbptt.checks.precision import apart
from tbptt.checks.trial import Conditions, Trial
from tbptt.checks.values import Aside
from tbptt.model import trainable_parameters
from tbptt.side_state import SideState
from tbptt.tree import Tree, clone, detach, differentiable, leaf_names, tensors, time_slice, tree_map
from tbptt.window import Window

__all__ = [
    "MIXES_LANES",
    "NOT_FINITE",
    "NO_STATE",
    "STARTS_ELSEWHERE",
    "Cause",
    "cannot_train",
    "keeps",
    "not_finite",
    "of_gradients",
    "of_values",
    "overwrites",
    "overwritten",
    "refuses",
    "undifferentiable",
    "unknown",
]

_SYMPTOMS = ("modified by an inplace operation", "has been modified inplace", "in-place operation")
_KEEP = "return the state itself, not state.detach(): the library cuts the graph where it has to"
_PROTECT = "model = tbptt.stateful(model), which protects where it is needed"
_REPORT = "compare outputs and gradients of two calls with those of one, by hand"

Cause = tuple[str, str]

NO_STATE = (
    "it returns no state: every window would start from nothing",
    "return outputs, state; or, if it keeps its state inside, tbptt.stateful(model, inside=True)",
)
NOT_FINITE = (
    "its outputs are not finite, before any training: nothing can be compared with them",
    "look at its initial weights, and at the size of the inputs",
)
MIXES_LANES = (
    "it mixes lanes: when lane 0 is fed something else, the other lanes change",
    "compute each lane alone: no mean or norm over the lanes; or, if it is meant, accept=['lane independence']",
)

STARTS_ELSEWHERE = (
    "a lane that is reset does not restart: state=None means something else than zeros to the model",
    "def initial_state(self, lanes): return the first state; or tbptt.stateful(model, initial=...)",
)


def overwritten(found: dict[str, float | str]) -> str:
    """Return what torch said of something overwritten, or nothing."""
    said = [value for value in found.values() if isinstance(value, str)]
    return next((message for message in said if any(symptom in message for symptom in _SYMPTOMS)), "")


def overwrites(message: str) -> Cause:
    """Return cause and fix for an error of the backward pass."""
    return f"it writes in place, over what the backward pass needs: {message.partition(': ')[2]}", _PROTECT


def refuses(message: str) -> Cause:
    """Return cause and fix for a model that cannot be run in the chunks."""
    return f"it cannot be run in these chunks: {message}", "check(..., chunks=(...)), of lengths that it takes"


def unknown(measured: str) -> Cause:
    """Return what is said where no experiment shows a cause."""
    return f"cause unknown: {measured}", _REPORT


def cannot_train(trial: Trial, conditions: Conditions, message: str) -> Cause:
    """Return why chunk after chunk cannot be trained: a graph that is kept inside, or what the model says."""
    if "second time" not in message:
        return refuses(message)
    with trial.under(conditions) as runs:
        runs.whole()
        kept = [
            f"{path}.{name}".removeprefix(".")
            for path, module in runs.model.named_modules()
            for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
    if not kept:
        return unknown(message)
    return f"it keeps something inside, with its graph: {kept[0]}", "detach what is kept, or return it as state"


def keeps(aside: Aside) -> Cause:
    """Return cause and fix for a model that goes on from more than its state."""
    if not aside.places:
        return (
            "it keeps something inside, or outside: given the same state, inputs and random numbers, a chunk is "
            f"another ({aside.apart:.0e}) once the model has seen other steps, though what modules keep was put back: "
            "a global, a closure, or an object",
            "return all that is carried as the state",
        )
    names = ", ".join(aside.names[:3])
    return (
        f"it keeps something inside: with {names} as at the start, a chunk that is given the same state is another "
        f"({aside.apart:.0e})",
        "return all that is carried as the state; or tbptt.stateful(model, inside=True)",
    )


def not_finite(trial: Trial, begin: int) -> Cause:
    """Return which parameter's gradient is NaN or infinity, and within what."""
    weights = trainable_parameters(trial.model)

    def named(window: Window, first: int) -> str:
        outputs = trial.whole(window)
        total = torch.stack([leaf[first:].abs().sum() for leaf in differentiable(outputs)]).sum()
        found = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
        values = {name: each for name, each in zip(weights, found, strict=True)}
        dense = {name: each.to_dense() if each.is_sparse else each for name, each in values.items()}
        return next((name for name, each in dense.items() if not torch.isfinite(each).all()), "")

    first = trial.plans["chunks"][0]
    inside = named(trial.window[:first], 0)
    name = inside or named(trial.window, begin) or "one of them"
    where = f"within one chunk of {first} steps already" if inside else "in one pass, though not within one chunk"
    return (
        f"the gradient is NaN or infinite {where}, in parameter {name}, though the outputs are finite",
        "look for an overflow in the backward pass: an exp, a division, a square root or a norm at 0",
    )


def of_gradients(crossing: Crossing, *, values_agree: bool, detail: str) -> Cause:
    """Return why the gradient through chunks is another than that of one pass."""
    if crossing.cut:
        missing = [name for name in crossing.cut if name not in crossing.written]
        side = "comes out of a chunk without its graph" if missing else "sends nothing back out of the chunk after it"
        return (
            f"it detaches the state that it takes or returns: {_listed(list(missing or crossing.cut), crossing.names)} "
            f"{side}, though the chunk after it depends on it",
            _KEEP,
        )
    if not values_agree:
        return (
            "its outputs depend on where the sequence is cut (value carry), and so does its gradient",
            "mend the value carry first",
        )
    return (
        "its outputs are the same however the sequence is cut, and its gradient is not, though some crosses: within a "
        f"call the gradient is detached, scaled or clipped ({detail})",
        "no .detach(), no_grad, hook or clipping inside the model that depends on the length of a call",
    )


def undifferentiable(step: int, autograd: float, differences: float) -> Cause:
    """Return cause and fix for a gradient that is not the derivative."""
    if autograd == 0:
        what = "it detaches its state inside: nothing is sent back"
    else:
        what = f"what is sent back is {autograd / differences if differences else float('inf'):.3g} of the derivative"
    return (
        f"{what} at step {step} of one pass, where central differences of the next state and outputs say "
        f"{differences:.2g} and autograd {autograd:.2g}",
        _KEEP,
    )


def of_values(trial: Trial, window: Window, sizes: list[int], message: str) -> Cause:
    """Return why the outputs in chunks of these sizes are others than those of one pass.

    Args:
        trial: under the conditions in which they are.
        window: the steps.
        sizes: the chunks; the second of them is looked at.
        message: what the model said where it could not be run in them, or nothing.
    """
    first, second = sizes[:2]
    shared = _without_lanes(trial, first)
    if shared:
        return (
            f"its state has the wrong batch size: {shared} is the same for any number of lanes, so that lanes go "
            "on from the past of others",
            "keep one state for each lane, (B, ...)",
        )
    if message:
        return refuses(message)
    longer = _depends_on_length(trial, window[: first + second], first)
    if longer:
        return longer, "compute each step from itself and the state alone"
    trial.restart()
    _, state = trial.run(window[:first], None)
    there = SideState.of(trial.model, device=trial.device)
    following, names = window[first : first + second], leaf_names(state)
    rounded = _rounded(trial, state)
    if rounded:
        return (
            f"it rounds its state where a call ends: {rounded}",
            "return the state in the precision it is computed in",
        )
    dropped = without_influence(trial, following, clone(state), there)
    steps = "single steps come" if second == 1 else f"{second} steps come at once"
    if dropped and len(dropped) == len(differentiable(state)):
        there.restore(trial.model, in_place=False)
        trial.model.train(trial.conditions.train)
        given = detach(trial.run(following, clone(state))[0])
        there.restore(trial.model, in_place=False)
        trial.model.train(trial.conditions.train)
        fresh = apart(given, detach(trial.run(following, None)[0]))
        like = (
            "each chunk is computed as if it were a fresh start" if fresh == 0 else "nothing that follows depends on it"
        )
        return f"it forgets to pass its state on: when {steps}, {like}", "outputs, state = self.core(inputs, state)"
    if dropped:
        return (
            f"it drops a part of its state: when {steps}, nothing that follows depends on {_listed(dropped, names)}",
            "outputs, state = self.core(inputs, state)",
        )
    return unknown("its outputs depend on where the sequence is cut, though each part of its state makes a difference")


def _listed(found: list[str], names: list[str] | tuple[str, ...]) -> str:
    rest = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]}{rest} (of {len(names)} tensors)"


def _depends_on_length(trial: Trial, window: Window, first: int) -> str:
    """Return what is said of a model whose first chunk is another in a longer call, from the start of a sequence."""
    whole = detach(trial.whole(window))
    alone = detach(trial.whole(window[:first]))
    if apart(time_slice(whole, 0, first), alone) <= trial.value_tolerance:
        return ""

    def later(leaf: Tensor) -> Tensor:
        other = leaf.clone()
        other[first:] = leaf[first:].flip(0) * 2 + 1 if leaf.is_floating_point() else leaf[first:].flip(0)
        return other

    other = detach(trial.whole(Window(tree_map(later, window.inputs))))
    ahead = apart(time_slice(whole, 0, first), time_slice(other, 0, first)) > trial.value_tolerance
    why = (
        "an output is another when a later input is: it looks ahead, or normalises over the steps that it is given"
        if ahead
        else "no output changes with a later input: it is the number of steps itself that enters"
    )
    return f"its outputs depend on the length of the chunk, before any state is passed: {why}"


def _rounded(trial: Trial, state: Tree) -> str:
    """Return the tensor of the state whose numbers all have a narrower type's precision, or nothing."""
    types = [torch.bfloat16, torch.float16] + ([torch.float32] if trial.precision == "float64" else [])
    for name, leaf in zip(leaf_names(state), tensors(state), strict=True):
        if not leaf.is_floating_point() or leaf.numel() < 4 or bool((leaf == leaf.round()).all()):
            continue  # whole numbers are whole in any type
        for dtype in types:
            if leaf.dtype == dtype or bool((leaf == leaf.to(dtype).to(leaf.dtype)).all()):
                return f"{name} has numbers of {str(dtype).removeprefix('torch.')} only"
    return ""


def _without_lanes(trial: Trial, steps: int) -> str:
    """Return the tensor of the state whose shape does not depend on the number of lanes, or nothing."""
    if trial.window.lanes == 1:
        return ""
    fewer = tree_map(lambda leaf: leaf[:steps, :-1], trial.window.inputs)
    try:
        trial.restart()
        _, state = trial.run(trial.window[:steps], None)
        trial.restart()
        _, other = trial.run(Window(fewer), None)
        pairs = list(zip(leaf_names(state), tensors(state), tensors(other), strict=True))
    except Exception:  # it takes one number of lanes only, or has a tensor for each
        return ""
    same = [f"{name} {tuple(a.shape)}" for name, a, b in pairs if a.is_floating_point() and a.shape == b.shape]
    return same[0] if same else ""
