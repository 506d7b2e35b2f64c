"""What may be done to the state's gradient where it crosses from a segment to the one before.

Letters: B lanes.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.gradients import Gradients
from tbptt.estimators.segments import Boundary, lane_norms, pass_on
from tbptt.tree import LaneDims, Tree, tensors

__all__ = ["ClipBoundary", "parse_boundary", "rule_at"]


@dataclass(frozen=True)
class ClipBoundary:
    """Scale the gradient that crosses a boundary, so that its 2-norm is at most `max_norm` in each lane.

    For a gradient that explodes on its way back: clipping the parameters' gradient afterwards keeps its size and loses
    its direction, as the exploded part is all that is left of it; clipped on the way, the near steps keep their say.
    A lane that explodes is clipped alone. It is given to the estimator, not to the trainer:
    `TBPTT(k1=8, k2=64, boundary=ClipBoundary(1.0))` acts at the 7 boundaries between windows that are crossed, 8, 16,
    ..., 56 steps back, with either `replay`; `FullBPTT` between segments, `SparseAttentiveBacktracking` at its cuts.
    Choose `max_norm` by `Estimate.boundary_norms`: before clipping, at the same boundaries, all lanes together.

    Not for unbiased estimators, which do not take it: what is clipped is what their mean lives by.

    Args:
        max_norm: the largest norm that crosses unchanged, of one lane's part of the gradient of sum / count, above 0.

    Raises:
        ConfigError: `max_norm` is not a positive, finite number.
        NonFiniteError: when a gradient arrives that is not finite; no scale could mend it.

    Exactness: biased wherever it clips.
    Cost: a norm and a product of the size of the state for each boundary.
    Reference: between chunks, as in k2-fsa/icefall pull request 560; for parameters Pascanu et al. (2013).
    """

    max_norm: float

    def __post_init__(self) -> None:
        value = cast(object, self.max_norm)  # whatever a caller without a type checker gave
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(
                f"max_norm was expected to be a positive, finite number, but is {value!r}: the gradient would end at "
                "every boundary, or never be clipped",
                fix="ClipBoundary(1.0)",
            )

    def refuse_unless(self, crossed: bool, owner: str, fix: str = "k2 > k1") -> None:
        """Refuse to be given to an estimator whose gradient crosses no boundary.

        Args:
            crossed: whether it crosses one.
            owner: the estimator, in words.
            fix: a setting with which it would.

        Raises:
            ConfigError: it does not.
        """
        if not crossed:
            raise ConfigError(
                f"boundaries to clip at were expected, but with {owner} the gradient crosses none: "
                f"{self} would never act",
                fix=f"{fix}, or ClipNorm(...) among the guards for the parameters' gradient",
            )

    def at(self, dims: LaneDims | None) -> Boundary:
        """Return the rule for a state with these lane dimensions."""

        def clip(index: int, start: Tree, cotangent: Gradients, /) -> Gradients:
            if all(gradient is None for gradient in cotangent):
                return cotangent
            norms = lane_norms(cotangent, start, dims)
            if not bool(torch.isfinite(norms).all()):
                raise NonFiniteError(
                    f"a finite gradient of the state was expected at boundary {index}, but it holds NaN or infinity: "
                    "clipping would hide it behind a number that nothing computed",
                    fix="shorten k2, or clip at more boundaries: a smaller k1",
                )
            factors = (self.max_norm / norms).clamp(max=1.0)
            if bool((factors == 1.0).all()):
                return cotangent
            known = [dim for leaf, dim in zip(tensors(start), dims or (), strict=False) if leaf.requires_grad]
            return [
                None
                if gradient is None
                else gradient * _shaped(factors, gradient, known[at] if len(norms) > 1 else None)
                for at, gradient in enumerate(cotangent)
            ]

        return clip


def rule_at(boundary: ClipBoundary | None, dims: LaneDims | None) -> Boundary:
    """Return what becomes of the gradient at the boundaries of a state with these lane dimensions; None: it passes."""
    return pass_on if boundary is None else boundary.at(dims)


def parse_boundary(text: str) -> ClipBoundary:
    """Return what a configuration spells, `"ClipBoundary(1.0)"`.

    Raises:
        ConfigError: it is no such call with a plain number.

    Example:
        >>> parse_boundary("ClipBoundary(0.5)")
        ClipBoundary(max_norm=0.5)
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "ClipBoundary":
            raise ValueError
        given = [ast.literal_eval(each) for each in call.args]
        return ClipBoundary(*given, **{str(each.arg): ast.literal_eval(each.value) for each in call.keywords})
    except (SyntaxError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"ClipBoundary with a number was expected, but {text!r} came", fix='boundary = "ClipBoundary(1.0)"'
        ) from error


def _shaped(factors: Tensor, gradient: Tensor, dim: int | None) -> Tensor:
    """Return the factors of the lanes, so that they multiply a gradient with the lanes in dimension `dim`."""
    real = gradient.real.dtype if gradient.is_complex() else gradient.dtype
    if dim is None:
        return factors.to(real)[0]
    shape = [1] * gradient.ndim
    shape[dim] = -1
    return factors.to(real).view(shape)
