"""By which of its ways does the past of a model come, and does a gradient go back along each?"""

from __future__ import annotations

import torch

from tbptt.checks.crossing import disturbed
from tbptt.checks.precision import apart, project
from tbptt.checks.report import CheckItem
from tbptt.checks.trial import Trial
from tbptt.checks.values import Facts
from tbptt.pathways import pathways_of
from tbptt.tree import as_leaves, copy, differentiable, replace_tensors, tensors

__all__ = ["pathways"]


def pathways(trial: Trial, facts: Facts) -> CheckItem | None:
    """Tell for each way whether the second chunk depends on it, and a gradient comes back; None for a single way.

    A way along which values come and no gradient goes back is noted: its model may be meant so, as Transformer-XL is,
    but what is learned through it is nothing, whatever look-back was asked for.
    """
    first, second = trial.plans["chunks"][:2]
    following = trial.window[first : first + second]
    with trial.under(facts.still.conditions) as trial:
        _, state = trial.run(trial.window[:first], None)
        found = pathways_of(trial.model, state)
        if not found:
            return None
        written = [leaf.requires_grad for leaf in tensors(state)]
        given = as_leaves(state)
        outputs, _ = trial.run(following, given)
        gradients = torch.autograd.grad(project(outputs, 0), differentiable(given), materialize_grads=True)
        arrived = {id(leaf): bool(each.any()) for leaf, each in zip(differentiable(given), gradients, strict=True)}
        goes_back = [
            graph and arrived.get(id(leaf), False) for graph, leaf in zip(written, tensors(given), strict=True)
        ]
        said: dict[str, str] = {}
        with torch.no_grad():
            usual, _ = trial.run(following, copy(state))  # some models write into what they are given
            for name, places in found.items():
                changed = [
                    disturbed(leaf) if place in places else leaf.clone() for place, leaf in enumerate(tensors(state))
                ]
                other, _ = trial.run(following, replace_tensors(state, changed))
                values, gradient = apart(usual, other) > 0, any(goes_back[place] for place in places)
                said[name] = _WORDS[values, gradient]
    detail = "; ".join(f"{name}: {words}" for name, words in said.items())
    verdict = "ok" if all(words == _WORDS[True, True] for words in said.values()) else "note"
    return CheckItem("pathways", verdict, detail, measured=said)


_WORDS = {
    (True, True): "values and gradient",
    (True, False): "values, but no gradient: nothing is learned through it, whatever the look-back",
    (False, False): "nothing comes",
    (False, True): "a gradient, but no values",
}
