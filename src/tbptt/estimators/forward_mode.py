"""What the methods have in common that carry influence along instead of going back.

The influence of the weights on the state, J = d state / d weights, is brought on with the state, lane by lane: J <- D J
+ I over a window, with D = d end / d start and I = d end / d weights at a fixed start. A window's gradient is that of
its own losses within it, and (d losses / d start) J for all that came before.

Letters: T time, B lanes, S numbers of a lane's state, P parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, check_window, unit_of
from tbptt.estimators.gradients import Gradients, add
from tbptt.estimators.lane_segment import LaneSegment, check_dense, check_embeddings
from tbptt.estimators.perlane import PerLane
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Pulled, Segment, norm_of, walk_back
from tbptt.length.base import check_whole
from tbptt.loss import Counted, Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.tree import LaneDims, Tree, all_finite, detach
from tbptt.window import Window

__all__ = [
    "CarriedInfluence",
    "ForwardMode",
    "Influence",
    "InfluenceCarry",
    "LaneSegment",
    "add_to",
    "check_dense",
    "check_size",
]

Influence: TypeAlias = dict[str, Any]
"""What a method knows of the influence of the weights on the state: tensors, in dicts by name. Empty for none."""

_MOST = 2**28


@dataclass(eq=False)
class InfluenceCarry:
    """What a forward-mode method carries.

    Attributes:
        chain: the model's state, and what is known of it.
        influence: of the weights on that state.
        vectorized: whether the lanes are run side by side; None before it has been found out.
        names: of the weights that it is the influence of.
    """

    chain: ChainCarry
    influence: Influence = field(default_factory=dict[str, Any])
    vectorized: bool | None = None
    names: tuple[str, ...] = ()

    @property
    def state(self) -> Tree | None:
        """The model's state after the last window, detached; None before the first."""
        return self.chain.state

    @property
    def finite(self) -> bool:
        """Whether the state and the influence are."""
        return self.chain.finite and all_finite(self.influence)

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors."""
        return {
            "chain": self.chain.state_dict(),
            "influence": self.influence,
            "vectorized": self.vectorized,
            "names": list(self.names),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: it was saved with another number of lanes.
        """
        self.chain.load_state_dict(state["chain"])
        self.influence, self.vectorized = state["influence"], state["vectorized"]
        self.names = tuple(state["names"])


def check_size(numbers: int, what: str, fix: str) -> None:
    """Refuse more than 2^28 numbers, 1 GiB in single precision.

    Raises:
        CapabilityError: they are more.
    """
    if numbers > _MOST:
        raise CapabilityError(f"at most {_MOST} numbers were expected, but {what} are {numbers}", fix=fix)


@dataclass(frozen=True)
class ForwardMode(Estimator):
    """What `RTRL`, `UORO` and their kin have in common; see there.

    Raises:
        ConfigError: a setting that cannot be meant.
    """

    k1: int = 1
    keep_outputs: bool = False

    stepwise: ClassVar[bool] = False
    """Whether influence is brought on step by step, however many steps a window has."""

    def __post_init__(self) -> None:
        check_whole(self, "k1", f"{type(self).__name__}(k1=1)")

    def next_steps(self, carry: InfluenceCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def init(self, model: nn.Module, lanes: int) -> InfluenceCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        check_embeddings(model)
        return InfluenceCarry(ChainCarry(lanes, unit=unit_of(model, k1=self.k1)))

    def reach(self, steps: int) -> tuple[int, ...] | None:
        """Return nothing: the influence of a step is approximated, so that how far it reaches is no number of steps."""
        del steps  # however many
        return ()

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Return what is to be known before the first window, such as which weights reach what; empty for nothing."""
        del model, window, dims  # nothing, unless a method says otherwise
        return {}

    @abstractmethod
    def made_of(
        self, made: Sequence[LaneSegment], influence: Influence, draws: int
    ) -> tuple[dict[str, Tensor], list[Tensor], Influence]:
        """Return the gradients of a window's summed losses, the norm of what arrives at its start, and the influence.

        Args:
            made: the window's segments, oldest first.
            influence: on the state before it. Stays as it is.
            draws: how many segments there were before.
        """

    def estimate(
        self, model: nn.Module, loss: Loss, carry: InfluenceCarry, window: Window
    ) -> tuple[Estimate, InfluenceCarry]:
        """Run the model over `window`, estimate the gradient of its losses, and bring the influence on.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss,
                or a model or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state), whose state cannot be taken apart by
                lane, or that is too large for the method.
        """
        check_window(window, carry.chain, self.k1, f"stream.windows({self.k1}), or k1={window.steps}")
        chain = carry.chain.with_dims(model, window)
        influence = carry.influence if chain.draws else self.begin(model, window, chain.dims)
        run = Run(model, StepLoss.of(loss), chain, keep_outputs=self.keep_outputs)
        if chain.draws and carry.names != run.names:
            changed = sorted(set(carry.names) ^ set(run.names))
            raise CapabilityError(
                f"the weights that are trained were expected to be those that the influence is of, but {changed[0]} "
                "has been frozen or thawed since: what it has done to the state is not known",
                fix="carry = estimator.init(model, lanes), which starts anew",
            )
        weights = dict(zip(run.names, run.parameters, strict=True))
        lanes = PerLane(model, weights, chain.lanes, chain.dims, carry.vectorized)
        made = self._run(run, lanes, window)
        sums, norms, influence = self.made_of(made, influence, chain.draws)
        counted = run.counted
        pulled = Pulled(_shared(sums, run.trained, counted), [each / counted.weight for each in norms if counted])
        after = replace(chain, state=detach(made[-1].segment.end), draws=chain.draws + len(made))
        return run.estimate(pulled, counted, window.steps), InfluenceCarry(
            after, influence, lanes.vectorized, run.names
        )

    def _run(self, run: Run, lanes: PerLane, window: Window) -> list[LaneSegment]:
        """Run the window, in segments between which influence is brought on."""
        state, dims = run.carry.state, run.carry.dims
        made: list[LaneSegment] = []
        weights = list(lanes.weights.values())
        of_loss = {name: each for name, each in run.trained.items() if name not in lanes.weights}
        for piece in [window[at : at + 1] for at in range(window.steps)] if self.stepwise else [window]:
            tracked = state is not None
            segment = run.inject(Segment.run(lanes, piece, state, dims, track=tracked), piece)
            one = torch.ones_like(run.sums[-1])
            made.append(LaneSegment(segment, run.names, weights, dims, one, run.parameters, of_loss))
            state = detach(segment.end)
        return made


@dataclass(frozen=True)
class CarriedInfluence(ForwardMode):
    """What those have in common that send losses back within a window, and from its start on along the influence."""

    @abstractmethod
    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return the gradient that the weights get through the state before a window.

        Args:
            influence: on that state; not empty.
            arrived: the gradient of the window's summed losses with respect to it. Shape (B, S).

        Returns:
            By name, flat, summed over the lanes. Shape (p,) each.
        """

    @abstractmethod
    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return the influence on the state after a segment.

        Args:
            influence: on the state before it; empty for none. Stays as it is.
            segment: the steps.
            draws: how many segments there were before.
        """

    def made_of(
        self, made: Sequence[LaneSegment], influence: Influence, draws: int
    ) -> tuple[dict[str, Tensor], list[Tensor], Influence]:
        """Return what the window alone gives, and what arrives at its start along the influence on that."""
        sums, arrived = _sent_back(made)
        norms: list[Tensor] = []
        if arrived is not None and draws:
            add_to(sums, self.past(influence, made[0].rows(made[0].segment.start, arrived)))
            norms.append(norm_of(arrived, made[0].one))
        for index, each in enumerate(made):
            influence = self.brought_on(influence, each, draws + index)
        return sums, norms, influence


def _sent_back(made: Sequence[LaneSegment]) -> tuple[dict[str, Tensor], Gradients | None]:
    """Return the gradients of the summed losses within a window, and what arrives at its start."""
    first = made[0]
    copies, direct = list(first.weights), first.direct
    names = [*first.names, *direct]
    total: Gradients = [None] * len(names)
    arrived: Gradients = []
    asked = [[*copies, *direct.values()]] * len(made)
    for step in walk_back([each.segment for each in made], asked, first.one, keep=True, to_start=True):
        total = add(total, step.gradients)
        arrived = step.cotangent
    check_dense(names, total)
    sums: dict[str, Tensor] = {}
    for index, (name, each) in enumerate(zip(names, total, strict=True)):
        if each is not None:
            add_to(sums, {name: each.sum(0) if first.lanes > 1 and index < len(copies) else each})
    return sums, arrived if first.segment.start is not None else None


def add_to(sums: dict[str, Tensor], news: Mapping[str, Tensor]) -> None:
    """Add gradients to sums of them, by name; of whatever shape."""
    for name, each in news.items():
        if name in sums:
            sums[name] = sums[name] + each.view_as(sums[name])
        else:
            sums[name] = each


def _shared(sums: Mapping[str, Tensor], weights: Mapping[str, Tensor], injected: Counted) -> Gradients:
    """Return the gradients of the mean for all that is trained."""
    if not injected:
        return [None] * len(weights)
    return [sums[name].view_as(value) / injected.weight if name in sums else None for name, value in weights.items()]
