"""Any nesting of plain values and tensors as JSON with references to tensors, and exactly back.

What JSON has is written as JSON; everything else is an object with the key "$", which names its kind. No
code is ever run or imported to read one: a named tuple's class must already be there.
"""

from __future__ import annotations

import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.errors import CheckpointError

__all__ = ["decode", "encode"]

_MARK = "$"
_EXACT_INT = 2**63  # beyond it other readers of JSON round, and Python limits the digits it will parse
_ALIGNMENT_BYTES = 64  # of fresh memory in torch
_SHORT = 80  # characters of a value that an error shows
_REAL = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.bool}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)
_COMPLEX = frozenset({torch.complex128, torch.complex64, torch.complex32})
_NUMPY_SCALARS = "biufcmM"  # numpy's own letters: bool, int, uint, float, complex, timedelta, datetime
_NUMPY_ARRAYS = _NUMPY_SCALARS + "SU"


def encode(tree: Any, root: str, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as a value that `json.dumps` takes, and put its tensors into `tensors`.

    Args:
        tree: None, bool, int, float, complex, str, bytes, tensors, numpy arrays and scalars, in any nesting
            of lists, tuples, named tuples and dicts with plain keys.
        root: what errors call the tree; a tensor's name is its path below it.
        tensors: filled with contiguous real tensors on the CPU, none of which share memory.

    Raises:
        CheckpointError: a value of another type, named by its path; or a container that holds itself.

    Example:
        >>> found = {}
        >>> encode({"lr": 0.1, "exp_avg": (torch.zeros(2),)}, "state", found)
        {'lr': 0.1, 'exp_avg': {'$': 'tuple', 'items': [{'$': 'tensor', 'name': 'exp_avg[0]'}]}}
        >>> decode(_, found)
        {'lr': 0.1, 'exp_avg': (tensor([0., 0.]),)}
    """
    try:
        return _Encoder(root, tensors).encode(tree, root)
    except RecursionError:
        raise CheckpointError(
            f"{root} was expected to be a tree, but it is nested without end: a container holds itself, "
            "and no "
            "file could hold that",
            fix="leave the reference back out of state_dict()",
        ) from None


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `encode` was given; every tensor in fresh memory, with the strides it had.

    Raises:
        CheckpointError: a kind, tensor or class that is not known here.
    """
    return _Decoder(tensors).decode(value)


class _Encoder:
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
            return value if _is_unicode(value) else {_MARK: "str", "hex": value.encode(*_SURROGATES).hex()}
        if kind is int:
            return value if -_EXACT_INT <= value < _EXACT_INT else {_MARK: "int", "hex": hex(value)}
        if kind is float:
            # x - x is 0 for every number and NaN for the rest, whose bits JSON cannot hold.
            return value if value - value == 0 else {_MARK: "float", "bits": struct.pack(">d", value).hex()}
        if kind is complex:
            return {_MARK: "complex", "bits": struct.pack(">2d", value.real, value.imag).hex()}
        if kind is bytes:
            return {_MARK: "bytes", "hex": value.hex()}
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
        if isinstance(value, np.generic) and value.dtype.kind in _NUMPY_SCALARS:
            return {_MARK: "scalar", "dtype": _dtype_name(value.dtype), "hex": value.tobytes().hex()}
        return self.refuse(value, path)

    def items(self, values: Sequence[Any], path: str) -> list[Any]:
        return [self.encode(item, f"{path}[{index}]") for index, item in enumerate(values)]

    def mapping(self, value: dict[Any, Any], path: str) -> dict[str, Any]:
        plain = all(type(key) is str and key != _MARK and _is_unicode(key) for key in value)
        if plain and type(value) is dict:
            return {key: self.encode(item, f"{path}.{key}") for key, item in value.items()}
        pairs: list[Any] = []
        for key, item in value.items():
            if type(key) not in (str, int, bool, float, bytes, type(None)):
                self.refuse(key, f"a key of {path}")
            below = f"{path}.{key}" if type(key) is str else f"{path}[{key!r}]"
            pairs.append([self.encode(key, f"a key of {path}"), self.encode(item, below)])
        return {_MARK: "dict" if type(value) is dict else "ordered", "items": pairs}

    def tuple(self, value: tuple[Any, ...], path: str) -> dict[str, Any]:
        kind = type(value)
        if kind is tuple:
            return {_MARK: "tuple", "items": self.items(value, path)}
        if kind is torch.Size:
            return {_MARK: "size", "items": list(value)}
        fields: tuple[str, ...] | None = getattr(kind, "_fields", None)
        if fields is None:
            self.refuse(value, path)
        if _find_class(kind.__module__, kind.__qualname__) is not kind:
            raise CheckpointError(
                f"{path} is a named tuple {kind.__module__}:{kind.__qualname__}, which cannot be found "
                "again under "
                "that name: a resumed run could not rebuild it",
                fix=f"define {kind.__name__} at the top level of its module",
            )
        items = [self.encode(item, f"{path}.{field}") for field, item in zip(fields, value, strict=True)]
        name = f"{kind.__module__}:{kind.__qualname__}"
        return {_MARK: "namedtuple", "class": name, "fields": list(fields), "items": items}

    def tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not is_plain or value.is_meta or value.dtype not in _REAL | _COMPLEX:
            self.refuse(value, path)
        entry: dict[str, Any] = {_MARK: "tensor", "name": self.free_name(path)}
        entry |= _layout(value)
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
        if value.dtype.kind not in _NUMPY_ARRAYS:
            self.refuse(value, path)
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        name = self.free_name(path)
        self.tensors[name] = torch.frombuffer(bytearray(value.tobytes(order)) or bytearray(1), dtype=torch.uint8)
        shape = list(value.shape)
        return {
            _MARK: "array",
            "name": name,
            "dtype": _dtype_name(value.dtype),
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
            f"{path} was expected to be a plain value, a tensor, a numpy array, or a list, tuple or dict "
            "of them, "
            f"but is a {kind.__module__}.{kind.__qualname__} ({shown}): a checkpoint holds no pickled "
            "objects, so "
            "it could not be restored",
            fix="return its parts from state_dict() instead, and rebuild it in load_state_dict()",
        )


class _Decoder:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.built: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        entry = cast("dict[str, Any]", value)
        if _MARK not in entry:
            return {key: self.decode(item) for key, item in entry.items()}
        if entry[_MARK] not in _KINDS:
            raise CheckpointError(
                f"one of the kinds {sorted(_KINDS)} was expected, but {entry[_MARK]!r} came: the "
                "checkpoint "
                "was written by a version of tbptt that knows more",
                fix="pip install --upgrade tbptt",
            )
        return _KINDS[entry[_MARK]](self, entry)

    def named_tuple(self, entry: dict[str, Any]) -> Any:
        module, _, qualname = str(entry["class"]).partition(":")
        found = _find_class(module, qualname)
        if found is None:
            raise CheckpointError(
                f"the checkpoint holds a named tuple {entry['class']}, but no such class has been "
                "imported, and "
                "reading a checkpoint imports nothing",
                fix=f"import {module} before resuming",
            )
        fields = getattr(found, "_fields", None)
        if not issubclass(found, tuple) or fields != tuple(entry["fields"]):
            raise CheckpointError(
                f"{entry['class']} was expected to be a named tuple with the fields {entry['fields']}, "
                "but has "
                f"{fields and list(fields)}: its values would get other meanings",
                fix=f"resume with the {qualname} that the run was started with",
            )
        # tuple.__new__, as namedtuple's own _make does: a class may want other arguments than its fields.
        return cast(Any, tuple.__new__(found, map(self.decode, entry["items"])))

    def tensor(self, entry: dict[str, Any]) -> Tensor:
        name = entry["name"]
        if name not in self.built:
            data = self.stored(name)
            self.built[name] = _rebuild(torch.view_as_complex(data) if "complex" in entry else data, entry)
        return self.built[name]

    def array(self, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        buffer = bytearray(self.stored(entry["name"]).numpy().tobytes())  # a bytearray: it may be written to
        return np.ndarray(shape, dtype, buffer=buffer, order=entry["order"])

    def stored(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(
                f"a tensor {name!r} was expected among {len(self.tensors)} stored ones, but is not there: "
                "the "
                "files of this checkpoint do not belong together",
                fix="resume from another checkpoint",
            )
        return self.tensors[name]


# Out here, and not in each decoder: a reference to itself would keep the files mapped until a collection.
_KINDS: dict[str, Callable[[_Decoder, dict[str, Any]], Any]] = {
    "int": lambda decoder, entry: int(entry["hex"], 16),
    "float": lambda decoder, entry: struct.unpack(">d", bytes.fromhex(entry["bits"]))[0],
    "complex": lambda decoder, entry: complex(*struct.unpack(">2d", bytes.fromhex(entry["bits"]))),
    "str": lambda decoder, entry: bytes.fromhex(entry["hex"]).decode(*_SURROGATES),
    "bytes": lambda decoder, entry: bytes.fromhex(entry["hex"]),
    "dict": lambda decoder, entry: {decoder.decode(key): decoder.decode(item) for key, item in entry["items"]},
    "ordered": lambda decoder, entry: OrderedDict((decoder.decode(k), decoder.decode(v)) for k, v in entry["items"]),
    "tuple": lambda decoder, entry: tuple(map(decoder.decode, entry["items"])),
    "size": lambda decoder, entry: torch.Size(entry["items"]),
    "namedtuple": _Decoder.named_tuple,
    "tensor": _Decoder.tensor,
    "array": _Decoder.array,
    "scalar": lambda decoder, entry: np.frombuffer(bytes.fromhex(entry["hex"]), entry["dtype"])[0],
}


_SURROGATES = ("utf-8", "surrogatepass")


def _is_unicode(text: str) -> bool:
    # Lone surrogates are legal in Python, but a pair of them comes back from JSON as one character.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.str


def _find_class(module: str, qualname: str) -> type[Any] | None:
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return cast("type[Any]", found) if isinstance(found, type) else None


def _default_stride(size: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for length in reversed(size):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]


def _layout(tensor: Tensor) -> dict[str, Any]:
    """Return what must be known of a tensor's place in memory for kernels to treat it alike.

    The order of a sum, and with it its last bits, may depend on strides and alignment.
    """
    size, stride = list(tensor.size()), list(tensor.stride())
    layout: dict[str, Any] = {}
    if stride != _default_stride(size):
        if any(step == 0 and length > 1 for step, length in zip(stride, size, strict=True)):
            layout["size"] = size
        apart = 1  # elements overlap unless each dimension steps over all that the faster ones cover
        for step, length in sorted(zip(stride, size, strict=True)):
            if length > 1 and step != 0:
                if step < apart:
                    return {}
                apart = step * length
        layout["stride"] = stride
    offset = tensor.storage_offset() % (_ALIGNMENT_BYTES // tensor.element_size())
    return layout | {"offset": offset} if offset else layout


def _rebuild(data: Tensor, layout: dict[str, Any]) -> Tensor:
    """Return a copy of `data` in fresh memory, laid out as `_layout` said."""
    if "stride" not in layout and "offset" not in layout:
        return data.clone(memory_format=torch.contiguous_format)
    stride: list[int] = layout.get("stride") or _default_stride(data.shape)
    offset: int = layout.get("offset", 0)
    reach = sum((length - 1) * step for length, step in zip(data.shape, stride, strict=True)) + 1
    memory = torch.empty(offset + (reach if data.numel() else 0), dtype=data.dtype)
    rebuilt = memory.as_strided(data.shape, stride, offset).copy_(data)
    return rebuilt.expand(layout["size"]) if "size" in layout else rebuilt
