"""The horizon against plain autograd, closed forms, and systems whose dependency is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from systems import Leaking
from torch import Tensor, nn

import tbptt
from tbptt.errors import CapabilityError, ConfigError, StreamError
from tbptt.horizon import measure
from tbptt.horizon.samples import places, sample
from tbptt.horizon.sent import Place, Plan
from tbptt.loss import StepLoss
from tbptt.models import InfluenceBalancingModel
from tbptt.streams import Adding, DelayedRecall, InfluenceBalancing
from tbptt.testing import influence_sums


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(2).sum(2) if outputs.ndim > 2 else (outputs - targets).square()


def half(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


def array_stream(steps: int = 2000, lanes: int = 3, inputs: int = 2, outputs: int = 4) -> tbptt.ArrayStream:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(steps * lanes, size, generator=generator).double() for size in (inputs, outputs)]
    return tbptt.ArrayStream(*data, lanes=lanes)


def line_stream() -> tbptt.ArrayStream:
    """One number in, one out."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(6000, *size, generator=generator).double() for size in ((1,), ())]
    return tbptt.ArrayStream(*data, lanes=3)


def sparse_stream() -> tbptt.ArrayStream:
    """A target at every eighth step."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(3000, size, generator=generator).double() for size in (2, 4)]
    return tbptt.ArrayStream(*data, mask=torch.arange(3000) % 8 == 3, lanes=1)


# Influence balancing: everything is known, and every shortcut is wrong


def balancing(max_lag: int | None, **changes: Any) -> Any:
    model = InfluenceBalancingModel().double()
    settings = {"probes": 3, "burn_in": 400, "costs": False, "context": False, "lyapunov": False} | changes
    return measure(model, half, InfluenceBalancing(2, dtype=torch.float64), max_lag=max_lag, **settings)


def test_bias_of_influence_balancing() -> None:
    report = balancing(128, lookbacks=[10, 40, 41, 50, 60, 80])
    sums = influence_sums(128)
    assert report.bias is not None
    assert report.signed is not None
    for steps in (10, 40, 41, 50, 60, 80):
        wanted = abs(sums[steps - 1] - sums[-1]) / abs(sums[-1])
        assert report.bias.value(steps) == pytest.approx(wanted, rel=1e-6)
        assert report.signed.value(steps) == pytest.approx(sums[steps - 1] / sums[-1], rel=1e-6)
    for steps, published in ((50, 0.2079), (60, 0.0172), (80, 1.8e-5)):
        assert report.bias.value(steps) == pytest.approx(published, rel=5e-3)
    assert report.signed.value(40) < 0 < report.signed.value(41)


@pytest.mark.parametrize("max_lag", [20, 44, 50])
def test_a_curve_too_short_for_influence_balancing_is_refused_rather_than_believed(max_lag: int) -> None:
    with pytest.raises(ConfigError, match="would be a guess") as refused:
        balancing(max_lag, probes=1).recommend(0.1)
    assert f"max_lag={2 * max_lag}" in refused.value.fix


@pytest.mark.parametrize(("max_lag", "context"), [(55, True), (72, False), (128, False), (None, True)])
def test_influence_balancing_never_gets_less_than_it_needs(max_lag: int | None, context: bool) -> None:
    """Its spectral radius is 0.5, a half-life of one step."""
    chosen = balancing(max_lag, context=context, probes=1).recommend(0.1)
    assert chosen.needed is not None
    assert chosen.needed >= 51
    assert chosen.k2 - chosen.k1 + 1 >= 51  # every loss reaches so far
    assert chosen.met


def test_a_short_curve_with_a_memory_limit_gives_the_longest_that_fits_and_says_so() -> None:
    report = balancing(40, costs=True)
    chosen = report.recommend(0.1, memory=report.costs.bytes_at(30))
    assert not chosen.met
    assert chosen.needed is None
    assert chosen.k2 == 30
    assert any("beyond the longest lag" in reason for reason in chosen.why)


# Closed forms


@pytest.mark.parametrize(("beta", "tolerance", "steps"), [(0.9, 0.1, 22), (0.9, 0.5, 7), (0.6, 0.1, 5)])
def test_a_known_decay(beta: float, tolerance: float, steps: int) -> None:
    report = measure(
        Leaking(beta), squared, line_stream(), max_lag=120, probes=4, gradients=False, context=False, costs=False
    )
    curve = np.array(report.state.mean)
    lags = np.array(report.state.at)
    np.testing.assert_allclose(curve, curve[0] / beta * beta**lags, rtol=1e-9)
    assert report.inputs is not None
    np.testing.assert_allclose(
        report.inputs.mean, np.array(report.inputs.mean[0]) * beta ** np.arange(120.0), rtol=1e-9
    )
    assert report.decay_rate == pytest.approx(beta, rel=0.01)
    assert report.half_life == pytest.approx(math.log(2) / -math.log(beta), rel=0.1)
    assert report.recommend(tolerance).needed == steps
    assert report.lyapunov == pytest.approx(math.log(beta), rel=1e-9)
    assert report.lag_of_share(0.9) == pytest.approx(math.log(0.1) / math.log(beta), abs=1.5)


# Against plain autograd


class Cells(nn.Module):
    """Two coupled cells; torch's LSTMCell, so that the oracle can hold every state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.LSTMCell(2, 5), nn.Linear(5, 4)

    def step(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.first(inputs, state)
        return self.head(state[0]), state

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs = []
        for each in inputs:
            output, state = self.step(each, state)
            outputs.append(output)
        return torch.stack(outputs), state


def found_places(model: nn.Module, longest: int, count: int, stream: tbptt.Stream | None = None) -> list[Place]:
    loss = StepLoss.of(squared)
    return places(model, loss, stream or array_stream(), longest, count, 17, np.random.default_rng(0))


def test_every_number_of_a_probe_is_what_autograd_says() -> None:
    torch.manual_seed(0)
    model, longest = Cells().double(), 24
    plan = Plan((1, 2, 3, 8, 16, 24), (1, 3, 8, 24))
    found = found_places(model, longest, 3)
    seen = sample(model, StepLoss.of(squared), found, plan)
    assert seen.gradients is not None
    assert seen.inputs is not None
    assert seen.context is not None
    for number, place in enumerate(found):
        inputs = place.window.inputs.clone().requires_grad_()
        states = [tuple(part.detach().requires_grad_() for part in place.state)]
        for step in range(longest):
            output, state = model.step(inputs[step], states[-1])
            states.append(state)
        losses = squared(output[None], place.window.targets[-1:])[0]
        assert seen.losses[number] == pytest.approx(float(losses.detach().mean()))
        for index, lag in enumerate(plan.lags):
            leaves = tuple(part.detach().requires_grad_() for part in states[longest - lag])  # c by itself, not by h
            output, _ = model(inputs.detach()[longest - lag :], leaves)
            parts = torch.autograd.grad(squared(output[-1:], place.window.targets[-1:]).sum(), leaves)
            norms = torch.stack([part.square().sum(1) for part in parts]).sum(0).sqrt()
            assert seen.state[number, index] == pytest.approx(float(norms.mean()))
        [of_inputs] = torch.autograd.grad(losses.sum(), inputs, retain_graph=True)
        np.testing.assert_allclose(seen.inputs[number], of_inputs.norm(dim=2).mean(1).flip(0))
        for index, steps in enumerate(plan.lookbacks):
            state = tuple(part.detach() for part in states[longest - steps])
            output = model(inputs.detach()[longest - steps :], state)[0][-1:]
            loss = squared(output, place.window.targets[-1:]).mean()
            wanted = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])
            torch.testing.assert_close(seen.gradients[number, index], wanted)
            alone = model(inputs.detach()[longest - steps :])[0][-1:].detach()
            assert seen.context[number, index] == pytest.approx(float(squared(alone, place.window.targets[-1:]).mean()))


def test_the_states_of_places_are_carried_from_the_beginning_of_the_stream() -> None:
    torch.manual_seed(0)
    model, stream = Cells().double(), array_stream()
    whole = stream.read(2000)
    stream.rewind()
    for place in found_places(model, 24, 4, stream):
        begin = place.window.start
        assert torch.equal(place.window.inputs, whole.inputs[begin : begin + 24])
        _, state = model(whole.inputs[:begin])
        torch.testing.assert_close(place.state, state)


class Symbols(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embedding, self.core = nn.Embedding(5, 3), nn.GRU(3, 4, batch_first=batch_first)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.core(self.embedding(ids), state)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_symbols_are_measured_behind_their_embedding(batch_first: bool, frozen: bool) -> None:
    """With a reset inside, too: nothing arrives from before it."""
    torch.manual_seed(0)
    inner = Symbols(batch_first).double()
    inner.embedding.weight.requires_grad_(not frozen)
    model = tbptt.stateful(inner, batch_first=True) if batch_first else inner
    ids, targets = torch.randint(5, (40, 3)), torch.randn(40, 3, 4).double()
    reset = torch.zeros(40, 3, dtype=torch.bool)
    reset[30] = True
    window = tbptt.Window(ids, targets, reset=reset)
    seen = sample(model, StepLoss.of(squared), [Place(window, None, (1,))], Plan((1, 5, 20, 40), (40,), False, False))
    assert seen.inputs is not None
    looked_up = inner.embedding.weight[ids[30:]].detach().requires_grad_()
    fed = looked_up.transpose(0, 1) if batch_first else looked_up
    outputs, _ = inner.core(fed)
    outputs = outputs.transpose(0, 1) if batch_first else outputs
    [wanted] = torch.autograd.grad(squared(outputs[-1:], targets[-1:]).sum(), looked_up)
    np.testing.assert_allclose(seen.inputs[0, :10], wanted.norm(dim=2).mean(1).flip(0))
    assert not seen.inputs[0, 10:].any()
    assert seen.state[0].tolist()[2:] == [0, 0]


def test_only_lanes_with_a_target_count() -> None:
    torch.manual_seed(0)
    model = Cells().double()
    [place] = found_places(model, 10, 1)
    mask = torch.ones(10, 3, dtype=torch.bool)
    mask[-1, 1] = False
    plan = Plan((1, 5, 10), (5, 10))
    masked = tbptt.Window(place.window.inputs, place.window.targets, mask)
    both = tbptt.Window(place.window.inputs[:, [0, 2]], place.window.targets[:, [0, 2]])
    state = tuple(part[[0, 2]] for part in place.state)
    results = [
        sample(model, StepLoss.of(squared), [Place(window, start, (0, 0))], plan)
        for window, start in ((masked, place.state), (both, state))
    ]
    for name in ("state", "inputs", "losses", "context"):
        np.testing.assert_allclose(getattr(results[0], name), getattr(results[1], name), err_msg=name)
    torch.testing.assert_close(results[0].gradients, results[1].gradients)


def test_models_that_run_in_chunks_are_measured_by_their_chunks() -> None:
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.GRU(2, 4)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if len(inputs) % 8:
                raise ValueError("chunks of 8 only")
            return self.core(inputs, state)

    torch.manual_seed(0)
    model = Chunked().double()
    report = measure(
        model, squared, array_stream(), max_lag=64, resolution=8, burn_in=64, probes=3, context=False, costs=False,
        lyapunov=False,
    )  # fmt: skip
    assert report.state.at == tuple(range(8, 72, 8))
    assert report.inputs is not None
    assert len(report.inputs.at) == 64
    found = places(model, StepLoss.of(squared), sparse_stream(), 32, 3, 0, np.random.default_rng(0), 8)
    assert [place.early for place in found] == [4] * 3  # chunks end with a multiple of 8, targets are at 3, 11, ...
    seen = sample(model, StepLoss.of(squared), found, Plan((8, 16, 32), (16, 32)))
    for number, place in enumerate(found):
        state = place.state.clone().requires_grad_()
        outputs, _ = model(place.window.inputs, state)
        loss = squared(outputs, place.window.targets)[-5]
        [wanted] = torch.autograd.grad(loss.sum(), state)
        assert seen.losses[number] == pytest.approx(float(loss.detach().mean()))
        assert seen.state[number, -1] == pytest.approx(float(wanted[0].norm(dim=1).mean()))


# What it must not do


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(2, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(nn.functional.dropout(inputs, 0.3, self.training), state)
        return self.norm(outputs.flatten(0, 1)).view_as(outputs), state


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_disturbed(fails: bool) -> None:
    torch.manual_seed(0)
    model, stream = Noisy().double(), array_stream()
    stream.read(31)
    place, weights = stream.state_dict(), {name: each.clone() for name, each in model.state_dict().items()}
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    if fails:
        with pytest.raises(ConfigError, match="passes"):
            measure(model, squared, stream, max_lag=5000, checked=False)
    else:
        measure(model, squared, stream, max_lag=30, probes=3, checked=False)  # which would refuse the BatchNorm
    assert torch.equal(torch.rand(3), wanted)
    assert stream.state_dict() == place
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_the_same_seed_finds_the_same() -> None:
    torch.manual_seed(0)
    model = Noisy().double()
    settings = {"max_lag": 30, "probes": 3, "costs": False, "checked": False}
    first = measure(model, squared, array_stream(), **settings)
    torch.manual_seed(99)
    again = measure(model, squared, array_stream(), **settings)
    assert first.to_json() == again.to_json()
    assert first.to_json() != measure(model, squared, array_stream(), seed=1, **settings).to_json()


# What a model has learned


def test_a_model_that_has_learned_nothing_is_told_from_one_that_has() -> None:
    """Delayed recall, lag 5: the look-back covers the lag once it is learned, and before that it is a lower bound."""
    torch.manual_seed(0)
    model = tbptt.SequenceModel(4, 4, hidden=32, embedding=8, core="gru")
    stream, loss = DelayedRecall(5, 32), nn.CrossEntropyLoss()
    before = measure(model, loss, stream, max_lag=64, costs=False, lyapunov=False)
    chosen = before.recommend(0.1)
    assert before.learned is False
    assert chosen.lower_bound
    assert any("lower bound" in reason for reason in chosen.why)
    assert any("lower bound" in note for note in before.notes)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    tbptt.Trainer(model, loss, adam, tbptt.TBPTT(8, 16), stream, guards=[tbptt.ClipNorm(1.0)]).run(updates=700)
    after = measure(model, loss, stream, costs=False, lyapunov=False)
    chosen = after.recommend(0.1)
    assert after.loss < 0.1
    assert after.learned
    assert not chosen.lower_bound
    assert chosen.needed is not None
    assert 6 <= chosen.needed <= chosen.k2
    context = after.context
    assert context is not None
    assert context.value(5) > 1 > 10 * context.value(8)


def test_losses_that_come_rarely_are_found() -> None:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(2, 1, hidden=8)
    report = measure(model, nn.MSELoss(), Adding(4, 12), max_lag=24, probes=5, costs=False, lyapunov=False)
    assert report.inputs is not None
    assert report.inputs.mean[11] > 0
    assert not any(report.inputs.mean[12:])  # a sequence ends where it was reset
    assert report.recommend(0.1).needed <= 12


# Refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_lag": 1}, "max_lag"),
        ({"max_lag": 10.0}, "max_lag"),
        ({"probes": 0}, "probes"),
        ({"resolution": 0}, "resolution"),
        ({"max_lag": 20, "resolution": 8}, "resolution"),
        ({"max_lag": 20, "lookbacks": [21]}, "look-backs"),
        ({"burn_in": -1}, "burn_in"),
        ({"max_lag": 1990}, "passes"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as refused:
        measure(Cells().double(), squared, array_stream(), **settings)
    assert refused.value.fix


def test_a_stream_without_targets_is_refused() -> None:
    data = torch.randn(9000, 2).double()
    stream = tbptt.ArrayStream(data, torch.randn(9000, 4).double(), mask=torch.zeros(9000, dtype=torch.bool), lanes=1)
    with pytest.raises(StreamError, match="target"):
        measure(Cells().double(), squared, stream, max_lag=10)


def test_a_model_without_state_is_refused() -> None:
    with pytest.raises(CapabilityError):
        measure(nn.Linear(2, 4).double(), squared, array_stream(), max_lag=10)


@pytest.mark.parametrize(
    "arguments", [{"tolerance": 0.0}, {"tolerance": 1.0}, {"k1": 0}, {"memory": -1.0}, {"time": math.inf}]
)
def test_recommendations_that_cannot_be_meant(arguments: dict[str, Any]) -> None:
    report = measure(Leaking(0.5), squared, line_stream(), max_lag=30, probes=3, costs=False)
    with pytest.raises(ConfigError, match="expected"):
        report.recommend(**arguments)


def test_limits_need_measured_costs() -> None:
    report = measure(Leaking(0.5), squared, line_stream(), max_lag=30, probes=3, costs=False)
    with pytest.raises(ConfigError, match="costs"):
        report.recommend(0.1, memory=1e9)


# Limits and costs


def test_costs_and_limits() -> None:
    torch.manual_seed(0)
    model = nn.GRU(2, 4).double()
    report = measure(model, squared, array_stream(), max_lag=64, probes=4)
    costs = report.costs
    assert costs is not None
    per_step = np.diff(costs.held_bytes) / np.diff(costs.lookbacks)
    assert per_step.min() > 0
    assert per_step.max() < 1.5 * per_step.min()  # memory is proportional to the look-back
    free = report.recommend(0.1)
    assert free.needed is not None
    assert (free.k1, free.k2) == (math.ceil(free.needed / 2), free.needed + math.ceil(free.needed / 2) - 1)
    given = report.recommend(0.1, k1=1)
    assert (given.k1, given.k2) == (1, free.needed)
    tight = report.recommend(0.1, memory=costs.bytes_at(free.needed))
    assert (tight.k1, tight.k2, tight.met) == (1, free.needed, True)
    too_tight = report.recommend(0.1, memory=costs.bytes_at(free.needed - 1))
    assert too_tight.k2 == free.needed - 1
    assert not too_tight.met
    with pytest.raises(ConfigError, match="memory"):
        report.recommend(0.1, memory=1.0)
    known = replace(costs, seconds=tuple(1e-3 + 1e-5 * steps for steps in costs.lookbacks))  # those measured vary
    timed = replace(report, costs=known)
    slow = timed.recommend(0.1, time=1.0)
    assert (slow.k1, slow.k2) == (free.k1, free.k2)
    fast = timed.recommend(0.1, time=1e-4)
    assert fast.met
    assert fast.k2 == free.needed + fast.k1 - 1
    assert (1e-3 + 1e-5 * fast.k2) / fast.k1 <= 1e-4 < (1e-3 + 1e-5 * free.k2) / free.k1
    assert not timed.recommend(0.1, time=1e-12).met
    assert report.recommend(0.1).estimator() == tbptt.TBPTT(free.k1, free.k2)


# What is handed on


def test_tables_json_and_text_hold_the_numbers() -> None:
    report = measure(nn.GRU(2, 4).double(), squared, array_stream(), max_lag=40, probes=4)
    tables = report.tables()
    assert tables["lags"]["lag"] == list(report.state.at)
    assert tables["lookbacks"]["lookback"] == list(report.lookbacks)
    assert all(len(set(map(len, columns.values()))) == 1 for columns in tables.values())
    found = json.loads(report.to_json())
    assert found["max_lag"] == 40
    assert found["tables"]["lags"]["gradient_of_state"] == list(report.state.mean)
    text = str(report)
    assert "40 steps back" in text
    assert f"{report.lag_of_share(0.9)}" in text
    assert report._repr_html_().startswith("<pre>")
