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
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, check_lanes_of, check_steps_of, unit_of
from tbptt.estimators.perlane import PerLane
from tbptt.estimators.rows import cotangent_of, rows_of
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Gradients, Pulled, Segment, norm_of, walk_back
from tbptt.length.base import check_whole
from tbptt.loss import Counted, Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.tree import LaneDims, Tree, all_finite, as_real, detach, differentiable, tensors
from tbptt.window import Window

__all__ = ["CarriedInfluence", "ForwardMode", "Influence", "InfluenceCarry", "LaneSegment", "add_to", "check_size"]

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


@dataclass(frozen=True, eq=False)
class LaneSegment:
    """A stretch of steps with its graph, whose gradients come lane by lane.

    Args:
        segment: the stretch, its start tracked unless it is the model's initial state.
        names: of the parameters.
        weights: each lane's copy of them; of one lane they themselves.
        dims: the lane dimensions of the state.
        one: 1, in the type of the losses.
        parameters: the weights that all lanes share.
        shared: the same steps run with these; None where a method does not ask for it.
        begun: the lanes that began at its first step, (B,), bool, and
        initial: their initial state as a stretch of no steps, if the start is held still there, too.
    """

    segment: Segment
    names: Sequence[str]
    weights: Sequence[Tensor]
    dims: LaneDims | None
    one: Tensor
    parameters: Sequence[Tensor] = ()
    shared: Segment | None = None
    begun: Tensor | None = None
    initial: LaneSegment | None = None

    @property
    def end(self) -> Tensor:
        """The numbers of the state after. Shape (B, S)."""
        return self.rows(self.segment.end)

    @property
    def lanes(self) -> int:
        """The number of lanes, B."""
        return tensors(self.segment.outputs)[0].shape[1]

    def rows(self, state: Tree, gradient: Gradients | None = None) -> Tensor:
        """Return a state, or its gradient, as rows. Shape (B, S)."""
        return rows_of(state, self.dims, gradient)

    def pulled(self, seeds: Tensor, *, weights: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pull a gradient of the end state back, each lane alone.

        Args:
            seeds: the gradient of each number of the end state. Shape (B, S).
            weights: whether to go on to the weights.

        Returns:
            The gradients of the weights that they depend on, by name, (B, p) each; and of the start, (B, S), None for
            the model's initial state.
        """
        silent = replace(self.segment, loss=None)
        chosen = list(self.weights) if weights else []
        tracked = self.segment.start is not None
        arriving = cotangent_of(seeds, self.segment.end, self.dims)
        found, before = silent.vjp(chosen, self.one, arriving, start=tracked, keep=True)
        lanes = seeds.shape[0]
        by_name = {
            name: each.detach().reshape(lanes, -1)
            for name, each in zip(self.names, found, strict=False)
            if each is not None
        }
        return by_name, self.rows(self.segment.start, before) if tracked else None

    def pushed(self, rows: Tensor) -> Tensor:
        """Return D times a direction of each lane's start state. Shape (B, S).

        Forward mode by going back twice, which every operation of torch can: u D t is linear in u, and its gradient
        with respect to u is D t.

        Cost: two backward passes.
        """
        start, end = self.segment.start, self.segment.end
        assert start is not None
        seed = torch.zeros_like(rows, requires_grad=True)
        pairs = zip(differentiable(end), cotangent_of(seed, end, self.dims), strict=True)
        roots = [(leaf, each) for leaf, each in pairs if leaf.requires_grad]
        before = differentiable(start)
        found = cast(
            "Sequence[Tensor | None]",
            torch.autograd.grad(
                [leaf for leaf, _ in roots], before, [each for _, each in roots], create_graph=True, allow_unused=True
            ),
        )
        total: Tensor | None = None
        for each, along in zip(found, cotangent_of(rows, start, self.dims), strict=True):
            if each is not None:
                part = (as_real(each) * as_real(along)).sum()  # pyright: ignore[reportArgumentType]
                total = part if total is None else total + part
        if total is None or not total.requires_grad:
            return torch.zeros_like(rows)
        return torch.autograd.grad(total, seed, retain_graph=True)[0].detach()

    def jacobians(self, seeds: Sequence[Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return I by name, (B, S, p) each, and D, (B, S, S), None for the model's initial state.

        Args:
            seeds: gradients of the end state, C of shape (B, S), to pull back instead of one for each of its numbers.

        Cost: S backward passes, or C, all lanes side by side.
        """
        chosen = self.unit_seeds() if seeds is None else seeds
        full: dict[str, Tensor] = {}
        before: list[Tensor] = []
        for index, each in enumerate(chosen):
            found, start = self.pulled(each)
            for name, gradient in found.items():
                if name not in full:
                    full[name] = gradient.new_zeros(len(gradient), len(chosen), gradient.shape[1])
                full[name][:, index] = gradient
            if start is not None:
                before.append(start)
        return full, torch.stack(before, 1) if before else None

    def state_jacobian(self) -> Tensor:
        """Return D. Shape (B, S, S).

        Cost: S backward passes, all lanes side by side, none of them into the weights.
        """
        rows = [self.pulled(seed, weights=False)[1] for seed in self.unit_seeds()]
        return torch.stack([each for each in rows if each is not None], 1)

    def unit_seeds(self) -> list[Tensor]:
        """Return a gradient of the end state for each of its numbers, 1 there and 0 elsewhere. S of shape (B, S)."""
        like = self.end
        eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        return [row.expand_as(like) for row in eye]


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
        check_steps_of(window, self.k1, f"stream.windows({self.k1}), or k1={window.steps}")
        check_lanes_of(window, carry.chain.lanes)
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
        pulled = Pulled(_shared(sums, weights, counted), [each / counted.weight for each in norms if counted])
        after = replace(chain, state=detach(made[-1].segment.end), draws=chain.draws + len(made))
        return run.estimate(pulled, counted, window.steps), InfluenceCarry(
            after, influence, lanes.vectorized, run.names
        )

    def _run(self, run: Run, lanes: PerLane, window: Window) -> list[LaneSegment]:
        """Run the window, in segments between which influence is brought on."""
        state, dims = run.carry.state, run.carry.dims
        made: list[LaneSegment] = []
        weights = list(lanes.weights.values())
        for piece in [window[at : at + 1] for at in range(window.steps)] if self.stepwise else [window]:
            tracked = state is not None
            segment = run.inject(Segment.run(lanes, piece, state, dims, track=tracked), piece)
            made.append(LaneSegment(segment, run.names, weights, dims, torch.ones_like(run.sums[-1]), run.parameters))
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
    """Return the gradients of the summed losses within a window, each lane's, and what arrives at its start."""
    first = made[0]
    sums: dict[str, Tensor] = {}
    arrived: Gradients = []
    parameters = [first.weights] * len(made)
    for step in walk_back([each.segment for each in made], parameters, first.one, keep=True, to_start=True):
        for name, each in zip(first.names, step.gradients, strict=True):
            if each is not None:
                sums[name] = sums[name] + each if name in sums else each
        arrived = step.cotangent
    tracked = first.segment.start is not None
    if first.lanes > 1:
        sums = {name: each.sum(0) for name, each in sums.items()}
    return sums, arrived if tracked else None


def add_to(sums: dict[str, Tensor], news: Mapping[str, Tensor]) -> None:
    """Add gradients to sums of them, by name; of whatever shape."""
    for name, each in news.items():
        if name in sums:
            sums[name] = sums[name] + each.view_as(sums[name])
        else:
            sums[name] = each


def _shared(sums: Mapping[str, Tensor], weights: Mapping[str, Tensor], injected: Counted) -> Gradients:
    """Return the gradients of the mean for the weights that all lanes share."""
    if not injected:
        return [None] * len(weights)
    return [sums[name].view_as(value) / injected.weight if name in sums else None for name, value in weights.items()]
