"""A model, an example, and the ways to run one on the other.

Letters: T time, B lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from tbptt.checks.precision import (
    apart,
    cast_inputs,
    computes_narrower,
    distance,
    half_precision,
    in_double,
    project,
)
from tbptt.errors import ConfigError, ShapeError
from tbptt.model import find_lane_dims, left_as_it_was, trainable_parameters
from tbptt.pathways import segment_steps
from tbptt.tree import LaneDims, Tree, detach, time_cat, time_slice, to, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Trial", "attempt", "row"]

MAX_STEPS, MAX_LANES = 24, 4
"""What of the example is used, unless its chunks are given: enough to see every fault, little enough for a second."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A copy of the model, an example, and how it is cut.

    Args:
        model: the copy; in double precision where the model allows that.
        window: the example; its inputs only.
        plans: the ways to cut it, by name: lengths of consecutive chunks, from its first step on. "elsewhere", in
            place of single steps, for a model that says that it is cut into segments: it is to refuse that.
        dims: the lane dimensions of the state.
        value_tolerance: the relative difference below which two outputs count as one.
        gradient_tolerance: the same for two gradients.
        precision: in words.
        half: the same in the model's own precision, where that is of 16 bits and the copy is in another.
    """

    model: nn.Module
    window: Window
    plans: dict[str, list[int]]
    dims: LaneDims | None = None
    value_tolerance: float = 1e-8
    gradient_tolerance: float = 1e-8
    precision: str = "float64"
    half: Trial | None = None

    @staticmethod
    def prepare(model: nn.Module, example: Window, chunks: Sequence[int] | None) -> Trial:
        """Make a trial of `model`, which stays untouched.

        Raises:
            ShapeError: the example is too short for its chunks, or to be cut at all.
            ConfigError: chunks that are none.
        """
        sizes = _sizes(example, chunks, segment_steps(model))
        device = next(model.parameters()).device
        inputs = to(tree_map(lambda leaf: leaf[: sum(sizes), :MAX_LANES], example.inputs), device)
        if chunks is None and not _runs(model, inputs, sizes):  # some take certain lengths only
            whole = to(tree_map(lambda leaf: leaf[:, :MAX_LANES], example.inputs), device)
            sizes = next((each for each in _others(example.steps) if _runs(model, whole, each)), sizes)
            inputs = time_slice(whole, 0, sum(sizes))
        plans = _plans(sizes, segment_steps(model))
        as_is = Trial(copy.deepcopy(model), Window(inputs), plans, None, 1e-4, 1e-4, "its own precision")
        half = half_precision(model)
        if half is not None:  # a step rounds by eps / 2, and one way to a result differs from another in several
            limit = 8 * torch.finfo(half).eps
            as_is = replace(as_is, value_tolerance=limit, gradient_tolerance=limit)
        doubled = in_double(as_is.model, inputs)
        if doubled is None:
            trial = as_is
        else:
            trial = Trial(doubled[0], Window(doubled[1]), plans)
            trial = trial.tolerant(as_is.in_single() if half else as_is) if computes_narrower(*doubled) else trial
            trial = trial if half is None else replace(trial, half=as_is)
        return replace(trial, dims=find_lane_dims(trial.model, trial.window.inputs))

    def in_single(self) -> Trial:
        """Return the trial of a copy in single precision."""
        inputs = cast_inputs(self.window.inputs, torch.float32)
        return replace(self, model=copy.deepcopy(self.model).float(), window=Window(inputs))

    def tolerant(self, single: Trial) -> Trial:
        """Return the trial of a model parts of which stay in single precision, whatever it is asked for.

        What rounding does to it is measured: the distance of the same pass in single precision.
        """
        with self.mode(train=False), single.mode(train=False):
            outputs = [each.run(each.window, None)[0] for each in (self, single)]
            value = apart(*outputs)
            gradient = attempt(lambda: self._gradient_apart(single, outputs))
        # Rounding differs from one way to the next by more than from one precision to the next; never by 1e-3.
        noises = (value, gradient if isinstance(gradient, float) else value)
        limits = [min(1e-3, max(1e-6, 30 * noise)) for noise in noises]
        words = f"float64 with parts in float32, where differences below {limits[0]:.0e} are rounding"
        return replace(self, value_tolerance=limits[0], gradient_tolerance=limits[1], precision=words)

    def _gradient_apart(self, single: Trial, outputs: list[Tree]) -> float:
        gradients = [each.gradient(found, 0) for each, found in zip((self, single), outputs, strict=True)]
        return distance(gradients[0], [leaf.double() for leaf in gradients[1]])

    @property
    def tried(self) -> str:
        """What the model is tried on, in words."""
        lanes = f"{self.window.lanes} lane" + ("s" if self.window.lanes > 1 else "")
        return f"{lanes} of {'+'.join(map(str, self.plans['chunks']))} steps, in {self.precision}"

    def run(self, window: Window, state: Tree | None) -> tuple[Tree, Tree]:
        """Run the model over `window` from `state`."""
        return unroll(self.model, window, state, None)

    def chunks(self, sizes: Sequence[int], *, forget: bool = False, cut: bool = False) -> Tree:
        """Return the outputs of consecutive chunks; without passing the state on, or its graph, if asked."""
        state, pieces = None, []
        for begin, end in pairwise([0, *accumulate(sizes)]):
            outputs, state = self.run(self.window[begin:end], None if forget else state)
            state = detach(state) if cut else state
            pieces.append(outputs)
        return time_cat(pieces)

    def gradient(self, outputs: Tree, begin: int) -> list[Tensor]:
        """Return the gradient of a random direction of the outputs from step `begin` on."""
        parameters = list(trainable_parameters(self.model).values())
        return list(torch.autograd.grad(project(outputs, begin), parameters, materialize_grads=True))

    @contextmanager
    def mode(self, *, train: bool) -> Generator[None]:
        """Put the copy into a mode; afterwards its buffers and attributes are as before."""
        self.model.train(train)
        with left_as_it_was(self.model):
            yield


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


def _sizes(example: Window, chunks: Sequence[int] | None, segment: int) -> list[int]:
    if chunks is None:
        if segment > 1:
            return _segments(example.steps, segment)
        if example.steps < 3:
            raise ShapeError(
                f"an example of at least 3 steps was expected, but {example.steps} came: "
                "one pass could not be compared with chunks of it",
                fix="tbptt.check(model, torch.randn(24, 4, features))",
            )
        return _thirds(min(example.steps, MAX_STEPS))
    sizes = list(chunks)
    if len(sizes) < 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"two or more lengths of chunks, in steps from 1, were expected, but {chunks!r} came: with one chunk "
            "nothing is carried",
            fix="chunks=(8, 8, 8)",
        )
    if sum(sizes) > example.steps:
        raise ShapeError(
            f"an example of at least {sum(sizes)} steps was expected, for chunks of {'+'.join(map(str, sizes))}, "
            f"but it has {example.steps}",
            fix="give a longer example, or shorter chunks",
        )
    return sizes


def _segments(steps: int, segment: int) -> list[int]:
    """Return the chunks for a model that is cut into segments: three of one segment, or of several short ones."""
    chunk = segment * max(1, min(steps, MAX_STEPS) // 3 // segment)
    if steps < 3 * chunk:
        raise ShapeError(
            f"an example of at least three segments of {segment} steps was expected, but {steps} steps came: the "
            "model can be cut at the end of a segment only, and one pass is compared with chunks of it",
            fix=f"tbptt.check(model, torch.randn({3 * segment}, 4, features))",
        )
    return [chunk] * 3


def _thirds(steps: int) -> list[int]:
    third = steps // 3
    return [third, third, steps - 2 * third]


def _plans(sizes: list[int], segment: int) -> dict[str, list[int]]:
    if segment == 1:
        return {"chunks": sizes, "uneven": _uneven(sizes), "steps": [1] * min(sum(sizes), MAX_STEPS)}
    longer = [sizes[0] + sizes[1], *sizes[2:]]  # in segments as well; and where it says that it must not be cut
    return {"chunks": sizes, "uneven": longer, "elsewhere": _uneven(sizes)}


def _uneven(sizes: list[int]) -> list[int]:
    return [size for size in (sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1) if size]


def _others(steps: int) -> list[list[int]]:
    """Return the chunks to try with a model that does not take the usual ones."""
    third = min(steps, MAX_STEPS) // 3
    return ([_thirds(steps)] if steps > MAX_STEPS else []) + [[each] * 3 for each in range(third - 1, 1, -1)]


def _runs(model: nn.Module, inputs: Tree, sizes: Sequence[int]) -> bool:
    """Tell whether a model can be run over the first chunk and go on with the second."""
    model, state = copy.deepcopy(model), None
    try:
        with torch.no_grad():
            for begin, end in pairwise([0, *accumulate(sizes[:2])]):
                _, state = unroll(model, Window(time_slice(inputs, begin, end)), state, None)
    except Exception:  # said again, and not caught, when it is run in earnest
        return False
    return True
