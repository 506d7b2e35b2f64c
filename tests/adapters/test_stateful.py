"""Every calling convention against a plain loop over the same cell: outputs, states and gradients.

Letters: T time, B lanes, D input, H hidden.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import tree
from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.estimators import TBPTT
from tbptt.model import find_lane_dims
from tbptt.window import Window

B, D, H = 3, 2, 4
CHUNKS = (4, 1, 1, 3)
T = sum(CHUNKS)


class Cell(nn.Module):
    """The one cell of this file; the phase makes a step depend on how many came before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D + H, H)

    def forward(self, x: Tensor, h: Tensor, t: int = 0) -> tuple[Tensor, Tensor]:
        h = 0.8 * h + (0.6 + 0.1 * (t % 3)) * torch.tanh(self.mix(torch.cat([x, h], -1)))
        return h * h - 0.3 * h, h


class Plain(nn.Module):
    """The oracle: the loop as anyone would write it. Its state is (h, t) if it counts, else h."""

    def __init__(self, counts: bool = False, start: float = 0.0) -> None:
        super().__init__()
        self.cell, self.counts, self.start = Cell(), counts, start

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h, t = state if self.counts and state is not None else (state, 0)
        h = inputs.new_full((inputs.shape[1], H), self.start) if h is None else h
        outputs = []
        for x in inputs:
            y, h = self.cell(x, h, t if self.counts else 0)
            t += 1
            outputs.append(y)
        return torch.stack(outputs), (h, t) if self.counts else h


class Held(nn.Module):
    """What the modules below share: the cell, and the loop over it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def loop(self, inputs: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = inputs.new_zeros(inputs.shape[1], H) if h is None else h
        outputs = []
        for x in inputs:
            y, h = self.cell(x, h)
            outputs.append(y)
        return torch.stack(outputs), h


class TimeFirst(Held):
    def forward(self, inputs: Tensor, state: Any = None, *, scale: float = 1.0) -> Any:
        outputs, h = self.loop(inputs, state)
        return outputs * scale, h


class BatchFirst(Held):
    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        outputs, h = self.loop(inputs.transpose(0, 1), state)
        return outputs.transpose(0, 1), h


class WithKeyword(Held):
    def forward(self, inputs: Tensor, mask: Any = None, *, memory: Any = None) -> Any:
        assert mask is None
        return self.loop(inputs, memory)


class ByName(Held):
    """As transformers' models: batch first, and a result with names, of which some are None."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, inputs: Tensor, memory: Any = None, use_cache: bool = False) -> Any:
        outputs, h = self.loop(inputs.transpose(0, 1), memory)
        return self.kind(logits=outputs.transpose(0, 1), memory=h if use_cache else None, loss=None)


class OneStep(Held):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.cell(x, x.new_zeros(len(x), H) if state is None else state)


class OneStepInPlace(Held):
    """Returns its state as its output, and writes into it in the next step."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = x.new_zeros(len(x), H) if state is None else state
        state.copy_(self.cell(x, state)[1])
        return state, state


class Short(Held):
    """Right only in few steps at a time."""

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        return self.loop(inputs, state if len(inputs) <= 2 else None)


class Reversed(Held):
    """Its own way: the state first, and inside a list."""

    def forward(self, state: Any, inputs: Tensor) -> Any:
        outputs, h = self.loop(inputs, state[0] if state else None)
        return {"new": [h], "out": outputs}


def call_reversed(module: nn.Module, inputs: Tensor, state: Any) -> tuple[Any, Any]:
    result = module(state, inputs)
    return result["out"], result["new"]


class InAttribute(Held):
    def __init__(self) -> None:
        super().__init__()
        self.h: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, self.h = self.loop(inputs, self.h)
        return outputs


class InBuffer(Held):
    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("h", torch.full((B, H), start))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, self.h = self.loop(inputs, self.h)
        return outputs


class IntoBuffer(InBuffer):
    """Writes into its buffer instead of replacing it."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = []
        for x in inputs:
            y, h = self.cell(x, self.h)
            self.h.copy_(h)
            outputs.append(y)
        return torch.stack(outputs)


class InDict(Held):
    """State deeper inside, in a submodule's dict that is written into; not what `vars` of the module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.cache = {"steps": [], "other": "text"}

    def forward(self, inputs: Tensor) -> Tensor:
        cache = self.inner.cache
        outputs, h = self.loop(inputs, cache["steps"][-1] if cache["steps"] else None)
        cache["steps"] = [h]
        return outputs


class Counting(nn.Module):
    """A tensor and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.h, self.t = Cell(), None, 0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = []
        for x in inputs:
            h = x.new_zeros(len(x), H) if self.h is None else self.h
            y, self.h = self.cell(x, h, self.t)
            self.t += 1
            outputs.append(y)
        return torch.stack(outputs)


class Resetting(InAttribute):
    """Must be put to its start, and stands somewhere else now."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.full((1, H), 7.0, dtype=torch.float64)

    def begin(self) -> None:
        self.h = None


class Spiking(Held):
    """One step at a time, state inside, as the libraries of spiking networks."""

    def __init__(self) -> None:
        super().__init__()
        self.mem: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        mem = self.mem if isinstance(self.mem, Tensor) else x.new_zeros(len(x), H)
        y, self.mem = self.cell(x, mem)
        return y


def begin(module: nn.Module) -> None:
    module.begin()


def half(lanes: int) -> Tensor:
    return torch.full((lanes, H), 0.5, dtype=torch.float64)


def half_inside(lanes: int) -> dict[str, Tensor]:
    return {":h": half(lanes)}


class WithStart(TimeFirst):
    def initial_state(self, lanes: int) -> Tensor:
        return half(lanes)


S = tbptt.stateful
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "pair": (lambda: S(TimeFirst()), Plain),
    "batch first": (lambda: S(BatchFirst(), batch_first=True), Plain),
    "keyword": (lambda: S(WithKeyword(), state="memory"), Plain),
    "names in a dict": (
        lambda: S(ByName(dict), state="memory", outputs="logits", arguments={"use_cache": True}, batch_first=True),
        Plain,
    ),
    "names in an object": (
        lambda: S(
            ByName(SimpleNamespace), state="memory", outputs="logits", arguments={"use_cache": True}, batch_first=True
        ),
        Plain,
    ),
    "one step": (lambda: S(OneStep(), one_step=True), Plain),
    "few steps": (lambda: S(Short(), max_steps=2), Plain),
    "single steps": (lambda: S(Short(), max_steps=1), Plain),
    "own call": (lambda: S(Reversed(), call_reversed), Plain),
    "inside attribute": (lambda: S(InAttribute(), inside=True), Plain),
    "inside buffer": (lambda: S(InBuffer(), inside=True), Plain),
    "inside buffer from 0.5": (lambda: S(InBuffer(0.5), inside=True), lambda: Plain(start=0.5)),
    "into buffer": (lambda: S(IntoBuffer(), inside=True), Plain),
    "into buffer from 0.5": (lambda: S(IntoBuffer(0.5), inside=True), lambda: Plain(start=0.5)),
    "inside dict": (lambda: S(InDict(), inside=True), Plain),
    "inside with a counter": (lambda: S(Counting(), inside=True), lambda: Plain(counts=True)),
    "inside with a reset": (lambda: S(Resetting(), inside=begin), Plain),
    "inside in single steps": (lambda: S(Spiking(), inside=True, one_step=True), Plain),
    "initial": (lambda: S(TimeFirst(), initial=half), lambda: Plain(start=0.5)),
    "initial of the module": (lambda: S(WithStart()), lambda: Plain(start=0.5)),
    "initial inside": (lambda: S(InAttribute(), inside=True, initial=half_inside), lambda: Plain(start=0.5)),
}
INSIDE = [name for name in CASES if "in" in name.split() or "inside" in name or "into" in name]
FIXED_LANES = [name for name in CASES if "buffer" in name]


def both(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The adapted model, and the plain loop with the same weights."""
    torch.manual_seed(seed)
    model, plain = (make().double() for make in CASES[name])
    source = next(each for each in model.modules() if isinstance(each, Cell))
    plain.cell.load_state_dict(source.state_dict())
    return model, plain


def run(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Any]]:
    """Chunk by chunk, with one graph through all of them."""
    state = model.initial_state(B) if hasattr(model, "initial_state") else None
    outputs, states = [], []
    for piece in inputs.split(CHUNKS):
        y, state = model(piece, state)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs), states


def gradients(model: nn.Module, outputs: Tensor) -> list[Tensor]:
    loss = (outputs * torch.arange(1.0, 1 + outputs.numel()).view_as(outputs).sin()).sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("in_place", ["auto", "protect"])
@pytest.mark.parametrize("name", CASES)
def test_a_convention_is_the_plain_loop(name: str, in_place: str) -> None:
    model, plain = both(name)
    model.in_place = in_place
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    for again in range(2):  # the second sequence starts as the first did
        outputs, states = run(model, inputs)
        wanted, last = run(plain, inputs)
        assert torch.equal(outputs, wanted), again
        (end,) = tree.tensors(states[-1])
        assert torch.equal(end, last[-1][0] if isinstance(last[-1], tuple) else last[-1])
        for found, right in zip(gradients(model, outputs), gradients(plain, wanted), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    restarted = torch.cat([plain(piece)[0] for piece in inputs.split(CHUNKS)])
    assert not torch.allclose(outputs, restarted)  # the control: the state matters


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_and_in_eval_mode(name: str) -> None:
    model, plain = both(name)
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(run(model, inputs)[0], run(plain, inputs)[0])
    assert not any(each.training for each in model.modules())
    outputs, _ = run(model.train(), inputs)  # training after it is not disturbed
    assert torch.equal(outputs, run(plain, inputs)[0])
    gradients(model, outputs)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_copied_and_pickled_before_and_after_a_call(name: str) -> None:
    model, _ = both(name)
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(again, inputs)[0], run(model, inputs)[0])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(again, inputs)[0], run(model, inputs)[0])
        before = [value.clone() for value in model.parameters()]
        with torch.no_grad():
            next(again.parameters()).add_(1)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not torch.equal(run(again, inputs)[0], run(model, inputs)[0])  # its own weights are used


SETTINGS = {
    "within": TBPTT(4, 2, losses="all", keep_outputs=True),
    "recompute": TBPTT(3, 7, keep_outputs=True),
    "retain": TBPTT(3, 9, replay="retain", keep_outputs=True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_plain_loop(name: str, setting: str) -> None:
    """With lanes reset inside of windows, where the model takes any number of lanes."""
    model, plain = both(name)
    if model.in_place == "auto" and hasattr(plain, "start") and plain.start and name not in FIXED_LANES:
        plain.initial_state = half  # a lane starts again from there
    estimator = SETTINGS[setting]
    torch.manual_seed(1)
    carries = [estimator.init(model, B), estimator.init(plain, B)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, plain)]
    begun = 0
    for index in range(6):
        reset = torch.zeros(3, B, dtype=torch.bool)
        if index in (2, 5) and name not in FIXED_LANES and name != "inside with a counter":
            reset[1, index % B] = True
        if index == 4:
            reset[2] = True
        begun += int(reset.sum())
        data = torch.randn(3, B, D, dtype=torch.float64), torch.randn(3, B, H, dtype=torch.float64)
        estimates = []
        for place, each in enumerate((model, plain)):
            estimate, carries[place] = estimator.estimate(
                each, nn.MSELoss(), carries[place], Window(*data, reset=reset)
            )
            estimate.apply(each)
            optimizers[place].step()
            estimates.append(estimate)
        torch.testing.assert_close(estimates[0].outputs, estimates[1].outputs, rtol=1e-12, atol=1e-12)
        for a, b in zip(estimates[0].gradients.values(), estimates[1].gradients.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert b.any()
        assert estimates[0].lookback == estimates[1].lookback
    assert begun >= B


@pytest.mark.parametrize("in_place", ["auto", "leave"])
def test_the_state_handed_in_is_never_changed(in_place: Any) -> None:
    class Writer(Held):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            state = {"h": [inputs.new_zeros(inputs.shape[1], H)], "n": []} if state is None else state
            outputs, h = self.loop(inputs, state["h"][0])
            state["h"][0].copy_(h.detach())
            state["n"].append(7)
            state["new"] = h
            return outputs, state

    model = S(Writer().double(), in_place=in_place)
    state = model(torch.randn(2, B, D, dtype=torch.float64))[1]
    state = tree.detach({"h": state["h"], "n": [7]})
    kept, version = state["h"][0].clone(), state["h"][0]._version
    later = model(torch.randn(2, B, D, dtype=torch.float64), state)[1]
    assert state["h"][0]._version == version
    assert torch.equal(state["h"][0], kept)
    assert (list(state), state["n"]) == (["h", "n"], [7])
    assert (later["n"], "new" in later) == ([7, 7], True)  # the control
    assert not torch.equal(later["h"][0], kept)


@pytest.mark.parametrize("form", [{"one_step": True}, {"max_steps": 1}])
def test_outputs_are_kept_when_the_next_step_writes_into_the_state(form: Any) -> None:
    class InPlace(OneStepInPlace):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            if x.ndim == 2:
                return super().forward(x, state)
            h, _ = super().forward(x[0], state)
            return h[None], h  # a view of the state

    torch.manual_seed(0)
    model = S(InPlace().double(), **form)
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    outputs, _ = run(model, inputs)
    h, wanted = half(B) * 0, []
    for x in inputs:
        h = model.module.cell(x, h)[1]
        wanted.append(h)
    assert torch.equal(outputs, torch.stack(wanted))
    for a, b in zip(gradients(model, outputs), gradients(model, torch.stack(wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- a module that keeps its state inside


def snapshot(module: nn.Module) -> dict[str, Any]:
    names = {f"{path}.{name}" for path, each in module.named_modules() for name in vars(each)}
    values = {name: repr(value) for name, value in module.named_buffers()}
    held = [
        getattr(module, "h", None),
        getattr(module, "t", None),
        repr(getattr(getattr(module, "inner", 0), "cache", 0)),
    ]
    return {"names": names, "buffers": values, "held": repr(held)}


@pytest.mark.parametrize("name", [name for name in INSIDE if "reset" not in name])
def test_the_module_stands_at_its_start_after_a_call_and_after_a_failure(name: str) -> None:
    model, plain = both(name)
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    before = snapshot(model.module)
    random = torch.get_rng_state()

    fails = [True]

    def fail(module: nn.Module, given: Any) -> None:
        if fails[0] and given[0].isnan().any():
            raise KeyError("in mid-call")

    model.module.cell.register_forward_pre_hook(fail)
    bad = inputs.clone()
    bad[2] = float("nan")
    for _ in range(2):  # at the very first call, when it is not known yet where the state is, and later
        with pytest.raises(KeyError):
            model(bad)
        assert snapshot(model.module) == before
        outputs, states = run(model, inputs)
        assert snapshot(model.module) == before
        with pytest.raises(KeyError):
            model(bad, states[0])
        assert snapshot(model.module) == before
        assert torch.equal(outputs, run(plain, inputs)[0])
    assert torch.equal(torch.get_rng_state(), random)


def test_parts_that_are_frozen_stay_so_and_statistics_are_no_state() -> None:
    class Normed(InAttribute):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(D), nn.Dropout(0.5)

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.drop(self.norm(inputs.flatten(0, 1)).view_as(inputs)))

    model = S(Normed(), inside=True)
    model.module.norm.eval()
    mean = model.module.norm.running_mean.clone()
    _, state = model(torch.randn(5, B, D))
    assert list(state) == [":h"]
    assert not model.module.norm.training
    assert model.module.drop.training
    assert torch.equal(model.module.norm.running_mean, mean)
    model.train()
    _, state = model(torch.randn(5, B, D), state)
    assert list(state) == [":h"]
    assert not torch.equal(model.module.norm.running_mean, mean)  # trained by the calls, as it should be


def test_a_start_with_a_graph_is_learned_and_does_not_stay_in_the_module() -> None:
    class Learned(InAttribute):
        def __init__(self) -> None:
            super().__init__()
            self.h0 = nn.Parameter(torch.randn(H))

        def begin(self) -> None:
            self.h = self.h0.expand(B, H)

    model = S(Learned(), inside=begin)
    outputs, _ = model(torch.randn(4, B, D))
    outputs.square().sum().backward()
    assert model.module.h0.grad.any()
    assert not model.module.h.requires_grad
    copy.deepcopy(model)


def test_no_state_inside_is_refused() -> None:
    model = S(nn.Linear(D, H), inside=True)
    with pytest.raises(CapabilityError, match="no buffer or attribute that holds a tensor changed"):
        model(torch.zeros(T, B, D))


def test_lanes_are_found_inside() -> None:
    for name, dims in [("inside attribute", (0,)), ("inside dict", (0,)), ("inside buffer", None)]:
        model, _ = both(name)
        assert find_lane_dims(model, torch.zeros(T, B, D, dtype=torch.float64)) == dims


# --- what is refused

NO_STATE = nn.Linear(D, H)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(module=NO_STATE), r"Linear was expected to take its state as the second .* takes input"),
        (dict(module=lambda x, s: (x, s)), "an nn.Module was expected, but a function came"),
        (dict(module=nn.GRUCell(D, H), one_step=True), "nn.GRUCell returns its state alone"),
        (dict(module=nn.LSTMCell(D, H), one_step=True), r"returns its state alone\nhint: tbptt.scan"),
        (dict(module=nn.LSTM(D, H, batch_first=True)), "batch_first=True, but batch_first=False came"),
        (dict(module=nn.LSTM(D, H), batch_first=True), "batch_first=False, but batch_first=True came"),
        (dict(module=WithKeyword(), state="memoyr"), r"expected to take 'memoyr', .* takes inputs, mask, memory"),
        (dict(module=TimeFirst(), arguments={"scael": 1}), r"expected to take 'scael'"),
        (dict(call=call_reversed, state="memory"), "either call or state was expected, but both came"),
        (dict(call=call_reversed, outputs="y"), "either call or outputs was expected"),
        (dict(call=call_reversed, arguments={"a": 1}), "either call or arguments was expected"),
        (dict(call=call_reversed, inside=True), "either call or inside was expected"),
        (dict(state="state", inside=True), "kept inside the module, or one passed as 'state', was expected, but both"),
        (dict(outputs="y"), "not said under which name the state is"),
        (dict(one_step=True, batch_first=True), "either one_step or batch_first was expected, but both came"),
        (dict(one_step=True, max_steps=3), "either one_step or max_steps was expected, but both came"),
        (dict(inside="h"), "inside was expected to be True, or a function .* is 'h'"),
        (dict(in_place="yes"), 'in_place was expected to be "auto", "protect" or "leave", but is \'yes\''),
        *((dict(max_steps=bad), "max_steps was expected to be a whole number") for bad in (0, -1, True, 1.5, "1")),
    ],
    ids=lambda each: ", ".join(each) if isinstance(each, dict) else "",  # no addresses: workers must agree on names
)
def test_a_contradiction_is_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CapabilityError), match=message) as caught:
        S(**{"module": TimeFirst(), **arguments})
    assert caught.value.fix


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: S(Last()), r"\(1, 3, 4\)"),
        (lambda: S(Flat()), r"\(5, 4\)"),
        (lambda: S(Scalar()), r"\(\)"),
    ],
)
def test_outputs_of_another_shape_are_refused(model: Callable[[], nn.Module], shape: str) -> None:
    with pytest.raises(ShapeError, match=rf"\(T, B, ...\) = \(5, 3\) \+ \(...\), but returned {shape}"):
        model()(torch.zeros(5, B, D))


class Last(TimeFirst):
    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        return super().forward(inputs, state)[0][-1:], state


class Flat(TimeFirst):
    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        return super().forward(inputs, state)[0][:, 0], state


class Scalar(TimeFirst):
    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        return super().forward(inputs, state)[0].sum(), state


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ({"logits": torch.zeros(1), "memory": None}, r"'memory', but its dict has \['logits'\]"),
        (SimpleNamespace(memory=torch.zeros(1)), r"'logits', but its SimpleNamespace has \['memory'\]"),
        ((torch.zeros(1), torch.zeros(1)), r"'logits', but its tuple has \[\]"),
        (torch.zeros(1), r"'logits', but its Tensor has \[\]"),
        (None, r"'logits', but its NoneType has \[\]"),
    ],
)
def test_a_result_without_the_name_is_refused(result: Any, shown: str) -> None:
    class Returns(Held):
        def forward(self, inputs: Tensor, memory: Any = None) -> Any:
            return result

    with pytest.raises(CapabilityError, match=f"to return an object with {shown}"):
        S(Returns(), state="memory", outputs="logits")(torch.zeros(T, B, D))


def test_a_module_that_returns_no_pair_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"InAttribute.* but returned one Tensor"):
        S(InAttributeWithSecond())(torch.zeros(T, B, D))


class InAttributeWithSecond(InAttribute):
    def forward(self, inputs: Tensor, state: Any = None) -> Tensor:
        return super().forward(inputs)
