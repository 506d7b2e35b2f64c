"""A model, an example, and the ways to run one on the other.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tbptt.adapters import Stateful
from tbptt.checks.plans import MAX_LANES, TOLD_LANES, cut_into, other_sizes, sizes_of
from tbptt.checks.precision import (
    apart,
    cast_inputs,
    computes_narrower,
    distance,
    half_precision,
    in_double,
    project,
)
from tbptt.checks.steady import steady
from tbptt.copies import put_back
from tbptt.model import copy_model, find_lane_dims, trainable_parameters
from tbptt.pathways import segment_steps
from tbptt.side_state import SideState
from tbptt.tree import LaneDims, Tree, detach, time_cat, time_slice, to, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Conditions", "Trial", "attempt", "row"]

SMALL = 2**16
"""Of a model with more numbers than this, gradients are taken for the smaller parameters, those of each module."""


@dataclass(frozen=True)
class Conditions:
    """Under what the runs that are compared are made.

    Args:
        train: in training mode; else in eval mode.
        steady: torch's random numbers, and the statistics of batch normalisation, are held still.
        held: places of the side state that are put back before each call of the model.
    """

    train: bool = False
    steady: bool = False
    held: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Trial:
    """A copy of the model, an example, and how it is cut.

    Args:
        model: the copy; in double precision where the model allows that.
        window: the example, of two lanes; its inputs only.
        plans: the ways to cut it, by name: lengths of consecutive chunks, from its first step on. "elsewhere", in
            place of single steps, for a model that says that it is cut into segments: it is to refuse that.
        wide: the same steps with up to four lanes.
        long: all steps of the example.
        dims: the lane dimensions of the state.
        value_tolerance: the relative difference below which two outputs count as one.
        gradient_tolerance: the same for two gradients.
        precision: in words.
        start: random generators, buffers and attributes as they are before every run that begins a sequence.
        conditions: those of the runs.
        half: the same in the model's own precision, where that is of 16 bits and the copy is in another.
    """

    model: nn.Module
    window: Window
    plans: dict[str, list[int]]
    wide: Window
    long: Window
    dims: LaneDims | None = None
    value_tolerance: float = 1e-8
    gradient_tolerance: float = 1e-8
    precision: str = "float64"
    start: SideState | None = None
    conditions: Conditions = Conditions()
    half: Trial | None = None

    @staticmethod
    def prepare(model: nn.Module, example: Window, chunks: Sequence[int] | None) -> Trial:
        """Make a trial of `model`, which stays untouched.

        Raises:
            ShapeError: the example is too short for its chunks, or to be cut at all.
            ConfigError: chunks that are none.
        """
        sizes = sizes_of(example.steps, chunks, segment_steps(model))
        device = next(model.parameters()).device
        whole = to(tree_map(lambda leaf: leaf[:, :MAX_LANES], example.inputs), device)
        copied = copy_model(model)
        if chunks is None and not _runs(copied, time_slice(whole, 0, sum(sizes)), sizes):  # some take certain lengths
            sizes = next((each for each in other_sizes(example.steps) if _runs(copied, whole, each)), sizes)
        as_is = _trial(copied, whole, sizes)
        as_is = replace(as_is, value_tolerance=1e-4, gradient_tolerance=1e-4, precision="its own precision")
        half = half_precision(model)
        if half is not None:  # a step rounds by eps / 2, and one way to a result differs from another in several
            limit = 8 * torch.finfo(half).eps
            as_is = replace(as_is, value_tolerance=limit, gradient_tolerance=limit)
        doubled = in_double(as_is.model, as_is.wide.inputs)
        if doubled is None:
            trial = as_is
        else:
            trial = _trial(doubled[0], cast_inputs(whole, torch.float64), sizes)
            trial = trial.tolerant(as_is.in_single() if half else as_is) if computes_narrower(*doubled) else trial
            trial = trial if half is None else replace(trial, half=as_is.begun())
        return replace(trial, dims=find_lane_dims(trial.model, trial.window.inputs)).begun()

    def in_single(self) -> Trial:
        """Return the trial of a copy in single precision."""
        inputs = [Window(cast_inputs(each.inputs, torch.float32)) for each in (self.window, self.wide, self.long)]
        return replace(self, model=copy_model(self.model).float(), window=inputs[0], wide=inputs[1], long=inputs[2])

    def begun(self) -> Trial:
        """Return the trial with its start; what wrappers of `tbptt.stateful` find out is found out before."""
        before = SideState.of(self.model, device=self.device)
        wrapped = [module for module in self.model.modules() if isinstance(module, Stateful)]
        if wrapped:
            for steps in (1, self.plans["chunks"][0]):
                attempt(lambda steps=steps: len(self.run(self.window[:steps], None)))
        known = [dict(module.overwrites) for module in wrapped]
        before.restore(self.model, in_place=False)
        for module, found in zip(wrapped, known, strict=True):
            module.overwrites.update(found)
        return replace(self, start=SideState.of(self.model, device=self.device))

    def tolerant(self, single: Trial) -> Trial:
        """Return the trial of a model parts of which stay in single precision, whatever it is asked for.

        What rounding does to it is measured: the distance of the same pass in single precision.
        """
        pair = [each.begun() for each in (self, single)]
        outputs = [each.whole() for each in pair]
        value = apart(detach(outputs[0]), detach(outputs[1]))
        gradient = attempt(lambda: pair[0]._gradient_apart(pair[1], outputs))
        # Rounding differs from one way to the next by more than from one precision to the next; never by 1e-3.
        noises = (value, gradient if isinstance(gradient, float) else value)
        limits = [min(1e-3, max(1e-6, 30 * noise)) for noise in noises]
        words = f"float64 with parts in float32, where differences below {limits[0]:.0e} are rounding"
        return replace(self, value_tolerance=limits[0], gradient_tolerance=limits[1], precision=words)

    def _gradient_apart(self, single: Trial, outputs: list[Tree]) -> float:
        gradients = [each.gradient(found, 0) for each, found in zip((self, single), outputs, strict=True)]
        return distance(gradients[0], [leaf.double() for leaf in gradients[1]])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def tried(self) -> str:
        """What the model is tried on, in words."""
        lanes = f"{self.window.lanes} lane" + ("s" if self.window.lanes > 1 else "")
        return f"{lanes} of {'+'.join(map(str, self.plans['chunks']))} steps, in {self.precision}"

    @contextmanager
    def under(self, conditions: Conditions) -> Generator[Trial]:
        """Yield the trial under other conditions; afterwards random generators and the copy are as at the start."""
        trial = replace(self, conditions=conditions)
        trial.restart()
        held = self.model.register_forward_pre_hook(trial._put_back) if conditions.held else None  # pyright: ignore[reportPrivateUsage]
        try:
            with steady() if conditions.steady else nullcontext():
                yield trial
        finally:
            if held is not None:
                held.remove()
            trial.restart()

    def restart(self) -> None:
        """Put random generators, buffers and attributes back to where they were at the start."""
        assert self.start is not None
        self.start.restore(self.model, in_place=False)
        self.model.train(self.conditions.train)

    def run(self, window: Window, state: Tree | None) -> tuple[Tree, Tree]:
        """Run the model over `window` from `state`."""
        return unroll(self.model, window, state, None)

    def _put_back(self, *called: Any) -> None:
        """Give the modules what they had at the start: copies in its place, as graphs may have saved what is there."""
        del called  # the model that is about to be called, and its inputs
        assert self.start is not None
        for place in self.conditions.held:
            path, _, name = place.rpartition(".")
            owner = self.model.get_submodule(path.partition(".")[2])
            buffers: dict[str, Any] = owner._buffers  # pyright: ignore[reportPrivateUsage, reportAssignmentType]
            room, holder = (f"{path}:buffers", buffers) if name in buffers else (path, vars(owner))
            if name in self.start.values[room]:
                holder[name] = put_back(self.start.values[room][name], None, {}, in_place=False)
            else:
                holder.pop(name, None)

    def whole(self, window: Window | None = None) -> Tree:
        """Return the outputs of one pass, over all steps or those of `window`."""
        self.restart()
        return self.run(self.window if window is None else window, None)[0]

    def chunks(
        self, sizes: Sequence[int], *, forget: bool = False, cut: bool = False, window: Window | None = None
    ) -> Tree:
        """Return the outputs of consecutive chunks; without passing the state on, or its graph, if asked."""
        self.restart()
        state, pieces = None, []
        for begin, end in pairwise([0, *accumulate(sizes)]):
            outputs, state = self.run((window or self.window)[begin:end], None if forget else state)
            state = detach(state) if cut else state
            pieces.append(outputs)
        return time_cat(pieces)

    def values(self, sizes: Sequence[int], *, forget: bool = False, window: Window | None = None) -> Tree:
        """Return the outputs of consecutive chunks, without any graph."""
        return detach(self.chunks(sizes, forget=forget, cut=True, window=window))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those whose gradients are compared: all of a small model; of a large one the small ones, and one a module."""
        every = trainable_parameters(self.model)
        smallest: dict[str, str] = {}
        for name, value in every.items():
            owner = name.rpartition(".")[0]
            if owner not in smallest or value.numel() < every[smallest[owner]].numel():
                smallest[owner] = name
        few = sum(value.numel() for value in every.values()) <= SMALL
        return {
            name: value
            for name, value in every.items()
            if few or name in smallest.values() or value.numel() <= SMALL // 16
        }

    def gradient(self, outputs: Tree, begin: int, scale: float = 1.0, *, keep: bool = False) -> list[Tensor]:
        """Return the gradient of a random direction of the outputs from step `begin` on."""
        total = project(outputs, begin) * scale
        found = torch.autograd.grad(total, list(self.parameters.values()), retain_graph=keep, materialize_grads=True)
        return [each.to_dense() if each.layout != torch.strided else each for each in found]


def attempt(measure: Callable[[], float]) -> float | str:
    """Return what was measured, or what the model said instead, in one line."""
    try:
        return measure()
    except Exception as error:  # whatever a model says to a length that it does not take is an answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def row(values: Mapping[str, float | str]) -> str:
    """Return what was measured on one line."""
    shown = [
        f"{label} {value:.0e}" if isinstance(value, float) else f"{label} refused" for label, value in values.items()
    ]
    return ", ".join(shown)


def _trial(model: nn.Module, whole: Tree, sizes: list[int]) -> Trial:
    """Return the trial of a model on all lanes and steps there are."""
    wide = Window(time_slice(whole, 0, sum(sizes)))
    told = tree_map(lambda leaf: leaf[:, :TOLD_LANES], whole)
    return Trial(
        model, Window(time_slice(told, 0, sum(sizes))), cut_into(sizes, segment_steps(model)), wide, Window(told)
    )


def _runs(model: nn.Module, inputs: Tree, sizes: Sequence[int]) -> bool:
    """Tell whether a model can be run over the first chunk and go on with the second."""
    before, state = SideState.of(model), None
    try:
        for begin, end in pairwise([0, *accumulate(sizes[:2])]):
            _, state = unroll(model, Window(time_slice(inputs, begin, end)), detach(state), None)
    except Exception:  # said again, and not caught, when it is run in earnest
        return False
    finally:
        before.restore(model, in_place=False)
    return True
