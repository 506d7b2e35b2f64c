"""What the encoder wrote, exactly back."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from tbptt.codec.known import Known, Like, known_classes, nothing
from tbptt.codec.layout import laid_out
from tbptt.codec.names import FACTORIES, MARK, NUMPY_ARRAYS, PLAIN_KEYS, SURROGATES
from tbptt.errors import CheckpointError
from tbptt.opaque import is_container, rebuild

__all__ = ["UnknownClassError", "decode"]


class UnknownClassError(CheckpointError):
    """A file names a class that this run's own state does not have at that place."""


def decode(value: Any, tensors: dict[str, Tensor], like: Like = nothing, root: str = "state") -> Any:
    """Return what `encode` was given; every tensor in fresh memory, with the strides it had.

    Args:
        value: what `encode` returned, or what a file has in its place.
        tensors: what `encode` has filled.
        like: `like(entry)` returns this run's own value of an entry of the tree, a key of its outermost dict ("" where
            that is no dict). A class that is named in an entry must be one that this value is made of, or registered.
            It is called only for entries in which a class is named, once.
        root: what errors call the tree.

    Raises:
        UnknownClassError: a class that is not known at its place; nothing of it was looked up, imported or called.
        CheckpointError: a kind, tensor or class that is not known here.
    """
    decoder = Decoder(tensors, like, root)
    if isinstance(value, dict) and MARK not in value:
        entries = cast("dict[str, Any]", value)
        return {name: decoder.entry(name, item) for name, item in entries.items()}
    return decoder.decode(value)


class Decoder:
    """Turns what JSON had back into values."""

    def __init__(self, tensors: dict[str, Tensor], like: Like, root: str) -> None:
        self.tensors, self.like = tensors, like
        self.built: dict[str, Tensor] = {}
        self._entry = ""
        self._known: Known | None = None  # of the entry; looked for when a class is named there
        self._path = [root]

    def entry(self, name: str, value: Any) -> Any:
        self._entry, self._known = name, None
        return self.below(f".{name}", value)

    def below(self, name: str, value: Any) -> Any:
        """Decode what is at `name` of the place where the decoder is."""
        self._path.append(name)
        decoded = self.decode(value)
        self._path.pop()
        return decoded

    def items(self, values: list[Any]) -> Iterator[Any]:
        return (self.below(f"[{index}]", item) for index, item in enumerate(values))

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return list(self.items(cast("list[Any]", value)))
        if not isinstance(value, dict):
            return value
        entry = cast("dict[str, Any]", value)
        if MARK not in entry:
            return {key: self.below(f".{key}", item) for key, item in entry.items()}
        if entry[MARK] not in _KINDS:
            raise CheckpointError(
                f"one of the kinds {sorted(_KINDS)} was expected, but {entry[MARK]!r} came: the checkpoint "
                "was written by a version of tbptt that knows more",
                fix="pip install --upgrade tbptt",
            )
        return _KINDS[entry[MARK]](self, entry)

    def known(self) -> Known:
        if self._known is None:
            self._known = known_classes(self.like(self._entry))
        return self._known

    def among(self, classes: dict[str, type[Any]], entry: dict[str, Any]) -> type[Any]:
        """Return the class of a name; names are looked up here, and nowhere else."""
        found = classes.get(str(entry["class"]))
        if found is None:
            self.refuse(entry)
        return found

    def found(self, entry: dict[str, Any]) -> type[Any]:
        """Return the class of an object, from among the run's own."""
        return self.among(self.known().kinds, entry)

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
        return cast(Any, tuple.__new__(found, self.items(entry["items"])))

    def object(self, entry: dict[str, Any]) -> Any:
        found = self.found(entry)
        made = {str(name): self.below(f".{name}", part) for name, part in entry["parts"]}
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
        return found.__members__[entry["name"]]

    def value(self, entry: dict[str, Any]) -> type[Any]:
        """Return a class that is a value: the run's own state must have it as a value, too."""
        return self.among(self.known().values, entry)

    def defaultdict(self, entry: dict[str, Any]) -> Any:
        factory = entry["factory"]
        if factory is not None:
            name = str(cast("dict[str, Any]", factory)["class"] if isinstance(factory, dict) else factory)
            if name not in FACTORIES:
                raise CheckpointError(
                    f"{self.place()} was expected to be a defaultdict of one of {', '.join(sorted(FACTORIES))}, but "
                    f"the checkpoint names {name}: a default is called, and a file must not say what is called",
                    fix="a plain dict in the state; do not use a file that you do not trust",
                )
            factory = FACTORIES[name]
        return defaultdict(cast(Any, factory), self.pairs(entry))

    def refuse(self, entry: dict[str, Any]) -> NoReturn:
        name = str(entry["class"])
        short = name.rpartition(":")[2]
        raise UnknownClassError(
            f"{self.place()} was expected to be of a class that this run's own state has there, but the checkpoint "
            f"names {name} (as {entry[MARK]}): what a class does comes from the program and never from a file, so "
            "nothing of it was built",
            fix=f"tbptt.registered_class({short}) first, if your model makes such objects later on; else do not use "
            "the file: it was made by something else than this run",
        )

    def place(self) -> str:
        return "".join(self._path)

    def pairs(self, entry: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        for key, item in entry["items"]:
            plain = self.decode(key)
            if type(plain) not in PLAIN_KEYS:
                raise CheckpointError(f"a plain key was expected in a dict, but a {type(plain).__name__} came")
            yield plain, self.below(f"[{plain!r}]", item)

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
    "tuple": lambda decoder, entry: tuple(decoder.items(entry["items"])),
    "size": lambda decoder, entry: torch.Size(entry["items"]),
    "deque": lambda decoder, entry: deque(decoder.items(entry["items"]), entry["maxlen"]),
    "defaultdict": Decoder.defaultdict,
    "slice": lambda decoder, entry: slice(*decoder.items(entry["items"])),
    "range": lambda decoder, entry: range(*decoder.items(entry["items"])),
    "namedtuple": Decoder.named_tuple,
    "object": Decoder.object,
    "class": Decoder.value,
    "enum": Decoder.enum,
    "constant": Decoder.constant,
    "device": lambda decoder, entry: torch.device(entry["name"]),
    "tensor": Decoder.tensor,
    "array": Decoder.array,
    "scalar": lambda decoder, entry: np.frombuffer(bytes.fromhex(entry["hex"]), entry["dtype"])[0],
}
