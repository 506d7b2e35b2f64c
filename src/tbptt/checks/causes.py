"""Why a model fails, as far as experiments can tell, and what to do about it: pairs of cause and fix."""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt.checks.precision import apart
from tbptt.checks.trial import Trial
from tbptt.tree import Tree, copy, differentiable, leaf_names, replace_tensors, tensors, time_slice, tree_map
from tbptt.window import Window

__all__ = [
    "DETACHES_INSIDE",
    "KEEPS_MORE",
    "MIXES_LANES",
    "NOT_FINITE",
    "NO_STATE",
    "RANDOM",
    "STARTS_ELSEWHERE",
    "disturbed",
    "of_gradients",
    "of_values",
    "overwrites",
    "overwritten",
    "refuses",
]

_SYMPTOMS = ("modified by an inplace operation", "has been modified inplace", "in-place operation")
_KEEP = "return the state itself, not state.detach(): the library cuts the graph where it has to"
_PROTECT = "model = tbptt.stateful(model), which protects where it is needed"

NO_STATE = (
    "it returns no state: every window would start from nothing",
    "return outputs, state; or, if it keeps its state inside, tbptt.stateful(model, inside=True)",
)
RANDOM = (
    "its outputs are random even in eval mode: a dropout that is always on, for example",
    "torch.nn.functional.dropout(x, p, self.training)",
)
NOT_FINITE = (
    "its outputs are not finite, before any training: nothing can be compared with them",
    "look at its initial weights, and at the size of the inputs",
)
DETACHES_INSIDE = ("no gradient comes from before the chunk, in one pass neither: it detaches its state inside", _KEEP)
KEEPS_MORE = (
    "what it computes depends on more than its inputs and the state that it is given: it keeps something inside",
    "return all that is carried as the state; or tbptt.stateful(model, inside=True)",
)
MIXES_LANES = (
    "it mixes lanes: when lane 0 is fed something else, the other lanes change",
    "compute each lane alone: no mean or norm over the lanes",
)
STARTS_ELSEWHERE = (
    "a lane that is reset does not restart: state=None means something else than zeros to the model",
    "def initial_state(self, lanes): return the first state; or tbptt.stateful(model, initial=...)",
)


def overwritten(found: dict[str, float | str]) -> str:
    """Return what torch said of something overwritten, or nothing."""
    said = [value for value in found.values() if isinstance(value, str)]
    return next((message for message in said if any(symptom in message for symptom in _SYMPTOMS)), "")


def overwrites(message: str) -> tuple[str, str]:
    """Return cause and fix for an error of the backward pass."""
    return f"it writes in place, over what the backward pass needs: {message.partition(': ')[2]}", _PROTECT


def refuses(message: str) -> tuple[str, str]:
    """Return cause and fix for a model that cannot be run in the chunks."""
    return f"it cannot be run in these chunks: {message}", "check(..., chunks=(...)), of lengths that it takes"


def of_gradients(*, crosses: bool) -> tuple[str, str]:
    """Return why the gradient through chunks is another than that of one pass."""
    if not crosses:
        return "it detaches the state that it takes or returns: no gradient crosses a boundary", _KEEP
    return (
        "its gradient depends on where the sequence is cut; where its outputs do as well, it follows from that",
        "mend the value carry first; if that is right, return all of the state with its graph",
    )


def of_values(trial: Trial, found: dict[str, float | str], wrong: list[str]) -> tuple[str, str]:
    """Return why the outputs in chunks are others than those of one pass."""
    name = "chunks" if "chunks" in wrong or not wrong else wrong[0]
    sizes = trial.plans[name]
    steps = "single steps come" if sizes[0] == 1 else f"{sizes[0]} steps come at once"
    with trial.mode(train=False), torch.no_grad():
        shared = _without_lanes(trial, sizes[0])
        if shared:
            return (
                f"its state has the wrong batch size: {shared} is the same for any number of lanes, so that lanes go "
                "on from the past of others",
                "keep one state for each lane, (B, ...)",
            )
        if isinstance(found["chunks"], str):
            return refuses(found["chunks"])
        whole, _ = trial.run(trial.window, None)
        first, state = trial.run(trial.window[: sizes[0]], None)
        if apart(time_slice(whole, 0, sizes[0]), first) > trial.value_tolerance:
            return (
                "its outputs depend on the length of the chunk, before any state is passed: it looks ahead, or "
                "normalises over the steps that it is given",
                "compute each step from itself and the state alone",
            )
        dropped, names = _without_influence(trial, sizes, state), leaf_names(state)
    if len(dropped) == len(differentiable(state)):
        cause = f"it forgets to pass its state on: when {steps}, each chunk is computed as if it were a fresh start"
    elif dropped:
        cause = f"it drops a part of its state: when {steps}, nothing that follows depends on {_listed(dropped, names)}"
    else:
        cause = (
            "its outputs depend on where the sequence is cut: the state does not hold, or not use, all that is needed"
        )
    if "steps" not in wrong and isinstance(found.get("steps"), float):
        return cause, "tbptt.stateful(model, max_steps=1): in single steps it is right"
    if wrong == ["steps"]:
        return cause, "windows of two steps or more, in which it is right"
    return cause, "outputs, state = self.core(inputs, state)"


def _listed(dropped: list[str], names: list[str]) -> str:
    rest = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
    return f"{dropped[0]}{rest} (of {len(names)} tensors)"


def _without_lanes(trial: Trial, steps: int) -> str:
    """Return the tensor of the state whose shape does not depend on the number of lanes, or nothing."""
    if trial.window.lanes == 1:
        return ""
    fewer = tree_map(lambda leaf: leaf[:steps, :-1], trial.window.inputs)
    try:
        _, state = trial.run(trial.window[:steps], None)
        _, other = trial.run(Window(fewer), None)
        pairs = list(zip(leaf_names(state), tensors(state), tensors(other), strict=True))
    except Exception:  # it takes one number of lanes only, or has a tensor for each
        return ""
    same = [f"{name} {tuple(a.shape)}" for name, a, b in pairs if a.is_floating_point() and a.shape == b.shape]
    return same[0] if same else ""


def _without_influence(trial: Trial, sizes: list[int], state: Tree) -> list[str]:
    """Return the tensors of the state that the next chunk does not look at."""
    following = trial.window[sizes[0] : sizes[0] + sizes[1]]
    usual, _ = trial.run(following, copy(state))  # some models write into what they are given
    leaves, names = tensors(state), leaf_names(state)
    found: list[str] = []
    for index, leaf in enumerate(leaves):
        if leaf.is_floating_point() or leaf.is_complex():
            changed = [disturbed(each) if at == index else each.clone() for at, each in enumerate(leaves)]
            outputs, _ = trial.run(following, replace_tensors(state, changed))
            if apart(usual, outputs) == 0:
                found.append(names[index])
    return found


def disturbed(leaf: Tensor) -> Tensor:
    """Return other numbers of about the same size."""
    return leaf + torch.randn_like(leaf) * (leaf.abs().mean() + 0.1)
