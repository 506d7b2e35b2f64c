"""What one has to know to read a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage] - the root of torch's dropouts

from tbptt.comparison.excerpt import Sizes
from tbptt.comparison.gradients import Reference
from tbptt.comparison.settings import longest_length
from tbptt.estimators import SyntheticGradients
from tbptt.estimators.base import Estimator
from tbptt.estimators.predictor import attached
from tbptt.pathways import segment_steps
from tbptt.tree import Tree

__all__ = ["notes_on"]


def notes_on(
    estimators: Mapping[str, Estimator],
    model: nn.Module,
    inputs: Tree,
    sizes: Sizes,
    reference: Reference,
    longest: int | None,
) -> tuple[str, ...]:
    """Return what a reader has to know, in the order of weight.

    Args:
        estimators: that have not failed.
        inputs: an example, leaves (T, B, ...).
    """
    limit = "" if longest is None else f", and no further than was asked for (longest={longest})"
    notes = [
        f"gradients at {len(reference.points)} points of {sizes.span} steps, weights as given; the full gradient goes "
        f"back at least {reference.reach} steps before each{limit}: what lies farther is in no figure"
    ]
    segment = segment_steps(model)
    if segment > 1:
        notes.append(f"the model is cut into segments of {segment} steps: all lengths are multiples of that")
    missing = sizes.points - len(reference.points)
    if missing:
        notes.append(f"{missing} of {sizes.points} points had no target that counts, and are left out")
    if any(isinstance(each, _DropoutNd) and each.p for each in model.modules()) or any(
        isinstance(each, nn.RNNBase) and each.dropout for each in model.modules()
    ):
        notes.append("gradients are compared with dropout off; time, memory and training are with the model as it came")
    changing = [name for name, each in estimators.items() if longest_length(each)]
    if changing:
        notes.append(
            f"the lengths of {', '.join(changing)} change: gradients are those of the lengths of the moment, see the "
            "look-back; in training they go on changing"
        )
    fresh = [name for name, each in estimators.items() if isinstance(each, SyntheticGradients)]
    if fresh and attached(model) is None:
        notes.append(
            f"the predictor of {', '.join(fresh)} is fresh, and predicts nothing: gradients are those of TBPTT with "
            "the same k1 and k2; in training it learns"
        )
    limits = {name: each.limits(model, inputs) for name, each in estimators.items()}
    return (*notes, *(f"{name}: {said}" for name, said in limits.items() if said))
