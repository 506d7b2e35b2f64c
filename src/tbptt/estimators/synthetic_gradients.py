"""Synthetic gradients: what comes after the window is predicted, not cut off.

Letters: T time, B lanes, S numbers of a lane's state, P parameters of the predictor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.gradients import Gradients, add
from tbptt.estimators.predictor import (
    PREFIX,
    Predictor,
    Spelled,
    attach,
    attached,
    check_spelled,
)
from tbptt.estimators.predictor_traces import check_traced, learned, learned_with, state_jacobian, traced
from tbptt.estimators.rows import cotangent_of, rows_of
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Pulled, Segment, Step, walk_back
from tbptt.estimators.synthetic_carry import SyntheticCarry
from tbptt.length.base import check_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable, named_parameters
from tbptt.tree import Tree, detach
from tbptt.window import Window

__all__ = ["SyntheticGradients"]


@final
@dataclass(frozen=True)
class SyntheticGradients(Estimator):
    """Run windows of k1 steps, and predict the gradient that would arrive at their end from all that comes after.

    A small module g sees the state s at the end of a window, each lane alone, and says what the losses to come will
    send back: g(s) ~ E sum_j gamma^(j-1) dl_j/ds over the steps j = 1, 2, ... after it, of the lane's summed losses,
    so that it depends neither on k1 nor on the number of lanes. The window's gradient is that of its own losses and of
    g(s) s together, over the number of its targets. g learns from what arrives one window later at the state that it
    has spoken of: the window's own losses, and g at its end (bootstrapping). With lambda_ > 0 that error also corrects
    the former predictions that led to this state, through traces: e <- gamma^k1 lambda D e + dg/dPsi, with D the
    window's state Jacobian. At first g is zero, and this is `TBPTT(k1, k1)`.

    Choose it where dependencies are longer than any look-back that can be afforded, and the state says what they will
    be about: what g cannot tell from the state, it cannot predict. Not recommended where `TBPTT` with k2 = 4 k1 is
    affordable: that costs less than traces do, is not learned, and does not err. Start with gamma=1; where
    `predicted_norm` grows without end, as g feeds on itself, take 0.9 to 0.98.

    g is a submodule of the model, named `synthetic_gradients`: saved, moved and trained with it. Attach it before the
    optimizer is made, and give it a learning rate of its own.

    Args:
        k1: steps of a window, at least 1.
        predictor: "linear"; a number of hidden units, for one hidden layer; or "own", a module of yours, given to
            `attach`. The first two predict zero at first.
        lambda_: from 0, learn from the next window and what is predicted at its end, to 1, from all windows to come:
            without the error of g at the next boundary, at the cost of traces.
        gamma: what a loss is worth less for each step that it lies ahead of a boundary; above 0, at most 1.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased by what g gets wrong; exact with a g that is right, and then for losses at any distance
        (tests/estimators/test_synthetic_gradients.py). With lambda_ = gamma = 1 what g learns from is the true
        gradient, at weights that stay. A lane that starts anew inside a window gets nothing predicted across that
        step, and its trace ends there. At the end of a window nobody knows yet that a lane starts anew in the next
        step: what was predicted for it was too much, and g learns 0 for such a state, so that it comes to expect ends
        as often as they come. In a window without a target nothing is learned, but what it would have said is kept,
        and added to the next one with a target: no weight moves in between.
    Cost: k1 steps forward and back, and g, for lambda_ = 0 and gamma = 1; gamma < 1: one more backward pass. Traces: S
        more backward passes, S numbers being a lane's state, and B S P numbers of memory, P those of g: S (S + 1) if it
        is linear, about 2 M S with M hidden units. Refused above 2^28.
    Reference: Jaderberg et al. (2017), arXiv:1608.05343; Czarnecki et al. (2017), arXiv:1703.00522; Pemberton & Costa
        (2024), BP(lambda), arXiv:2401.07044, whose step is a window here: gamma counts steps, lambda_ windows.

    Example:
        >>> import tbptt
        >>> stream = tbptt.streams.DelayedRecall(3, lanes=8)
        >>> model = tbptt.SequenceModel(4, 4, hidden=8, embedding=4, core="gru")
        >>> estimator = SyntheticGradients(k1=2)
        >>> estimator.attach(model, stream.read(2).inputs)
        >>> optimizer = torch.optim.Adam(estimator.parameter_groups(model, lr=5e-3, predictor_lr=1e-2))
        >>> carry = estimator.init(model, stream.lanes)
        >>> for _ in range(3):
        ...     estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, stream.read(2))
        ...     estimate.apply(model)
        ...     optimizer.step()
        >>> sorted(estimate.metrics)
        ['arrived_norm', 'bootstrap_error', 'predicted_norm']
    """

    k1: int
    predictor: Spelled = "linear"
    lambda_: float = 0.0
    gamma: float = 1.0
    keep_outputs: bool = False

    kind: ClassVar[str] = "biased"

    @classmethod
    def examples(cls) -> tuple[SyntheticGradients, ...]:
        """Return settings with and without traces, discount and hidden units; see `Estimator.examples`."""
        return cls(4), cls(3, lambda_=1.0), cls(3, 5, lambda_=0.5, gamma=0.9), cls(2, gamma=0.9)

    def __post_init__(self) -> None:
        check_whole(self, "k1", "SyntheticGradients(k1=10)")
        check_spelled(self.predictor)
        if not isinstance(self.predictor, str):
            object.__setattr__(self, "predictor", int(self.predictor))  # numpy's whole numbers become Python's
        for name, least, why in (
            ("lambda_", True, "it is how much of the next prediction's error goes on to those before it"),
            ("gamma", False, "it is what a loss is worth less for each step that it lies ahead"),
        ):
            value: Any = getattr(self, name)  # whatever a caller without a type checker gave
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not known or not (0 <= value <= 1 and (least or value > 0)):
                raise ConfigError(
                    f"{name} was expected to be a number from 0{'' if least else ', not 0 itself,'} to 1, but is "
                    f"{value!r}: {why}",
                    fix=f"SyntheticGradients(k1={self.k1}, {name}=1.0)",
                )
            object.__setattr__(self, name, float(value))

    def prepare(self, model: nn.Module, inputs: Tree) -> None:
        """Give the model a fresh predictor; one of this kind that is there already stays as it is.

        Args:
            model: the model. Its outputs, the names of its other parameters and torch's random numbers stay.
            inputs: an example, leaves (T, B, ...).

        Raises:
            ConfigError: the model has another one, or something else under its name; or one of your own is missing.
            CapabilityError: a state whose lanes cannot be told apart, or a model that runs its submodules by itself.
        """
        found = attached(model)
        if found is not None:
            self._check_attached(found)
            return
        if self.predictor == "own":
            raise ConfigError(
                'a predictor of your own was expected in the model, as predictor="own" says, but there is none',
                fix="estimator.attach(model, inputs, module), before the optimizer is made",
            )
        attach(model, inputs, self.predictor, None)

    def attach(self, model: nn.Module, inputs: Tree, module: nn.Module | None = None) -> None:
        """Give the model a fresh predictor; before the optimizer is made.

        Args:
            model: the model. Its outputs, the names of its other parameters and torch's random numbers stay.
            inputs: an example, leaves (T, B, ...).
            module: with predictor="own": rows (B, S) to rows (B, S), each lane by itself; it is moved to the
                device and type of the state.

        Raises:
            ConfigError: the model has a predictor, or something else under its name; or the module does not fit to
                what `predictor` says.
            CapabilityError: a state whose lanes cannot be told apart, or a model that runs its submodules by itself.
            ShapeError: a module that returns another shape.
        """
        if attached(model) is not None:
            raise ConfigError(
                "a model without a predictor was expected, but it has one already: what that has learned, and what "
                "an optimizer knows of it, would be lost",
                fix="estimator.prepare(model, inputs), which leaves one that is there as it is",
            )
        if (module is None) == (self.predictor == "own"):
            raise ConfigError(
                f'a module was expected with predictor="own" and only then, but with predictor={self.predictor!r} '
                f"{'none' if module is None else type(module).__name__} came",
                fix='SyntheticGradients(k1, predictor="own").attach(model, inputs, module)',
            )
        attach(model, inputs, self.predictor, module)

    def parameter_groups(self, model: nn.Module, *, lr: float, predictor_lr: float) -> list[dict[str, Any]]:
        """Return the model's parameters and the predictor's, for an optimizer.

        Args:
            model: the model, its predictor attached.
            lr: learning rate of the first group.
            predictor_lr: learning rate of the second.

        Raises:
            CapabilityError: nothing is attached.
        """
        self._attached(model)
        named = named_parameters(model)
        return [
            {"params": [each for name, each in named.items() if not name.startswith(PREFIX)], "lr": lr},
            {"params": [each for name, each in named.items() if name.startswith(PREFIX)], "lr": predictor_lr},
        ]

    def next_steps(self, carry: SyntheticCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def init(self, model: nn.Module, lanes: int) -> SyntheticCarry:
        """Return the carry before the first window.

        Raises:
            CapabilityError: the model cannot be trained in windows, has no predictor, or too large a one for traces.
            ConfigError: its predictor is of another kind.
        """
        check_trainable(model)
        predictor = self._attached(model)
        if self.lambda_:
            check_traced(predictor, lanes)
        return SyntheticCarry(ChainCarry(lanes, unit=unit_of(model, k1=self.k1)))

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return how far each loss of a window reaches within it; see `Estimator.reach`.

        What a prediction stands for reaches further, into later windows' losses; these are not of this window. Empty
        for a predictor of your own, which may say something from the start and so hides it.
        """
        return () if self.predictor == "own" else tuple(range(1, steps + 1))

    def estimate(
        self, model: nn.Module, loss: Loss, carry: SyntheticCarry, window: Window
    ) -> tuple[Estimate, SyntheticCarry]:
        """Run the model over `window`, and estimate the gradient of its losses and of all that come after.

        The predictor's gradients are those of half its squared error, summed over the state and averaged over lanes.
        Metrics, norms over all lanes: `predicted_norm`, of what is predicted at the window's end; `arrived_norm`, of
        what has arrived at its start; `bootstrap_error`, of the difference to what was predicted for it.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, or a state of another size.
            CapabilityError: a model or predictor that cannot be used so.
        """
        fix = f"stream.windows({self.k1}), or SyntheticGradients(k1={window.steps})"
        check_window(window, carry.chain, self.k1, fix)
        predictor = self._attached(model)
        chain = carry.chain.with_dims(model, window)
        run = Run(model, StepLoss.of(loss), chain, keep_outputs=self.keep_outputs)
        return _Update(self, predictor, run, replace(carry, chain=chain), window).made()

    def _attached(self, model: nn.Module) -> Predictor:
        found = attached(model)
        if found is None:
            raise CapabilityError(
                f"a {type(model).__name__} with a predictor was expected, but it has none: what comes after a window "
                "is predicted by a module that is saved, moved and trained with the model",
                fix="estimator.attach(model, inputs), before the optimizer is made",
            )
        self._check_attached(found)
        return found

    def _check_attached(self, found: Predictor) -> None:
        if found.spelled != self.predictor:
            raise ConfigError(
                f"a predictor of the kind {self.predictor!r} was expected, but the model has one of the kind "
                f"{found.spelled!r}: the setting would have no effect",
                fix=f"SyntheticGradients(k1={self.k1}, predictor={found.spelled!r})",
            )


class _Update:
    """One call of `SyntheticGradients.estimate`."""

    def __init__(
        self, setting: SyntheticGradients, predictor: Predictor, run: Run, carry: SyntheticCarry, window: Window
    ) -> None:
        self.setting, self.predictor, self.run, self.carry, self.window = setting, predictor, run, carry, window
        self.dims, self.start = carry.chain.dims, carry.chain.state
        self.weights = {
            name.removeprefix(PREFIX): value
            for name, value in zip(run.names, run.parameters, strict=True)
            if name.startswith(PREFIX)
        }

    def made(self) -> tuple[Estimate, SyntheticCarry]:
        """Run the window, and send back what is predicted to come after it as if it had arrived there."""
        run = self.run
        segment = Segment.run(run.model, self.window, self.start, self.dims, track=self.start is not None)
        segment = run.inject(segment, self.window)
        injected = run.counted
        with torch.no_grad():
            ahead = self.predictor(self._rows(segment.end))
        metrics = {"predicted_norm": float(torch.linalg.vector_norm(ahead))}
        gradients, arrived = self._sent_back(segment, ahead)
        lessons, trace = ({}, None) if arrived is None else self._learned(segment, arrived, metrics)
        sums = self._with_owed(gradients, lessons)
        carry = SyntheticCarry(replace(self.carry.chain, state=detach(segment.end)), trace)
        if not injected:  # no update follows, so that no weight moves before these are used
            carry.owed = {name: each for name, each in sums.items() if each is not None}
            return run.estimate(Pulled([None] * len(run.asked), []), injected, segment.steps, metrics=metrics), carry
        shares: Gradients = [
            each if each is None or name.startswith(PREFIX) else each / injected.weight for name, each in sums.items()
        ]
        return run.estimate(Pulled(shares, []), injected, segment.steps, metrics=metrics), carry

    def _rows(self, state: Tree, gradient: Gradients | None = None) -> Tensor:
        """Return a state, or its gradient, as the predictor takes it. Shape (B, S)."""
        rows = rows_of(state, self.dims, gradient)
        return rows.to(next(self.predictor.parameters(), rows).dtype)

    def _sent_back(self, segment: Segment, ahead: Tensor) -> tuple[Gradients, Tensor | None]:
        """Return the gradient of the summed losses, and what arrives at the window's start, shape (B, S).

        None for what arrives at the very first start, for which nothing was predicted.
        """
        parameters, gamma = self.run.asked, self.setting.gamma
        tracked, traces = segment.start is not None, bool(self.setting.lambda_)
        twice = tracked and gamma < 1  # what arrives is discounted, what the model learns from is not
        step = self._back(segment, ahead, parameters, start=tracked and not twice, keep=twice or (tracked and traces))
        if not tracked:
            return step.gradients, None
        gradients = step.gradients
        if twice:
            ahead = ahead * gamma**segment.steps
            step = self._back(self._discounted(segment), ahead, (), start=True, keep=traces)
        return gradients, self._rows(segment.start, step.cotangent)

    def _back(self, segment: Segment, ahead: Tensor, parameters: Sequence[Tensor], *, start: bool, keep: bool) -> Step:
        arriving = cotangent_of(ahead, segment.end, self.dims)
        one = torch.ones_like(self.run.sums[-1])
        [step] = walk_back([segment], [parameters], one, keep=keep, to_start=start, arriving=arriving)
        return step

    def _discounted(self, segment: Segment) -> Segment:
        """Return the segment with each loss worth less, the further it lies ahead of the start."""
        if segment.loss is None:
            return segment
        losses = self.run.loss.by_step(segment.outputs, self.window)[0]
        ahead = torch.arange(segment.steps, dtype=losses.dtype, device=losses.device)
        return segment.injecting((losses * (self.setting.gamma**ahead)[:, None]).sum())

    def _learned(
        self, segment: Segment, arrived: Tensor, metrics: dict[str, float]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the predictor's gradient, by its own names, and the trace for the next window."""
        rows = self._rows(segment.start)
        with torch.no_grad():
            errors = arrived - self.predictor(rows)
        metrics["arrived_norm"] = float(torch.linalg.vector_norm(arrived))
        metrics["bootstrap_error"] = float(torch.linalg.vector_norm(errors))
        if not self.weights:  # all of them frozen
            return {}, None
        if not self.setting.lambda_:
            return learned(self.predictor, self.weights, rows, errors), None
        trace = traced(self.predictor, self.weights, rows, self.carry.trace)
        jacobian = state_jacobian(segment, self.dims, self.run.sums[-1]).to(trace.dtype)
        share = self.setting.lambda_ * self.setting.gamma**segment.steps
        return learned_with(trace, self.weights, errors), share * jacobian @ trace

    def _with_owed(self, gradients: Gradients, lessons: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Return what is to be used, by the parameters' names: of this window, and of those before without a target."""
        found = dict(zip(self.run.trained, gradients, strict=True))
        found |= {PREFIX + name: each for name, each in lessons.items()}
        for name, owed in self.carry.owed.items():
            if name in found:  # not where it has been frozen since
                news = found[name]
                [found[name]] = add([owed], [news])
        return found
