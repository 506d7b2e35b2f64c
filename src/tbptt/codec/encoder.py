"""Any nesting of plain values, tensors and objects as JSON with references to tensors."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from enum import Enum
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.codec.layout import layout_of
from tbptt.codec.names import DTYPES, FACTORIES, MARK, NUMPY_ARRAYS, NUMPY_SCALARS, PLAIN_KEYS, SURROGATES
from tbptt.errors import CheckpointError
from tbptt.opaque import class_name, is_container, parts

__all__ = ["encode"]

_EXACT_INT = 2**63  # beyond it other readers of JSON round, and Python limits the digits it will parse
_SHORT = 80  # characters of a value that an error shows


def encode(tree: Any, root: str, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as a value that `json.dumps` takes, and put its tensors into `tensors`.

    Args:
        tree: None, bool, int, float, complex, str, bytes, tensors, numpy arrays and scalars, dtypes, devices,
            classes and enums, in any nesting of lists, deques, tuples, named tuples, dicts with plain keys, and
            objects of Python classes.
        root: what errors call the tree; a tensor's name is its path below it.
        tensors: filled with contiguous real tensors on the CPU, none of which share memory.

    Raises:
        CheckpointError: a value of another type, named by its path; or a container that holds itself.

    Example:
        >>> found = {}
        >>> encode({"lr": 0.1, "exp_avg": (torch.zeros(2),)}, "state", found)
        {'lr': 0.1, 'exp_avg': {'$': 'tuple', 'items': [{'$': 'tensor', 'name': 'exp_avg[0]'}]}}
    """
    try:
        return Encoder(root, tensors).encode(tree, root)
    except RecursionError:
        raise CheckpointError(
            f"{root} was expected to be a tree, but it is nested without end: a container holds itself, "
            "and no file could hold that",
            fix="leave the reference back out of state_dict()",
        ) from None


class Encoder:
    """Turns values into what JSON has, and collects their tensors."""

    def __init__(self, root: str, tensors: dict[str, Tensor]) -> None:
        self.root = root
        self.tensors = tensors
        self.storages: set[int] = set()
        # One tensor met twice is written once and is one tensor again: an in-place change reaches both.
        # The tensor is held, so that its id cannot be given to another.
        self.seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return value if _is_unicode(value) else {MARK: "str", "hex": value.encode(*SURROGATES).hex()}
        if kind is int:
            return value if -_EXACT_INT <= value < _EXACT_INT else {MARK: "int", "hex": hex(value)}
        if kind is float:
            # x - x is 0 for every number and NaN for the rest, whose bits JSON cannot hold.
            return value if value - value == 0 else {MARK: "float", "bits": struct.pack(">d", value).hex()}
        if kind is complex:
            return {MARK: "complex", "bits": struct.pack(">2d", value.real, value.imag).hex()}
        if kind is bytes:
            return {MARK: "bytes", "hex": value.hex()}
        if kind is list:
            return self.items(value, path)
        if kind is dict or kind is OrderedDict:
            return self.mapping(value, path)
        if isinstance(value, tuple):
            return self.tuple(cast("tuple[Any, ...]", value), path)
        if isinstance(value, Tensor):
            return self.tensor(value, path)
        if kind is np.ndarray:
            return self.array(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in NUMPY_SCALARS:
            return {MARK: "scalar", "dtype": value.dtype.str, "hex": value.tobytes().hex()}
        return self.rare(value, path)

    def rare(self, value: Any, path: str) -> dict[str, Any]:
        """Encode what is met inside the states of some models only."""
        kind: type[Any] = type(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return {MARK: "constant", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {MARK: "device", "name": str(value)}
        if isinstance(value, type):
            return {MARK: "class", "class": self.name(value, path)}
        if isinstance(value, Enum):
            if value.name not in kind.__members__:  # two flags at once, for example
                self.refuse(value, path)
            return {MARK: "enum", "class": self.name(kind, path), "name": value.name}
        if kind is deque:
            return {MARK: "deque", "items": self.items(value, path), "maxlen": value.maxlen}
        if kind is defaultdict:
            return {MARK: "defaultdict", "factory": self.factory(value, path), "items": self.pairs(value, path)}
        if kind in (slice, range):
            return {MARK: kind.__name__, "items": self.items((value.start, value.stop, value.step), path)}
        if not is_container(kind):
            self.refuse(value, path)
        found = parts(value).items()
        return {
            MARK: "object",
            "class": self.name(kind, path),
            "parts": [[name, self.encode(part, f"{path}.{name}")] for name, part in found],
        }

    def factory(self, value: defaultdict[Any, Any], path: str) -> dict[str, Any] | None:
        if value.default_factory is None:
            return None
        for name, kind in FACTORIES.items():
            if value.default_factory is kind:
                return {MARK: "class", "class": name}
        self.refuse(value.default_factory, f"the default of {path}")

    def name(self, kind: type[Any], path: str) -> str:
        name = class_name(kind)
        if name is None:
            raise CheckpointError(
                f"{path} is a {kind.__module__}:{kind.__qualname__}, which cannot be found again under that name: "
                "a resumed run could not rebuild it",
                fix=f"define {kind.__name__} at the top level of its module",
            )
        return name

    def items(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.encode(item, f"{path}[{index}]") for index, item in enumerate(values)]

    def mapping(self, value: dict[Any, Any], path: str) -> dict[str, Any]:
        plain = all(type(key) is str and key != MARK and _is_unicode(key) for key in value)
        if plain and type(value) is dict:
            return {key: self.encode(item, f"{path}.{key}") for key, item in value.items()}
        return {MARK: "dict" if type(value) is dict else "ordered", "items": self.pairs(value, path)}

    def pairs(self, value: dict[Any, Any], path: str) -> list[Any]:
        pairs: list[Any] = []
        for key, item in value.items():
            if type(key) not in PLAIN_KEYS:
                self.refuse(key, f"a key of {path}")
            below = f"{path}.{key}" if type(key) is str else f"{path}[{key!r}]"
            pairs.append([self.encode(key, f"a key of {path}"), self.encode(item, below)])
        return pairs

    def tuple(self, value: tuple[Any, ...], path: str) -> dict[str, Any]:
        kind = type(value)
        if kind is tuple:
            return {MARK: "tuple", "items": self.items(value, path)}
        if kind is torch.Size:
            return {MARK: "size", "items": list(value)}
        fields: tuple[str, ...] | None = getattr(kind, "_fields", None)
        if fields is None or hasattr(kind, "__del__"):
            self.refuse(value, path)
        items = [self.encode(item, f"{path}.{field}") for field, item in zip(fields, value, strict=True)]
        return {MARK: "namedtuple", "class": self.name(kind, path), "fields": list(fields), "items": items}

    def tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not is_plain or value.is_meta or value.dtype not in DTYPES.values():
            self.refuse(value, path)
        entry: dict[str, Any] = {MARK: "tensor", "name": self.free_name(path)}
        entry |= layout_of(value)
        data = value.detach()
        if "size" in entry:  # an expanded tensor: one copy of what it repeats is enough
            data = data[tuple(slice(0, 1) if step == 0 else slice(None) for step in data.stride())]
        if data.is_complex():
            entry["complex"] = True
            data = torch.view_as_real(data.resolve_conj())
        data = data.resolve_neg().cpu().contiguous()
        if data.untyped_storage().data_ptr() in self.storages:
            data = data.clone(memory_format=torch.contiguous_format)  # safetensors takes no shared memory
        self.storages.add(data.untyped_storage().data_ptr())
        self.tensors[entry["name"]] = data
        self.seen[id(value)] = (value, entry)
        return entry

    def array(self, value: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        if value.dtype.kind not in NUMPY_ARRAYS:
            self.refuse(value, path)
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        name = self.free_name(path)
        self.tensors[name] = torch.frombuffer(bytearray(value.tobytes(order)) or bytearray(1), dtype=torch.uint8)
        shape = list(value.shape)
        return {
            MARK: "array",
            "name": name,
            "dtype": value.dtype.str,
            "shape": shape,
            "order": order,
        }

    def free_name(self, path: str) -> str:
        below = path[len(self.root) :].removeprefix(".") or self.root
        name = stem = below.encode("utf-8", "backslashreplace").decode()
        count = 0
        while name in self.tensors or name == "__metadata__":  # that one belongs to safetensors
            count += 1
            name = f"{stem}#{count}"
        return name

    def refuse(self, value: Any, path: str) -> NoReturn:
        kind = type(value)
        shown = repr(value) if not isinstance(value, Tensor) else f"{value.layout}, {value.dtype}, {value.device}"
        shown = shown if len(shown) <= _SHORT else shown[:_SHORT] + "..."
        raise CheckpointError(
            f"{path} was expected to be a plain value, a tensor, a numpy array, or a list, tuple, dict or Python "
            f"object of them, but is a {kind.__module__}.{kind.__qualname__} ({shown}): a checkpoint holds no "
            "pickled objects, so it could not be restored",
            fix="return its parts from state_dict() instead, and rebuild it in load_state_dict()",
        )


def _is_unicode(text: str) -> bool:
    # Lone surrogates are legal in Python, but a pair of them comes back from JSON as one character.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
