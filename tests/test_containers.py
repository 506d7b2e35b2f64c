"""States of any nesting: nothing in them is lost, shared or mixed up, whatever they are made of.

The oracle is a walker of its own, `members` and `remake`, which knows the containers of this file by name and
shares no code with the library.
"""

from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tbptt import tree
from tbptt.codec import decode, encode

B = 3
CHOSEN = torch.tensor([False, True, False])
ORDER = torch.tensor([2, 0, 0, 1])
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool)


class Color(Enum):
    RED = 1
    BLUE = "two"


class Pair(NamedTuple):
    hidden: Any
    cell: Any


class Cache:
    """Keeps what it is told, and would go wrong if it were built by its `__init__` or `__setattr__`."""

    def __init__(self, needed: int) -> None:
        raise AssertionError(needed)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(name)


class Slotted:
    __slots__ = ("__weakref__", "_own", "left", "right")


class MoreSlots(Slotted):
    __slots__ = ("extra",)


@dataclass(frozen=True)
class Record:
    first: Any
    second: Any = None


class DictCache(dict[Any, Any]):
    """A dict with attributes, whose way of reading items is not that of a dict."""

    def __iter__(self) -> Any:
        raise AssertionError

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError


class ListCache(list[Any]):
    """A list with attributes, whose way of reading items is not that of a list."""

    def __iter__(self) -> Any:
        raise AssertionError


SLOTS = {Slotted: ("_own", "left", "right"), MoreSlots: ("_own", "left", "right", "extra")}
Path = tuple[Any, ...]


def members(value: Any) -> list[tuple[Any, Any]] | None:
    """The oracle's way in: names and members of a container, None for a leaf."""
    kind = type(value)
    if kind in (tuple, list, deque, Pair):
        return list(enumerate(value))
    if kind in (dict, OrderedDict, defaultdict):
        return list(value.items())
    if kind is Cache:
        return list(vars(value).items())
    if kind in SLOTS:
        return [(name, getattr(value, name)) for name in SLOTS[kind] if hasattr(value, name)]
    if kind is Record:
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if kind is DictCache:
        return [*dict.items(value), *((("attribute", name), item) for name, item in vars(value).items())]
    if kind is ListCache:
        items = [(index, list.__getitem__(value, index)) for index in range(list.__len__(value))]
        return [*items, *((("attribute", name), item) for name, item in vars(value).items())]
    return None


def make(kind: type[Any], found: list[tuple[Any, Any]], like: Any) -> Any:
    """The oracle's way back: a container of these members; `like` tells a deque's length and a default."""
    items = [item for _, item in found]
    if kind is Pair:
        return Pair(*items)
    if kind is deque:
        return deque(items, None if like is None else like.maxlen)
    if kind is defaultdict:
        return defaultdict(list if like is None else like.default_factory, found)
    if kind in (tuple, list, dict, OrderedDict):
        return kind(found) if kind in (dict, OrderedDict) else kind(items)
    if kind is Record:
        return Record(*items)
    made = kind.__new__(kind)
    for name, item in found:
        if isinstance(name, tuple):
            vars(made)[name[1]] = item
        elif kind is DictCache:
            dict.__setitem__(made, name, item)
        elif kind is ListCache:
            list.append(made, item)
        else:
            object.__setattr__(made, name, item)
    return made


def remake(value: Any, function: Callable[[Path, Any], Any], path: Path = (), *, turned: bool = False) -> Any:
    """Every leaf through `function`; `turned`: attributes get their values in another order."""
    found = members(value)
    if found is None:
        return function(path, value)
    new = [(name, remake(item, function, (*path, name), turned=turned)) for name, item in found]
    return make(type(value), new[::-1] if turned and type(value) in (Cache, dict) else new, value)


def leaves(value: Any) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    remake(value, lambda path, leaf: found.setdefault(path, leaf))
    return found


def tensors(value: Any) -> dict[Path, Tensor]:
    return {path: leaf for path, leaf in leaves(value).items() if isinstance(leaf, Tensor)}


def containers(value: Any) -> list[Any]:
    found = members(value)
    return [] if found is None else [value, *(each for _, item in found for each in containers(item))]


def shape_of(value: Any) -> Any:
    """All but the leaves: kinds, names and their order, what else a container has."""
    found = members(value)
    if found is None:
        return Tensor if isinstance(value, Tensor) else (type(value), value)
    extra = value.maxlen if type(value) is deque else value.default_factory if type(value) is defaultdict else None
    return type(value), extra, [(name, shape_of(item)) for name, item in found]


# --- random trees


class Grower:
    """Grows random trees, and remembers the lane dimension of each of their tensors."""

    def __init__(self, seed: int, *, shared: bool = False, storable: bool = False) -> None:
        self.rng = random.Random(seed)
        self.shared, self.storable = shared, storable
        self.dims: dict[int, int | None] = {}
        self.bases: list[Tensor] = []
        self.kept: list[Tensor] = []

    def tree(self, depth: int = 4) -> Any:
        rng = self.rng
        if depth == 0 or (depth < 4 and rng.random() < 0.35):
            return self.tensor() if rng.random() < 0.7 else self.constant()
        kind = rng.choice((*_SEQUENCES, *_DICTS, *_OBJECTS, Pair, Record))
        if kind is Pair:
            return Pair(self.tree(depth - 1), rng.choice([None, 7, torch.empty(0, B) if self.shared else None]))
        if kind is Record:
            return Record(self.tree(depth - 1), self.constant())
        num = rng.randrange(5 if depth < 4 else 2, 5) if depth == 4 else rng.randrange(4)
        items = [self.tree(depth - 1) for _ in range(num)]
        if kind in _SEQUENCES:
            return make(kind, list(enumerate(items)), deque(maxlen=9) if rng.random() < 0.5 else None)
        if kind in _DICTS:
            keys = (
                rng.sample(["z", "a", "b.c", "", "$", "[]"], num) if rng.random() < 0.7 else rng.sample(range(9), num)
            )
            return make(kind, list(zip(keys, items, strict=True)), None)
        names = rng.sample(SLOTS.get(kind, ("keys", "values", "left", "seen")), min(num, 3))
        found: list[tuple[Any, Any]] = list(zip(names, items, strict=False))
        if kind in (DictCache, ListCache):
            found = [(index, self.tree(depth - 1)) for index in range(2)] + [(("attribute", n), v) for n, v in found]
        return make(kind, found, None)

    def tensor(self) -> Tensor:
        rng = self.rng
        shape = [rng.choice((0, 1, 2, 2, 4)) for _ in range(rng.randrange(3))]
        dim = None if self.shared and rng.random() < 0.3 else rng.randrange(len(shape) + 1)
        if dim is not None:
            shape.insert(dim, B)
        dtype = rng.choice(DTYPES)
        made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        made = (made * 9).to(dtype)
        if (made.is_floating_point() or made.is_complex()) and rng.random() < 0.7:
            self.bases.append(made.requires_grad_())
            made = made * 1  # in a graph
        self.dims[id(made)] = dim
        self.kept.append(made)  # its id stays its own
        return made

    def constant(self) -> Any:
        plain = [
            None,
            True,
            3,
            -1.5,
            2j,
            "text",
            b"raw",
            torch.Size((2, 3)),
            torch.float16,
            torch.device("cpu"),
            Color.RED,
        ]
        more = [Color.BLUE, torch.strided, slice(1, None, 2), range(3), torch.channels_last, Pair, torch.nn.GRU]
        return self.rng.choice([*plain, *more, *(() if self.storable else (torch.tanh_ and shape_of, json))])


_SEQUENCES = (tuple, list, deque)
_DICTS = (dict, OrderedDict, defaultdict)
_OBJECTS = (Cache, Slotted, MoreSlots, DictCache, ListCache)


def lane_dims(grower: Grower, state: Any) -> tuple[int | None, ...]:
    """The lane dimensions in the library's order; that it sees each tensor once is the first thing to check."""
    seen = tree.tensors(state)
    assert sorted(map(id, seen)) == sorted(map(id, tensors(state).values()))
    return tuple(grower.dims[id(leaf)] for leaf in seen)


# --- what must be true, each as a function that raises AssertionError


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(left, right)


def check_new(old: Any, new: Any) -> None:
    """The same kinds, names and constants, in containers of which none is the other's."""
    assert shape_of(new) == shape_of(old)
    assert not {id(each) for each in containers(old) if each != ()} & {id(each) for each in containers(new)}


def check_detached(old: Any, new: Any) -> None:
    check_new(old, new)
    now = tensors(new)
    for path, leaf in tensors(old).items():
        assert same_bits(leaf, now[path])
        assert now[path].data_ptr() == leaf.data_ptr()
        assert now[path].is_leaf
        assert not now[path].requires_grad


def check_cloned(old: Any, new: Any) -> None:
    check_new(old, new)
    now = tensors(new)
    for path, leaf in tensors(old).items():
        assert same_bits(leaf, now[path])
        assert leaf.numel() == 0 or now[path].data_ptr() != leaf.data_ptr()
        assert not now[path].requires_grad


def check_copied(old: Any, new: Any) -> None:
    check_new(old, new)
    now = tensors(new)
    for path, leaf in tensors(old).items():
        assert same_bits(leaf, now[path])
        assert leaf.numel() == 0 or now[path].data_ptr() != leaf.data_ptr()
        if leaf.requires_grad:
            (found,) = torch.autograd.grad(now[path].real.sum(), leaf, retain_graph=True)
            assert torch.equal(found, torch.ones_like(leaf))


def check_reset(old: Any, new: Any, fresh: Any, dims: dict[Path, int | None]) -> None:
    check_new(old, new)
    now, start = tensors(new), None if fresh is None else tensors(fresh)
    for path, leaf in tensors(old).items():
        dim = dims[path]
        assert dim is not None
        begun = torch.zeros_like(leaf) if start is None else start[path]
        lanes = [(begun if CHOSEN[lane] else leaf).select(dim, lane) for lane in range(B)]
        assert same_bits(now[path], torch.stack(lanes, dim))
        if leaf.requires_grad:
            (found,) = torch.autograd.grad(now[path].real.sum(), leaf, retain_graph=True)
            wanted = torch.ones_like(leaf)
            wanted.select(dim, 1).zero_()
            assert torch.equal(found, wanted)


def check_selected(old: Any, new: Any, dims: dict[Path, int | None]) -> None:
    check_new(old, new)
    now = tensors(new)
    for path, leaf in tensors(old).items():
        dim = dims[path]
        wanted = leaf if dim is None else torch.stack([leaf.select(dim, int(lane)) for lane in ORDER], dim)
        assert same_bits(now[path], wanted)


def check_stored(old: Any, new: Any) -> None:
    check_cloned(old, new)


def through_files(value: Any) -> Any:
    found: dict[str, Tensor] = {}
    text = json.dumps(encode(value, "state", found), allow_nan=False)
    return decode(json.loads(text), load(save(found)), lambda _: value)  # the run's own has the same classes


def mutate(value: Any) -> None:
    """Spoil every container that can be changed."""
    for each in containers(value):
        if isinstance(each, list):
            list.clear(each)
        elif isinstance(each, deque | dict):
            type(each).clear(each)
        if type(each) in SLOTS:
            for name in SLOTS[type(each)]:
                object.__setattr__(each, name, "spoiled")
        elif hasattr(each, "__dict__"):
            vars(each)["spoiled"] = True


# --- the properties


@pytest.mark.parametrize("seed", range(200))
def test_any_nesting_is_detached_copied_and_stored(seed: int) -> None:
    state = Grower(seed).tree()
    before, shape = leaves(state), shape_of(state)
    results = [tree.detach(state), tree.clone(state), tree.copy(state)]
    check_detached(state, results[0])
    check_cloned(state, results[1])
    check_copied(state, results[2])
    assert tree.num_bytes(state) == sum(leaf.numel() * leaf.element_size() for leaf in tensors(state).values())
    for result in results:
        mutate(result)
    assert shape_of(state) == shape
    assert all(leaf is before[path] for path, leaf in leaves(state).items())

    storable = Grower(seed, storable=True).tree()
    check_stored(storable, through_files(storable))


@pytest.mark.parametrize("seed", range(200))
def test_lanes_of_any_nesting_are_reset_and_chosen(seed: int) -> None:
    grower = Grower(seed)
    state = grower.tree()
    order = lane_dims(grower, state)
    dims = {path: grower.dims[id(leaf)] for path, leaf in tensors(state).items()}
    check_reset(state, tree.where_lanes(CHOSEN, None, state, order), None, dims)
    anew = remake(state, lambda _, leaf: torch.ones_like(leaf) if isinstance(leaf, Tensor) else leaf, turned=True)
    check_reset(state, tree.where_lanes(CHOSEN, anew, state, order), anew, dims)

    grower = Grower(seed, shared=True)
    state = grower.tree()
    grower.dims |= {id(leaf): grower.dims.get(id(leaf), 1) for leaf in tensors(state).values()}
    dims = {path: grower.dims[id(leaf)] for path, leaf in tensors(state).items()}
    check_selected(state, tree.select_lanes(state, ORDER, lane_dims(grower, state)), dims)


def test_the_seeds_meet_everything() -> None:
    """The control: what is never grown is never tested."""
    kinds, dtypes, empties = set(), set(), 0
    for seed in range(200):
        state = Grower(seed).tree()
        kinds |= {type(each) for each in [*containers(state), *leaves(state).values()]}
        dtypes |= {leaf.dtype for leaf in tensors(state).values()}
        empties += sum(leaf.numel() == 0 for leaf in tensors(state).values())
    assert {*_SEQUENCES, *_DICTS, *_OBJECTS, Pair, Record, Color, torch.dtype, torch.device, type(None)} <= kinds
    assert dtypes == set(DTYPES)
    assert empties > 20


def zoo() -> tuple[Grower, Any]:
    """One of each container, with a tensor in a graph in each."""
    grower = Grower(0)

    def leaf() -> Tensor:
        grower.bases.append(torch.randn(B, 2, requires_grad=True))
        made = grower.bases[-1] * 1
        grower.dims[id(made)] = 0
        return made

    kinds = [*_SEQUENCES, *_DICTS, Cache, Slotted, DictCache, ListCache, Pair, Record]
    return grower, [make(kind, [("left", leaf()), ("right", leaf())], None) for kind in kinds]


def test_a_single_leaf_forgotten_is_caught_anywhere() -> None:
    """The negative control of each property: one leaf not treated, or one container not renewed."""
    grower, state = zoo()
    old = tensors(state)
    dims = {path: grower.dims[id(leaf)] for path, leaf in old.items()}
    order = lane_dims(grower, state)
    right: list[tuple[Any, Callable[[Any], None]]] = [
        (tree.detach(state), lambda new: check_detached(state, new)),
        (tree.clone(state), lambda new: check_cloned(state, new)),
        (tree.copy(state), lambda new: check_copied(state, new)),
        (tree.where_lanes(CHOSEN, None, state, order), lambda new: check_reset(state, new, None, dims)),
        (tree.select_lanes(state, ORDER, order), lambda new: check_selected(state, new, dims)),
        (through_files(state), lambda new: check_stored(state, new)),
    ]
    for result, check in right:
        check(result)
        for victim in old:
            wrong = remake(result, lambda path, leaf, victim=victim: old[path] if path == victim else leaf)
            with pytest.raises(AssertionError):
                check(wrong)
        for index, shared in enumerate(state):
            wrong = [*result[:index], shared, *result[index + 1 :]]
            with pytest.raises(AssertionError):
                check(wrong)


def test_a_tree_without_one_of_its_leaves_is_caught() -> None:
    _, state = zoo()
    dropped = remake(state, lambda path, leaf: None if path == (6, "left") else leaf)
    assert tree.num_bytes(dropped) == tree.num_bytes(state) - B * 2 * 4
    with pytest.raises(AssertionError):
        check_new(state, dropped)


def test_attributes_set_in_another_order_are_not_mixed_up() -> None:
    """The first and the fresh state of a model may have come about in different ways."""
    state, fresh = Cache.__new__(Cache), Cache.__new__(Cache)
    vars(state).update(a=torch.full((B,), 1.0), b=torch.full((B,), 2.0))
    vars(fresh).update(b=torch.full((B,), -2.0), a=torch.full((B,), -1.0))
    merged = tree.where_lanes(CHOSEN, fresh, state, (0, 0))
    assert merged.a.tolist() == [1, -1, 1]
    assert merged.b.tolist() == [2, -2, 2]
    assert list(vars(merged)) == ["a", "b"]


# --- containers of other libraries


def filled_cache(steps: int = 4) -> Any:
    """The cache of a tiny Mamba2, with its graph; with the model, to go on from it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        **dict(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, head_dim=4, num_heads=4),
        **dict(expand=2, n_groups=1, chunk_size=4),
    )
    model = transformers.Mamba2Model(config).train()
    tokens = torch.randint(0, 11, (B, steps))
    return model, model(tokens, use_cache=True).cache_params


def cache_tensors(cache: Any) -> list[Tensor]:
    """By name, as transformers has them."""
    found = []
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name)
            found += list(held.values()) if isinstance(held, dict) else [held]
    assert all(isinstance(each, Tensor) for each in found)
    return found


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_a_cache_with_a_graph_is_detached_stored_and_gone_on_from() -> None:
    model, cache = filled_cache()
    assert any(leaf.requires_grad for leaf in cache_tensors(cache))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(cache)
    values = [leaf.detach().clone() for leaf in cache_tensors(cache)]
    detached, stored = tree.detach(cache), through_files(cache)
    next_token = torch.randint(0, 11, (B, 1))
    results = []
    for made in (detached, stored):
        assert type(made) is type(cache)
        assert made.layers is not cache.layers
        assert [type(layer) for layer in made.layers] == [type(layer) for layer in cache.layers]
        assert all(vars(a).keys() == vars(b).keys() for a, b in zip(made.layers, cache.layers, strict=True))
        found = cache_tensors(made)
        assert not any(leaf.requires_grad for leaf in found)
        assert all(same_bits(a, b) for a, b in zip(found, values, strict=True))
        assert tree.num_bytes(made) == sum(leaf.nbytes for leaf in values)
        with torch.no_grad():
            # a copy, since the model writes into it
            results.append(model(next_token, cache_params=tree.clone(made), use_cache=True).last_hidden_state)
    assert torch.equal(*results)
    with torch.no_grad():
        fresh = model(next_token, use_cache=True).last_hidden_state
    assert not torch.allclose(results[0], fresh)  # the control: the cache matters
    dims = (0,) * len(values)
    reset = tree.where_lanes(CHOSEN, None, cache, dims)
    for leaf, before in zip(cache_tensors(reset), values, strict=True):
        assert not leaf[1].any()
        assert torch.equal(leaf[[0, 2]], before[[0, 2]])
        assert before[1].any()  # the control


def test_a_nested_tensordict() -> None:
    tensordict = pytest.importorskip("tensordict")
    inner = tensordict.TensorDict({"c": torch.randn(B, 2, requires_grad=True) * 1}, batch_size=[B])
    state = tensordict.TensorDict({"h": torch.randn(B, 4), "deep": inner}, batch_size=[B], names=["lane"])
    detached, stored = tree.detach(state), through_files(state)
    for made in (detached, stored):
        assert type(made) is type(state)
        assert (made.batch_size, made.names) == (state.batch_size, ["lane"])
        assert type(made["deep"]) is type(inner)
        assert torch.equal(made["h"], state["h"])
        assert torch.equal(made["deep", "c"], state["deep", "c"])
        assert not made["deep", "c"].requires_grad
    assert detached["h"].data_ptr() == state["h"].data_ptr()
    detached["new"] = torch.zeros(B)
    detached["deep"]["new"] = torch.zeros(B)
    assert set(state.keys()) == {"h", "deep"}
    assert set(inner.keys()) == {"c"}
    assert tree.num_bytes(state) == B * 6 * 4
    reset = tree.where_lanes(CHOSEN, None, state, (0, 0))
    assert reset["deep", "c"].requires_grad
    assert not reset["deep", "c"][1].any()
    assert torch.equal(reset["h"][[0, 2]], state["h"][[0, 2]])
    chosen = tree.select_lanes(state, ORDER, (0, 0))
    assert chosen.batch_size == chosen["deep"].batch_size == torch.Size([4])
    assert torch.equal(chosen["deep", "c"], inner["c"][ORDER])
    empty = tensordict.TensorDict({}, batch_size=[B])
    assert tree.copy(empty).batch_size == through_files(empty).batch_size == torch.Size([B])
