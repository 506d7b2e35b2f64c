"""Whatever a forward pass reads and changes besides inputs, weights and state is put back, bit for bit."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tbptt.codec import decode, encode
from tbptt.copies import OTHER
from tbptt.side_changes import packed, unpacked
from tbptt.side_state import SideState, preserved, replayed


class Restless(nn.Module):
    """Each call reads and changes something of every kind; what it returns depends on all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.register_buffer("nothing", None)
        self.norm = nn.BatchNorm1d(3)
        self.count, self.gain, self.name = 0, float("nan"), "a"
        self.held, self.array = torch.zeros(2), np.zeros(3)
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(1), random.Random(2)
        self.old, self.lanes = np.random.RandomState(3), [np.random.default_rng(each) for each in range(2)]
        self.list, self.deque = [0, [1.0]], deque([0.0, 0.0, 0.0], maxlen=3)
        self.dict, self.ordered = {"a": 0, "b": torch.zeros(2)}, OrderedDict(a=1)
        self.seen, self.words, self.table = {0}, Counter("ab"), defaultdict(int)

    def forward(self, inputs: Tensor) -> Tensor:
        drawn = [torch.rand(3), torch.rand(3, generator=self.torch), torch.from_numpy(np.random.rand(3))]
        drawn += [torch.from_numpy(each.random(3)) for each in (self.numpy, *self.lanes)]
        drawn += [torch.full((3,), each()) for each in (random.random, self.python.random, self.old.random_sample)]
        outputs = self.norm(inputs * self.weight) * self.scale + self.hidden + sum(drawn)
        outputs = outputs + self.count + self.held.sum() + self.array[0] + self.list[1][0] + self.deque[0]
        outputs = outputs + self.dict["b"][0] + self.ordered["a"] + len(self.seen) + self.words["a"] + self.table["x"]
        outputs = outputs + getattr(self, "late", 0)
        with torch.no_grad():
            self.scale += 0.5
            self.hidden = self.hidden + 1  # another tensor in its place
        self.count, self.gain, self.name, self.late = self.count + 1, 0.0, self.name + "b", 7
        self.held[0] += 1
        self.array += 1
        self.list[1][0] += 1
        self.list.append(3)
        self.deque.append(float(self.count))
        self.dict["b"] += 1
        self.dict["c"] = 4
        self.ordered["a"] += 1
        self.seen.add(self.count)
        self.words["a"] += 1
        self.table["x"] += 1
        return outputs


X = torch.arange(12.0).view(4, 3) ** 2


def test_a_pass_that_is_run_as_it_was_gives_what_it_gave_and_leaves_no_trace() -> None:
    model = Restless()
    past = SideState.of(model)
    first = [model(X) for _ in range(3)]
    objects = dict(vars(model)) | dict(model.named_buffers())
    now = SideState.of(model)
    with replayed(past, model):
        again = [model(X) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert now.differences(SideState.of(model)) == []
    assert all(value is objects[name] for name, value in (vars(model) | dict(model.named_buffers())).items())
    assert not torch.equal(model(X), first[0])  # the control: a further pass gives something else


def test_every_kind_of_change_is_seen_and_named() -> None:
    model = Restless()
    before = SideState.of(model)
    model(X)
    names = {"0.count", "0.gain", "0.name", "0.late", "0.scale", "0.hidden", "0.held", "0.array", "0.torch", "0.numpy"}
    names |= {"0.python", "0.old", "0.lanes", "0.list", "0.deque", "0.dict", "0.ordered", "0.seen", "0.words"}
    names |= {"0.table", "0.norm.running_mean", "0.norm.running_var", "0.norm.num_batches_tracked"}
    assert set(before.differences(SideState.of(model))) == names | {"torch", "numpy", "python"}


def test_to_restore_writes_into_what_is_there() -> None:
    model = Restless()
    past = SideState.of(model)
    first = model(X)
    objects = (model.scale, model.norm.running_mean, model.list, model.deque, model.dict)
    past.restore(model)
    assert past.differences(SideState.of(model)) == []
    again = (model.scale, model.norm.running_mean, model.list, model.deque, model.dict)
    assert all(a is b for a, b in zip(objects, again, strict=True))
    assert torch.equal(model(X), first)


def test_what_was_saved_restores_another_process() -> None:
    model = Restless()
    model(X)
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(packed([SideState.of(model)]), "side", tensors))
    wanted = [model(X) for _ in range(2)]
    other = Restless()
    torch.manual_seed(8)
    np.random.seed(8)
    random.seed(8)
    assert not torch.equal(other(X), wanted[0])  # the control
    [state] = unpacked(decode(json.loads(text), tensors))
    assert state is not None
    state.restore(other)
    assert all(torch.equal(other(X), each) for each in wanted)


def test_nothing_is_copied_again_that_has_not_changed() -> None:
    model = Restless()
    before = SideState.of(model)
    assert SideState.of(model, like=before) is before
    torch.rand(1)
    drawn = SideState.of(model, like=before)
    assert drawn is not before
    assert drawn.values is before.values
    assert drawn.generators["numpy"] is before.generators["numpy"]
    model.norm(X)
    moved = SideState.of(model, like=drawn)
    assert moved.values["0"] is before.values["0"]
    assert moved.values["0:buffers"] is before.values["0:buffers"]
    assert moved.values["0.norm:buffers"] is not before.values["0.norm:buffers"]
    np.random.standard_normal()  # the second of a pair lies ready: the next draw moves nothing else
    odd = SideState.of(model, like=moved)
    np.random.standard_normal()
    assert SideState.of(model, like=odd).differences(odd) == ["numpy"]


def nans(*values: float) -> Tensor:
    return torch.tensor([*values, float("nan")])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (nans(1.0), nans(1.0), True),
        (nans(1.0), nans(0.0), False),
        (nans(float("inf")), nans(torch.finfo(torch.float32).max), False),
        (torch.tensor([0.0, float("nan")]), torch.tensor([float("nan"), 0.0]), False),
        (torch.complex(nans(1.0), nans(2.0)), torch.complex(nans(1.0), nans(2.0)), True),
        (torch.complex(nans(1.0), nans(2.0)), torch.complex(nans(1.0), nans(3.0)), False),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
        (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse(), False),
        (torch.ones(2).to(torch.bfloat16), torch.ones(2).to(torch.float16), False),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), True),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(0), torch.ones(0), True),
    ],
)
def test_any_tensor_is_compared_and_put_back(one: Tensor, other: Tensor, same: bool) -> None:
    module = nn.Module()
    module.register_buffer("kept", one.clone())
    before = SideState.of(module)
    module.kept = other.clone()
    after = SideState.of(module, like=before)
    assert (after is before) is same
    assert before.differences(after) == ([] if same else ["0.kept"])
    before.restore(module)
    assert SideState.of(module).differences(before) == []
    with replayed(after, module):
        assert SideState.of(module).differences(after) == []


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
def test_so_are_sparse_rows_and_quantised_numbers() -> None:
    makers = [torch.Tensor.to_sparse_csr, lambda each: torch.quantize_per_tensor(each, 0.1, 0, torch.quint8)]
    for make in makers:
        test_any_tensor_is_compared_and_put_back(make(torch.eye(2)), make(torch.eye(2)), True)
        test_any_tensor_is_compared_and_put_back(make(torch.eye(2)), make(2 * torch.eye(2)), False)


def test_a_graph_that_saved_a_buffer_is_left_alone() -> None:
    """Batch normalisation saves its running statistics, and writes to them without saying so."""
    norm = nn.BatchNorm1d(3)
    past = SideState.of(norm)
    (wanted,) = torch.autograd.grad(norm(X).pow(2).sum(), norm.weight)
    with replayed(past, norm):
        outputs = norm(X)
    with preserved(norm):
        norm(X)
    norm.eval()
    saved = norm(X)
    with preserved(norm):
        norm.train()(X)
    assert torch.equal(torch.autograd.grad(outputs.pow(2).sum(), norm.weight)[0], wanted)
    saved.sum().backward()
    assert not norm.training


def test_a_buffer_of_two_modules_stays_one() -> None:
    pair = nn.ModuleList([nn.Module(), nn.Module()])
    shared = torch.zeros(2)
    for each in pair:
        each.register_buffer("shared", shared)
    state = SideState.of(pair)
    with replayed(state, pair):
        assert pair[0].shared is pair[1].shared
        pair[0].shared += 1
        assert pair[1].shared.tolist() == [1, 1]
    assert pair[0].shared is shared
    assert shared.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_buffers_of_scripted_modules_are_restored() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, inputs: Tensor) -> Tensor:
            self.runs += 1
            return self.norm(inputs) + self.runs

    model = torch.jit.script(Counting())
    past = SideState.of(model)
    first = model(X)
    now = SideState.of(model)
    assert "0.norm.running_mean" in past.differences(now)
    with replayed(past, model):
        assert torch.equal(model(X), first)
    assert now.differences(SideState.of(model)) == []
    past.restore(model)
    assert torch.equal(model(X), first)


def test_weights_and_unknown_objects_are_not_touched() -> None:
    class Anything:
        pass

    model = Restless()
    model.bag, model.parts = Anything(), [model.weight]
    model.itself = [1]
    model.itself.append(model.itself)
    state: Any = SideState.of(model)
    with replayed(state, model), torch.no_grad():
        model.weight += 1
        model.bag.value = 1
        model.bag = None
    assert model.weight.tolist() == [2, 2, 2]
    assert model.bag.value == 1
    left_out = {name for name, value in state.values["0"].items() if value is OTHER}
    assert {"bag", "parts", "itself"} <= left_out


def test_generators_come_back_after_an_error() -> None:
    model = Restless()
    now = SideState.of(model)
    with pytest.raises(RuntimeError), preserved(model):
        model(X[:, :2])
    assert now.differences(SideState.of(model)) == []


@pytest.mark.gpu
def test_a_generator_of_the_device_is_put_back() -> None:
    device = torch.device("cuda")
    model = Restless().to(device)
    past = SideState.of(model.norm, device=device)
    first = torch.rand(3, device=device)
    model.norm(X.to(device))
    with replayed(past, model.norm, device=device):
        assert torch.equal(torch.rand(3, device=device), first)
    assert not torch.equal(torch.rand(3, device=device), first)
