"""Objects as containers: what is refused and why, and that reading a checkpoint runs nothing."""

from __future__ import annotations

import array
import functools
import io
import json
import random
import re
import sys
import tempfile
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum, Flag
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tbptt import tree
from tbptt.codec import UnknownClassError, decode, encode
from tbptt.errors import CapabilityError, CheckpointError
from tbptt.opaque import class_name, find_class, is_container, parts, rebuild

HERE = __name__
ran: list[str] = []


class Plain:
    pass


class Closing:
    """Holds something outside memory."""

    def __del__(self) -> None:
        ran.append("del")


class Below(Closing):
    pass


class ClosingPair(NamedTuple("ClosingPair", [("h", Any)])):
    def __del__(self) -> None:
        ran.append("del")


class Watching:
    """Does something whenever it is built, read or written to."""

    def __new__(cls) -> Any:
        ran.append("new")
        return super().__new__(cls)

    def __init__(self) -> None:
        ran.append("init")

    def __setattr__(self, name: str, value: Any) -> None:
        ran.append("setattr")

    def __setstate__(self, state: Any) -> None:
        ran.append("setstate")

    def __hash__(self) -> int:
        ran.append("hash")
        return 0

    def __eq__(self, other: object) -> bool:
        ran.append("eq")
        return True

    @property
    def door(self) -> int:
        return 0

    @door.setter
    def door(self, value: Any) -> None:
        ran.append("property")


class Slotted:
    __slots__ = ("kept",)

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)  # would be asked for what was never set


class OnlySlots:
    __slots__ = ("a",)


Kind = TypeVar("Kind")


class Typed(Generic[Kind]):
    pass


class Color(Enum):
    RED = 1
    ROUGE = 1


class Bits(Flag):
    A = 1
    B = 2


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    ran.clear()


def with_method() -> Any:
    made = Plain()
    made.update = Plain().__init__
    return made


REFUSED: dict[str, Callable[[], Any]] = {
    "numpy array": lambda: np.zeros(3),
    "module": lambda: nn.Linear(1, 1),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset([1]),
    "array": lambda: array.array("d", [1.0]),
    "bytearray": lambda: bytearray(3),
    "lock": threading.Lock,
    "file": io.StringIO,
    "generator of numbers": random.Random,
    "torch generator": torch.Generator,
    "generator": lambda: (item for item in ()),
    "iterator": lambda: iter([1]),
    "bound method": lambda: Plain().__init__,
    "builtin method": lambda: [].append,
    "object with a bound method": with_method,
    "partial": lambda: functools.partial(print, torch.zeros(1)),
    "weak reference": lambda: weakref.ref(Plain),
    "del": Closing,
    "del of a base": Below,
    "temporary directory's finalizer": lambda: weakref.finalize(Plain, print),
    "named temporary file": tempfile.TemporaryFile,
    "exception": lambda: ValueError(torch.zeros(1)),
    "subclass of OrderedDict": type("Mine", (OrderedDict,), {}),
    "subclass of tuple": type("Triple", (tuple,), {}),
    "regular expression": lambda: re.compile("a"),
    "memory view": lambda: memoryview(b"a"),
    "bare object": object,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_its_attributes_is_refused(name: str) -> None:
    value = REFUSED[name]()
    for use in (tree.detach, tree.tensors, tree.copy, tree.num_bytes, tree.leaf_names):
        with pytest.raises(CapabilityError, match="cannot be looked into: what it carries could be neither detached"):
            use({"a": (torch.zeros(2), value)})
    getattr(value, "close", lambda: None)()


@pytest.mark.parametrize("name", ["lock", "generator", "bound method", "partial", "del", "builtin method", "iterator"])
def test_what_is_more_than_its_attributes_is_not_stored(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"state\.a\[1\] was expected to be a plain value"):
        encode({"a": (0, REFUSED[name]())}, "state", {})


def test_what_is_all_in_its_attributes_is_a_container() -> None:
    for kind in (Plain, Watching, Slotted, Typed, OnlySlots, type("D", (dict,), {}), type("L", (list,), {})):
        assert is_container(kind), kind
    for kind in (dict, list, tuple, object, int, Tensor, nn.Parameter, Color, Closing, Below, type, type(None)):
        assert not is_container(kind), kind


def test_an_object_is_taken_apart_and_built_without_running_its_code() -> None:
    value = object.__new__(Watching)
    vars(value).update(h=torch.ones(2), door=torch.zeros(1))  # the second is hidden by a property
    ran.clear()
    again = tree.clone(value)
    assert type(again) is Watching
    assert list(vars(again)) == ["h", "door"]
    assert torch.equal(vars(again)["h"], value.h)
    assert ran == []
    again.door = 3
    assert ran == ["setattr"]  # the control


def test_slots_that_were_never_set_stay_so() -> None:
    assert parts(Slotted()) == {}
    with pytest.raises(AttributeError):
        Slotted.kept.__get__(tree.copy(Slotted()))
    full = Slotted()
    full.kept = torch.ones(1)
    assert torch.equal(tree.copy(full).kept, full.kept)


def test_typed_classes_come_back() -> None:
    typed = Typed[int]()
    typed.h = torch.ones(2)
    assert torch.equal(tree.copy(typed).h, typed.h)


@pytest.mark.parametrize("use", [tree.detach, tree.tensors, tree.copy, lambda value: encode(value, "state", {})])
def test_what_leads_back_to_itself_is_refused(use: Any) -> None:
    loop, items, mapping = Plain(), [], {}
    loop.child = Plain()
    loop.child.parent = loop
    items.append(items)
    mapping["me"] = (mapping,)
    for value in (loop, items, mapping):
        with pytest.raises((CapabilityError, CheckpointError), match=r"leads back to itself|holds itself"):
            use(value)


def test_one_object_in_two_places_is_no_loop() -> None:
    shared = Plain()
    shared.h = torch.zeros(2)
    assert tree.num_bytes([shared, {"again": shared}]) == 16


# --- what a checkpoint may do when it is read: nothing


def decoded(entry: Any, *own: Any) -> Any:
    """Decode for a run whose own state is made of these."""
    return decode(entry, {}, lambda _: own)


def test_reading_runs_no_code_of_the_class() -> None:
    part = [["h", 1], ["door", 2], ["__class__", 3]]
    made = decoded({"$": "object", "class": f"{HERE}:Watching", "parts": part}, rebuild(Watching, {}))
    assert type(made) is Watching
    assert vars(made) == {"h": 1, "door": 2, "__class__": 3}
    assert ran == []


@pytest.mark.parametrize(
    "name", ["Closing", "Below", "nn", "Color", "Tensor", "np", "Nowhere", "Closing.__del__", "ran"]
)
def test_reading_builds_only_containers(name: str) -> None:
    with pytest.raises(CheckpointError):
        decode({"$": "object", "class": f"{HERE}:{name}", "parts": []}, {})
    assert ran == []


def test_no_class_with_del_comes_in_by_another_door() -> None:
    closing = {"$": "class", "class": f"{HERE}:Closing"}
    pair = tuple.__new__(ClosingPair, (0,))
    with pytest.raises(CheckpointError):
        decoded({"$": "namedtuple", "class": f"{HERE}:ClosingPair", "fields": ["h"], "items": [1]}, pair)
    own = (Plain(), rebuild(OnlySlots, {}), Closing)  # which has the class as a value: not even then
    made = decoded({"$": "object", "class": f"{HERE}:Plain", "parts": [["__class__", closing], ["__dict__", {}]]}, *own)
    assert type(made) is Plain
    for attribute in ("__class__", "b"):
        with pytest.raises(CheckpointError, match="whose objects are their attributes"):
            decoded({"$": "object", "class": f"{HERE}:OnlySlots", "parts": [[attribute, closing]]}, *own)
    del made
    assert ran == []
    del pair
    ran.clear()


def test_parts_that_an_object_has_no_place_for_are_refused() -> None:
    for name in ("{}", "[]"):
        with pytest.raises(CheckpointError, match="whose objects are their attributes"):
            decoded({"$": "object", "class": f"{HERE}:Plain", "parts": [[name, [1]]]}, Plain())


def test_an_object_as_a_key_would_run_its_hash() -> None:
    key = {"$": "object", "class": f"{HERE}:Watching", "parts": []}
    for kind in ("dict", "ordered", "defaultdict"):
        with pytest.raises(CheckpointError, match="plain key"):
            decoded({"$": kind, "factory": None, "items": [[key, 1], [key, 2]]}, rebuild(Watching, {}))
    assert ran == []


def test_bytes_are_never_taken_for_addresses() -> None:
    """An array of objects made of a file's bytes would be a pointer to anywhere."""
    stored = {"x": torch.zeros(8, dtype=torch.uint8)}
    for dtype in ("O", "|O", "O8", [["a", "O"]], [["a", "f4"]], "V8"):
        entry = {"$": "array", "name": "x", "dtype": dtype, "shape": [1], "order": "C"}
        with pytest.raises((CheckpointError, TypeError, ValueError)):
            decode(entry, stored)
    with pytest.raises(ValueError):
        decode({"$": "scalar", "dtype": "O", "hex": "00" * 8}, {})


def test_an_enum_is_an_enum_and_nothing_else() -> None:
    for name, member in (("RED", Color.RED), ("ROUGE", Color.RED)):
        assert decoded({"$": "enum", "class": f"{HERE}:Color", "name": name}, Color.RED) is member
    for kind, name in (("Color", "BLUE"), ("Color", "mro"), ("Color", "__init__"), ("Plain", "__init__")):
        with pytest.raises(CheckpointError, match="was expected to be an enum"):
            decoded({"$": "enum", "class": f"{HERE}:{kind}", "name": name}, Color.RED, Plain())
    with pytest.raises(CheckpointError, match="state"):
        encode(Bits.A | Bits.B, "state", {})
    assert decoded(json.loads(json.dumps(encode(Bits.B, "state", {}))), Bits.A) is Bits.B


def test_constants_are_torchs_own() -> None:
    for name in ("load", "nn", "ops", "Tensor", "__loader__", "no_such_dtype"):
        with pytest.raises(CheckpointError, match="dtype, layout or memory format"):
            decode({"$": "constant", "name": name}, {})


def test_reading_imports_nothing_even_where_a_module_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some packages import what they are asked for by name."""
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: ran.append(name) or Plain
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    assert lazy.Anything is Plain
    assert ran == ["Anything"]  # the control
    before = set(sys.modules)
    for name in ("lazy:Plain", "lazy:Plain.Inner", "antigravity:Plain", "this", "torch.onnx:Nothing", ":", ""):
        assert find_class(name) is None
        for kind in ("object", "class", "enum", "namedtuple"):
            with pytest.raises(UnknownClassError, match="was expected to be of a class that this run"):
                decode({"$": kind, "class": name, "parts": [], "fields": [], "items": [], "name": ""}, {})
    assert ran == ["Anything"]
    assert set(sys.modules) == before


def test_a_class_is_named_only_if_it_is_found_again() -> None:
    class Local:
        pass

    assert class_name(Plain) == f"{HERE}:Plain"
    assert find_class(f"{HERE}:Plain") is Plain
    assert class_name(Local) is None
    with pytest.raises(CheckpointError, match=r"define Local at the top level"):
        encode([Local()], "state", {})
    assert type(rebuild(Local, {})) is Local  # that concerns files only
