"""Truncated evolution strategies: perturbed weights, over one window.

Letters: N particles, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tbptt.estimators.perturbation import Course, Perturbation

__all__ = ["TruncatedES"]


@final
@dataclass(frozen=True)
class TruncatedES(Perturbation):
    """Run each window with perturbed weights, from the state that the weights themselves have led to.

    g = 1 / (N σ²) Σ_i ε_i L(s, θ + ε_i), with ε_i in pairs of opposite sign, drawn anew for each window; then the state
    goes on with θ. No graph and no derivative, so the model may be chaotic, stepped or a black box; and as blind as
    `TBPTT(k1, k1)` to what lies before the window. Not recommended but as the cheapest of its kind and the one to
    compare with: where dependencies are longer than k1 take `PES` or `ESSingle`, and where there is a gradient that can
    be used take `TBPTT`, which costs three forward passes and not N.

    Args:
        k1: steps of a window, at least 1.
        num_particles: N, even; half of them are independent.
        sigma: standard deviation of the noise, in the unit of the weights. What is estimated is the gradient of the
            loss smoothed to that width; too small, and rounding of the losses is divided by it.
        seed: of the noise, which depends on it and on the number of windows only.
        vectorize: "auto": all particles side by side (torch.func.vmap) where model and loss allow for it, else one
            after another, as the metric `vectorized` says; True: refuse what does not; False: one after another.
        keep_outputs: whether estimates hold the window's outputs, those of the weights as they are.

    Raises:
        ConfigError: a setting that cannot be meant.
        CapabilityError: `vectorize=True` and a model that cannot be.

    Exactness: biased as `TBPTT(k1, k1)` is; its mean is the gradient of the smoothed window loss, and of the loss
        itself where that is quadratic. Relative variance 2 (P + 1) / N where it is linear
        (tests/estimators/test_perturbation.py).
        The loss reported is of the weights as they are; `particle_loss` is the smoothed one.
    Cost: N + 1 forward passes, no graph; N P / 2 numbers drawn on the CPU; memory of N copies of weights, states and
        losses where vectorised, else of N / 2 of weights.
    Reference: Metz et al. (2019), arXiv:1810.10180; antithetic as in Salimans et al. (2017), arXiv:1703.03864.

    Example:
        >>> import tbptt
        >>> estimator = TruncatedES(k1=8, num_particles=20, sigma=0.1)
        >>> model, stream = tbptt.models.InfluenceBalancingModel(), tbptt.streams.InfluenceBalancing()
        >>> loss = lambda outputs, targets: 0.5 * (outputs - targets) ** 2
        >>> estimate, carry = estimator.estimate(model, loss, estimator.init(model, 1), stream.read(8))
        >>> sorted(estimate.metrics)
        ['particle_loss', 'vectorized']
    """

    kind: ClassVar[str] = "biased"
    own_states: ClassVar[bool] = False

    @classmethod
    def examples(cls) -> tuple[TruncatedES, ...]:
        """Return one setting of each way to run; see `Estimator.examples`."""
        return cls(3, 6, 0.1), cls(3, 2, 0.1, vectorize=False)

    def renews(self, course: Course, first: bool) -> bool:
        """Return whether a window begins."""
        del course  # no window looks back
        return first
