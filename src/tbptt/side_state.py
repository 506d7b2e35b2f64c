"""What a forward pass reads and changes besides its inputs, its weights and the state that is carried.

Random generators - torch's, numpy's and Python's global ones, and those that modules keep - and the buffers and plain
attributes of modules: running scales, codebooks, counters. To run a stretch of steps again is to put all of it back to
where it was; to resume a run is to find it as it was left.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.opaque import CONSTANTS

__all__ = ["SideState", "preserved", "replayed"]

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OWN_OF_MODULES = frozenset(vars(nn.Module())) - {"training", "_buffers"}
"""Attributes that every module has: its tree and its hooks, which no forward pass changes."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """One value as it was: the object itself, and a copy of what is in it."""

    owner: Any
    content: Any


@dataclass(frozen=True, eq=False)
class SideState:
    """Everything a forward pass reads and changes besides inputs, weights and the carried state, as it was once.

    Args:
        generators: states of the global random generators, by name.
        values: of the modules' buffers, attributes and generators, by place: "0.core.running_mean". Objects of
            Python classes that a module keeps are not looked into, but for random generators.
    """

    generators: Mapping[str, Any]
    values: Mapping[str, _Kept]

    @staticmethod
    def of(*modules: nn.Module, device: torch.device | None = None, like: SideState | None = None) -> SideState:
        """Take it down.

        Args:
            modules: whose attributes are to be in it: the model, and a loss that is a module.
            device: whose generator is to be in it besides the CPU's; None for none.
            like: an earlier one; copies of what has not changed since are shared with it.
        """
        known = {} if like is None else like.values
        values = {place: _keep(value, known.get(place)) for place, _, _, value in _cells(modules)}
        generators = _global_generators(device)
        if like is not None:  # a pass that draws nothing needs no further copy of the same 10 KB
            generators = {
                name: like.generators[name]
                if name in like.generators and _same(state, like.generators[name])
                else state
                for name, state in generators.items()
            }
        return SideState(generators, values)

    def restore(self, *modules: nn.Module) -> None:
        """Put the generators and the modules back to it; an attribute that has come since is deleted.

        A tensor that has not changed is not written to either: graphs may have saved it.
        """
        _set_global_generators(self.generators)
        for place, holder, name, _ in list(_cells(modules)):
            if place not in self.values:
                del holder[name]
        holders = _holders(modules)
        for place, kept in self.values.items():
            holder, name = holders[place.rpartition("/")[0]], place.rpartition("/")[2]
            holder[name] = _put_back(kept)

    def differences(self, other: SideState) -> list[str]:
        """Return where two of them differ: the names of global generators, and places in modules."""
        names = [name for name, state in self.generators.items() if not _same(state, other.generators.get(name))]
        places = {*self.values, *other.values}
        moved = [p for p in sorted(places) if not _same_kept(self.values.get(p), other.values.get(p))]
        return names + [place.replace("/", ".") for place in moved]

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and tensors."""
        return {
            "generators": dict(self.generators),
            "values": {place: _plain(kept) for place, kept in self.values.items()},
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], *modules: nn.Module) -> SideState:
        """Return what `state_dict` described, for these modules; places that they do not have are left out."""
        here = {place: value for place, _, _, value in _cells(modules)}
        values = {place: _kept_from(here[place], plain) for place, plain in state["values"].items() if place in here}
        return SideState(dict(state["generators"]), values)


@contextmanager
def preserved(*modules: nn.Module, device: torch.device | None = None) -> Generator[SideState]:
    """Leave all of it as it was when the block was entered."""
    before = SideState.of(*modules, device=device)
    try:
        yield before
    finally:
        before.restore(*modules)


@contextmanager
def replayed(past: SideState, *modules: nn.Module, device: torch.device | None = None) -> Generator[None]:
    """Run the block as it was then, and leave all of it as it is now."""
    with preserved(*modules, device=device):
        past.restore(*modules)
        yield


def _holders(modules: tuple[nn.Module, ...]) -> dict[str, dict[str, Any]]:
    """Return the dicts in which modules keep attributes and buffers, by place."""
    found: dict[str, dict[str, Any]] = {}
    for number, root in enumerate(modules):
        for name, module in root.named_modules():
            found[f"{number}.{name}" if name else str(number)] = vars(module)
            found[f"{number}.{name}:buffers" if name else f"{number}:buffers"] = cast(
                "dict[str, Any]",
                module._buffers,  # pyright: ignore[reportPrivateUsage]
            )
    return found


def _cells(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield what is looked at: its place, the dict it is in, its name there, and the value."""
    for place, holder in _holders(modules).items():
        for name, value in holder.items():
            if name not in _OWN_OF_MODULES and name != "_buffers" and _is_plain(value):
                yield f"{place}/{name}", holder, name, value


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a tensor, a constant, a generator, or a built-in container of nothing else."""
    if isinstance(value, nn.Parameter):
        return False
    if isinstance(value, Tensor):
        return not (value.requires_grad and value.is_leaf)  # such as weights in the place of a module's own
    if isinstance(value, (*CONSTANTS, *_GENERATORS)):
        return True
    if type(value) in (list, tuple, deque):
        return all(_is_plain(each) for each in value)
    if type(value) is dict:
        return all(isinstance(key, CONSTANTS) and _is_plain(each) for key, each in value.items())
    return type(value) in (set, frozenset)


def _keep(value: Any, known: _Kept | None = None) -> _Kept:
    if isinstance(value, Tensor):
        if known is not None and known.owner is value and _equal(value, known.content):
            return known
        return _Kept(value, value.detach().clone())
    if isinstance(value, _GENERATORS):
        return _Kept(value, _state_of(value))
    if type(value) in (list, tuple, deque):
        return _Kept(value, [_keep(each) for each in value])
    if type(value) is dict:
        return _Kept(value, {key: _keep(each) for key, each in value.items()})
    return _Kept(value, set(value) if type(value) is set else value)


def _put_back(kept: _Kept) -> Any:
    """Return the object that was kept, with what was in it."""
    owner, content = kept.owner, kept.content
    if isinstance(owner, Tensor):
        if not _equal(owner, content):  # batch normalisation writes without a new version
            with torch.no_grad():
                owner.copy_(content)
    elif isinstance(owner, _GENERATORS):
        _set_state(owner, content)
    elif type(owner) in (list, deque):
        values = [_put_back(each) for each in content]
        owner.clear()
        owner.extend(values)
    elif type(owner) is tuple:
        for each in content:
            _put_back(each)
    elif type(owner) is dict:
        values = {key: _put_back(each) for key, each in content.items()}
        owner.clear()
        owner.update(values)
    elif type(owner) is set:
        owner.clear()
        owner.update(content)
    return owner


def _plain(kept: _Kept) -> Any:
    if isinstance(kept.content, list):
        return [_plain(each) for each in cast("list[_Kept]", kept.content)]
    if isinstance(kept.content, dict) and not isinstance(kept.owner, _GENERATORS):
        return {key: _plain(each) for key, each in cast("dict[Any, _Kept]", kept.content).items()}
    return kept.content


def _kept_from(here: Any, plain: Any) -> _Kept:
    """Return a value that was saved, to be put into the object that is here."""
    if isinstance(here, Tensor) and isinstance(plain, Tensor) and here.shape == plain.shape:
        return _Kept(here, plain.to(here))
    if isinstance(here, _GENERATORS):
        return _Kept(here, plain)
    if type(here) in (list, deque) and isinstance(plain, list):
        return _Kept(here, [_keep(each) for each in cast("list[Any]", plain)])
    if type(here) is dict and isinstance(plain, dict):
        return _Kept(here, {key: _keep(each) for key, each in cast("dict[Any, Any]", plain).items()})
    return _keep(tuple(cast("list[Any]", plain)) if type(here) is tuple else plain)


def _same_kept(one: _Kept | None, other: _Kept | None) -> bool:
    return one is other or (one is not None and other is not None and _same(_plain(one), _plain(other)))


def _same(one: Any, other: Any) -> bool:
    """Tell whether two plain values hold the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = cast("tuple[dict[Any, Any], dict[Any, Any]]", (one, other))
        return pairs[0].keys() == pairs[1].keys() and all(_same(each, pairs[1][key]) for key, each in pairs[0].items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        left, right = cast("tuple[list[Any], list[Any]]", (one, other))
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(one is other or one == other)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; NaN is the same as NaN."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != torch.strided:
        return False
    return bool(
        torch.equal(one, other)
        or (
            one.is_floating_point()
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    )


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _global_generators(device: torch.device | None) -> dict[str, Any]:
    found = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if device is not None and device.type == "cuda":
        found["cuda"] = (str(device), torch.cuda.get_rng_state(device))
    return found


def _set_global_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states:
        device, state = states["cuda"]
        torch.cuda.set_rng_state(state.cpu(), torch.device(device))
