"""What training changes in the model and the loss besides their weights, and a checkpoint must hold for that.

Counters in attributes, buffers that are in no state_dict, random generators of modules: found by comparing with what
was there at the start. What never changes is a setting, is not saved, and so may be another when a run is resumed.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt.codec import encode
from tbptt.copies import OTHER, from_plain, generators_in, is_savable, same, state_of, to_plain
from tbptt.errors import CheckpointError
from tbptt.opaque import is_container, parts
from tbptt.side_state import SideState

__all__ = ["SideChanges", "packed", "unpacked"]

_MOST = 100_000  # parts of the objects of one module; what is larger (a data set, a tokenizer) is not looked into
_OF_RNNS = ("_flat_weights", "_flat_weight_refs")  # of torch.nn's: renewed by themselves when weights are exchanged
_Places = dict[str, list[str]]
"""Names of attributes or buffers, by module as `SideState` has them."""


class SideChanges:
    """What has changed in modules since this was made.

    An attribute that has changed once counts as changed for good, so that a value that returns is saved as well. What
    is in the modules' own state_dicts is left to these, and the mode (train or eval) to the program.

    Objects of Python classes, functions and classes that a module keeps are not saved; `unsaved` names those that
    change, as far as can be seen from outside: by their attributes, in as many as 100 000 parts. What is written in C
    is seen to change only where another object takes its place.

    Args:
        modules: the model, and the loss if it is a module.
        ignored: attributes that are not the modules' own, by name, such as those of a framework that runs them.
    """

    def __init__(self, *modules: nn.Module, ignored: Collection[str] = ()) -> None:
        self.modules, self.ignored = modules, {"training", *_OF_RNNS, *ignored}
        self._start = self._now = SideState.of(*modules)
        self._prints = self._fingerprints()
        self._changed: set[tuple[str, str]] = set()
        self._told: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return what has changed, as plain values and tensors; nothing of what cannot be saved."""
        self._look()
        values: dict[str, dict[str, Any]] = {}
        gone: _Places = {}
        for room, name in sorted(self._changed):
            now = self._now.values.get(room, {})
            if name not in now:
                gone.setdefault(room, []).append(name)
            elif _fits_a_file(now[name]):
                values.setdefault(room, {})[name] = to_plain(now[name])
        return {"values": values, "gone": gone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put what `state_dict` returned into the modules; all else stays as it is there.

        A tensor goes to the device of the one in its place; where there is none, to that of the first module.
        """
        now = SideState.of(*self.modules)
        values = {room: dict(each) for room, each in now.values.items()}
        device = next((each.device for each in self.modules[0].parameters()), torch.device("cpu"))
        for room, named in state["values"].items():
            for name, plain in named.items():
                here = values.setdefault(room, {}).get(name)
                values[room][name] = _moved(from_plain(plain), here.device if isinstance(here, Tensor) else device)
                self._changed.add((room, name))
        for room, names in state["gone"].items():
            for name in names:
                values.get(room, {}).pop(name, None)
                self._changed.add((room, name))
        replace(now, values=values).restore(*self.modules)

    def unsaved(self) -> list[str]:
        """Return the places that have changed and that no checkpoint holds, each of them once: "model.core.stats"."""
        self._look()
        found = [
            f"{_shown(room)}.{name}"
            for room, name in sorted(self._changed)
            if name in self._now.values.get(room, {}) and not _fits_a_file(self._now.values[room][name])
        ]
        new = [place for place in found if place not in self._told]
        self._told.update(new)
        return new

    def _look(self) -> None:
        """Compare with the start."""
        self._now = now = SideState.of(*self.modules, like=self._now)
        left_out = set(self._in_state_dicts())
        for room in {*self._start.values, *now.values}:
            before, after = self._start.values.get(room, {}), now.values.get(room, {})
            for name in {*before, *after} - self.ignored if before is not after else ():
                changed = name not in before or name not in after or not same(before[name], after[name])
                if changed and (room, name) not in left_out:
                    self._changed.add((room, name))
        prints = self._fingerprints()
        # what is new, or was one of these and is none now, was found above
        self._changed |= {place for place, each in prints.items() if self._prints.get(place, each)[0] != each[0]}

    def _in_state_dicts(self) -> Iterator[tuple[str, str]]:
        for number, module in enumerate(self.modules):
            for key in module.state_dict():
                owner, _, name = key.rpartition(".")
                yield f"{number}.{owner}:buffers" if owner else f"{number}:buffers", name

    def _fingerprints(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Return what the objects are made of that `SideState` does not look into; and they, to keep their ids."""
        weights = {id(each) for module in self.modules for each in (*module.parameters(), *module.buffers())}
        found: dict[tuple[str, str], tuple[Any, Any]] = {}
        for room, module in _rooms(self.modules):
            values = self._now.values.get(room, {})
            for name, value in vars(module).items():
                if name not in self.ignored and values.get(name) is OTHER:
                    held: list[Any] = []
                    found[room, name] = tuple(_traits(value, weights, set(), held)), held
        return found


def packed(sides: Sequence[SideState | None]) -> dict[str, Any]:
    """Return several of one model's as plain values: copies that they share are there once.

    Of what no file can hold (functions, objects) there are the names alone.
    """
    contents: list[Any] = []
    places: dict[int, int] = {}

    def place(content: Any) -> int:
        if id(content) not in places:
            places[id(content)] = len(contents)
            contents.append(_with_arrays_as_tensors(to_plain(content)))
        return places[id(content)]

    fitting: dict[int, bool] = {}

    def fits(content: Any) -> bool:
        if id(content) not in fitting:
            fitting[id(content)] = _fits_a_file(content)
        return fitting[id(content)]

    found: list[Any] = []
    for side in sides:
        if side is None:
            found.append(None)
            continue
        values = {
            room: {name: place(value) if fits(value) else -1 for name, value in each.items()}
            for room, each in side.values.items()
        }
        found.append({"generators": {name: place(each) for name, each in side.generators.items()}, "values": values})
    return {"contents": contents, "sides": found}


def unpacked(state: Mapping[str, Any]) -> list[SideState | None]:
    """Return what `packed` described; what was left out there stays in the modules as it is."""
    contents = [from_plain(_with_arrays(each)) for each in state["contents"]] + [OTHER]  # -1
    return [
        None
        if each is None
        else SideState(
            {name: contents[place] for name, place in each["generators"].items()},
            {room: {name: contents[place] for name, place in named.items()} for room, named in each["values"].items()},
        )
        for each in state["sides"]
    ]


def _with_arrays_as_tensors(plain: Any) -> Any:
    """Return plain values of which whoever moves a carry to a device can move all."""
    if isinstance(plain, np.ndarray):
        numbers = np.frombuffer(plain.tobytes(), np.uint8)
        return ("$array", torch.from_numpy(numbers.copy()), plain.dtype.str, list(plain.shape))
    return _each(plain, _with_arrays_as_tensors)


def _with_arrays(plain: Any) -> Any:
    """Return what `_with_arrays_as_tensors` was given."""
    if type(plain) is tuple and len(plain) == 4 and isinstance(plain[0], str) and plain[0] == "$array":
        _, numbers, dtype, shape = plain
        return np.frombuffer(numbers.cpu().numpy().tobytes(), dtype).reshape(shape).copy()
    return _each(plain, _with_arrays)


def _each(plain: Any, function: Callable[[Any], Any]) -> Any:
    if type(plain) in (list, tuple):
        return type(plain)(function(each) for each in plain)
    if type(plain) is deque:
        return deque((function(each) for each in plain), plain.maxlen)
    if isinstance(plain, dict):
        found = copy.copy(cast("dict[Any, Any]", plain))  # of its own kind
        for key, each in found.items():
            found[key] = function(each)
        return found
    return plain


def _rooms(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    for number, root in enumerate(modules):
        for name, module in root.named_modules():
            yield f"{number}.{name}" if name else str(number), module


def _shown(room: str) -> str:
    number, dot, rest = room.removesuffix(":buffers").partition(".")
    return ("model" if number == "0" else "loss") + dot + rest


def _fits_a_file(content: Any) -> bool:
    if not is_savable(content):
        return False
    try:
        encode(to_plain(content), "side", {})
    except CheckpointError:
        return False
    return True


def _moved(content: Any, device: torch.device) -> Any:
    if isinstance(content, Tensor):
        return content.to(device)
    if type(content) in (list, tuple, deque):
        items = [_moved(each, device) for each in content]
        return deque(items, content.maxlen) if type(content) is deque else type(content)(items)
    if type(content) is dict:
        pairs = cast("dict[Any, Any]", content)
        return {key: _moved(each, device) for key, each in pairs.items()}
    return content


def _traits(value: Any, weights: set[int], seen: set[int], held: list[Any]) -> Iterator[Any]:
    """Yield what tells an object from the same one changed; tensors by their version, which each write counts up."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        yield repr(value)
        return
    if id(value) in seen or len(seen) >= _MOST or isinstance(value, (weakref.ref, Optimizer)):
        return
    if type(value).__module__.startswith("tbptt."):  # ours keep what they have found out once, and no state
        return
    seen.add(id(value))
    held.append(value)
    if isinstance(value, Tensor):
        yield id(value)
        if id(value) not in weights and not value.is_inference():
            yield value._version
    elif isinstance(value, np.ndarray):
        yield hash(value.tobytes()) if not value.dtype.hasobject else id(value)
    elif next(generators_in(value, set()), None) is value:
        yield repr(state_of(value))
    else:
        yield id(value) if not _is_open(value) else type(value)
        for part in _parts(value):
            yield from _traits(part, weights, seen, held)


def _is_open(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, deque, nn.Module)) or is_container(type(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return list(value.state_dict(keep_vars=True).values())
    if is_container(type(value)):
        return [each for pair in parts(value).items() for each in pair]
    if isinstance(value, dict):
        return [each for pair in cast("dict[Any, Any]", value).items() for each in pair]
    if isinstance(value, (list, tuple, deque)):
        return list(cast("list[Any]", value))
    if isinstance(value, (set, frozenset)):
        return sorted(cast("set[Any]", value), key=repr)
    return []
