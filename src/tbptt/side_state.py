"""What a forward pass reads and changes besides its inputs, its weights and the state that is carried.

Random generators - torch's, numpy's and Python's global ones, and those that modules keep - and the buffers and plain
attributes of modules: running scales, codebooks, counters. To run steps again as they were run is to have all of it as
it was; to resume a run is to find it as it was left.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Generator, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from tbptt.copies import (
    ATOMS,
    OTHER,
    copied,
    generators_in,
    put_back,
    same,
    set_state,
    state_of,
)

__all__ = ["SideState", "as_then", "preserved", "replayed"]

_Holder: TypeAlias = MutableMapping[str, Any]
"""Where a module keeps attributes, or buffers, by name."""

_OWN_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has: its tree and its hooks, which no forward pass changes."""
_MT19937 = struct.Struct("624Ii")  # the words of the state, and the place in them


@dataclass(frozen=True, eq=False)
class SideState:
    """Everything a forward pass reads and changes besides inputs, weights and the carried state, as it was once.

    It holds copies, which nobody may write to: those of what did not change are shared between successive ones.
    Objects of Python classes that a module keeps are not looked into, random generators apart.

    Args:
        generators: states of the global random generators, by name.
        values: copies of the modules' buffers and attributes, by module ("0.core", its buffers "0.core:buffers") and
            by name.
    """

    generators: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def of(*modules: nn.Module, device: torch.device | None = None, like: SideState | None = None) -> SideState:
        """Take it down.

        Args:
            modules: whose attributes are to be in it: the model, and a loss that is a module.
            device: whose generator is to be in it besides the CPU's; None for none.
            like: an earlier one of the same modules. Where nothing at all has changed since it is returned itself.

        Cost: for a small model and `like` about 30 us; a comparison with the last copy of each buffer, and a copy of
            each one that has changed.
        """
        generators = _global_generators(device, {} if like is None else like.generators)
        seen: dict[int, Any] = {}
        values: dict[str, Mapping[str, Any]] = {}
        for place, holder in _holders(modules):
            values[place] = _copies(holder, None if like is None else like.values.get(place), seen)
        if like is None:
            return SideState(generators, values)
        unmoved = values.keys() == like.values.keys() and all(each is like.values[key] for key, each in values.items())
        if unmoved and generators is like.generators:
            return like
        return SideState(generators, like.values if unmoved else values)

    def restore(self, *modules: nn.Module, in_place: bool = True) -> None:
        """Put the generators and the modules back to it for good; an attribute that has come since is deleted.

        Tensors are written to in place, so that whoever else holds them sees it; those that have not changed are not
        written to, as graphs may have saved them. Without `in_place` copies are put in their places: what a model keeps
        may be a view of its inputs.
        """
        _set_global_generators(self.generators)
        self._install(modules, in_place=in_place)

    def differences(self, other: SideState) -> list[str]:
        """Return where two of them differ: names of global generators, then places in modules as "0.core.scale"."""
        names = [name for name, state in self.generators.items() if not same(state, other.generators.get(name))]
        moved: set[str] = set()
        for room in {*self.values, *other.values}:
            one, two = self.values.get(room, {}), other.values.get(room, {})
            for name in {*one, *two} if one is not two else ():
                if name not in one or name not in two or not same(one[name], two[name]):
                    moved.add(f"{room.removesuffix(':buffers')}.{name}")
        return names + sorted(moved)

    def _install(self, modules: tuple[nn.Module, ...], *, in_place: bool) -> None:
        """Put the values into the modules: into what is there, or as copies in its place."""
        made: dict[int, Any] = {}
        for place, holder in _holders(modules):
            values = self.values.get(place)
            if values is None:  # a module that was not there: nothing is known of it
                continue
            for name in [name for name in holder if name not in _OWN_OF_MODULES and name not in values]:
                del holder[name]
            for name, content in values.items():
                here = holder.get(name)
                if content is not OTHER:
                    value = content if type(content) in ATOMS else put_back(content, here, made, in_place)
                    if value is not here or name not in holder:
                        holder[name] = value


@contextmanager
def preserved(*modules: nn.Module, device: torch.device | None = None) -> Generator[SideState]:
    """Leave all of it as it is: the block runs on copies of buffers and attributes."""
    now = SideState.of(*modules, device=device)
    with replayed(now, *modules, device=device):
        yield now


@contextmanager
def replayed(past: SideState, *modules: nn.Module, device: torch.device | None = None) -> Generator[None]:
    """Run the block as it was then, and leave all of it as it is now.

    The block works on copies that stand in the places of buffers and attributes. These themselves are not written to:
    a graph built before may have saved them, and one built in the block saves the copies.
    """
    holders = [holder for _, holder in _holders(modules)]
    now = [{name: value for name, value in each.items() if name not in _OWN_OF_MODULES} for each in holders]
    seen: set[int] = set()
    random_ones = [each for values in now for value in values.values() for each in generators_in(value, seen)]
    kept = [(each, state_of(each)) for each in random_ones]
    generators = _global_generators(device, past.generators)
    try:
        _set_global_generators(past.generators, generators)
        past._install(modules, in_place=False)  # pyright: ignore[reportPrivateUsage]
        yield
    finally:
        for holder, values in zip(holders, now, strict=True):
            for name in [name for name in holder if name not in _OWN_OF_MODULES and name not in values]:
                del holder[name]
            for name, value in values.items():
                if name not in holder or holder[name] is not value:
                    holder[name] = value
        for generator, state in kept:
            set_state(generator, state)
        _set_global_generators(generators)


@contextmanager
def as_then(past: SideState | None, *modules: nn.Module, device: torch.device | None = None) -> Generator[None]:
    """Run the block as it was then, or on copies of what is there now if that is not known; see `replayed`."""
    with preserved(*modules, device=device) if past is None else replayed(past, *modules, device=device):
        yield


class _ScriptBuffers(MutableMapping[str, Any]):
    """The buffers of a TorchScript module, which are kept in C++."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Any:
        return dict(self.module.named_buffers(recurse=False))[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.module, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.module.named_buffers(recurse=False))

    def __len__(self) -> int:
        return sum(1 for _ in self.module.named_buffers(recurse=False))


def _holders(modules: tuple[nn.Module, ...]) -> list[tuple[str, _Holder]]:
    """Return where modules keep attributes and buffers, with its place; a module met twice once."""
    found: list[tuple[str, _Holder]] = []
    seen: set[int] = set()
    for number, root in enumerate(modules):
        _collect(root, str(number), found, seen)
    return found


def _collect(module: nn.Module, place: str, found: list[tuple[str, _Holder]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, torch.jit.ScriptModule):
        found.append((f"{place}:buffers", _ScriptBuffers(module)))
        children = dict(module.named_children())
    else:
        found.append((place, vars(module)))
        found.append((f"{place}:buffers", cast("_Holder", module._buffers)))  # pyright: ignore[reportPrivateUsage]
        children = module._modules  # pyright: ignore[reportPrivateUsage]
    for name, child in children.items():
        if child is not None:
            _collect(child, f"{place}.{name}", found, seen)


def _copies(holder: _Holder, known: Mapping[str, Any] | None, seen: dict[int, Any]) -> Mapping[str, Any]:
    """Return copies of what a module keeps; `known` itself, an earlier return value, where nothing has changed."""
    before: Mapping[str, Any] = {} if known is None else known
    found: dict[str, Any] = {}
    unmoved = known is not None
    for name, value in holder.items():
        if name in _OWN_OF_MODULES:
            continue
        old = before.get(name, OTHER)
        if value is not old or type(value) not in ATOMS:  # most attributes are numbers that stay
            value = copied(value, old, seen)
            unmoved = unmoved and value is old and name in before
        found[name] = value
    return before if unmoved and len(found) == len(before) else found


def _global_generators(device: torch.device | None, known: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the states of the global generators: `known` itself where that is what they are, its parts if not."""
    torch_state, python = torch.get_rng_state(), random.getstate()
    found: dict[str, Any] = {
        "torch": known.get("torch") if same(torch_state, known.get("torch")) else torch_state,
        "numpy": known["numpy"] if _is_numpys(known.get("numpy")) else np.random.get_state(),
        "python": known.get("python") if python == known.get("python") else python,
    }
    if device is not None and device.type == "cuda":
        cuda = (str(device), torch.cuda.get_rng_state(device))
        found["cuda"] = known["cuda"] if same(cuda, known.get("cuda")) else cuda
    unmoved = found.keys() == known.keys() and all(state is known[name] for name, state in found.items())
    return known if unmoved else found


def _set_global_generators(states: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> None:
    """Put the global generators back; `now` is where they are, if that is known."""
    wanted = {name: state for name, state in states.items() if now is None or now.get(name) is not state}
    if "torch" in wanted:
        torch.set_rng_state(wanted["torch"].cpu())
    if "python" in wanted:
        random.setstate(wanted["python"])
    if "numpy" in wanted and not _is_numpys(wanted["numpy"]):
        np.random.set_state(wanted["numpy"])
    if "cuda" in wanted:
        device, state = wanted["cuda"]
        torch.cuda.set_rng_state(state.cpu(), torch.device(device))


def _is_numpys(known: Any) -> bool:
    """Tell whether a state is that of numpy's global generator, where that can be told without copying it.

    To copy it takes 40 us, and most models never touch it.
    """
    generator = cast("Any", np.random).get_bit_generator()
    if not isinstance(known, tuple) or not isinstance(generator, np.random.MT19937) or known[3]:
        return False  # a second Gaussian number is held ready, which lies elsewhere
    words = ctypes.string_at(generator.ctypes.state_address, _MT19937.size)
    return words == known[1].tobytes() + struct.pack("i", known[2])
