"""Evolution strategies with one noise for a whole sequence.

Letters: B lanes, N particles, P parameters, G groups of lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tbptt.estimators.perturbation import Course, Perturbation
from tbptt.length.base import check_whole

__all__ = ["ESSingle"]


@final
@dataclass(frozen=True)
class ESSingle(Perturbation):
    """Let each particle keep its noise, and its own state, for as long as the sequence lasts.

    g = 1 / (N σ²) Σ_i ε_i L_i with ε_i drawn once for a sequence, in pairs of opposite sign. Without derivatives and
    without truncation, and with a variance that does not grow with the number of windows, as that of `PES` does: for
    losses that a gradient tells nothing of, chaotic or stepped ones, over many windows. Where a gradient can be used,
    `TBPTT` and `RTRL` are cheaper by far: the noise goes with P / N.

    New noise is drawn at the step where a sequence begins and no lane is left with one that began before the noise in
    use was drawn: at each reset of all lanes, also in mid-window. Where lanes are reset one by one, those in the middle
    of a sequence then go on with the new noise, and are weighed with the sum of both.

    An endless stream has no such step, and all of training would then move within the N / 2 directions of one draw:
    give it `refresh`, or have no more parameters than that. The metric `noise_age` counts the updates with one noise.

    Args:
        k1: steps of a window, at least 1.
        num_particles: N, even; half of them are independent.
        sigma: standard deviation of the noise, in the unit of the weights. The width that losses are smoothed to; too
            small, and rounding of the losses is divided by it.
        seed: of the noise, which depends on it and on the number of draws only.
        vectorize: "auto": all particles side by side (torch.func.vmap) where model and loss allow for it, else one
            after another, as the metric `vectorized` says; True: refuse what does not; False: one after another.
        keep_outputs: whether estimates hold the window's outputs, those of the weights as they are.
        refresh: updates after which new noise is drawn though no sequence has ended, and added to what was met before;
            1 is `PES`. None: never.

    Raises:
        ConfigError: a setting that cannot be meant.
        CapabilityError: `vectorize=True` and a model that cannot be; or more than 2**28 numbers G N P / 2 to keep,
            where lanes are reset at different times.

    Exactness: unbiased, at weights that stay, for the loss smoothed over the noise of every sequence, and for the loss
        itself where it is quadratic in the weights, with relative variance 2 (P + 1) / N where it is linear; weights
        that move leave particles that have seen other ones (tests/estimators/test_perturbation.py). The loss reported,
        and the state of the carry, are of the weights as they are; `particle_loss` is the smoothed one.
    Cost: N + 1 forward passes, no graph; N P / 2 numbers drawn on the CPU for each draw; memory of N copies of weights
        and states, N P / 2 for the noise, and as much for each of the G groups of lanes that have met more than one.
    Reference: Vicol, Kolter & Swersky (2023), arXiv:2304.11153; as noise-reuse ES, Li et al. (2023), arXiv:2304.12180;
        `refresh` is their GPES with K = refresh * k1. Lanes that are reset one by one are ours.

    Example:
        >>> import tbptt
        >>> estimator = ESSingle(k1=10, num_particles=1000, sigma=0.1)
        >>> model, stream = tbptt.models.InfluenceBalancingModel(), tbptt.streams.InfluenceBalancing(steps=100)
        >>> loss = lambda outputs, targets: 0.5 * (outputs - targets) ** 2
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(10):
        ...     estimate, carry = estimator.estimate(model, loss, carry, window)
        >>> estimate.gradients["theta"].item() > 0  # downhill is where lags of more than 40 steps say
        True
    """

    refresh: int | None = None

    kind: ClassVar[str] = "unbiased"
    own_states: ClassVar[bool] = True

    @classmethod
    def examples(cls) -> tuple[ESSingle, ...]:
        """Return one setting of each way to run, and one that draws anew; see `Estimator.examples`."""
        return cls(3, 6, 0.1), cls(3, 2, 0.1, vectorize=False), cls(3, 6, 0.1, refresh=2)

    def __post_init__(self) -> None:
        Perturbation.__post_init__(self)
        if self.refresh is not None:
            check_whole(self, "refresh", "ESSingle(k1=16, num_particles=100, sigma=0.1, refresh=64), or None for never")

    def renews(self, course: Course, first: bool) -> bool:
        """Return whether no sequence of the noise's time is left, or the noise has done its time."""
        return course.is_over or (first and self.refresh is not None and course.age >= self.refresh)
