"""The mechanism of the evolution strategies: weights perturbed at random, and which noise a loss has met.

A particle is a copy of the model whose weights are off by noise. The gradient of a loss is the mean, over particles,
of the loss times the noise that has moved it, over the noise's variance. The methods differ in when new noise is
drawn, and in whether a particle goes on with a state of its own.

Letters: T time, B lanes, M pairs, N = 2 M particles, P parameters, G groups of lanes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.gradients import Gradients
from tbptt.estimators.particles import Noise, Particles, States, draw_noise
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Pulled
from tbptt.length.base import check_seed, check_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable, trainable_parameters
from tbptt.tree import Tree, all_finite, detach
from tbptt.window import Window

__all__ = ["Course", "ParticleCarry", "Perturbation"]

MOST_SUMMED = 2**28
"""The most numbers, G M P, that may be kept for lanes whose sequences began at different times."""


@dataclass(frozen=True, eq=False)
class Course:
    """Which noise the lanes' present sequences have been run with.

    A sequence that has met several is weighed with their sum, as each of them has moved its losses.

    Args:
        begun: for each lane, the number of the noise that its sequence began with; -1 where none has begun.
        number: of the noise in use; -1 before the first.
        age: the updates that have been made with it.
        about: the settings and the weights that it was drawn for.
        sums: by such a number, the noises from that one to the one in use, added up. The one in use stands for
            itself and is not among them. Leaves (M, ...).
        noise: the one in use; None where it has to be drawn again.
    """

    begun: tuple[int, ...]
    number: int = -1
    age: int = 0
    about: str = ""
    sums: dict[int, Noise] = field(default_factory=dict[int, Noise])
    noise: Noise | None = None

    @property
    def in_flight(self) -> bool:
        """Whether any sequence has begun."""
        return any(number >= 0 for number in self.begun)

    @property
    def is_over(self) -> bool:
        """Whether a sequence is about to begin, and none is left that began before the noise in use was drawn."""
        return -1 in self.begun and set(self.begun) <= {-1, self.number}

    def ended(self, lanes: list[bool]) -> Course:
        """Return the course after the sequences of some lanes have ended."""
        begun = tuple(-1 if end else number for number, end in zip(self.begun, lanes, strict=True))
        return replace(self, begun=begun, sums={each: self.sums[each] for each in self.sums if each in begun})

    def renewed(self, noise: Noise) -> Course:
        """Return the course with new noise in use, which all sequences under way will have met as well.

        Raises:
            CapabilityError: more sums of noise would have to be kept than `MOST_SUMMED` allows for.
        """
        older = sorted({number for number in self.begun if number >= 0})
        size = sum(each.numel() for each in noise.values())
        if len(older) > 1 and len(older) * size > MOST_SUMMED:
            raise CapabilityError(
                f"at most {MOST_SUMMED} numbers were expected to be kept for lanes whose sequences began at different "
                f"updates, but {len(older)} groups of such lanes times {size} numbers of noise (pairs times "
                "parameters) are more: each group's losses are weighed with noise of its own",
                fix="fewer particles, or reset all lanes at the same step",
            )
        sums: dict[int, Noise] = {}
        for number in older:
            before = self.sums.get(number, self.noise)
            assert before is not None
            sums[number] = {name: before[name] + each for name, each in noise.items()}
        return replace(self, number=self.number + 1, age=0, sums=sums, noise=noise)

    def started(self) -> Course:
        """Return the course with a sequence under way in every lane."""
        return replace(self, begun=tuple(self.number if number < 0 else number for number in self.begun))

    def groups(self) -> list[tuple[Noise, list[int]]]:
        """Return the lanes that have met the same noise, with the sum of it."""
        lanes: dict[int, list[int]] = {}
        for lane, number in enumerate(self.begun):
            lanes.setdefault(number, []).append(lane)
        assert self.noise is not None
        return [(self.sums.get(number, self.noise), members) for number, members in lanes.items()]

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and tensors; the noise in use is left out, as its number says what it is."""
        names = ("begun", "number", "age", "about", "sums")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Course:
        """Return what `state_dict` described."""
        return Course(tuple(state["begun"]), state["number"], state["age"], state["about"], dict(state["sums"]))


@dataclass(eq=False)
class ParticleCarry:
    """What an evolution strategy carries from window to window.

    Attributes:
        mean: of the run with the weights as they are, which goes along.
        course: the noise that the sequences have met.
        particles: their states; empty where they start each window together.
        vectorized: whether they run side by side; None before it has been found out.
    """

    mean: ChainCarry
    course: Course
    particles: States = ()
    vectorized: bool | None = None

    @property
    def lanes(self) -> int:
        """The number of sequences side by side."""
        return self.mean.lanes

    @property
    def state(self) -> Tree | None:
        """The state of the model with the weights as they are, detached; None before the first window."""
        return self.mean.state

    @property
    def finite(self) -> bool:
        """Whether the model's state and the particles' are."""
        return self.mean.finite and all_finite(self.particles)

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors."""
        return {
            "mean": self.mean.state_dict(),
            "course": self.course.state_dict(),
            "particles": list(self.particles),
            "vectorized": self.vectorized,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: it was saved with another number of lanes.
        """
        self.mean.load_state_dict(state["mean"])
        self.course = Course.from_state_dict(state["course"])
        self.particles, self.vectorized = tuple(state["particles"]), state["vectorized"]


@dataclass(frozen=True)
class Perturbation(Estimator):
    """What `TruncatedES`, `PES` and `ESSingle` have in common; see there.

    The gradient of a parameter that no loss depends on is noise as well, and 0 in the mean only. A loss's own
    parameters are perturbed with the model's: all gradients are those of the same smoothed loss. `Estimate.lookback` is
    0, as nothing is back-propagated.

    Raises:
        ConfigError: a setting that cannot be meant.
    """

    k1: int
    num_particles: int
    sigma: float
    seed: int = 0
    vectorize: bool | Literal["auto"] = "auto"
    keep_outputs: bool = False

    own_states: ClassVar[bool]
    """Whether each particle goes on from window to window with a state of its own."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        fix = f"{name}(k1=16, num_particles=100, sigma=0.1)"
        check_whole(self, "k1", fix)
        check_whole(self, "num_particles", fix)
        if self.num_particles % 2:
            raise ConfigError(
                f"num_particles of {name} was expected to be even, but is {self.num_particles}: particles come in "
                "pairs, off the weights by the same noise either way",
                fix=f"num_particles={self.num_particles + 1}",
            )
        sigma, how = cast("tuple[object, object]", (self.sigma, self.vectorize))
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ConfigError(
                f"sigma of {name} was expected to be a positive, finite number, but is {sigma!r}: it is the standard "
                "deviation of the noise, and differences are divided by it",
                fix=fix,
            )
        check_seed(self, f"{fix[:-1]}, seed=0)")
        if how not in ("auto", True, False) or not isinstance(how, bool | str):
            raise ConfigError(
                f'vectorize was expected to be "auto", True or False, but is {how!r}', fix='vectorize="auto"'
            )

    @abstractmethod
    def renews(self, course: Course, first: bool) -> bool:
        """Return whether new noise is drawn now.

        Args:
            course: what the sequences have met so far; those that begin now have begun with nothing yet.
            first: whether this is the first step of a window; else a lane is reset here.
        """

    def next_steps(self, carry: ParticleCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def init(self, model: nn.Module, lanes: int) -> ParticleCarry:
        """Return the carry before the first window; see `Estimator.init`.

        Raises:
            ConfigError: a sigma that is lost in the rounding of a weight.
        """
        check_trainable(model)
        for name, value in trainable_parameters(model).items():
            largest = float(value.detach().abs().max()) if value.numel() else 0.0
            if self.sigma < torch.finfo(value.dtype).eps * largest:
                raise ConfigError(
                    f"a sigma that can be added to a weight of {largest:.3g} in {value.dtype} was expected, but it is "
                    f"{self.sigma}: {name} would be rounded back, and its gradient would be nothing but rounding",
                    fix="a larger sigma, or model.double()",
                )
        return ParticleCarry(ChainCarry(lanes, unit=unit_of(model, k1=self.k1)), Course((-1,) * lanes))

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return nothing: how far a loss reaches cannot be seen in a gradient made of noise."""
        del steps  # however many
        return ()

    def estimate(
        self, model: nn.Module, loss: Loss, carry: ParticleCarry, window: Window
    ) -> tuple[Estimate, ParticleCarry]:
        """Run the model and its particles over `window`, and estimate the gradient of its losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state), or that cannot be vectorised and must be.
            ConfigError: the carry belongs to other settings or weights.
        """
        check_window(window, carry.mean, self.k1, f"stream.windows({self.k1}), or k1={window.steps}")
        with torch.no_grad():
            carry = replace(carry, mean=carry.mean.with_dims(model, window))
            flight = _Flight(self, model, StepLoss.of(loss), carry, window)
            for begin, end in pairwise(sorted({0, *window.resets, window.steps})):
                flight.over(begin, end)
            return flight.estimate(), flight.carry_on()


class _Flight:
    """One call of `estimate`: the model and its particles, from reset to reset."""

    def __init__(
        self, setting: Perturbation, model: nn.Module, loss: StepLoss, carry: ParticleCarry, window: Window
    ) -> None:
        self.setting, self.carry, self.window = setting, carry, window
        self.run = Run(model, loss, carry.mean, keep_outputs=setting.keep_outputs)
        self.parameters = self.run.trained
        self.particles = Particles(model, loss, self.parameters, carry.mean.dims)
        self.course = self._taken_up(carry.course)
        self.state, self.own = carry.state, carry.particles or None
        self.vectorized = carry.vectorized if setting.vectorize in ("auto", carry.vectorized) else None
        self.sums: Gradients = [None] * len(self.parameters)
        self.losses: Tensor | float = 0.0

    def _taken_up(self, course: Course) -> Course:
        """Return the course as the last window left it, with its noise."""
        setting = self.setting
        names = ",".join(self.parameters)
        about = f"{setting.num_particles} {setting.sigma} {setting.seed} {setting.vectorize} {names}"
        if not setting.own_states:
            course = course.ended([True] * len(course.begun))
        if not course.in_flight:
            return replace(course, about=about)
        if course.about != about:
            raise ConfigError(
                f"the particles were expected to be those of the carry, {course.about!r}, but are {about!r} (number, "
                "sigma, seed, vectorize, parameters that require a gradient): the noise that their states have met "
                "could not be told again",
                fix="carry = estimator.init(model, lanes) when settings or trained parameters have changed",
            )
        return course if course.noise is not None else replace(course, noise=self._drawn(course.number))

    def _drawn(self, number: int) -> Noise:
        setting = self.setting
        return draw_noise(self.parameters, setting.num_particles // 2, setting.sigma, setting.seed, number)

    def over(self, begin: int, end: int) -> None:
        """Run over the steps from one place where a lane may be reset to the next."""
        piece, course = self.window[begin:end], self.course
        if begin in self.window.resets:
            course = course.ended(piece.reset[0].tolist())
        if self.setting.renews(course, begin == 0):
            course = course.renewed(self._drawn(course.number + 1))
        self.course = course = course.started()
        assert course.noise is not None
        if self.vectorized is None:
            self.vectorized = self._can_be_vectorized(course.noise, piece)
        losses, self.own = self.particles.run(course.noise, piece, self.own, self.state, vectorized=self.vectorized)
        # after the particles, which leave no trace: so what it draws and writes is what the model alone would
        self.state = detach(self.run.report(piece, self.state))
        self.losses = self.losses + losses.sum()
        pairs = self.setting.num_particles // 2
        odd = (losses[:pairs] - losses[pairs:]).sum(1)  # (M, B)
        groups = course.groups()
        for noise, lanes in groups:
            by_pair = (odd if len(groups) == 1 else odd[:, lanes]).sum(1)
            for index, each in enumerate(noise.values()):
                part = torch.tensordot(by_pair.to(each.dtype), each, 1)
                sofar = self.sums[index]
                self.sums[index] = part if sofar is None else sofar + part

    def _can_be_vectorized(self, noise: Noise, piece: Window) -> bool:
        if not self.setting.vectorize:
            return False
        why = self.particles.obstacle(noise, piece, self.state)
        if why and self.setting.vectorize is True:
            raise CapabilityError(
                f"a model and a loss that torch.func.vmap can run were expected for vectorize=True, but {why}",
                fix='vectorize="auto", to run the particles one after another; tbptt.scan(cell) of a cell written in '
                "plain tensor operations can be vectorised, nn.LSTM and nn.GRU cannot",
            )
        return not why

    def estimate(self) -> Estimate:
        """Return what came out of all that was run."""
        setting, counted = self.setting, self.run.counted
        metrics = {"vectorized": float(bool(self.vectorized))}
        if setting.own_states:
            metrics["noises"] = float(self.course.number - min(self.course.begun) + 1)  # in the longest sum
            metrics["noise_age"] = float(self.course.age + 1)
        if not counted:  # a mean of nothing: no gradient, rather than 0 / 0
            return self.run.estimate(Pulled([None] * len(self.sums), []), counted, 0, metrics=metrics)
        metrics["particle_loss"] = float(self.losses) / (setting.num_particles * counted.weight)
        scale = 1 / (setting.num_particles * setting.sigma**2 * counted.weight)
        gradients: Gradients = [
            None if each is None else (each * scale).to(parameter.dtype)
            for each, parameter in zip(self.sums, self.run.asked, strict=True)
        ]
        return self.run.estimate(Pulled(gradients, []), counted, 0, metrics=metrics)

    def carry_on(self) -> ParticleCarry:
        """Return the carry after the window."""
        assert self.own is not None
        mean = replace(self.carry.mean, state=self.state)
        course = replace(self.course, age=self.course.age + 1)
        if self.setting.own_states:
            return ParticleCarry(mean, course, self.own, self.vectorized)
        return ParticleCarry(mean, replace(course, noise=None), (), self.vectorized)  # neither is needed again
