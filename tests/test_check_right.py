"""Thirty right but unusual models: they pass, with the notes that belong to them: (model, items noted)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import tbptt

FEATURES, HIDDEN = 2, 6


class Base(nn.Module):
    def __init__(self, core: nn.Module | None = None) -> None:
        super().__init__()
        self.core, self.head = core or nn.GRU(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return self.head(outputs), state


class Cell(nn.Module):
    """One step of a leaky cell; `tbptt.scan` runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def start(self, inputs):
        return inputs.new_zeros(len(inputs), HIDDEN)

    def forward(self, inputs, state=None):
        state = self.start(inputs) if state is None else state
        new = torch.tanh(self.mix(torch.cat([inputs, state], -1)))
        return new, new


class Sampled(nn.Module):
    """A VRNN: a latent is sampled at every step, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.cell = nn.Linear(HIDDEN, 2 * 3), nn.GRUCell(FEATURES + 3, HIDDEN)

    def forward(self, inputs, state=None):
        state = inputs.new_zeros(len(inputs), HIDDEN) if state is None else state
        mean, spread = self.prior(state).chunk(2, -1)
        latent = torch.distributions.Normal(mean, nn.functional.softplus(spread) + 0.1).rsample()
        state = self.cell(torch.cat([inputs, latent], -1), state)
        return state, state


class Categories(nn.Module):
    """An RSSM: categorical latents, sampled, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.logits = nn.GRUCell(FEATURES + 8, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, inputs, state=None):
        hidden, latent = (inputs.new_zeros(len(inputs), n) for n in (HIDDEN, 8)) if state is None else state
        hidden = self.cell(torch.cat([inputs, latent], -1), hidden)
        chances = self.logits(hidden).view(-1, 2, 4).softmax(-1)
        drawn = torch.distributions.OneHotCategorical(chances).sample()
        latent = (drawn + chances - chances.detach()).flatten(1)
        return torch.cat([hidden, latent], -1), (hidden, latent)


class NoiseForAllSteps(Base):
    """Noise drawn for all steps of a call at once: one pass and chunks draw in another order."""

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs + 0.1 * torch.randn_like(inputs), state)
        return self.head(outputs + 0.1 * torch.randn_like(outputs)), state


class NumpyNoise(Base):
    def forward(self, inputs, state=None):
        first, second = (0.1 * torch.from_numpy(np.random.randn(*inputs.shape)).to(inputs) for _ in range(2))
        outputs, state = self.core(inputs + first if self.training else inputs, state)
        return self.head(outputs) + (second.sum(-1, keepdim=True) if self.training else 0), state


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, inputs, state=None):
        noise = torch.randn(inputs.shape, generator=self.generator, dtype=inputs.dtype)
        outputs, state = self.core(inputs + 0.1 * noise if self.training else inputs, state)
        return self.head(outputs), state


class Normalised(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, inputs, state=None):
        return super().forward(self.norm(inputs.flatten(0, 1)).view(inputs.shape), state)


class RunningScale(Base):
    """A buffer that each call moves in training, and that all lanes share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs, state=None):
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * inputs.detach().abs().mean()
        return super().forward(inputs / self.scale, state)


class Codebook(Base):
    """Vector quantisation, its codebook moved by the assignments."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, HIDDEN))

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        chosen = torch.cdist(outputs.flatten(0, 1), self.codes.clone()).argmin(-1)
        quantised = self.codes[chosen].view_as(outputs)
        if self.training:
            with torch.no_grad():
                self.codes.mul_(0.9).index_add_(0, chosen, outputs.flatten(0, 1), alpha=0.1 / len(chosen))
        return self.head(outputs + (quantised - outputs).detach()), state


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.core.requires_grad_(False)


class Averages(Cell):
    def forward(self, inputs, state=None):
        state = torch.zeros_like(inputs) if state is None else state
        state = 0.9 * state + 0.1 * inputs
        return self.mix(torch.cat([state, state.new_zeros(len(state), HIDDEN)], -1)), state


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, HIDDEN, 3)

    def forward(self, inputs, state=None):
        padded = torch.cat([inputs.new_zeros(2, *inputs.shape[1:]) if state is None else state, inputs])
        return torch.tanh(self.conv(padded.permute(1, 2, 0)).permute(2, 0, 1)), padded[-2:]


class Ring(nn.Module):
    """A ring buffer of hidden states, and where to write next, for each lane."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def forward(self, inputs, state=None):
        ring, place = (
            (inputs.new_zeros(len(inputs), 4, HIDDEN), torch.zeros(len(inputs)).long()) if state is None else state
        )
        new = torch.tanh(self.mix(torch.cat([inputs, ring.mean(1)], -1)))
        here = nn.functional.one_hot(place % 4, 4)[..., None].to(ring)
        return new, (ring * (1 - here) + new[:, None] * here, place + 1)


class Annealed(nn.Module):
    """Gets quieter with each call of training, of which it keeps the number."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(FEATURES, HIDDEN), nn.Linear(HIDDEN, 2)
        self.calls = 0

    def forward(self, inputs, state=None):
        self.calls += self.training and torch.is_grad_enabled()
        outputs, state = self.core(inputs / (1 + self.calls), state)
        return self.head(outputs), state


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES + 1, 2)

    def forward(self, inputs, state=None):
        state = torch.zeros(inputs.shape[1], dtype=torch.int64) if state is None else state
        count = state + torch.arange(len(inputs))[:, None]
        return self.head(torch.cat([inputs, torch.sin(count[..., None].to(inputs))], -1)), state + len(inputs)


class Clockwork(Cell):
    """Each half of the units moves at its own period."""

    def forward(self, inputs, state=None):
        hidden, clock = (self.start(inputs), torch.zeros(len(inputs)).long()) if state is None else state
        new = torch.tanh(self.mix(torch.cat([inputs, hidden], -1)))
        due = (clock[:, None] % torch.tensor([1, 1, 1, 4, 4, 4])) == 0
        hidden = torch.where(due, new, hidden)
        return hidden, (hidden, clock + 1)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return (value > 0).to(value)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient / (1 + 10 * value.abs()) ** 2


class Spiking(Cell):
    """Leaky integrate and fire; the threshold adapts, the reset is detached."""

    def forward(self, inputs, state=None):
        voltage, spikes, adapted = [self.start(inputs)] * 3 if state is None else state
        voltage = 0.9 * voltage + 3 * self.mix(torch.cat([inputs, spikes], -1)) - spikes.detach()
        adapted = 0.95 * adapted + spikes
        spikes = Spike.apply(voltage - 0.3 - 0.1 * adapted)
        return spikes, (voltage, spikes, adapted)


class Fire(Cell):
    def forward(self, inputs, state=None):
        voltage = self.start(inputs) if state is None else state
        voltage = 0.9 * voltage + self.mix(torch.cat([inputs, voltage], -1))
        spikes = Spike.apply(voltage - 0.2)
        return spikes, voltage * (1 - spikes.detach())


class Drops(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return self.head(nn.functional.dropout(outputs, 0.5, self.training)), state


class Zoneout(Cell):
    def forward(self, inputs, state=None):
        state = self.start(inputs) if state is None else state
        new, _ = super().forward(inputs, state)
        keep = torch.rand_like(new) < 0.3 if self.training else torch.zeros_like(new, dtype=torch.bool)
        new = torch.where(keep, state, new)
        return new, new


class Variational(nn.Module):
    """One mask for a sequence, drawn at its start and carried."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, inputs, state=None):
        if state is None:
            ones = inputs.new_ones(len(inputs), HIDDEN)
            state = inputs.new_zeros(len(inputs), HIDDEN), nn.functional.dropout(ones, 0.3, self.training)
        hidden = self.cell(inputs, state[0] * state[1])
        return hidden, (hidden, state[1])

    def initial_state(self, lanes):
        ones = self.cell.weight_hh.new_ones(lanes, HIDDEN)
        return torch.zeros_like(ones), nn.functional.dropout(ones, 0.3, self.training)


class Energy(Cell):
    """It follows the gradient of an energy, taken inside."""

    def forward(self, inputs, state=None):
        state = self.start(inputs) if state is None else state
        at = state if state.requires_grad else state.detach().requires_grad_()
        energy = torch.tanh(self.mix(torch.cat([inputs, at], -1))).pow(2).sum()
        (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        state = at - 0.1 * slope
        return state, state


class Learned(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(HIDDEN))

    def initial_state(self, lanes):
        return self.first.expand(lanes, HIDDEN)


class Named(Cell):
    def forward(self, inputs, state=None):
        new, _ = super().forward(inputs, None if state is None else state["hidden"]["now"])
        return new, {"hidden": {"now": new}}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angle, self.enter = nn.Parameter(torch.rand(HIDDEN)), nn.Linear(FEATURES, HIDDEN)

    def forward(self, inputs, state=None):
        turn = torch.polar(torch.full_like(self.angle, 0.95), self.angle)
        state = turn * (0 if state is None else state) + self.enter(inputs)
        return state.real + state.imag, state


class Words(nn.Module):
    def __init__(self, **kind) -> None:
        super().__init__()
        self.words, self.core = nn.Embedding(20, FEATURES, **kind), nn.GRU(FEATURES, HIDDEN)

    def forward(self, inputs, state=None):
        return self.core(self.words(inputs), state)


class Attends(nn.Module):
    """Attention over all that was: its cache grows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 4)

    def forward(self, inputs, state=None):
        keys = self.key(inputs) if state is None else torch.cat([state[0], self.key(inputs)])
        seen = inputs if state is None else torch.cat([state[1], inputs])
        scores = torch.einsum("tbh,sbh->tsb", self.query(inputs), keys)
        later = torch.ones(scores.shape[:2], dtype=torch.bool).triu(len(seen) - len(inputs) + 1)
        weights = scores.masked_fill(later[..., None], -torch.inf).softmax(1)
        return torch.einsum("tsb,sbd->tbd", weights, seen), (keys, seen)


def legacy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return used(Base(weight_norm(nn.LSTM(FEATURES, HIDDEN), "weight_hh_l0")))


def used(model: nn.Module) -> nn.Module:
    """After a forward pass, as a model is that has been looked at."""
    model(torch.randn(3, 2, FEATURES))
    return model


def parametrised(kind: Callable[..., nn.Module]) -> nn.Module:
    return used(Base(kind(nn.LSTM(FEATURES, HIDDEN), "weight_hh_l0")))


CASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "VRNN": (lambda: tbptt.scan(Sampled()), {"randomness"}),
    "RSSM": (lambda: tbptt.scan(Categories()), {"randomness", "gradient carry"}),
    "noise for all steps": (NoiseForAllSteps, {"randomness"}),
    "numpy noise": (NumpyNoise, {"value carry"}),
    "own generator": (OwnGenerator, set()),
    "batch norm": (Normalised, {"batch norm"}),
    "running scale": (RunningScale, {"value carry", "lane independence"}),
    "codebook": (Codebook, {"value carry"}),
    "reservoir": (Frozen, {"gradient carry"}),
    "averages": (lambda: tbptt.scan(Averages()), {"gradient carry"}),
    "convolution": (Convolution, {"gradient carry"}),
    "ring buffer": (lambda: tbptt.scan(Ring()), set()),
    "counter": (Counter, {"gradient carry"}),
    "annealed by calls": (Annealed, {"value carry"}),
    "weight norm": (lambda: parametrised(parametrizations.weight_norm), set()),
    "legacy weight norm": (legacy, set()),
    "spectral norm": (lambda: parametrised(parametrizations.spectral_norm), {"value carry"}),
    "orthogonal": (lambda: used(Base(parametrizations.orthogonal(nn.RNN(FEATURES, HIDDEN), "weight_hh_l0"))), set()),
    "max_norm": (lambda: Words(max_norm=0.5), set()),
    "sparse": (lambda: Words(sparse=True), set()),
    "clockwork": (lambda: tbptt.scan(Clockwork()), set()),
    "adaptive spikes": (lambda: tbptt.scan(Spiking()), {"gradient carry"}),
    "spikes": (lambda: tbptt.scan(Fire()), set()),
    "bf16 GRU": (lambda: Base().bfloat16(), set()),
    "fp16 scan": (lambda: tbptt.scan(Cell()).half(), set()),
    "dropout": (Drops, set()),
    "dropout between layers": (lambda: Base(nn.LSTM(FEATURES, HIDDEN, num_layers=2, dropout=0.5)), set()),
    "zoneout": (lambda: tbptt.scan(Zoneout()), set()),
    "variational dropout": (lambda: tbptt.scan(Variational()), set()),
    "gradient inside": (lambda: tbptt.scan(Energy()), set()),
    "learned start": (lambda: tbptt.scan(Learned()), set()),
    "dict": (lambda: tbptt.scan(Named()), set()),
    "complex": (lambda: tbptt.scan(Complex()), set()),
    "growing cache": (Attends, {"reset"}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_passes_with_its_notes(name: str) -> None:
    build, noted = CASES[name]
    torch.manual_seed(0)
    model = build()
    kind = next(model.parameters()).dtype
    words = torch.randint(20, (48, 3))
    example = words if isinstance(model, Words) else torch.randn(48, 3, FEATURES, dtype=kind)
    report = tbptt.check(model, example, tbptt.TBPTT(16, 32))
    assert report, str(report)
    assert {item.name for item in report.items if item.verdict == "note"} == noted, str(report)


def test_what_is_noted_is_said() -> None:
    """A note says what it means; the weights of a model whose forward pass writes into them stay."""
    said = {
        name: str(tbptt.check(CASES[name][0](), torch.randn(24, 3, FEATURES))) for name in ("batch norm", "reservoir")
    }
    assert "mixes the lanes and the steps" in said["batch norm"]
    assert "move once for a step" in said["batch norm"]
    assert "no trained weight is upstream of the state: no gradient can cross, and none has to" in said["reservoir"]
    model = Words(max_norm=0.5)
    before = model.words.weight.detach().clone()
    tbptt.check(model, torch.randint(20, (24, 3)))
    assert torch.equal(model.words.weight, before)
