"""What local learning rules have in common: a unit follows its own past, and what goes round by others is left out.

Letters: B lanes, N units, L numbers of a unit's state, one in each tensor of it, G gates, O numbers of the output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.forward_mode import ForwardMode, Influence, add_to
from tbptt.estimators.gradients import Gradients, gradients_of
from tbptt.estimators.lane_segment import LaneSegment, check_dense
from tbptt.estimators.perlane import check_single_steps
from tbptt.estimators.segments import Segment
from tbptt.estimators.sparsity import tried_step
from tbptt.length.base import check_seed
from tbptt.model import find_lane_dims, fork_random, left_as_it_was, trainable_parameters
from tbptt.tree import LaneDims, Tree, differentiable, tensors
from tbptt.window import Window

__all__ = ["LocalRule"]

_APART = 1e-3
"""The relative distance beyond which a step is not unit by unit: far above rounding."""
_PROBES = 4
"""Random states and inputs that are tried, in each lane."""
_PURPOSE = 0x4C4F43414C
"""Keeps the feedback weights apart from all else that is drawn from a seed."""


@dataclass(frozen=True)
class LocalRule(ForwardMode):
    """What `RFLO` and `EProp` have in common; see there.

    Raises:
        ConfigError: a setting that cannot be meant.
    """

    feedback: Literal["symmetric", "random"] = "symmetric"
    seed: int = 0

    kind: ClassVar[str] = "biased"
    stepwise: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ForwardMode.__post_init__(self)
        check_seed(self)
        if self.feedback not in ("symmetric", "random"):
            raise ConfigError(
                f'feedback was expected to be "symmetric" or "random", but is {self.feedback!r}',
                fix=f'{type(self).__name__}(feedback="symmetric")',
            )

    @abstractmethod
    def local(self, slopes: Tensor, kept: Tensor) -> Tensor:
        """Return how the numbers of a unit follow from what they were. Shape (B, N, L, L).

        Args:
            slopes: their derivatives within the step, of the units that follow themselves; of others nothing that could
                be used. Shape (B, N, L, L).
            kept: which those are. Shape (L, L).
        """

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Find out what is local to a unit."""
        found = _Units.found(model, window.inputs, dims)
        return {"layers": found.layers, "gates": found.gates, "kept": found.kept, "traces": {}}

    def limits(self, model: nn.Module, inputs: Tree) -> str:
        """Return which weights are learned from each step alone; see `Estimator.limits`."""
        others = _Units.found(model, inputs, find_lane_dims(model, inputs)).others
        return f"{', '.join(others)}: learned from each step alone, as their rows are no units" if others else ""

    def made_of(
        self, made: Sequence[LaneSegment], influence: Influence, draws: int
    ) -> tuple[dict[str, Tensor], list[Tensor], Influence]:
        """Return what each step alone gives, and what arrives at its end along the traces of before."""
        del draws  # nothing is drawn from step to step
        sums: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for each in made:
            old, news = self._followed(influence, each)
            traces = dict(old)
            add_to(traces, news)
            if each.shared is not None and each.shared.loss is not None:
                direct, arrived = self._of_the_step(each, each.shared)
                if self.feedback == "random":
                    along = _along(traces, arrived, influence["layers"])
                    direct = {name: value for name, value in direct.items() if name not in along}
                else:
                    along = _along(old, arrived, influence["layers"])
                    norms = [arrived.norm()]
                add_to(sums, direct)
                add_to(sums, along)
            influence = influence | {"traces": traces}
        return sums, norms, influence

    def _followed(self, influence: Influence, segment: LaneSegment) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the influence that is left of before, and that of the step. (B, L, G, N, r) each, by name."""
        end, layers = segment.end, int(influence["layers"])
        seeds = _layer_seeds(end, layers, None)
        pulled = [segment.pulled(seed) for seed in seeds]
        news: dict[str, Tensor] = {}
        for name, gates in influence["gates"].items():
            rows = [found.get(name) for found, _ in pulled]
            like = next((row for row in rows if row is not None), None)
            if like is not None:
                parts = torch.stack([torch.zeros_like(like) if row is None else row for row in rows], 1)
                news[name] = parts.view(len(end), layers, gates, end.shape[1] // layers, -1)
        starts = [start for _, start in pulled if start is not None]
        old: dict[str, Tensor] = {}
        if starts and influence["traces"]:
            by_unit = [each.view(len(end), layers, -1).transpose(1, 2) for each in starts]
            slopes = torch.stack(by_unit, 2)  # (B, N, L, L)
            own = self.local(slopes, influence["kept"])
            for name, trace in influence["traces"].items():
                old[name] = torch.einsum("bnlm,bmgnr->blgnr", own.to(trace.dtype), trace)
        return old, news

    def _of_the_step(self, segment: LaneSegment, shared: Segment) -> tuple[dict[str, Tensor], Tensor]:
        """Return a step's gradients of its summed losses by the weights, and what arrives at its end, (B, S).

        Raises:
            CapabilityError: the losses do not depend on the state that is returned.
        """
        assert shared.loss is not None
        names, asked = [*segment.names, *segment.of_loss], [*segment.parameters, *segment.of_loss.values()]
        one = torch.ones_like(shared.loss)
        own: Gradients = [None] * len(asked)
        if shared.loss.requires_grad:
            own = gradients_of([shared.loss], [one], asked, keep=True)
        check_dense(names, own)
        direct = {name: each for name, each in zip(names, own, strict=True) if each is not None}
        if self.feedback == "random":
            outputs = differentiable(shared.outputs)
            errors = torch.autograd.grad(shared.loss, outputs, retain_graph=True, allow_unused=True)
            return direct, self._broadcast(list(errors), outputs, segment.end)
        ends = differentiable(shared.end)
        arrived = _arrived_at(ends, shared.loss, segment.parameters)
        if all(each is None for each in arrived):
            raise CapabilityError(
                "outputs made of the state that is returned were expected, but the losses do not depend on it: what "
                "arrives at the state cannot be seen. nn.RNN, nn.GRU and nn.LSTM return copies",
                fix="tbptt.scan(cell) of a cell that makes its outputs of the very state that it returns; or "
                'feedback="random"',
            )
        return direct, segment.rows(shared.end, arrived)

    def _broadcast(self, errors: Gradients, outputs: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the errors of the outputs, times fixed random weights. Shape (B, S)."""
        full = [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(errors, outputs, strict=True)]
        joined = torch.cat([each.movedim(1, 0).flatten(1) for each in full], 1)  # (B, O)
        drawn = np.random.default_rng((self.seed, _PURPOSE)).standard_normal((joined.shape[1], like.shape[1]))
        weights = torch.from_numpy(drawn / joined.shape[1] ** 0.5).to(dtype=joined.dtype, device=joined.device)
        return (joined @ weights).to(like.dtype)


@dataclass(frozen=True, eq=False)
class _Units:
    """What a model's units are.

    Args:
        layers: tensors of the state, L; each has a number for each unit.
        gates: of each weight whose rows are units, how many rows a unit has, G; by name.
        kept: which tensors' numbers follow from which, each unit from itself alone. Shape (L, L).
        others: the weights that reach the state, and whose rows are no units.
    """

    layers: int
    gates: dict[str, int]
    kept: Tensor
    others: tuple[str, ...]

    @staticmethod
    def found(model: nn.Module, inputs: Tree, dims: LaneDims | None) -> _Units:
        """Find them out by derivatives at random states and inputs; nothing remains in the model.

        Raises:
            CapabilityError: a state whose tensors are not of one size, or a model that takes no single steps.
        """
        check_single_steps(model, inputs)
        parameters = trainable_parameters(model)
        units: _Units | None = None
        with fork_random(tensors(inputs)[0].device), left_as_it_was(model):
            torch.manual_seed(0)
            for index in range(_PROBES):
                segment = tried_step(model, inputs, index % tensors(inputs)[0].shape[0], dims, moved=True)
                units = _Units._at(segment, parameters, _count_layers(segment.segment.end, segment.end), units)
        assert units is not None
        return units

    @staticmethod
    def _at(segment: LaneSegment, parameters: Mapping[str, Tensor], layers: int, before: _Units | None) -> _Units:
        end = segment.end
        size = end.shape[1] // layers
        scale = 1.0 + torch.rand(size, dtype=end.dtype, device=end.device)  # tells units apart
        kept = (
            torch.ones(layers, layers, dtype=torch.bool, device=end.device) if before is None else before.kept.clone()
        )
        gates = {
            name: each.shape[0] // size for name, each in parameters.items() if each.ndim and not each.shape[0] % size
        }
        gates = gates if before is None else dict(before.gates)
        reached = set() if before is None else {*before.gates, *before.others}
        plain, other = _layer_seeds(end, layers, None), _layer_seeds(end, layers, scale)
        for layer in range(layers):
            ones, start = segment.pulled(plain[layer])
            scaled, moved = segment.pulled(other[layer])
            assert start is not None
            assert moved is not None
            for source, (a, b) in enumerate(zip(start.chunk(layers, 1), moved.chunk(layers, 1), strict=True)):
                kept[layer, source] &= _near(b, a * scale)
            for name, value in ones.items():
                reached.add(name)
                if name in gates:
                    rows, wanted = (each.view(len(end), gates[name], size, -1) for each in (scaled[name], value))
                    if not _near(rows, wanted * scale[:, None]):
                        del gates[name]
        own = {name: count for name, count in gates.items() if name in reached}
        return _Units(layers, own, kept, tuple(name for name in parameters if name in reached and name not in own))


def _count_layers(state: Tree, rows: Tensor) -> int:
    layers = len(differentiable(state))
    sizes = {leaf.numel() for leaf in differentiable(state)}
    if len(sizes) > 1 or any(leaf.is_complex() for leaf in differentiable(state)):
        raise CapabilityError(
            "a state of real tensors with one number for each unit was expected, but they are of several sizes, or "
            "complex: it cannot be told which numbers are of one unit",
            fix="UORO(k1), which takes any model; or ElementwiseRTRL(k1), where the recurrence is element-wise",
        )
    assert rows.shape[1] % layers == 0
    return layers


def _layer_seeds(like: Tensor, layers: int, scale: Tensor | None) -> list[Tensor]:
    """Return gradients of the end state that are 1, or `scale`, (N,), at one of its tensors. L of shape (B, S)."""
    found: list[Tensor] = []
    for layer in range(layers):
        seed = torch.zeros_like(like)
        part = seed.chunk(layers, 1)[layer]
        part.copy_(torch.ones_like(part) if scale is None else scale.expand_as(part))
        found.append(seed)
    return found


def _arrived_at(ends: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Return the gradient of a loss with respect to each tensor of the state after a step, the others held still.

    One of them may be made of another, as spikes are of potentials: the gradient stops at the first that it comes to,
    as influence on that is followed by itself.
    """
    found: dict[int, Tensor] = {}

    def stop(index: int, gradient: Tensor) -> Tensor:
        found[index] = gradient
        return torch.zeros_like(gradient)

    hooks = [leaf.register_hook(partial(stop, index)) for index, leaf in enumerate(ends) if leaf.requires_grad]
    try:
        gradients_of([loss], [torch.ones_like(loss)], parameters, keep=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(index) for index in range(len(ends))]


def _along(traces: Mapping[str, Tensor], arrived: Tensor, layers: int) -> dict[str, Tensor]:
    """Return what arrives at each unit, (B, S), times the influence on it, summed over lanes; by name."""
    own = arrived.view(len(arrived), layers, -1)
    return {
        name: torch.einsum("bln,blgnr->gnr", own.to(trace.dtype), trace).flatten() for name, trace in traces.items()
    }


def _near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _APART * wanted.norm())
