"""Objects as containers: what a state of any Python class is made of, and the same object of other parts.

Some models carry an object of their own (a cache with layers, a TensorDict) that is no tree. It is taken
apart by its attributes and put together without calling its `__init__`; what it shares with no tensor, such
as a dtype or a function, goes along as it is.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError

__all__ = ["CONSTANTS", "class_name", "find_class", "is_container", "parts", "rebuild", "refuse"]

CONSTANTS = (
    *(bool, int, float, complex, str, bytes, range, slice, type(None), type, Enum),
    *(types.FunctionType, types.ModuleType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""What never changes, and so is shared by an object and its copies."""

_NEVER = (Tensor, nn.Module, types.MethodType, types.GeneratorType, weakref.finalize)
_BATCH = "()"  # among the parts of a TensorDict: its batch size, and the names of those dimensions
_HEAP_TYPE = 1 << 9  # CPython: the class was made by a class statement, or by an extension that allows the same


def is_container(kind: type[Any]) -> bool:
    """Tell whether objects of class `kind` can be taken apart and put together again.

    Not so what is written in C, or guards something outside memory (`__del__`): its attributes are not all of it.
    """
    if issubclass(kind, (*CONSTANTS, *_NEVER)) or any("__del__" in vars(each) for each in kind.__mro__):
        return False
    bases = [each for each in kind.__mro__ if each not in (object, dict, list)]
    if not bases or not all(each.__flags__ & _HEAP_TYPE for each in bases):
        return False
    try:
        _blank(kind)
    except TypeError:
        return False
    return True


def parts(value: object) -> dict[str, Any]:
    """Return what an object is made of: its attributes, and its items if it is a kind of dict or list.

    Example:
        >>> class Cache:
        ...     pass
        >>> cache = Cache()
        >>> cache.keys = [1, 2]
        >>> parts(cache)
        {'keys': [1, 2]}
        >>> rebuild(Cache, {"keys": [3]}).keys
        [3]
    """
    if _is_tensordict(type(value)):
        known: Any = value
        return {_BATCH: (known.batch_size, tuple(known.names)), **dict(known.items())}
    found: dict[str, Any] = dict(value.__dict__) if type(value).__dictoffset__ else {}
    for name, slot in _slots(type(value)).items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:
            pass  # it was never set
    if isinstance(value, dict):  # items as they are kept, whatever the class makes of reading them
        found["{}"] = dict(dict.items(cast("dict[Any, Any]", value)))
    if isinstance(value, list):
        found["[]"] = list.copy(cast("list[Any]", value))
    return found


def rebuild(kind: type[Any], found: Mapping[str, Any]) -> Any:
    """Return an object of class `kind` made of what `parts` returned; its `__init__` is not called."""
    if _is_tensordict(kind):
        return _tensordict(kind, dict(found))
    made, slots = _blank(kind), _slots(kind)
    for name, value in found.items():
        if name == "{}":
            dict.update(made, _exactly(dict, value))
        elif name == "[]":
            list.extend(made, _exactly(list, value))
        elif name in slots:
            slots[name].__set__(made, value)
        else:  # past __setattr__ and properties, which may do anything, and past `__class__`
            made.__dict__[name] = value
    return made


def _exactly(kind: type[Any], items: Any) -> Any:
    if type(items) is not kind:  # reading the items of anything else may run code of its class
        raise TypeError(f"a plain {kind.__name__} of items was expected, but a {type(items).__name__} came")
    return items


def class_name(kind: type[Any]) -> str | None:
    """Return the name by which `find_class` finds the class again, or None for one that it would not find."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    return name if find_class(name) is kind else None


def find_class(name: str) -> type[Any] | None:
    """Return the class of the name "module:Class"; None if it has not been imported."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):  # no getattr: some modules import what they are asked for
        found = getattr(found, "__dict__", {}).get(part)
    return cast("type[Any]", found) if isinstance(found, type) else None


def refuse(value: object) -> CapabilityError:
    """Return the error for a value that a tree cannot hold."""
    kind = type(value)
    return CapabilityError(
        f"tensors in containers were expected, but one of these holds a {kind.__module__}.{kind.__qualname__}, "
        "which cannot be looked into: what it carries could be neither detached, reset nor saved",
        fix="keep everything in tensors, tuples, lists, dicts, or objects of a Python class that hold such",
    )


def _blank(kind: type[Any]) -> Any:
    """Return an object of class `kind` with nothing in it."""
    if issubclass(kind, dict):
        return cast("Any", dict.__new__(kind))
    if issubclass(kind, list):
        return cast("Any", list.__new__(kind))
    return object.__new__(kind)


@cache
def _slots(kind: type[Any]) -> dict[str, types.MemberDescriptorType]:
    """Return what is kept in slots, and so is not in `__dict__`."""
    members = (member for each in reversed(kind.__mro__) for member in vars(each).items())
    return {name: member for name, member in members if isinstance(member, types.MemberDescriptorType)}


def _is_tensordict(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == "tensordict" and kind.__name__ == "TensorDict"


def _tensordict(kind: Callable[..., Any], found: dict[str, Any]) -> Any:
    """Return a TensorDict of these members, whose number of lanes may be another than it was."""
    size, names = found.pop(_BATCH)
    shapes = [value.shape[: len(size)] for value in found.values() if hasattr(value, "shape")]
    return kind(found, batch_size=shapes[0] if shapes else size, names=list(names) if any(names) else None)
