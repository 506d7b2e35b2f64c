"""What local learning rules have in common: a unit follows its own past, and what goes round by others is left out.

Letters: B lanes, N units, L numbers of a unit's state, one in each tensor of it, G gates, O numbers of the output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.forward_mode import ForwardMode, Influence, add_to
from tbptt.estimators.gradients import Gradients
from tbptt.estimators.lane_segment import LaneSegment, check_dense
from tbptt.estimators.perlane import PerLane
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Segment
from tbptt.estimators.sparsity import initial_segment
from tbptt.estimators.units import Units, find_units, rows_driven, stopped_at
from tbptt.length.base import check_seed
from tbptt.model import find_lane_dims, initial_state
from tbptt.tree import LaneDims, Tree, detach, differentiable
from tbptt.unroll import state_at_reset
from tbptt.window import Window

__all__ = ["LocalRule"]

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

    def __post_init__(self) -> None:
        ForwardMode.__post_init__(self)
        check_seed(self)
        if self.feedback not in ("symmetric", "random"):
            raise ConfigError(
                f'feedback was expected to be "symmetric" or "random", but is {self.feedback!r}',
                fix=f'{type(self).__name__}(feedback="symmetric")',
            )

    @abstractmethod
    def local(self, units: Units, step: LaneSegment, draws: int) -> tuple[Units, Tensor]:
        """Return what is known of the units now, and how their numbers follow from their own. Shape (B, N, L, L).

        Args:
            units: what was known.
            step: the step, its start tracked.
            draws: its number.
        """

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Find out what is local to a unit, as far as random weights, states and inputs show it."""
        found, _, _ = find_units(model, window.inputs, dims)
        return _kept(found) | {"traces": {}}

    def limits(self, model: nn.Module, inputs: Tree) -> str:
        """Return which weights are learned from each step alone, and what is left out; see `Estimator.limits`."""
        units, others, places = find_units(model, inputs, find_lane_dims(model, inputs))
        said = [f"{', '.join(others)}: learned from each step alone, as their rows are no units"] if others else []
        left_out = self.left_out(units, places)
        return "; ".join([*said, left_out] if left_out else said)

    @abstractmethod
    def left_out(self, units: Units, places: Sequence[str]) -> str:
        """Return which ways from the state to itself are not followed, in words.

        Args:
            units: what is known of them.
            places: the names of the state's tensors.
        """

    def made_of(
        self, made: Sequence[LaneSegment], influence: Influence, draws: int
    ) -> tuple[dict[str, Tensor], list[Tensor], Influence]:
        """Return what each step alone gives, and what arrives at its end along the traces of before."""
        sums: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for index, each in enumerate(made):
            units, before = _started(influence, each, draws + index)
            units, news, _ = rows_driven(units, each, draws + index)
            old: dict[str, Tensor] = {}
            if before and each.segment.start is not None:
                units, own = self.local(units, each, draws + index)
                old = {name: torch.einsum("bnlm,bmgnr->blgnr", own.to(t.dtype), t) for name, t in before.items()}
                old = {name: trace for name, trace in old.items() if name in units.gates}
            traces = dict(old)
            add_to(traces, news)
            if each.shared is not None and each.shared.loss is not None:
                direct, arrived = self._of_the_step(each, each.shared, units)
                if self.feedback == "random":
                    along = _along(traces, arrived, units.layers)
                    direct = {name: value for name, value in direct.items() if name not in along}
                else:
                    along = _along(old, arrived, units.layers)
                    norms = [arrived.norm()]
                add_to(sums, direct)
                add_to(sums, along)
            influence = _kept(units) | {"traces": traces}
        return sums, norms, influence

    def _run(self, run: Run, lanes: PerLane, window: Window) -> list[LaneSegment]:
        """Run the window step by step, each from a start that is held still: a lane's initial state is one, too."""
        state, dims = run.carry.state, run.carry.dims
        weights, made = list(lanes.weights.values()), list[LaneSegment]()
        of_loss = {name: each for name, each in run.trained.items() if name not in lanes.weights}
        for piece in [window[at : at + 1] for at in range(window.steps)]:
            start = state
            begun = torch.ones_like(piece.reset[0]) if state is None else piece.reset[0]
            initial = None
            if bool(begun.any()):
                start = state_at_reset(run.model, piece, 0, state, dims)
                start = detach(initial_state(run.model, piece.lanes) if start is None else start)
                initial = initial_segment(run.model, dims)
                piece = replace(piece, reset=torch.zeros_like(piece.reset))
            tracked = start is not None
            segment = Segment.run(lanes, piece, start, dims, track=tracked)
            shared = run.inject(Segment.run(run.model, piece, start, dims, track=tracked), piece)
            one = torch.ones_like(run.sums[-1])
            own = (run.parameters, of_loss, shared, begun, initial)
            made.append(LaneSegment(segment, run.names, weights, dims, one, *own))
            state = detach(segment.end)
        return made

    def _of_the_step(self, step: LaneSegment, shared: Segment, units: Units) -> tuple[dict[str, Tensor], Tensor]:
        """Return a step's gradients of its summed losses by the weights, and what arrives at its end, (B, S).

        Raises:
            CapabilityError: the losses do not depend on the state that is returned, or on that before as well.
        """
        loss, ends, starts = shared.loss, differentiable(shared.end), differentiable(shared.start)
        assert loss is not None
        names, weights = [*step.names, *step.of_loss], [*step.parameters, *step.of_loss.values()]
        inputs, held, nothing = [*weights, *starts], list[Tensor | None](ends), [None] * len(ends)
        found, _ = stopped_at(nothing, loss, torch.ones_like(loss), inputs)
        check_dense(names, found[: len(names)])
        direct = {name: each for name, each in zip(names, found, strict=False) if each is not None}
        if step.initial is not None and step.begun is not None:
            add_to(direct, _from_the_start(step, step.initial, step.begun, found[len(names) :], units))
        if self.feedback == "random":
            outputs = differentiable(shared.outputs)
            errors = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
            return direct, self._broadcast(list(errors), outputs, step.end)
        beyond, arrived = stopped_at(held, loss, torch.ones_like(loss), inputs)
        past = any(each is not None and bool((each.abs() > 0).any()) for each in beyond[len(names) :])
        if past or all(each is None for each in arrived):
            how = "depend on the state before the step in another way" if past else "do not depend on it"
            raise CapabilityError(
                f"outputs made of the state that is returned were expected, but the losses {how}: what arrives at the "
                "state cannot be seen. nn.RNN, nn.GRU and nn.LSTM return copies",
                fix="tbptt.scan(cell) of a cell that makes its outputs of the very state that it returns, and returns "
                'what else they are made of, such as spikes; or feedback="random"',
            )
        return direct, step.rows(shared.end, arrived)

    def _broadcast(self, errors: Gradients, outputs: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the errors of the outputs, times fixed random weights. Shape (B, S)."""
        full = [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(errors, outputs, strict=True)]
        joined = torch.cat([each.movedim(1, 0).flatten(1) for each in full], 1)  # (B, O)
        drawn = np.random.default_rng((self.seed, _PURPOSE)).standard_normal((joined.shape[1], like.shape[1]))
        weights = torch.from_numpy(drawn / joined.shape[1] ** 0.5).to(dtype=joined.dtype, device=joined.device)
        return (joined @ weights).to(like.dtype)


def _kept(units: Units) -> Influence:
    return {"layers": units.layers, "gates": dict(units.gates), "kept": units.kept}


def _started(influence: Influence, step: LaneSegment, draws: int) -> tuple[Units, dict[str, Tensor]]:
    """Return what is known of the units, and the traces at the start of a step, (B, L, G, N, r) each, by name.

    In lanes that begin at it they are what the weights are to the initial state: nothing, unless that is learned.
    """
    units, traces = Units(influence["layers"], influence["gates"], influence["kept"]), influence["traces"]
    begun = step.begun
    if begun is None or not bool(begun.any()):
        return units, traces
    fresh: dict[str, Tensor] = {}
    if step.initial is not None:
        units, fresh, _ = rows_driven(units, step.initial, draws)
    chosen = begun.view(-1, 1, 1, 1, 1)
    names = [name for name in {**traces, **fresh} if name in units.gates]
    return units, {
        name: torch.where(chosen, fresh.get(name, 0.0), traces.get(name, 0.0)).expand(len(begun), -1, -1, -1, -1)
        for name in names
    }


def _from_the_start(
    step: LaneSegment, initial: LaneSegment, begun: Tensor, arrived: Gradients, units: Units
) -> dict[str, Tensor]:
    """Return what the weights of the initial state that are learned from each step alone get in lanes that begin."""
    assert step.shared is not None
    rows = step.rows(step.shared.start, arrived) * begun[:, None]
    found, _ = initial.pulled(rows.sum(0, keepdim=True))
    return {name: each for name, each in found.items() if name not in units.gates}


def _along(traces: Mapping[str, Tensor], arrived: Tensor, layers: int) -> dict[str, Tensor]:
    """Return what arrives at each unit, (B, S), times the influence on it, summed over lanes; by name."""
    own = arrived.view(len(arrived), layers, -1)
    return {
        name: torch.einsum("bln,blgnr->gnr", own.to(trace.dtype), trace).flatten() for name, trace in traces.items()
    }
