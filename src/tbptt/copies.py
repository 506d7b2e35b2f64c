"""Copies of plain values: made, compared, put back, and saved.

Plain are tensors and arrays, constants, random generators (of which the state is copied), and built-in containers of
nothing else. What is not plain is not looked into: `OTHER` stands for it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from operator import is_
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.opaque import CONSTANTS

__all__ = [
    "ATOMS",
    "OTHER",
    "copied",
    "from_plain",
    "generators_in",
    "is_savable",
    "put_back",
    "same",
    "set_state",
    "state_of",
    "to_plain",
]

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SEQUENCES = (list, tuple, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SETS = (set, frozenset)
ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_SAVED = (*ATOMS, range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
"""Constants that a file can hold; classes and functions are the program's own."""


class _Other(Enum):
    """Stands for a value that is not looked into, and stays whatever it is."""

    OTHER = "other"


@dataclass(frozen=True, eq=False)
class _Random:
    """The state of a random generator that a module keeps; `owner` is that generator, None for one of a file."""

    owner: Any
    state: Any


OTHER = _Other.OTHER


def copied(value: Any, known: Any, seen: dict[int, Any]) -> Any:
    """Return a copy of a value, `known` where that is the same; `OTHER` for what is not looked into."""
    kind = type(value)
    if kind in ATOMS:
        return known if kind is type(known) and (value == known or same(value, known)) else value
    if id(value) in seen:  # two names of one object
        return seen[id(value)]
    seen[id(value)] = OTHER  # a container that holds itself
    seen[id(value)] = found = _copy_of_object(value, known, seen)
    return found


def _copy_of_object(value: Any, known: Any, seen: dict[int, Any]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        if not _is_buffer(value):
            return OTHER
        return known if isinstance(known, Tensor) and _equal(value, known) else value.detach().clone()
    if kind in _SEQUENCES:
        return _copy_of_sequence(value, known, seen)
    if kind in _MAPPINGS:
        return _copy_of_mapping(value, known, seen)
    if kind in _SETS:
        return known if kind is type(known) and value == known else copy.copy(value)
    if isinstance(value, _GENERATORS):
        state = state_of(value)
        return known if isinstance(known, _Random) and same(state, known.state) else _Random(value, state)
    if kind is np.ndarray:
        if value.dtype.hasobject:
            return OTHER
        return known if same(value, known) else value.copy()
    if isinstance(value, CONSTANTS):
        return known if kind is type(known) and value == known else value
    return OTHER


def _copy_of_sequence(value: Any, known: Any, seen: dict[int, Any]) -> Any:
    comparable = type(known) is type(value) and len(known) == len(value)
    if ATOMS.issuperset(map(type, value)):
        return known if comparable and value == known else copy.copy(value)
    items: list[Any] = []
    for each, old in zip(value, known if comparable else [OTHER] * len(value), strict=True):
        items.append(copied(each, old, seen))
        if items[-1] is OTHER:
            return OTHER
    return known if comparable and all(map(is_, items, known)) else _filled(value, items)


def _copy_of_mapping(value: Any, known: Any, seen: dict[int, Any]) -> Any:
    comparable = type(known) is type(value) and list(known) == list(value)
    pairs: dict[Any, Any] = {}
    for key, each in value.items():
        pairs[key] = copied(each, known[key] if comparable else OTHER, seen)
        if pairs[key] is OTHER:
            return OTHER
    return known if comparable and all(map(is_, pairs.values(), known.values())) else _filled(value, pairs)


def _is_buffer(value: Tensor) -> bool:
    """Tell whether a tensor is data of the forward pass, and no weight."""
    if isinstance(value, nn.Parameter) or (value.requires_grad and value.is_leaf):
        return False
    return not nn.parameter.is_lazy(value)


def _filled(like: Any, items: Any) -> Any:
    """Return a container of the kind of `like` with other items in it."""
    if type(like) is tuple:
        return tuple(items)
    made = copy.copy(like)  # with its greatest length or default
    made.clear()
    return _fill(made, items)


def _fill(container: Any, items: Any) -> Any:
    if isinstance(items, dict):
        for key, value in cast("dict[Any, Any]", items).items():  # to update a Counter is to add to it
            container[key] = value
    else:
        container.extend(items)
    return container


def put_back(content: Any, here: Any, made: dict[int, Any], in_place: bool) -> Any:
    """Return what is to stand in a place for a copy that was kept: `here`, written to, or a new object."""
    if id(content) not in made:
        made[id(content)] = _made(content, here, made, in_place)
    return made[id(content)]


def _made(content: Any, here: Any, made: dict[int, Any], in_place: bool) -> Any:
    kind = type(content)
    if isinstance(content, Tensor):
        if not (in_place and isinstance(here, Tensor) and here.shape == content.shape and here.dtype == content.dtype):
            return content.clone()
        if not _equal(here, content):
            with torch.no_grad():
                here.copy_(content)
        return here
    if isinstance(content, _Random):
        owner = here if content.owner is None else content.owner
        if isinstance(owner, _GENERATORS):
            set_state(owner, content.state)
        return owner
    if kind is np.ndarray or kind in _SETS:
        return copy.copy(content)
    if kind in _SEQUENCES:
        old = list(here) if kind is type(here) else []
        old += [None] * (len(content) - len(old))
        items = [put_back(each, was, made, in_place) for each, was in zip(content, old, strict=False)]
        return _refilled(content, here, items, in_place)
    if kind in _MAPPINGS:
        was = here if kind is type(here) else {}
        pairs = {key: put_back(each, was.get(key), made, in_place) for key, each in content.items()}
        return _refilled(content, here, pairs, in_place)
    return content


def _refilled(content: Any, here: Any, items: Any, in_place: bool) -> Any:
    if not in_place or type(here) is not type(content) or isinstance(here, tuple):
        return _filled(content, items)
    here.clear()
    return _fill(here, items)


def generators_in(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the random generators in a value."""
    kind = type(value)
    if isinstance(value, _GENERATORS):
        yield value
    elif (kind in _SEQUENCES or kind in _MAPPINGS) and id(value) not in seen:
        seen.add(id(value))
        for each in value.values() if kind in _MAPPINGS else value:
            yield from generators_in(each, seen)


def is_savable(content: Any) -> bool:
    """Tell whether a file can hold a copy: not so functions, classes and `OTHER`."""
    if type(content) in _SEQUENCES:
        return all(is_savable(each) for each in content)
    if type(content) in _MAPPINGS:
        return all(is_savable(each) for pair in content.items() for each in pair)
    return type(content) in _SETS or isinstance(content, (*_SAVED, Tensor, np.ndarray, _Random))


def to_plain(content: Any) -> Any:
    """Return a copy that was kept as what a file holds: sets, counters and states of generators by name."""
    kind = type(content)
    if isinstance(content, _Random):
        return ("$generator", content.state)
    if kind in _SETS:
        return (f"${kind.__name__}", list(content))
    if kind in _SEQUENCES:
        return _filled(content, [to_plain(each) for each in content])
    if kind in _MAPPINGS:
        pairs = {key: to_plain(each) for key, each in content.items()}
        return ("$Counter", pairs) if kind is Counter else _filled(content, pairs)
    return content


def from_plain(plain: Any) -> Any:
    """Return the copy that `to_plain` made plain."""
    kind = type(plain)
    if kind is tuple and len(plain) == 2 and isinstance(plain[0], str) and plain[0] in _NAMED:
        return _NAMED[plain[0]](plain[1])
    if kind in _SEQUENCES:
        return _filled(plain, [from_plain(each) for each in plain])
    if kind in _MAPPINGS:
        return _filled(plain, {key: from_plain(each) for key, each in plain.items()})
    return plain


_NAMED: dict[str, Any] = {
    "$set": set,
    "$frozenset": frozenset,
    "$Counter": Counter,
    "$generator": partial(_Random, None),
}


def same(one: Any, other: Any) -> bool:
    """Tell whether two values that were kept hold the same numbers; NaN is the same as NaN."""
    if one is other:
        return True
    if isinstance(one, _Random) and isinstance(other, _Random):
        return same(one.state, other.state)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if type(one) is not type(other):
        return False
    if type(one) in _SEQUENCES:
        pairs = cast("tuple[list[Any], list[Any]]", (one, other))
        return len(pairs[0]) == len(pairs[1]) and all(map(same, *pairs))
    if type(one) in _MAPPINGS:
        left, right = cast("tuple[dict[Any, Any], dict[Any, Any]]", (one, other))
        return left.keys() == right.keys() and all(same(each, right[key]) for key, each in left.items())
    return bool(one == other or (one != one and other != other))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; NaN is the same as NaN."""
    if one is other:
        return True
    if (one.shape, one.dtype, one.layout, one.device) != (other.shape, other.dtype, other.layout, other.device):
        return False
    if one.is_meta:  # there are no numbers
        return True
    if one.layout != torch.strided:
        left, right = _parts(one), _parts(other)
        return bool(left) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _parts(sparse: Tensor) -> list[Tensor]:
    """Return what a sparse tensor is made of; nothing for a layout that is not known."""
    if sparse.layout == torch.sparse_coo:
        return [sparse._indices(), sparse._values()]
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [sparse.crow_indices(), sparse.col_indices(), sparse.values()]
    if sparse.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [sparse.ccol_indices(), sparse.row_indices(), sparse.values()]
    return []


def state_of(generator: Any) -> Any:
    """Return the state of a random generator of torch, numpy or Python."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Put a random generator back to where `state_of` found it."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
