"""Clipping each unit's gradient by the size of that unit's weights."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import LOSS_PREFIX, Estimate
from tbptt.estimators.gradients import numbers_of, with_numbers
from tbptt.guards.base import Guard
from tbptt.guards.norms import flag, positive, total_norm, with_norm
from tbptt.model import named_parameters

__all__ = ["AdaptiveClip"]


class AdaptiveClip(Guard):
    """Scale the gradient of each unit, so that its norm is at most `clipping` times that of the unit's weights.

    Adaptive gradient clipping: G_i <- G_i min(1, clipping max(||W_i||, epsilon) / ||G_i||), row by row. A bound on the
    relative change of weights, which needs no guess of a norm and treats layers of different size alike. With
    optimizers that normalise by themselves, such as Adam, it does little.

    A unit is a row of a matrix: all but the first dimension of a parameter, as torch lays out the weights of linear,
    recurrent and convolutional layers and of embeddings; in recurrent ones, of each gate. What has but one dimension of
    more than one element - biases, gains - is one unit as a whole, as in the reference code. Biases that are zero
    get `clipping * epsilon` at most. The paper leaves a classifier's last layer out; here all parameters are clipped.

    It reads the weights as they are, which the trainer shows it; in a loop of your own, call `begin(model)` first.
    Adds the metrics `gradient_norm`, before any clipping, and `clipped_share`, of all elements in units scaled.

    Args:
        clipping: the largest ratio of norms that passes unchanged, above 0. The paper's are from 0.01 for batches of
            4096 to 0.16 for small ones.
        epsilon: the least that a unit's weights count as, above 0.
        allow_bias: whether it may be used with an unbiased estimator, whose promise it breaks.

    Raises:
        ConfigError: a setting that is not a positive, finite number; or no model was shown.
        NonFiniteError: when called with a gradient that is not finite; no scale could mend it.

    Exactness: biased wherever it clips; the equation above, row by row (tests/guards/test_adaptive.py).
    Cost: O(P), one more copy of the gradients of parameters that it clips; a few operations for each parameter.
    Reference: Brock et al. (2021), equation 3, arXiv:2102.06171, and its code for what a unit is.

    Example:
        >>> import tbptt
        >>> model, stream = nn.GRU(1, 1), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 1), lanes=2)
        >>> sgd, guards = torch.optim.SGD(model.parameters(), lr=0.1), [tbptt.NonFinite(), AdaptiveClip(0.01)]
        >>> tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(8, 8), stream, guards=guards).run(passes=2).updates
        10
    """

    changes_mean: ClassVar[bool] = True

    def __init__(self, clipping: float = 0.01, epsilon: float = 1e-3, *, allow_bias: bool = False) -> None:
        why = "every gradient would be lost or none ever clipped"
        self.clipping = positive("clipping", clipping, "AdaptiveClip", why, 0.01)
        self.epsilon = positive("epsilon", epsilon, "AdaptiveClip", "weights that are zero could never move", 1e-3)
        self.allow_bias = flag("allow_bias", allow_bias, "AdaptiveClip")
        self._model: weakref.ref[nn.Module] | None = None  # weak, so that a copy of the guard is none of the model
        self._loss: weakref.ref[nn.Module] | None = None

    def begin(self, model: nn.Module, loss: nn.Module | None = None) -> None:
        """Look at this model's weights from now on, and at those of this loss."""
        self._model, self._loss = weakref.ref(model), None if loss is None else weakref.ref(loss)

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with the gradients of some units scaled."""
        gradients = estimate.all_gradients
        if not estimate.num_injected or not gradients:
            return estimate
        weights = self._weights(gradients)
        norm = total_norm(gradients)
        wide = norm.dtype == torch.float64  # then squares may overflow the gradients' own dtype
        factors = {name: self._factors(each, weights[name].detach(), wide) for name, each in gradients.items()}
        counts = torch.stack([(each < 1.0).sum().to(norm.device) for each in factors.values()]).tolist()  # one transfer
        clipped: dict[str, Tensor] = {}
        num_clipped = 0
        for (name, gradient), count in zip(gradients.items(), counts, strict=True):
            numbers = numbers_of(gradient)
            scaled = (numbers * factors[name]).to(gradient.dtype) if count else numbers
            clipped[name] = with_numbers(gradient, scaled) if count else gradient
            num_clipped += count * (numbers.numel() // max(1, factors[name].numel()))
        share = num_clipped / max(1, sum(numbers_of(each).numel() for each in gradients.values()))
        return estimate.with_gradients(clipped, **with_norm(estimate, norm, clipped_share=share))

    def _weights(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        model = None if self._model is None else self._model()
        loss = None if self._loss is None else self._loss()
        weights = {} if model is None else named_parameters(model)
        if weights and loss is not None:
            weights |= {LOSS_PREFIX + name: each for name, each in named_parameters(loss).items()}
        if not weights:
            raise ConfigError(
                "a model was expected to be shown before the first estimate, but none was, or it is gone: gradients "
                "are clipped by the size of its weights",
                fix="adaptive_clip.begin(model)",
            )
        unknown = [name for name in gradients if name not in weights]
        if unknown:
            raise ConfigError(
                f"gradients of the model that was shown were expected, but that has no parameter {unknown[0]!r}: they "
                "would be clipped by the size of other weights",
                fix="adaptive_clip.begin(model) with the model that is trained",
            )
        return weights

    def _factors(self, gradient: Tensor, weight: Tensor, wide: bool) -> Tensor:
        """Return what to multiply each unit's gradient with; of a shape that broadcasts to the gradient's."""
        if gradient.is_sparse:  # of the rows that have one
            gradient = gradient.coalesce()
            weight, gradient = weight[tuple(gradient.indices())], gradient.values()
        most = self.clipping * _unit_norms(weight, wide).clamp(min=self.epsilon)
        found = _unit_norms(gradient, wide)
        return torch.where(found > most, most / found, 1.0)


def _unit_norms(values: Tensor, wide: bool) -> Tensor:
    """Return the norm of each unit; of the shape of `values`, with 1 for the dimensions that a unit spans."""
    if wide:
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
    if values.ndim == 0:
        return values.abs()
    is_matrix = sum(size > 1 for size in values.shape) > 1
    return torch.linalg.vector_norm(values, dim=tuple(range(1 if is_matrix else 0, values.ndim)), keepdim=True)
