"""Persistent evolution strategies: new noise for each window, and none of it forgotten.

Letters: B lanes, N particles, P parameters, G groups of lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tbptt.estimators.perturbation import Course, Perturbation

__all__ = ["PES"]


@final
@dataclass(frozen=True)
class PES(Perturbation):
    """Let each particle go on with its own state, and weigh its losses with all the noise it has met.

    ξ_i ← ξ_i + ε_i with ε_i drawn anew for each window, in pairs of opposite sign; g = 1 / (N σ²) Σ_i ξ_i L_i. Without
    derivatives and without truncation: for losses that a gradient tells nothing of, chaotic or stepped ones, with
    dependencies longer than a window. For sequences of few windows; its variance grows with their number, where
    `ESSingle` stays. Where a gradient can be used, `TBPTT` and `RTRL` are cheaper by far: the noise goes with P / N.

    At a reset a lane's sum ξ starts anew with the noise of the window, also in mid-window, also of a single lane.

    Args:
        k1: steps of a window, at least 1; the weights of a particle change so often.
        num_particles: N, even; half of them are independent.
        sigma: standard deviation of the noise of one window, in the unit of the weights. The width that losses are
            smoothed to; too small, and rounding of the losses is divided by it.
        seed: of the noise, which depends on it and on the number of windows only.
        vectorize: "auto": all particles side by side (torch.func.vmap) where model and loss allow for it, else one
            after another, as the metric `vectorized` says; True: refuse what does not; False: one after another.
        keep_outputs: whether estimates hold the window's outputs, those of the weights as they are.

    Raises:
        ConfigError: a setting that cannot be meant.
        CapabilityError: `vectorize=True` and a model that cannot be; or more than 2**28 numbers G N P / 2 to keep,
            where lanes are reset at different times.

    Exactness: unbiased, at weights that stay, for the loss smoothed over the noise of every window, and for the loss
        itself where it is quadratic in the weights; weights that move leave particles that have seen other ones
        (tests/estimators/test_perturbation.py). The loss reported, and the state of the carry, are of the weights as
        they are; `particle_loss` is the smoothed one.
    Cost: N + 1 forward passes, no graph; N P / 2 numbers drawn on the CPU; memory of N copies of weights and states,
        and (1 + G) N P / 2 for the noise, G the number of different windows that the lanes' sequences began in: 1
        where all are reset together, at most B.
    Reference: Vicol, Metz & Sohl-Dickstein (2021), algorithm 2, arXiv:2112.13835; a sum for each lane is ours.

    Example:
        >>> import tbptt
        >>> estimator = PES(k1=4, num_particles=20, sigma=0.1)
        >>> model, stream = tbptt.models.InfluenceBalancingModel(), tbptt.streams.InfluenceBalancing()
        >>> loss = lambda outputs, targets: 0.5 * (outputs - targets) ** 2
        >>> carry = estimator.init(model, stream.lanes)
        >>> for _ in range(3):
        ...     estimate, carry = estimator.estimate(model, loss, carry, stream.read(4))
        >>> estimate.metrics["noises"]  # that each particle has met by now, one in each window
        3.0
    """

    kind: ClassVar[str] = "unbiased"
    own_states: ClassVar[bool] = True

    @classmethod
    def examples(cls) -> tuple[PES, ...]:
        """Return one setting of each way to run; see `Estimator.examples`."""
        return cls(3, 6, 0.1), cls(3, 2, 0.1, vectorize=False)

    def renews(self, course: Course, first: bool) -> bool:
        """Return whether a window begins."""
        del course  # what was met before is kept in its sums
        return first
