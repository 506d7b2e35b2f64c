"""What a model computes in one pass and in chunks, in a mode: measured, with randomness told from a lost state.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor

from tbptt.checks.precision import apart
from tbptt.checks.steady import Operations, Watched
from tbptt.checks.trial import Conditions, Trial, attempt
from tbptt.copies import generators_in, same
from tbptt.side_state import SideState
from tbptt.tree import Tree, all_finite, clone, detach, tree_map
from tbptt.window import Window

__all__ = ["Aside", "Facts", "Values", "exceeds", "measure_values"]


@dataclass(frozen=True)
class Aside:
    """What else than the state a chunk goes on from.

    Args:
        apart: how far a chunk is from itself, given the same state and random numbers, with all else as at the start.
        places: what is kept in the modules and moved; empty where what it is could not be found in them.
        lanes: whether that has a size for each lane, as a state has.
        counts: whether it is, or has in it, a Python number that counts steps or data.
        calls: whether it depends on how many calls of training there were, and on nothing else, as annealing does.
    """

    apart: float = 0.0
    places: tuple[str, ...] = ()
    lanes: bool = False
    counts: bool = False
    calls: bool = False

    @property
    def names(self) -> list[str]:
        """The places as the model's own code has them."""
        return [place.partition(".")[2] for place in self.places]

    @property
    def statistic(self) -> bool:
        """Whether it is what may be kept aside: numbers of all lanes together, such as a running scale."""
        return bool(self.places) and not self.lanes and not self.counts


@dataclass(frozen=True, eq=False)
class Values:
    """One pass and chunks of it, in one mode.

    Args:
        conditions: those under which they were compared, in the end.
        found: the distance of the chunks, by the name of the plan; a text where the model refused.
        finite: whether one pass is.
        draws: where its random numbers come from, such as "torch"; empty where none are, or none matter.
        dropout: the function that drops something out; empty for none.
        batch_norm: whether statistics of the batch are used.
        thresholds: whether it has operations that make steps of small changes.
        aside: what it goes on from besides the state.
        forgotten: the distance of chunks each of which begins anew.
    """

    conditions: Conditions
    found: dict[str, float | str] = field(default_factory=dict[str, "float | str"])
    finite: bool = True
    draws: tuple[str, ...] = ()
    dropout: str = ""
    batch_norm: bool = False
    thresholds: bool = False
    aside: Aside = Aside()
    forgotten: float | str = 0.0
    wrong: tuple[str, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether chunks are what one pass is, and nothing but the state is gone on from."""
        asides = self.aside.apart == 0 or self.aside.statistic
        return self.finite and asides and not self.wrong and isinstance(self.found["chunks"], float)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a model computes in both modes.

    Args:
        still: in eval mode.
        training: in training mode.
    """

    still: Values
    training: Values

    @property
    def conditions(self) -> Conditions:
        """Those to compare gradients under: in training mode, unless chunks draw other random numbers there."""
        other = self.training.aside.statistic or any(each != "torch" for each in self.training.draws)
        return self.still.conditions if other and not self.training.agree else self.training.conditions


def measure_values(trial: Trial, *, train: bool) -> Values:
    """Run one pass and chunks of it, in one mode, under conditions in which they can agree if the state is carried."""
    with trial.under(Conditions(train)) as plain:
        found, whole = _watched(plain)
        if not all_finite(whole):
            return replace(found, finite=False)
        try:
            aside = _aside(plain)
        except Exception:  # it cannot go on from its own state: where chunks are run, it is said why
            aside = Aside()
    held = aside.places if aside.statistic else ()
    options = [Conditions(train, held=held)]
    if found.batch_norm or "torch" in found.draws:
        options = [*([] if found.batch_norm else options), Conditions(train, steady=True, held=held)]
    for conditions in options:
        with trial.under(conditions) as chosen:
            whole = detach(chosen.whole())
            distances = _distances(chosen, whole)
            forgotten = attempt(lambda c=chosen, w=whole: apart(w, c.values(trial.plans["chunks"], forget=True)))
        wrong = tuple(label for label, value in distances.items() if exceeds(value, trial.value_tolerance))
        found = replace(found, conditions=conditions, found=distances, aside=aside, forgotten=forgotten, wrong=wrong)
        if not wrong:
            break
    return found


def _distances(trial: Trial, whole: Tree) -> dict[str, float | str]:
    return {
        label: attempt(lambda sizes=sizes: apart(tree_map(lambda leaf: leaf[: sum(sizes)], whole), trial.values(sizes)))
        for label, sizes in trial.plans.items()
    }


def _watched(trial: Trial) -> tuple[Values, Tree]:
    """Return what happens in one pass, and its outputs."""
    operations, functions = Operations(), Watched()
    assert trial.start is not None
    try:
        with functions, operations:
            whole = trial.whole()
    except Exception:  # some compiled code does not run where it is watched; if it is the model, it says it again
        operations, functions = Operations(), Watched()
        whole = trial.whole()
    there = SideState.of(trial.model, device=trial.device)
    own = [place for place in trial.start.differences(there) if place not in there.generators]
    own = [place for place in own if _is_generator(trial, place)]
    draws = [name for name in trial.start.differences(there) if name in there.generators] + own
    if operations.random and "torch" not in draws:  # from a generator of its own
        draws.append("torch")
    if draws:  # do they matter? With those that come next
        _exchanged(replace(trial.start, generators=there.generators), there, own).restore(trial.model, in_place=False)
        trial.model.train(trial.conditions.train)
        draws = draws if apart(detach(whole), detach(trial.run(trial.window, None)[0])) > 0 else []
    found = Values(
        trial.conditions,
        draws=tuple(draws),
        dropout=functions.dropout,
        batch_norm=bool(functions.batch_norm),
        thresholds=operations.thresholds,
    )
    return found, detach(whole)


def _aside(trial: Trial) -> Aside:
    """Run the second chunk again, from the same state and random numbers, with all that is kept aside as at the start.

    In between, the model is run over other steps: what is kept where it cannot be put back is another, too.
    """
    first, second = trial.plans["chunks"][:2]
    following = trial.window[first : first + second]
    trial.restart()
    _, state = trial.run(trial.window[:first], None)
    state = clone(state)
    there = SideState.of(trial.model, device=trial.device)
    usual = detach(trial.run(following, clone(state))[0])
    assert trial.start is not None
    start = trial.start

    def other(places: Iterable[str]) -> float:
        """Return how far the chunk is from itself, with what is kept at these places as at the start."""
        _exchanged(there, start, places).restore(trial.model, in_place=False)
        trial.model.train(trial.conditions.train)
        try:
            return apart(usual, detach(trial.run(following, clone(state))[0]))
        except Exception:  # what is kept there is needed to go on
            return float("inf")

    moved = [place for place in start.differences(there) if place not in there.generators]
    moved = [place for place in moved if not _is_generator(trial, place)]
    trial.whole(Window(tree_map(lambda leaf: leaf.flip(0), trial.window.inputs)))
    found = other(moved)
    if not exceeds(found, trial.value_tolerance):
        return Aside()
    if exceeds(other(()), trial.value_tolerance):
        return Aside(found)
    places = tuple(place for place in moved if exceeds(other([place]), trial.value_tolerance)) or tuple(moved)
    numbers = any(type(each) is int for place in places for each in _contents(there, place))
    calls = trial.conditions.train and _counts_calls(trial, places)
    return Aside(found, places, _has_lanes(trial, places), numbers and not calls, calls)


def _counts_calls(trial: Trial, places: tuple[str, ...]) -> bool:
    """Tell whether what is kept is the same after one call, whatever the inputs and however many steps."""
    ends: list[list[Any]] = []
    reversed_steps = Window(tree_map(lambda leaf: leaf.flip(0), trial.window.inputs))
    for window in (trial.window[: trial.plans["chunks"][0]], reversed_steps):
        trial.restart()
        trial.run(window, None)
        now = SideState.of(trial.model, device=trial.device)
        ends.append([_contents(now, place) for place in places])
    return same(*ends)


def _exchanged(state: SideState, other: SideState, places: Iterable[str]) -> SideState:
    """Return a side state with what another one has at some places."""
    values: dict[str, dict[str, Any]] = {room: dict(each) for room, each in state.values.items()}
    for place in places:
        path, _, name = place.rpartition(".")
        for room in (path, f"{path}:buffers"):
            values.get(room, {}).pop(name, None)
            if name in other.values.get(room, {}):
                values[room][name] = other.values[room][name]
    return replace(state, values=values)


def _is_generator(trial: Trial, place: str) -> bool:
    """Tell whether there is a random generator at a place, which may well be elsewhere in another chunk."""
    path, _, name = place.rpartition(".")
    module = dict(trial.model.named_modules()).get(path.partition(".")[2])  # a scripted one has no get_submodule
    return any(generators_in(getattr(module, name, None), set()))


def _contents(state: SideState, place: str) -> list[Any]:
    """Return the tensors and plain values that are kept at a place."""
    path, _, name = place.rpartition(".")
    rest: list[Any] = [state.values[r][name] for r in (path, f"{path}:buffers") if name in state.values.get(r, {})]
    found: list[Any] = []
    while rest:
        each = rest.pop()
        if isinstance(each, Mapping):
            rest += cast("Mapping[Any, Any]", each).values()
        elif isinstance(each, (list, tuple, deque)):
            rest += cast("list[Any]", each)
        else:
            found.append(each)
    return found


def _has_lanes(trial: Trial, places: tuple[str, ...]) -> bool:
    """Tell whether something kept aside has another size with another number of lanes."""
    if trial.window.lanes == 1:
        return False
    shapes: list[list[tuple[int, ...]]] = []
    for lanes in (trial.window.lanes, trial.window.lanes - 1):
        trial.restart()
        try:
            trial.run(Window(tree_map(lambda leaf, lanes=lanes: leaf[:, :lanes], trial.window.inputs)), None)
        except Exception:  # it takes one number of lanes only
            return False
        now = SideState.of(trial.model)
        shapes.append([tuple(leaf.shape) for p in places for leaf in _contents(now, p) if isinstance(leaf, Tensor)])
    return shapes[0] != shapes[1]


def exceeds(value: float | str, tolerance: float) -> bool:
    """Tell whether a distance was measured and is more than rounding; NaN exceeds everything."""
    return isinstance(value, float) and not value <= tolerance
