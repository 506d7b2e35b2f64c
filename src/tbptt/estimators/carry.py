"""What estimators over a chain of segments carry from window to window.

Letters: B lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.estimators.history import History, Stretch
from tbptt.estimators.replayable import joins_of
from tbptt.estimators.retained import RetainedSegment, retained_from, retained_state
from tbptt.length import Adaptive, Length, LengthState
from tbptt.length.base import States, states_from
from tbptt.model import find_lane_dims
from tbptt.pathways import in_segments, segment_steps
from tbptt.rereading import Rereading
from tbptt.side_changes import packed, unpacked
from tbptt.tree import LaneDims, Tree, all_finite, tensors
from tbptt.window import Window

__all__ = ["ChainCarry", "check_saved_lanes", "check_window"]


@dataclass(eq=False)
class ChainCarry:
    """What an estimator over a chain of segments carries.

    Attributes:
        lanes: the number of sequences side by side.
        state: the model's state after the last window, detached; None before the first.
        dims: the lane dimension of each tensor of the state, once it has been found out.
        past: the steps that the next look-back or probe may re-run.
        windows: the lengths of the last windows, newest first, as far as a look-back may go: where the boundaries are.
        retained: the segments whose graphs the next look-back may use, oldest first.
        lengths: how far the policies of k1 and k2 have come.
        draws: made so far by an estimator that draws; with its seed, they say what is drawn next. Of `TBPTT`:
            updates made.
        running: running means that it draws by; None for one of nothing yet.
        looked: whether the lane dimensions were looked for.
        loss_looked: whether the loss was looked at, if it is one of single steps; set in place, once it is known.
        joins: whether the model's calls may be joined, and cut elsewhere, when steps are run again: it draws nothing,
            moves nothing, and its outputs are the same. None: not known yet; set in place, see `replayable`.
        unit: steps of a segment, where the model is cut into segments: all cuts are multiples of it. Else 1.
    """

    lanes: int
    state: Tree | None = None
    dims: LaneDims | None = None
    past: History = field(default_factory=History)
    windows: tuple[int, ...] = ()
    retained: tuple[RetainedSegment, ...] = ()
    lengths: States = field(default_factory=dict[str, LengthState])
    draws: int = 0
    running: tuple[float | None, ...] = ()
    unit: int = 1
    looked: bool = field(default=False, repr=False)
    loss_looked: bool = field(default=False, repr=False)
    joins: bool | None = field(default=None, repr=False)

    @property
    def finite(self) -> bool:
        """Whether the model's state is."""
        return all_finite(self.state)

    def with_dims(self, model: nn.Module, window: Window) -> ChainCarry:
        """Return the carry with the lane dimensions of the model's state, looked for once."""
        if self.looked:
            return self
        return replace(self, dims=find_lane_dims(model, window.inputs), looked=True)

    def for_window(self, model: nn.Module, window: Window) -> ChainCarry:
        """Return the carry as a look-back from `window` finds it, with the lane dimensions of the model's state.

        Where all lanes start anew at its first step, nothing before it is needed any more: neither state nor gradient
        comes from there.
        """
        carry = self.with_dims(model, window)
        return replace(carry, past=History(), windows=(), retained=()) if window.resets.get(0) else carry

    def boundaries(self, news: int) -> list[int]:
        """Return the steps at which windows begin inside a look-back, newest first, counted from its own first step.

        Args:
            news: the step at which the newest window begins.
        """
        found: list[int] = []
        for steps in (0, *self.windows):
            news -= steps
            if news <= 0:
                break
            found.append(news)
        return found

    def windows_with(self, steps: int, keep: int) -> tuple[int, ...]:
        """Return the lengths of the last windows, one of `steps` steps the newest, that cover `keep` steps at least."""
        kept, total = [steps], steps
        for each in self.windows:
            if total >= keep:
                break
            kept.append(each)
            total += each
        return tuple(kept)

    def missing(self, window: Window) -> int:
        """Return how many steps `window` is short of the end of a segment, as the last one of a pass may be.

        Nothing goes on from there. A look-back begins where it would if they were there, or it would cut a segment.
        """
        return -window.steps % self.unit

    def last(self, model: nn.Module, steps: int) -> Stretch | None:
        """Return the last `steps` steps before the window, all there are if that is fewer; None for none.

        For a model whose calls cannot be cut elsewhere they begin with a call, and may be fewer.
        """
        if self.joins is None and self.past.stretches:
            self.joins = joins_of(model, self.past.stretches, self.dims, self.unit)
        return self.past.last(model, steps, self.dims, whole_calls=not self.joins)

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors; graphs are left out and built again when needed."""
        return {
            "lanes": self.lanes,
            "state": self.state,
            "dims": self.dims,
            "looked": self.looked,
            "past": _past_of(self),
            "windows": list(self.windows),
            "retained": retained_state(self.retained),
            "lengths": {name: each.state_dict() for name, each in self.lengths.items()},
            "draws": self.draws,
            "running": list(self.running),
            "joins": self.joins,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: it was saved with another number of lanes.
        """
        check_saved_lanes(self.lanes, state["lanes"])
        self.state, self.looked, self.draws = state["state"], state["looked"], state["draws"]
        self.running, self.windows = tuple(state["running"]), tuple(state.get("windows", ()))
        self.dims = None if state["dims"] is None else tuple(state["dims"])
        self.past = _past_from(state["past"])
        self.joins = state.get("joins")
        self.lengths = states_from(state["lengths"])
        self.retained = retained_from(state["retained"])


def _past_of(carry: ChainCarry) -> dict[str, Any]:
    stretches = carry.past.stretches
    return {
        "stretches": [
            {"window": each.window.state_dict(), "state": each.state, "calls": list(each.calls)} for each in stretches
        ],
        # what draws and moves nothing is the same from whatever it finds
        "sides": packed([None if carry.joins else each.side for each in stretches]),
    }


def _past_from(state: dict[str, Any] | list[dict[str, Any]]) -> History:
    if isinstance(state, list):  # of a version that kept no side states: the model draws anew
        return History(tuple(Stretch(Window(**each["window"]), each["state"]) for each in state))
    pairs = zip(state["stretches"], unpacked(state["sides"]), strict=True)
    return History(
        tuple(Stretch(Window(**each["window"]), each["state"], side, tuple(each["calls"])) for each, side in pairs)
    )


def unit_of(model: nn.Module, **lengths: int | Length | Sequence[int] | None) -> int:
    """Return the steps of the model's segments, 1 for one without; lengths must be multiples of them.

    Args:
        lengths: the settings that decide where a sequence is cut, by name; None for one that is left out.

    Raises:
        ConfigError: one of them is, or may become, no multiple of a segment: said before anything is trained.
    """
    unit = segment_steps(model)
    for name, length in lengths.items():
        of = length.unit if isinstance(length, Length) else length or 0
        if any(each % unit for each in (of if isinstance(of, Sequence) else [of])):
            raise ConfigError(
                f"{name} in multiples of the segments of {unit} steps of {type(model).__name__} was expected, but "
                f"{name}={length} came: a window or a look-back that begins within a segment belongs to another model",
                fix=_fitting(name, length, unit),
            )
    return unit


def _fitting(name: str, length: int | Length | Sequence[int] | None, unit: int) -> str:
    if isinstance(length, Adaptive):
        return f"{name}=Adaptive(..., max={in_segments(length.max, unit)}, multiple={unit})"
    if isinstance(length, Length):
        return f"{name}=Curriculum([1, 2, 4], updates=1000, segment={unit}), or Choice of multiples of {unit}"
    whole = [in_segments(each, unit) for each in (length if isinstance(length, Sequence) else [length or unit])]
    return f"{name}={whole if isinstance(length, Sequence) else whole[0]}"


def check_saved_lanes(lanes: int, saved: int) -> None:
    """Refuse a saved carry of another number of lanes.

    Raises:
        ShapeError: it is one.
    """
    if saved != lanes:
        raise ShapeError(
            f"a carry of {lanes} lanes was expected, but the saved one has {saved}: "
            "each lane's state belongs to that lane's sequence",
            fix=f"go on with {saved} lanes",
        )


def check_window(window: Window | Rereading, carry: ChainCarry, most: int | None = None, fix: str = "") -> None:
    """Refuse a window that an estimator cannot go on with.

    Args:
        window: the steps to come.
        carry: what it goes on from.
        most: the most steps that it may have; None for any number.
        fix: what to say where it has more.

    Raises:
        ShapeError: it has more steps, or other lanes than the carry.
        CapabilityError: its inputs or targets, or the state, carry a graph.
    """
    if most is not None and window.steps > most:
        raise ShapeError(
            f"a window of at most k1 = {most} steps was expected, but {window.steps} came: "
            "there would be fewer updates than k1 says",
            fix=fix or "stream.read(estimator.next_steps(carry))",
        )
    if window.lanes != carry.lanes:
        raise ShapeError(
            f"a window of {carry.lanes} lanes was expected, as the carry has, but {window.lanes} came: "
            "each lane's state belongs to that lane's sequence",
            fix=f"estimator.init(model, lanes={window.lanes}) when the sequences are other ones",
        )
    first = window if isinstance(window, Window) else window.first
    for what, tree in (("inputs", first.inputs), ("targets", first.targets), ("a carried state", carry.state)):
        for leaf in () if tree is None else tensors(tree):
            if leaf.requires_grad:
                raise CapabilityError(
                    f"{what} without a graph were expected, but a tensor of shape {tuple(leaf.shape)} requires a "
                    f"gradient in the window from step {window.start} on: the estimator returns gradients of the model "
                    "and of the loss only, so that whatever has made it would never be trained",
                    fix="make the module that makes it, such as an encoder, a part of the model; or detach() it",
                )
