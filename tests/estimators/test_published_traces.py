"""RFLO and e-prop on random networks against their published recursions in NumPy: Murray (2019), Bellec et al. (2020).

Leaky units, integrate-and-fire neurons, and adaptive ones in both spellings: the carried threshold is that after, or
before, the last spike was added. In volts and in millivolts, where a surrogate is narrow beside the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from systems import squared
from torch import Tensor, nn

import tbptt
from tbptt import RFLO, EProp, Window

T, N, M, K = 30, 5, 3, 2
KINDS = ("leaky", "fire", "after", "before")


@dataclass(frozen=True)
class Setting:
    """What a network is, drawn at random."""

    kind: str
    learned: bool
    millivolts: bool
    keep: float
    forget: float
    beta: float
    gamma: float

    @property
    def scale(self) -> float:
        return 12.0 if self.millivolts else 0.7

    @property
    def rest(self) -> float:
        return -65.0 if self.millivolts else 0.0

    @property
    def threshold(self) -> float:
        return -50.0 if self.millivolts else 0.6

    @property
    def width(self) -> float:
        return 0.8 if self.millivolts else 0.5


class Spike(torch.autograd.Function):
    """1 above 0, with the pseudo-derivative gamma max(0, 1 - |value| / width)."""

    @staticmethod
    def forward(value: Tensor, width: float, gamma: float) -> Tensor:
        return (value > 0).to(value.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        value, ctx.width, ctx.gamma = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        return gradients[0] * ctx.gamma * (1 - value.abs() / ctx.width).clamp(min=0), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Tensor, width: float, gamma: float) -> tuple[Tensor, Any]:
        return Spike.apply(value, width, gamma), in_dims[0]  # type: ignore[return-value]


class Net(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting, s = setting, setting.scale
        self.w, self.u = nn.Parameter(torch.randn(N, N) * s), nn.Parameter(torch.randn(N, M) * s)
        self.b, self.c = nn.Parameter(torch.randn(N) * 0.1 * s), nn.Parameter(torch.randn(K, N))
        if setting.kind == "leaky":
            self.h0 = nn.Parameter(torch.randn(N), requires_grad=setting.learned)
        else:
            self.v0 = nn.Parameter(torch.randn(N) * s + setting.rest, requires_grad=setting.learned)
            self.a0 = nn.Parameter(torch.rand(1, N), requires_grad=setting.learned and setting.kind != "fire")

    def initial_state(self, lanes: int) -> Any:
        if self.setting.kind == "leaky":
            return self.h0.expand(lanes, -1)
        v, a = self.v0.expand(lanes, -1), self.a0.expand(lanes, -1)
        return (v, torch.zeros_like(v)) if self.setting.kind == "fire" else {"a": a, "v": v, "z": torch.zeros_like(v)}

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        set_ = self.setting
        if set_.kind == "leaky":
            state = set_.keep * state + (1 - set_.keep) * torch.tanh(state @ self.w.T + x @ self.u.T + self.b)
            return state @ self.c.T, state
        v, z = state if set_.kind == "fire" else (state["v"], state["z"])
        a = torch.zeros_like(v) if set_.kind == "fire" else state["a"]
        if set_.kind == "before":
            a = set_.forget * a + z
        v = set_.keep * (v - set_.rest) + set_.rest + z @ self.w.T + x @ self.u.T + self.b - set_.scale * z.detach()
        new = Spike.apply(v - set_.threshold - set_.beta * set_.scale * a, set_.width, set_.gamma)
        if set_.kind == "after":
            a = set_.forget * a + new
        return new @ self.c.T, (v, new) if set_.kind == "fire" else {"a": a, "v": v, "z": new}  # type: ignore[operator]


def in_numpy(net: Net, leak: float, window: Window) -> dict[str, np.ndarray]:
    """The gradients of the summed losses by the published traces, lane by lane."""
    p = {name: value.detach().numpy() for name, value in net.named_parameters()}
    found = {name: np.zeros_like(value) for name, value in p.items()}
    rule = leaky_in_numpy if net.setting.kind == "leaky" else spiking_in_numpy
    for lane in range(window.lanes):
        begins = sorted({0, *np.flatnonzero(window.reset[:, lane].numpy()).tolist()})
        for begin, end in zip(begins, [*begins[1:], window.steps], strict=True):
            x, y = (each[begin:end, lane].numpy() for each in (window.inputs, window.targets))
            for name, value in rule(p, net.setting, leak, x, y).items():
                found[name] += value.reshape(found[name].shape)
    return found


def leaky_in_numpy(p: dict[str, np.ndarray], s: Setting, leak: float, x: Any, y: Any) -> dict[str, np.ndarray]:
    h, trace, start = p["h0"], np.zeros((N, N + M + 1)), np.ones(N)
    gradient, of_start, of_c = np.zeros_like(trace), np.zeros(N), np.zeros((K, N))
    for now, wanted in zip(x, y, strict=True):
        before = np.concatenate([h, now, [1.0]])
        value = np.tanh(p["w"] @ h + p["u"] @ now + p["b"])
        h = s.keep * h + (1 - s.keep) * value
        trace = (1 - leak) * trace + np.outer((1 - s.keep) * (1 - value**2), before)
        start = (1 - leak) * start
        error = 2 * (p["c"] @ h - wanted)
        gradient += (error @ p["c"])[:, None] * trace
        of_start += (error @ p["c"]) * start
        of_c += np.outer(error, h)
    return {"w": gradient[:, :N], "u": gradient[:, N:-1], "b": gradient[:, -1], "c": of_c, "h0": of_start}


def spiking_in_numpy(p: dict[str, np.ndarray], s: Setting, leak: float, x: Any, y: Any) -> dict[str, np.ndarray]:
    """The traces of potential and threshold by neuron, of each weight (columns), of v0 and of a0 (the last two)."""
    v, a, z = p["v0"], p["a0"][0] if s.kind != "fire" else np.zeros(N), np.zeros(N)
    of_v, of_a, of_z = (np.zeros((N, N + M + 3)) for _ in range(3))
    of_v[:, -2] = 1.0
    of_a[:, -1] = s.kind != "fire"
    gradient, of_c, beta = np.zeros_like(of_v), np.zeros((K, N)), s.beta * s.scale
    for now, wanted in zip(x, y, strict=True):
        if s.kind == "before":
            a, of_a = s.forget * a + z, s.forget * of_a + of_z
        current = np.concatenate([z, now, [1.0], [0.0, 0.0]])
        v = s.keep * (v - s.rest) + s.rest + p["w"] @ z + p["u"] @ now + p["b"] - s.scale * z
        of_v = s.keep * of_v + current  # the neuron's own: the reset and recurrent spikes are left out
        at = v - s.threshold - beta * a
        z = (at > 0).astype(float)
        slope = s.gamma * np.maximum(0, 1 - np.abs(at) / s.width)
        of_z = slope[:, None] * (of_v - beta * of_a)
        if s.kind == "after":
            a, of_a = s.forget * a + z, s.forget * of_a + of_z
        error = 2 * (p["c"] @ z - wanted)
        gradient += (error @ p["c"])[:, None] * of_z
        of_c += np.outer(error, z)
    weights, start = gradient[:, :-2], {"v0": gradient[:, -2], "a0": gradient[:, -1]}
    return {"w": weights[:, :N], "u": weights[:, N:-1], "b": weights[:, -1], "c": of_c} | start


def drawn(seed: int) -> tuple[Net, Window, Any]:
    torch.manual_seed(seed)
    one, two, three, four = torch.rand(4).tolist()
    kind = KINDS[seed % 4]
    keep = 0.7 + 0.25 * one
    setting = Setting(
        kind,
        seed // 4 % 2 == 0,
        kind != "leaky" and seed // 8 % 2 == 0,
        keep,
        0.8 + 0.19 * two,
        0.3 * three,
        0.3 + four,
    )
    net, lanes = Net(setting).double(), 1 + seed % 3
    reset = torch.rand(T, lanes) < (0.05 if seed // 3 % 2 else 0.0)
    window = Window(torch.randn(T, lanes, M).double(), torch.randn(T, lanes, K).double(), reset=reset)
    k1 = (1, 4, 30)[seed % 3]
    return net, window, RFLO(k1, leak=1 - keep) if kind == "leaky" else EProp(k1)


def summed(estimator: Any, net: Net, window: Window) -> dict[str, np.ndarray]:
    model = tbptt.scan(net)
    carry, sums = estimator.init(model, window.lanes), {}
    for at in range(0, T, estimator.k1):
        estimate, carry = estimator.estimate(model, squared, carry, window[at : at + estimator.k1])
        for name, value in estimate.gradients.items():
            sums[name] = sums.get(name, 0.0) + value.numpy() * estimate.num_injected
    return {name.removeprefix("cell."): value for name, value in sums.items()}


def see_published(seed: int) -> bool:
    """See that a drawn network's gradient is the published one; return whether its traces matter in it."""
    net, window, estimator = drawn(seed)
    wanted = in_numpy(net, getattr(estimator, "leak", 0.0), window)
    found = summed(estimator, net, window)
    trained = {name for name, value in net.named_parameters() if value.requires_grad}
    assert found.keys() <= trained
    for name in trained:
        scale = max(1.0, np.abs(wanted[name]).max())
        assert np.abs(found.get(name, 0.0) - wanted[name]).max() < 1e-12 * scale, (seed, net.setting, name)
    steps = summed(tbptt.TBPTT(1, 1), net, window)
    return bool(np.abs(steps["u"] - wanted["u"]).max() > 1e-2 * np.abs(wanted["u"]).max())


def test_rflo_and_eprop_are_their_published_recursions() -> None:
    assert sum(see_published(seed) for seed in range(8)) >= 6  # the control: truncation after a step is another thing


@pytest.mark.slow
def test_rflo_and_eprop_are_their_published_recursions_on_a_hundred_networks() -> None:
    assert sum(see_published(seed) for seed in range(100)) > 80
