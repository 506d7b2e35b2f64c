"""The classes that a file may name: those of this run's own state, and those that the program has registered."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias, TypeVar, cast

import torch

from tbptt.errors import ConfigError
from tbptt.opaque import is_container, parts

__all__ = ["Known", "Like", "known_classes", "name_of", "nothing", "registered_class"]

Like: TypeAlias = Callable[[str], Any]
"""`like(entry)` -> this run's own value of an entry of its state; asked only where a file names a class there."""

_Class = TypeVar("_Class", bound=type)
_registered: dict[str, type[Any]] = {}


def nothing(entry: str) -> None:
    """Return no value: then a file may name the registered classes alone."""
    del entry


def registered_class(kind: _Class) -> _Class:
    """Let checkpoints hold objects of a class; returns the class, so that it can be a decorator.

    Only for a class whose objects come into the state later than in the first two windows: all others are found by
    themselves. Any checkpoint may then hold objects of it, with attributes as the file has them, put together without
    its `__init__`: register no class whose methods run what its attributes say.

    Args:
        kind: a Python class, a named tuple, or an enum.

    Raises:
        ConfigError: it is none of these, so that no checkpoint could hold its objects.

    Example:
        >>> @registered_class
        ... class Memory:
        ...     keys = None
        >>> Memory.__name__
        'Memory'
    """
    if not isinstance(cast(object, kind), type) or not (is_container(kind) or _is_named_tuple(kind) or _is_enum(kind)):
        raise ConfigError(
            f"a Python class, a named tuple or an enum was expected, but {kind!r} came: no checkpoint can hold its "
            "objects",
            fix="register the class of the object that the error named",
        )
    _registered[name_of(kind)] = kind
    return kind


@dataclass(frozen=True, eq=False)
class Known:
    """The classes that a place of a file may name.

    Attributes:
        kinds: of objects, named tuples and enums, by name.
        values: classes that are values themselves, as some caches keep the class of their layers, by name.
    """

    kinds: dict[str, type[Any]] = field(default_factory=lambda: dict(_registered))
    values: dict[str, type[Any]] = field(default_factory=dict[str, "type[Any]"])


def known_classes(own: Any) -> Known:
    """Return the classes that a value of this run is made of, and the registered ones."""
    known = Known()
    _gather(own, known, {})
    return known


def name_of(kind: type[Any]) -> str:
    """Return the name by which files know a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _gather(value: Any, known: Known, seen: dict[int, Any]) -> None:
    kind: type[Any] = type(value)
    if value is None or kind in _PLAIN or id(value) in seen:
        return
    seen[id(value)] = value  # held, so that its id is not given to another
    if isinstance(value, type):
        known.values[name_of(cast("type[Any]", value))] = value
        return
    if _is_enum(kind) or _is_named_tuple(kind) or is_container(kind):
        known.kinds[name_of(kind)] = kind
    for item in _members(value, kind):
        _gather(item, known, seen)


def _members(value: Any, kind: type[Any]) -> Iterable[Any]:
    if kind in (dict, OrderedDict, defaultdict):
        return value.values()
    if kind in (list, deque):
        return value
    if issubclass(kind, tuple):
        return tuple.__iter__(value)
    return parts(value).values() if is_container(kind) else ()


_PLAIN = (bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.device)


def _is_named_tuple(kind: type[Any]) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_enum(kind: type[Any]) -> bool:
    return issubclass(kind, Enum)
