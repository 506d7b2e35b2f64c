"""The codec gives back exactly what it was given, and refuses by name what it cannot."""

from __future__ import annotations

import collections
import json
import math
import random
import struct
import sys
from collections import OrderedDict
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tbptt.codec import UnknownClassError, decode, encode
from tbptt.errors import CheckpointError


class Pair(NamedTuple):
    h: Any
    c: Any


def through_files(tree: Any) -> Any:
    """Encode, write, read, decode: the way of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(tree, "state", tensors), allow_nan=False)
    return decode(json.loads(text), load(save(tensors)), lambda _: tree)  # the run's own has the same classes


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert not b.requires_grad
        assert a.stride() == b.stride()
        flat = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b)]
        assert torch.equal(*(t.resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in flat))
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        assert np.asarray(a).strides == np.asarray(b).strides or not np.asarray(a).size
    elif isinstance(a, dict):
        assert [(type(k), repr(k)) for k in a] == [(type(k), repr(k)) for k in b]  # the order too
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_same(x, y)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, complex):
        assert struct.pack(">2d", a.real, a.imag) == struct.pack(">2d", b.real, b.imag)
    elif isinstance(a, float):
        assert struct.pack(">d", a) == struct.pack(">d", b)
    else:
        assert a == b


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(torch.bool, torch.complex64, torch.complex128),
]
SHAPES = [(), (0,), (1,), (3,), (2, 0, 3), (2, 3), (1, 4, 1), (2, 3, 4)]


def make_tensor(rng: random.Random, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    if dtype == torch.bool:
        raw = bytearray(rng.choice((0, 1)) for _ in range(size))
    else:
        raw = bytearray(rng.randbytes(size))  # any bits: NaNs with payloads, denormals, -0.0
    flat = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).clone()


def make_scalar(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(None, True, False, 0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 1 << 20_000),
            *(0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, -math.nan),
            *(
                struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0],
                complex(-0.0, math.nan),
                rng.random(),
            ),
            *("", "$", "tensor", "é€😀", "\ud800", "\ud83d\ude00", "\x00", b"", b"\x00\xff"),
            *(np.float64(0.1), np.float32(math.nan), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True)),
            *(np.complex64(1 - 2j), np.datetime64("2020-01-01", "D"), np.float16(1.5)),
        ]
    )


def make_key(rng: random.Random) -> Any:
    return rng.choice(["a", "b.c", "$", "", "__metadata__", "a[0]", "\ud800", 0, 1, -7, 2**70, b"k", None, 2.5])


def make_tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(12 if depth else 4)
    if kind < 2:
        return make_scalar(rng)
    if kind == 2:
        return make_tensor(rng, rng.choice(DTYPES), rng.choice(SHAPES))
    if kind == 3:
        dtype = rng.choice(["<f8", ">i4", "|b1", "<c8", "<U5", "|S3", "<M8[ns]", "<u2"])
        array = np.frombuffer(rng.randbytes(600) if dtype not in ("|b1", "<U5") else bytes(600), dtype)[:6]
        return rng.choice([array.copy(), np.asfortranarray(array.reshape(2, 3)), array.reshape(1, 6)[:, :0].copy()])
    parts = [make_tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 7:
        return {make_key(rng): part for part in parts}
    if kind == 7:
        return OrderedDict((make_key(rng), part) for part in parts)
    if kind == 8:
        return Pair(make_tree(rng, depth - 1), parts)
    return parts if kind < 10 else tuple(parts)


@pytest.mark.parametrize("seed", range(60))
def test_any_nesting_comes_back_bit_for_bit(seed: int) -> None:
    tree = make_tree(random.Random(seed), 5)
    assert_same(tree, through_files(tree))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype) -> None:
    rng = random.Random(str(dtype))
    for shape in SHAPES:
        tensor = make_tensor(rng, dtype, shape)
        assert_same(tensor, through_files([tensor])[0])


BASE = torch.arange(120, dtype=torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        BASE.view(10, 12).t(),
        BASE.view(2, 3, 4, 5).permute(3, 1, 0, 2),
        torch.empty(2, 3, 4, 5).normal_().to(memory_format=torch.channels_last),
        BASE.view(10, 12)[:, 3:5],
        BASE[::7],
        BASE[5:9],
        BASE[7],
        BASE[:3].view(3, 1).expand(3, 4),
        BASE[:1].expand(5),
        BASE[3:4].expand(2, 6).t(),
        torch.empty_strided((1, 4, 1), (99, 1, 7)).normal_(),
        torch.empty(0, 3).t(),
        torch.randn(3, 4, dtype=torch.complex64).mH,
        torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        torch.randn(3, requires_grad=True) * 2,
        torch.nn.Parameter(torch.randn(2)).detach(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}{tensor.stride()}",
)
def test_layout_in_memory_comes_back(tensor: Tensor) -> None:
    back = through_files({"x": tensor})["x"]
    assert_same(tensor, back)
    # The offset within the alignment of fresh memory, on which vectorised kernels may depend.
    lane = 64 // tensor.element_size()
    assert back.storage_offset() % lane == tensor.storage_offset() % lane


def test_overlapping_memory_comes_back_in_value() -> None:
    sliding = BASE.unfold(0, 5, 2)
    back = through_files(sliding)
    assert torch.equal(sliding, back)
    back += 1  # every element has its own memory


def test_one_tensor_met_twice_is_one_tensor_again() -> None:
    shared = torch.arange(3.0)
    tree = through_files({"a": shared, "b": [shared], "view": shared[1:]})
    assert tree["a"] is tree["b"][0]
    assert torch.equal(tree["view"], shared[1:])


def test_names_that_collide_stay_apart() -> None:
    tree = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "__metadata__": torch.tensor(3)}
    assert_same(tree, through_files(tree))


def test_nothing_is_shared_with_the_files() -> None:
    tensors: dict[str, Tensor] = {}
    text = encode([torch.zeros(3), np.zeros(2)], "state", tensors)
    tensor, array = decode(text, tensors)
    tensor += 1
    array += 1
    assert all(not stored.any() for stored in tensors.values())


def test_a_parameter_comes_back_as_a_plain_tensor() -> None:
    back = through_files(torch.nn.Parameter(torch.ones(2)))
    assert type(back) is Tensor
    assert not back.requires_grad


def test_torch_size_and_named_tuples_keep_their_class() -> None:
    assert type(through_files(torch.zeros(2, 3).size())) is torch.Size
    assert type(through_files(Pair(1, Pair(2, 3))).c) is Pair


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "set"),
        (np.array([None]), "ndarray"),
        (np.zeros(2, dtype=[("a", "f4")]), "ndarray"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (np.str_("x"), "str_"),
        (torch.eye(2).to_sparse(), "Tensor"),
        (torch.empty(2, device="meta"), "Tensor"),
        (torch.sort(torch.zeros(2)), "sort"),
        (len, "builtin_function_or_method"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_by_its_path(value: Any, kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"state\.optimizer\.foo\[2\]") as caught:
        encode({"optimizer": {"foo": [0, 1, value]}}, "state", {})
    assert kind in str(caught.value)
    assert "hint:" in str(caught.value)


def test_keys_that_cannot_be_stored_are_refused_by_their_path() -> None:
    with pytest.raises(CheckpointError, match=r"a key of state\.a"):
        encode({"a": {(1, 2): 3}}, "state", {})


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="holds itself"):
        encode({"loop": loop}, "state", {})


def test_a_named_tuple_that_could_not_be_found_again_is_refused() -> None:
    class Local(NamedTuple):
        x: int

    with pytest.raises(CheckpointError, match=r"state\.a.*Local"):
        encode({"a": Local(1)}, "state", {})


def test_reading_imports_nothing() -> None:
    assert "this" not in sys.modules
    entry = {"$": "namedtuple", "class": "this:Zen", "fields": ["x"], "items": [1]}
    with pytest.raises(UnknownClassError, match="this:Zen"):
        decode(entry, {})
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "own",
    [
        collections.namedtuple("Pair", ["h", "d"], module=__name__)(1, 2),
        type("Pair", (), {"__module__": __name__})(),
        Enum("Pair", {"RED": 1}, module=__name__)["RED"],
    ],
    ids=lambda own: type(own).__mro__[1].__name__,
)
def test_only_the_same_named_tuple_is_built(own: Any) -> None:
    """Of a class of that name, as after an edit."""
    entry = {"$": "namedtuple", "class": f"{__name__}:Pair", "fields": ["h", "c"], "items": [1, 2]}
    assert decode(entry, {}, lambda _: Pair(0, 0)) == Pair(1, 2)
    with pytest.raises(CheckpointError, match="named tuple with the fields"):
        decode(entry, {}, lambda _: own)


def test_unknown_kinds_and_missing_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="pickle"):
        decode({"$": "pickle", "hex": ""}, {})
    with pytest.raises(CheckpointError, match="'w'"):
        decode({"$": "tensor", "name": "w"}, {"v": torch.zeros(1)})


def test_an_optimizer_s_state_comes_back() -> None:
    model = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = through_files(state)
    assert_same(state, back)
    optimizer.load_state_dict(back)
