"""A small module that predicts the gradient of the future losses from the state.

It sees each lane's state as one row of numbers, and gives one number for each of them.

Letters: B lanes, S numbers of a lane's state, M hidden units.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.estimators.rows import rows_of
from tbptt.length.base import is_whole
from tbptt.model import check_trainable, find_lane_dims, initial_state, split_result
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, detach, differentiable, tensors, time_slice

__all__ = ["NAME", "PREFIX", "Predictor", "Spelled", "attach", "attached", "check_spelled"]

NAME = "synthetic_gradients"
"""The name under which a model has its predictor as a submodule."""
PREFIX = f"{NAME}."
"""What the names of the predictor's parameters begin with, among the model's."""

Spelled: TypeAlias = int | Literal["linear", "own"]
"""A number of hidden units, "linear" for none, or "own" for a module of the user's."""


@final
class Predictor(nn.Module):
    """Predict, for each lane alone, the gradient of its future losses with respect to its state.

    Args:
        net: takes rows (B, S) and returns rows (B, S).
        size: S.
        spelled: what the estimator that made it calls it.
    """

    def __init__(self, net: nn.Module, size: int, spelled: Spelled) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.spelled: Spelled = spelled

    @staticmethod
    def of(spelled: int | Literal["linear"], size: int) -> Predictor:
        """Return a fresh one, whose predictions are zero: at first the estimator is `TBPTT(k1, k1)`."""
        last = nn.Linear(size if spelled == "linear" else spelled, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        net = last if spelled == "linear" else nn.Sequential(nn.Linear(size, spelled), nn.ReLU(), last)
        return Predictor(net, size, spelled)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the predicted gradient of rows (B, S).

        Raises:
            ShapeError: rows of another width, or a module of the user's that returns another shape.
        """
        if rows.shape[-1] != self.size:
            raise ShapeError(
                f"a state of {self.size} numbers in each lane was expected, as the predictor was made for, but "
                f"{rows.shape[-1]} came: it has no weights for the others",
                fix="a model whose state keeps its size",
            )
        found = self.net(rows)
        if not isinstance(found, Tensor) or found.shape != rows.shape:
            came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ShapeError(
                f"a predictor that returns one number for each number of the state, shape {tuple(rows.shape)}, was "
                f"expected, but {came} came: each of them has a gradient",
                fix=f"let it end in nn.Linear(..., {self.size})",
            )
        return found


def check_spelled(spelled: object) -> None:
    """Refuse what spells no predictor.

    Raises:
        ConfigError: it does not.
    """
    known = spelled in ("linear", "own") if isinstance(spelled, str) else is_whole(spelled)
    if not known or (not isinstance(spelled, str) and cast(int, spelled) < 1):
        raise ConfigError(
            f'predictor was expected to be "linear", a number of hidden units from 1, or "own", but is {spelled!r}',
            fix='SyntheticGradients(k1=10, predictor="linear"); a module of your own: predictor="own" and '
            "estimator.attach(model, inputs, module)",
        )


def attached(model: nn.Module) -> Predictor | None:
    """Return the predictor that a model has; None for none.

    Raises:
        ConfigError: the model has something else under that name.
    """
    found: object = getattr(model, NAME, None)
    if found is None or isinstance(found, Predictor):
        return found
    raise ConfigError(
        f"{type(model).__name__}.{NAME} was expected to be free, or a predictor that an estimator attached, but is a "
        f"{type(found).__name__}: it would be overwritten",
        fix="give it another name in the model",
    )


def attach(model: nn.Module, inputs: Tree, spelled: Spelled, own: nn.Module | None) -> None:
    """Make a fresh predictor a submodule of a model, whose outputs and other parameters stay as they are.

    Args:
        model: the model; run for one step, twice, to see its state and that its outputs stay.
        inputs: an example, leaves (T, B, ...).
        spelled: what predictor.
        own: the user's module, which is moved to where the state is, and to its type; None for none.

    Raises:
        ShapeError: a module of the user's that returns another shape.
        CapabilityError: a state that cannot be taken apart by lane, or a model that runs its submodules by itself.
    """
    check_trainable(model)
    inputs, dims = _example(model, inputs)
    outputs, state = _run(model, inputs)
    rows = rows_of(state, dims)
    leaf = differentiable(state)[0]
    with preserved(device=leaf.device):  # a model with a predictor draws what it would draw without
        predictor = Predictor.of(spelled, rows.shape[1]) if spelled != "own" else None
    if predictor is None:
        assert own is not None
        predictor = Predictor(own, rows.shape[1], "own")
    model.add_module(NAME, predictor.to(device=leaf.device, dtype=rows.dtype))
    try:
        with preserved(device=leaf.device), torch.no_grad():
            predictor(rows)
        same = _alike(_run(model, inputs)[0], outputs)
    except BaseException:
        delattr(model, NAME)
        raise
    if not same:
        delattr(model, NAME)
        raise CapabilityError(
            f"a {type(model).__name__} whose outputs do not depend on what submodules it has was expected, but they "
            "changed when it got one more: it runs them by itself, as nn.Sequential does",
            fix="put it into a module of your own, and call it there by name",
        )


def _example(model: nn.Module, inputs: Tree) -> tuple[Tree, LaneDims | None]:
    """Return one step of the inputs, all of them for a model that takes no single steps, and the lane dimensions."""
    dims = find_lane_dims(model, inputs)
    one = time_slice(inputs, 0, 1)
    try:
        _run(model, one)
    except CapabilityError:
        raise
    except Exception:  # whatever a model says to a length that it does not take; to all of them it is said again
        return inputs, dims
    return one, dims


def _run(model: nn.Module, inputs: Tree) -> tuple[Tree, Tree]:
    """Return the outputs and the state after `inputs`; nothing remains of the run."""
    first = tensors(inputs)[0]
    with preserved(model, device=first.device), torch.no_grad():
        outputs, state = split_result(model, model(inputs, initial_state(model, first.shape[1])))
        return detach(outputs), detach(state)


def _alike(found: Tree, wanted: Tree) -> bool:
    """Tell whether outputs are the same, but for what a GPU's kernels round differently from run to run."""
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)
