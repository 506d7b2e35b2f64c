"""What the encoder wrote, exactly back."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tbptt.codec.layout import laid_out
from tbptt.codec.names import MARK, NUMPY_ARRAYS, PLAIN_KEYS, SURROGATES
from tbptt.errors import CheckpointError
from tbptt.opaque import find_class, is_container, rebuild

__all__ = ["decode"]


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `encode` was given; every tensor in fresh memory, with the strides it had.

    Raises:
        CheckpointError: a kind, tensor or class that is not known here.
    """
    return Decoder(tensors).decode(value)


class Decoder:
    """Turns what JSON had back into values."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.built: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        entry = cast("dict[str, Any]", value)
        if MARK not in entry:
            return {key: self.decode(item) for key, item in entry.items()}
        if entry[MARK] not in _KINDS:
            raise CheckpointError(
                f"one of the kinds {sorted(_KINDS)} was expected, but {entry[MARK]!r} came: the checkpoint "
                "was written by a version of tbptt that knows more",
                fix="pip install --upgrade tbptt",
            )
        return _KINDS[entry[MARK]](self, entry)

    def found(self, entry: dict[str, Any]) -> type[Any]:
        name = str(entry["class"])
        found = find_class(name)
        if found is None:
            raise CheckpointError(
                f"the checkpoint holds a {entry[MARK]} {name}, but no such class has been imported, and "
                "reading a checkpoint imports nothing",
                fix=f"import {name.partition(':')[0]} before resuming",
            )
        return found

    def named_tuple(self, entry: dict[str, Any]) -> Any:
        found = self.found(entry)
        fields = getattr(found, "_fields", None)
        if not issubclass(found, tuple) or fields != tuple(entry["fields"]) or hasattr(found, "__del__"):
            raise CheckpointError(
                f"{entry['class']} was expected to be a named tuple with the fields {entry['fields']}, but has "
                f"{fields and list(fields)}: its values would get other meanings",
                fix=f"resume with the {found.__name__} that the run was started with",
            )
        # tuple.__new__, as namedtuple's own _make does: a class may want other arguments than its fields.
        return cast(Any, tuple.__new__(found, map(self.decode, entry["items"])))

    def object(self, entry: dict[str, Any]) -> Any:
        found = self.found(entry)
        made = {str(name): self.decode(part) for name, part in entry["parts"]}
        try:
            if is_container(found):
                return rebuild(found, made)
        except (AttributeError, TypeError):
            pass  # parts that its objects have no place for
        raise CheckpointError(
            f"{entry['class']} was expected to be a Python class whose objects are their attributes "
            f"{sorted(made)}, but is not: what it does besides could not be undone",
            fix=f"resume with the {found.__name__} that the run was started with",
        )

    def enum(self, entry: dict[str, Any]) -> Any:
        found = self.found(entry)
        if not issubclass(found, Enum) or entry["name"] not in found.__members__:
            raise CheckpointError(
                f"{entry['class']} was expected to be an enum with {entry['name']!r}, but is not",
                fix=f"resume with the {found.__name__} that the run was started with",
            )
        return found[entry["name"]]

    def pairs(self, entry: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        for key, item in entry["items"]:
            plain = self.decode(key)
            if type(plain) not in PLAIN_KEYS:
                raise CheckpointError(f"a plain key was expected in a dict, but a {type(plain).__name__} came")
            yield plain, self.decode(item)

    def constant(self, entry: dict[str, Any]) -> Any:
        found: Any = vars(torch).get(entry["name"])
        if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            raise CheckpointError(
                f"a dtype, layout or memory format was expected, but torch {torch.__version__} has no "
                f"{entry['name']!r}",
                fix="resume with the torch that the run was started with",
            )
        return found

    def tensor(self, entry: dict[str, Any]) -> Tensor:
        name = entry["name"]
        if name not in self.built:
            data = self.stored(name)
            self.built[name] = laid_out(torch.view_as_complex(data) if "complex" in entry else data, entry)
        return self.built[name]

    def array(self, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if dtype.kind not in NUMPY_ARRAYS:  # numpy would take the bytes of an object for its address
            raise CheckpointError(f"an array of numbers or texts was expected, but one of {dtype} came")
        buffer = bytearray(self.stored(entry["name"]).numpy().tobytes())  # a bytearray: it may be written to
        return np.ndarray(shape, dtype, buffer=buffer, order=entry["order"])

    def stored(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(
                f"a tensor {name!r} was expected among {len(self.tensors)} stored ones, but is not there: the "
                "files of this checkpoint do not belong together",
                fix="resume from another checkpoint",
            )
        return self.tensors[name]


# Out here, and not in each decoder: a reference to itself would keep the files mapped until a collection.
_KINDS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "int": lambda decoder, entry: int(entry["hex"], 16),
    "float": lambda decoder, entry: struct.unpack(">d", bytes.fromhex(entry["bits"]))[0],
    "complex": lambda decoder, entry: complex(*struct.unpack(">2d", bytes.fromhex(entry["bits"]))),
    "str": lambda decoder, entry: bytes.fromhex(entry["hex"]).decode(*SURROGATES),
    "bytes": lambda decoder, entry: bytes.fromhex(entry["hex"]),
    "dict": lambda decoder, entry: dict(decoder.pairs(entry)),
    "ordered": lambda decoder, entry: OrderedDict(decoder.pairs(entry)),
    "tuple": lambda decoder, entry: tuple(map(decoder.decode, entry["items"])),
    "size": lambda decoder, entry: torch.Size(entry["items"]),
    "deque": lambda decoder, entry: deque(map(decoder.decode, entry["items"]), entry["maxlen"]),
    "defaultdict": lambda decoder, entry: defaultdict(decoder.decode(entry["factory"]), decoder.pairs(entry)),
    "slice": lambda decoder, entry: slice(*map(decoder.decode, entry["items"])),
    "range": lambda decoder, entry: range(*map(decoder.decode, entry["items"])),
    "namedtuple": Decoder.named_tuple,
    "object": Decoder.object,
    "class": Decoder.found,
    "enum": Decoder.enum,
    "constant": Decoder.constant,
    "device": lambda decoder, entry: torch.device(entry["name"]),
    "tensor": Decoder.tensor,
    "array": Decoder.array,
    "scalar": lambda decoder, entry: np.frombuffer(bytes.fromhex(entry["hex"]), entry["dtype"])[0],
}
