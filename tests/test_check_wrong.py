"""Forty wrong models, each named truly: (model, expected item, words of its cause)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tbptt

FEATURES, HIDDEN = 2, 5
SHARED: dict[str, Tensor] = {}


class Base(nn.Module):
    """A GRU and a head: each wrong model changes one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        return self.head(outputs), state


class Stepwise(Base):
    """The same, step by step: `sent` is what becomes of the state between two steps of one call."""

    def forward(self, inputs, state=None):
        outputs = []
        for step, each in enumerate(inputs):
            output, state = self.core(each[None], state)
            state = self.sent(state, step, len(inputs))
            outputs.append(self.head(output))
        return torch.cat(outputs), state

    def sent(self, state, step, steps):
        return state


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, scale):
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


def clipped(state: Tensor, limit: float) -> Tensor:
    state = state * 1
    if state.requires_grad:
        state.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return state


def wrong(sent: Callable[..., Tensor], name: str) -> nn.Module:
    return type(name, (Stepwise,), {"sent": lambda self, *args: sent(*args)})()


def around(before=None, after=None, name: str = "Around") -> nn.Module:
    """A model that does something to the state that it takes, and to what it returns."""

    def forward(self, inputs, state=None):
        state = before(self, inputs, state) if before else state
        outputs, new = Base.forward(self, inputs, state)
        return after(self, inputs, outputs, new) if after else (outputs, new)

    return type(name, (Base,), {"forward": forward})()


class HookDetaches(Base):
    """A forward hook on the core detaches what comes out of it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.core.register_forward_hook(
            lambda module, given, result: (result[0], result[1].detach()) if module.training else None
        )


class CutsBySteps(Stepwise):
    """It counts its steps in its state, and detaches at every 16th."""

    def forward(self, inputs, state=None):
        hidden, clock = (None, torch.zeros(inputs.shape[1])) if state is None else state
        outputs = []
        for each in inputs:
            output, hidden = self.core(each[None], hidden)
            clock = clock + 1
            hidden = hidden.detach() if int(clock[0]) % 16 == 0 else hidden
            outputs.append(self.head(output))
        return torch.cat(outputs), (hidden, clock)


class KeepsTheInput(Base):
    def forward(self, inputs, state=None):
        outputs, state = super().forward(inputs + getattr(self, "last", 0.0), state)
        self.last = inputs[-1]
        return outputs, state


class KeepsInABuffer(Base):
    """The real state is in a buffer, and what it returns is for show."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 1, HIDDEN), persistent=False)

    def forward(self, inputs, state=None):
        given = inputs.new_zeros(1, inputs.shape[1], HIDDEN) if state is None else self.kept
        outputs, new = super().forward(inputs, given)
        self.kept = new.detach()
        return outputs, new


class Counts(Base):
    """Its position is an attribute: no reset of a lane reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def forward(self, inputs, state=None):
        outputs, state = super().forward(inputs, state)
        place = self.position + torch.arange(len(inputs)).to(inputs)
        self.position += len(inputs)
        return outputs + torch.sin(place)[:, None, None], state


class KeepsGlobally(Base):
    def forward(self, inputs, state=None):
        outputs, state = super().forward(inputs + SHARED.get("last", torch.zeros(1)).to(inputs), state)
        SHARED["last"] = inputs[-1].detach().mean()
        return outputs, state


class KeepsAGraph(Base):
    def forward(self, inputs, state=None):
        outputs, state = super().forward(inputs, state)
        before, self.outputs = getattr(self, "outputs", None), outputs
        return (outputs if before is None else outputs + 0 * before.sum()), state


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRU(FEATURES, HIDDEN), nn.GRU(HIDDEN, HIDDEN)

    def forward(self, inputs, state=None):
        one, two = (None, None) if state is None else state
        outputs, one = self.one(inputs, one)
        outputs, two = self.two(outputs, self.given(two, len(inputs)))
        return outputs, (one, self.returned(two))

    def given(self, state, steps):
        return state if steps == 1 else None

    def returned(self, state):
        return state


class DetachesASecond(TwoLayers):
    def given(self, state, steps):
        return state

    def returned(self, state):
        return state.detach()


class Writes(Base):
    def forward(self, inputs, state=None):
        outputs, new = super().forward(inputs, state)
        if state is not None:
            with torch.no_grad():
                state.copy_(new)
        return outputs, new


class OverwritesWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(FEATURES, FEATURES))

    def forward(self, inputs, state=None):
        state = inputs.new_zeros(inputs.shape[1:]) if state is None else state.clone()
        outputs = []
        for step in inputs:
            new = torch.tanh(step + state @ self.weight) * (1 + state)
            state.copy_(new)
            outputs.append(new)
        return torch.stack(outputs), state


class Overflows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return (value > 0).to(value)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        surge = torch.exp(-1e4 * value)
        return gradient * surge / (1 + surge) ** 2


class Clock(Base):
    def forward(self, inputs, state=None):
        hidden, number = (None, 0) if state is None else state
        outputs, hidden = super().forward(inputs, hidden)
        place = torch.arange(number, number + len(inputs)).to(inputs)
        return outputs + torch.sin(place)[:, None, None], (hidden, number + len(inputs))


class ForgetsItsStart(Base):
    """It has an initial state, and starts single lanes from zeros by hand."""

    def initial_state(self, lanes):
        return torch.ones(1, lanes, HIDDEN).to(self.head.weight) * (lanes > 1)


class NormalisesLanes(Base):
    def forward(self, inputs, state=None):
        outputs, state = super().forward(inputs, state)
        return (outputs - outputs.mean(1, keepdim=True) if self.training else outputs), state


def training(self: nn.Module, yes: Tensor | None, no: Tensor | None) -> Tensor | None:
    return yes if self.training else no


def detached(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.detach()


def returning(change: Callable[[nn.Module, Tensor, Tensor], Tensor], name: str) -> nn.Module:
    return around(after=lambda self, x, y, s: (y, change(self, x, s)), name=name)


def saying(change: Callable[[nn.Module, Tensor, Tensor], Tensor], name: str) -> nn.Module:
    return around(after=lambda self, x, y, s: (change(self, x, y), s), name=name)


def taking(change: Callable[[nn.Module, Tensor, Tensor | None], Tensor | None], name: str) -> nn.Module:
    return around(before=change, name=name)


VALUE, GRADIENT, DETACHED, LANES = "value carry", "gradient carry", "detached training", "lane independence"
FORGETS = "it forgets to pass its state on: when 8 steps come at once"
DETACHES, INSIDE = "detaches the state that it takes or returns", "detaches its state inside"
WITHIN = "within a call the gradient is detached, scaled or clipped"
LENGTH = "its outputs depend on the length of the chunk"
CASES: list[tuple[Callable[[], nn.Module], str, str]] = [
    # in training mode
    (lambda: taking(lambda m, x, s: training(m, None, s), "ForgetsInTraining"), VALUE, f"in training mode, {FORGETS}"),
    (lambda: returning(lambda m, x, s: s.detach() if m.training else s, "DetachesInTraining"), GRADIENT, DETACHES),
    (lambda: taking(lambda m, x, s: training(m, detached(s), s), "TakesDetachedInTraining"), GRADIENT, DETACHES),
    (HookDetaches, GRADIENT, DETACHES),
    (NormalisesLanes, LANES, "in training mode, it mixes lanes"),
    (lambda: saying(lambda m, x, y: y * len(x) if m.training else y, "LengthInTraining"), VALUE, LENGTH),
    (lambda: taking(lambda m, x, s: s if m.training else None, "ForgetsInEval"), VALUE, FORGETS),
    # in long windows
    (
        lambda: taking(lambda m, x, s: None if len(x) >= 32 else s, "LongWindowsForget"),
        VALUE,
        "when 64 steps come at once, each chunk is computed as if it were a fresh start",
    ),
    (lambda: taking(lambda m, x, s: detached(s) if len(x) >= 32 else s, "LongWindowsDetach"), GRADIENT, WITHIN),
    (lambda: saying(lambda m, x, y: y / 2 if len(x) > 50 else y, "LongWindowsHalve"), VALUE, LENGTH),
    (lambda: wrong(lambda s, t, n: s.detach() if t % 16 == 15 else s, "DetachesEvery16th"), GRADIENT, WITHIN),
    (lambda: wrong(lambda s, t, n: s.detach() if t == 40 else s, "DetachesAt40"), GRADIENT, WITHIN),
    (lambda: wrong(lambda s, t, n: Scaled.apply(s, 0.5) if t == n - 20 else s, "ScalesLate"), GRADIENT, WITHIN),
    # the gradient inside
    (lambda: wrong(lambda s, t, n: s.detach(), "DetachesEachStep"), GRADIENT, INSIDE),
    (CutsBySteps, GRADIENT, INSIDE),
    (lambda: wrong(lambda s, t, n: Scaled.apply(s, 0.9), "ScalesEachStep"), GRADIENT, "0.9 of the derivative"),
    (lambda: wrong(lambda s, t, n: Scaled.apply(s, -1.0), "Reverses"), GRADIENT, "-1 of the derivative"),
    (lambda: wrong(lambda s, t, n: clipped(s, 1.0), "Clips"), GRADIENT, "clipped or normalised inside"),
    (lambda: taking(lambda m, x, s: None if s is None else clipped(s, 1e-3), "ClipsItsStart"), GRADIENT, WITHIN),
    (lambda: wrong(lambda s, t, n: (s + s.detach()) / 2, "HalfDetached"), GRADIENT, "of the derivative"),
    (lambda: returning(lambda m, x, s: s.detach(), "Detaches"), GRADIENT, DETACHES),
    (lambda: taking(lambda m, x, s: detached(s), "TakesDetached"), GRADIENT, DETACHES),
    (DetachesASecond, GRADIENT, "[1] (of 2 tensors) comes out of a chunk without its graph"),
    (
        lambda: saying(lambda m, x, y: y + 0 * Overflows.apply(y - 1), "NotFiniteBackward"),
        GRADIENT,
        "the gradient is NaN or infinite within one chunk of 8 steps already, in parameter core.weight_ih_l0",
    ),
    # values
    (lambda: taking(lambda m, x, s: None, "Forgets"), VALUE, FORGETS),
    (TwoLayers, VALUE, "it drops a part of its state: when 8 steps come at once, nothing that follows depends on [1]"),
    (lambda: returning(lambda m, x, s: s.half().to(s), "RoundsToHalf"), VALUE, "numbers of float16 only"),
    (lambda: returning(lambda m, x, s: s.bfloat16().to(s), "RoundsToBfloat16"), VALUE, "numbers of bfloat16 only"),
    (lambda: saying(lambda m, x, y: y / 0, "NotFinite"), VALUE, "its outputs are not finite"),
    (lambda: saying(lambda m, x, y: y - y.mean(0), "NormalisesOverTime"), VALUE, "looks ahead, or normalises"),
    (lambda: saying(lambda m, x, y: y + x.flip(0).cumsum(0).flip(0).sum(-1, True), "LooksAhead"), VALUE, "looks ahead"),
    (lambda: saying(lambda m, x, y: y * len(x), "CountsTheSteps"), VALUE, "it is the number of steps itself"),
    (
        lambda: around(
            lambda m, x, s: None if s is None else s.expand(1, x.shape[1], HIDDEN).contiguous(),
            lambda m, x, y, s: (y, s[:, :1]),
            "OneStateForAll",
        ),
        VALUE,
        "its state has the wrong batch size",
    ),
    # kept elsewhere
    (KeepsTheInput, VALUE, "it keeps something inside: with last as at the start"),
    (KeepsInABuffer, VALUE, "it keeps something inside: with kept as at the start"),
    (Counts, VALUE, "it keeps something inside: with position as at the start"),
    (KeepsGlobally, VALUE, "a global, a closure, or an object"),
    (KeepsAGraph, DETACHED, "it keeps something inside, with its graph: outputs"),
    # in place, lanes, resets
    (Writes, "in-place safety", "it writes in place, over what the backward pass needs"),
    (OverwritesWithin, GRADIENT, "it writes in place, over what the backward pass needs"),
    (lambda: saying(lambda m, x, y: y - 0.1 * y.mean(1, keepdim=True), "MixesLanes"), LANES, "it mixes lanes"),
    (lambda: returning(lambda m, x, s: s.roll(1, 1), "RollsLanes"), LANES, "it mixes lanes"),
    (
        lambda: taking(lambda m, x, s: torch.ones(1, x.shape[1], HIDDEN).to(x) if s is None else s, "StartsElsewhere"),
        "reset",
        "state=None means something else than zeros",
    ),
    (Clock, "reset", "has a Python number in it, "),
    (
        lambda: saying(lambda m, x, y: nn.functional.dropout(y, 0.5), "AlwaysDropsOut"),
        "randomness",
        "random even in eval mode: a dropout that is always on",
    ),
]


@pytest.mark.parametrize(("build", "item", "cause"), CASES, ids=[type(build()).__name__ for build, *_ in CASES])
def test_each_is_named_truly(build: Callable[[], nn.Module], item: str, cause: str) -> None:
    torch.manual_seed(0)
    SHARED.clear()
    report = tbptt.check(build(), torch.randn(80, 3, FEATURES), tbptt.TBPTT(64, 64))
    found = {each.name: each for each in report.items if not each.passed}
    assert item in found, str(report)
    assert cause in found[item].cause, str(report)
    assert found[item].fix


def test_the_control_passes() -> None:
    """What the wrong ones are made of is right."""
    for model in (Base(), Stepwise(), around()):
        report = tbptt.check(model, torch.randn(80, 3, FEATURES), tbptt.TBPTT(64, 64))
        assert report.conclusion == "it carries its state", str(report)
