"""Evolution strategies as machinery: how particles run, what they leave, what is carried, what is refused."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from particle_runs import METHODS, RULES, Weighted, cut, half_squared, itself, over, reset_alone, with_resets
from safetensors.torch import load, save
from systems import SYSTEMS, B, D, H, record, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import PES, ArrayStream, ESSingle, Estimate, Monitor, NonFinite, Trainer, TruncatedES, Window
from tbptt.codec import decode, encode
from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.estimators import particles, perturbation
from tbptt.estimators.perturbation import ParticleCarry, Perturbation, draw_noise
from tbptt.monitors import Update

methods = pytest.mark.parametrize("method", METHODS)
ways = pytest.mark.parametrize("vectorize", [True, False], ids=["side by side", "one by one"])


# What runs, and how


class Cache:
    def __init__(self, memory: Tensor, steps: int) -> None:
        self.memory, self.steps = memory, steps


class Opaque(nn.Module):
    """Keeps its state in an object, with a number that is no tensor; writes into a buffer, draws, ties, freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.again = nn.Linear(D + H, H), nn.Linear(D + H, H)
        self.again.weight = self.mix.weight
        self.frozen = nn.Parameter(torch.ones(H), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        memory = inputs.new_zeros(inputs.shape[1], H) if state is None else state.memory
        steps = 7 if state is None else state.steps
        self.calls.add_(1)
        outputs = []
        for step in inputs:
            each = nn.functional.dropout(torch.cat([step, memory], -1), 0.3, self.training)
            memory = torch.tanh(self.mix(each) + 0.1 * self.again(each)) * self.frozen
            outputs.append(memory)
        return torch.stack(outputs), Cache(memory, steps)


def opaque_windows() -> list[Window]:
    return cut(with_resets(SYSTEMS["leaky"](), 32), 3)


@methods
def test_side_by_side_is_one_by_one(method: type[Perturbation]) -> None:
    torch.manual_seed(3)
    model, windows = Opaque().double().eval(), opaque_windows()
    runs = {way: over(method(3, 6, 0.2, vectorize=way), model, windows) for way in ("auto", True, False)}
    assert [runs[way][0][0].metrics["vectorized"] for way in runs] == [1.0, 1.0, 0.0]
    assert len(runs[False][1].particles) in (0, 6)
    for fast, slow in zip(runs[True][0], runs[False][0], strict=True):
        assert fast.gradients.keys() == {"mix.weight", "mix.bias", "again.bias"}
        assert relative(fast.gradients, slow.gradients) < 1e-12
        assert fast.metrics["particle_loss"] == pytest.approx(slow.metrics["particle_loss"], rel=1e-12)


@ways
@methods
def test_nothing_remains_but_what_the_model_alone_would_leave(method: type[Perturbation], vectorize: bool) -> None:
    torch.manual_seed(4)
    model, windows = Opaque().double(), opaque_windows()
    alone, weights = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    estimates, carry = over(method(3, 4, 0.2, vectorize=vectorize, keep_outputs=True), model, windows)
    random = torch.get_rng_state()
    torch.manual_seed(5)
    alone.calls.zero_()
    state, shown = None, []
    with torch.no_grad():
        for window in windows:
            outputs, state = tbptt.unroll.unroll(alone, window, state, (0,))
            shown.append(outputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(each.outputs, outputs) for each, outputs in zip(estimates, shown, strict=True))
    assert torch.equal(carry.state.memory, state.memory)
    assert carry.state.steps == state.steps
    assert model.calls == alone.calls > 7
    for name in set(weights) - {"calls"}:
        assert torch.equal(model.state_dict()[name], weights[name])
    assert not any(leaf.requires_grad for leaf in tbptt.tree.tensors((carry.state, list(carry.particles))))
    for estimate, window, outputs in zip(estimates, windows, shown, strict=True):
        mean = squared(outputs, window.targets)[window.mask].mean()
        torch.testing.assert_close(estimate.loss, mean)
        assert (estimate.num_injected, estimate.lookback) == (int(window.mask.sum()), 0)


class Rattling(nn.Module):
    """Its outputs are noise that no weight has a say in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        drawn = nn.functional.dropout(torch.ones_like(inputs)) + 0 * self.weight
        return drawn[..., 0], inputs[-1, :, 0]


@ways
@methods
def test_the_two_of_a_pair_draw_the_same(
    method: type[Perturbation], vectorize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = Rattling(), [Window(torch.ones(4, 2, 1), torch.zeros(4, 2)) for _ in range(6)]
    estimates, _ = over(method(4, 4, 0.1, vectorize=vectorize), model, windows, loss=itself)
    assert not any(each.gradients["weight"].any() for each in estimates)
    assert len({float(each.loss) for each in estimates}) > 1
    # the control: a draw for each particle would show
    vmap = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda function, randomness: vmap(function, randomness="different"))
    monkeypatch.setattr(particles, "replayed", lambda *_, **__: nullcontext())
    estimates, _ = over(method(4, 4, 0.1, vectorize=vectorize), model, windows, loss=itself)
    assert any(each.gradients["weight"].any() for each in estimates)


class Counting(nn.Module):
    """Asks its state for a number, which no tensor of many particles has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1]) if state is None else state * (1 if float(state.sum()) > 0 else 2)
        return inputs[..., 0] * self.weight + state, state + self.weight


@methods
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.LSTM(D, H), "lstm"),
        (lambda: nn.GRU(D, H), "gru"),
        (lambda: tbptt.scan(nn.GRUCell(D, H)), "performance drop"),
        (Counting, "item"),
    ],
    ids=["LSTM", "GRU", "GRUCell", "a state asked for a number"],
)
@pytest.mark.filterwarnings("ignore")  # as most programs do, that do not want to hear of performance
def test_what_cannot_be_vectorised_runs_one_by_one_or_is_refused(
    method: type[Perturbation], build: Any, reason: str
) -> None:
    torch.manual_seed(6)
    model, window = build(), Window(torch.randn(3, 2, D), torch.randn(3, 2))
    loss = lambda outputs, targets: outputs.view(3, 2, -1).sum(-1) - targets  # noqa: E731
    estimates, carry = over(method(3, 4, 0.1), model, [window, window], loss=loss)
    assert [each.metrics["vectorized"] for each in estimates] == [0.0, 0.0]
    assert carry.vectorized is False
    with pytest.raises(CapabilityError, match="vectorize=True, but .*" + reason) as caught:
        over(method(3, 4, 0.1, vectorize=True), model, [window], loss=loss)
    assert 'vectorize="auto"' in caught.value.fix


@methods
@pytest.mark.parametrize("vectorize", ["auto", True, False])
def test_a_fault_of_the_loss_is_not_taken_for_one_of_vectorising(method: type[Perturbation], vectorize: Any) -> None:
    windows = cut(with_resets(SYSTEMS["leaky"](), 32), 3)
    with pytest.raises(ShapeError, match="one value for each step and lane"):
        over(method(3, 4, 0.1, vectorize=vectorize), Opaque().double(), windows, loss=lambda o, t: (o - t).mean())


@methods
def test_the_loss_of_the_particles_is_that_of_the_smoothed_loss(method: type[Perturbation]) -> None:
    torch.manual_seed(12)
    model, windows = Opaque().double().eval(), opaque_windows()
    for sigma, near in ((1e-6, True), (0.5, False)):
        for each in over(method(3, 6, sigma), model, windows)[0]:
            assert (each.metrics["particle_loss"] == pytest.approx(float(each.loss), rel=1e-4)) == near
    linear = Weighted(2, 0.9)  # where smoothing changes nothing
    for each in over(method(4, 6, 0.5), linear, reset_alone(), loss=itself)[0]:
        assert each.metrics["particle_loss"] == pytest.approx(float(each.loss), rel=1e-12)


@methods
def test_a_window_without_targets_teaches_nothing_and_is_run(method: type[Perturbation]) -> None:
    torch.manual_seed(7)
    system = SYSTEMS["leaky"]()
    windows = cut(record(system, 9, masks=False, resets=False), 3)
    blank = Window(windows[1].inputs, windows[1].targets, torch.zeros(3, B, dtype=torch.bool))
    estimates, carry = over(method(3, 4, 0.1), system.model, [windows[0], blank])
    assert estimates[1].loss.isnan()
    assert (estimates[1].num_terms, estimates[1].num_injected) == (0, 0)
    assert not any(each.any() for each in estimates[1].gradients.values())
    through, _ = over(method(3, 4, 0.1), system.model, windows)
    [after], _ = over(method(3, 4, 0.1), system.model, windows[2:], carry)
    assert relative(after.gradients, through[2].gradients) < 1e-12
    assert relative(after.gradients, through[1].gradients) > 0.1  # the control


def test_new_noise_for_each_window_makes_es_single_what_pes_is() -> None:
    torch.manual_seed(8)
    system = SYSTEMS["leaky"]()
    windows = cut(record(system, 21, masks=True, resets=False), 3)
    runs = [over(each, system.model, windows)[0] for each in (PES(3, 6, 0.1), ESSingle(3, 6, 0.1, refresh=1))]
    assert all(relative(a.gradients, b.gradients) == 0 for a, b in zip(*runs, strict=True))
    assert [each.metrics["noises"] for each in runs[0]] == [1, 2, 3, 4, 5, 6, 7]
    other, _ = over(ESSingle(3, 6, 0.1), system.model, windows)
    assert relative(other[1].gradients, runs[0][1].gradients) > 0.1
    assert [(each.metrics["noises"], each.metrics["noise_age"]) for each in other[:3]] == [(1, 1), (1, 2), (1, 3)]


# The carry


def through_files(state: dict[str, Any]) -> Any:
    found: dict[str, Tensor] = {}
    text = json.dumps(encode(state, "carry", found), allow_nan=False)
    return decode(json.loads(text), load(save(found)))


@ways
@pytest.mark.parametrize("estimator", [*RULES.values()], ids=[*RULES])
def test_a_saved_carry_goes_on_bit_for_bit(estimator: Perturbation, vectorize: bool) -> None:
    estimator = replace(estimator, vectorize=vectorize)
    torch.manual_seed(9)
    recording = with_resets(SYSTEMS["leaky"](), 32)
    windows = cut(recording, 3)

    def start() -> tuple[Opaque, torch.optim.Optimizer, ParticleCarry]:
        torch.manual_seed(10)
        model = Opaque().double()
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5), estimator.init(model, B)

    def go_on(model: nn.Module, optimizer: Any, carry: Any, windows: list[Window]) -> tuple[list[Estimate], Any]:
        found = []
        for window in windows:
            [estimate], carry = over(estimator, model, [window], carry)
            estimate.apply(model)
            optimizer.step()
            found.append(estimate)
        return found, carry

    whole, end = go_on(*start(), windows)
    tbptt.registered_class(Cache)
    for stop in (2, 9):
        model, optimizer, carry = start()
        _, carry = go_on(model, optimizer, carry, windows[:stop])
        saved, random = through_files(carry.state_dict()), torch.get_rng_state()
        fresh = estimator.init(model, B)
        fresh.load_state_dict(saved)
        again = over(estimator, model, [windows[stop]], carry)[0]  # the old carry stays what it is, too
        torch.set_rng_state(random)
        rest, last = go_on(model, optimizer, fresh, windows[stop:])
        assert relative(again[0].gradients, rest[0].gradients) == 0
        for a, b in zip(rest, whole[stop:], strict=True):
            assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)
            assert torch.equal(a.loss, b.loss)
        assert torch.equal(last.state.memory, end.state.memory)
    with pytest.raises(ShapeError, match=f"carry of 5 lanes was expected, but the saved one has {B}"):
        estimator.init(model, 5).load_state_dict(saved)


@pytest.mark.parametrize("method", [PES, ESSingle])
@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"sigma": 0.2}, {"num_particles": 6}, {"vectorize": False}, "unfrozen"], ids=str
)
def test_particles_in_flight_belong_to_their_settings(method: type[Perturbation], changed: Any) -> None:
    torch.manual_seed(11)
    model, windows = Opaque().double(), opaque_windows()
    _, carry = over(method(3, 4, 0.1), model, windows[:2])
    if changed == "unfrozen":
        model.frozen.requires_grad_()
    settings: dict[str, Any] = {"k1": 3, "num_particles": 4, "sigma": 0.1} | ({} if changed == "unfrozen" else changed)
    with pytest.raises(ConfigError, match="expected to be those of the carry") as caught:
        over(method(**settings), model, windows[2:3], carry)
    assert "estimator.init" in caught.value.fix
    settings["num_particles"] = 4 if changed == "unfrozen" else settings["num_particles"]
    over(TruncatedES(**settings), model, windows[:1], over(TruncatedES(3, 4, 0.1), model, windows[:1])[1])


def test_too_many_sums_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = Weighted(2, 0.9), reset_alone()
    size = 2 * 5  # parameters times pairs; lanes of three sequences that began at different times
    monkeypatch.setattr(perturbation, "MOST_SUMMED", 3 * size)
    over(PES(4, 10, 0.1), model, windows, loss=half_squared)
    monkeypatch.setattr(perturbation, "MOST_SUMMED", 3 * size - 1)
    with pytest.raises(CapabilityError, match="3 groups of such lanes times 10 numbers") as caught:
        over(PES(4, 10, 0.1), model, windows, loss=half_squared)
    assert "fewer particles" in caught.value.fix


# Noise and settings


def test_noise_is_normal_and_its_own_for_each_seed_and_number() -> None:
    shapes = {"a": torch.zeros(50, 2), "b": torch.zeros(()), "c": torch.zeros(3, dtype=torch.complex128)}
    drawn = draw_noise(shapes, 1000, 0.5, 3, 7)
    assert {name: tuple(each.shape) for name, each in drawn.items()} == {
        "a": (1000, 50, 2),
        "b": (1000,),
        "c": (1000, 3),
    }
    flat = drawn["a"].flatten().double()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        values = (flat / 0.5) ** power
        assert abs(float(values.mean()) - moment) < 4 * float(values.std()) / len(flat) ** 0.5
    assert float(drawn["c"].real.std()) == pytest.approx(0.5, rel=0.1)
    assert float(drawn["c"].imag.std()) == pytest.approx(0.5, rel=0.1)
    for seed, number in ((3, 8), (4, 7), (7, 3)):
        other = draw_noise(shapes, 1000, 0.5, seed, number)["a"].flatten().double()
        assert abs(float(torch.corrcoef(torch.stack([flat, other]))[0, 1])) < 4 / len(flat) ** 0.5
    again = draw_noise(
        {name: value.to(torch.bfloat16) for name, value in shapes.items() if name != "c"}, 1000, 0.5, 3, 7
    )
    assert torch.equal(again["a"], drawn["a"])
    assert again["a"].dtype == torch.float32


@methods
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({"k1": value}, "k1 of .* was expected to be a whole number") for value in (0, -1, 2.0, True, "3")),
        *(({"num_particles": value}, "num_particles of .* whole number") for value in (0, -2, 4.0, None)),
        *(({"num_particles": value}, "expected to be even") for value in (1, 3)),
        *(({"sigma": value}, "positive, finite") for value in (0, -0.1, math.inf, math.nan, "0.1", True)),
        *(({"seed": value}, "a seed was expected") for value in (-1, 0.5, None)),
        *(({"vectorize": value}, "vectorize was expected") for value in (None, "yes", 1)),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant(method: type[Perturbation], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**({"k1": 3, "num_particles": 4, "sigma": 0.1} | wrong))


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True])
def test_a_refresh_that_cannot_be_meant(refresh: Any) -> None:
    with pytest.raises(ConfigError, match="refresh of ESSingle was expected to be a whole number"):
        ESSingle(3, 4, 0.1, refresh=refresh)


@methods
def test_windows_and_weights_that_do_not_fit(method: type[Perturbation]) -> None:
    model = nn.GRU(D, H)
    estimator = method(4, 2, 0.1)
    carry = estimator.init(model, B)
    assert estimator.next_steps(carry) == 4
    assert estimator.reach(4) == ()
    with pytest.raises(ShapeError, match="at most k1 = 4 steps was expected, but 5 came"):
        estimator.estimate(model, squared, carry, Window(torch.zeros(5, B, D), torch.zeros(5, B, H)))
    with pytest.raises(ShapeError, match=f"a window of {B} lanes was expected"):
        estimator.estimate(model, squared, carry, Window(torch.zeros(4, B + 1, D), torch.zeros(4, B + 1, H)))
    with pytest.raises(ConfigError, match="sigma that can be added to a weight"):
        method(4, 2, 1e-9).init(model, B)


class Brittle(nn.Module):
    """h' = h + exp(w x), shown as h / (1 + h): where exp overflows the output is no number, and neither is the next."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1).double())

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = torch.ones(inputs.shape[1], 1).double() if state is None else state
        shown = []
        for step in inputs:
            state = 0.5 * state + torch.exp(self.weight * step)
            shown.append(state / (1 + state))
        return torch.stack(shown), state


@pytest.mark.parametrize("estimator", [PES(4, 4, 0.1), ESSingle(4, 4, 0.1)], ids=str)
def test_a_particle_that_is_lost_is_not_carried_on(estimator: Perturbation) -> None:
    """The model's own state is sound: it is the particles' that says to go back behind a refused update."""
    inputs = torch.zeros(40, 1).double()
    inputs[9] = 700.0  # exp(700) can be held, exp(1.02 * 700) cannot
    model = Brittle()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-9)
    refused: list[bool] = []

    class Seen(Monitor):
        def update(self, update: Update) -> None:
            refused.append(update.refused)

    stream = ArrayStream(inputs, torch.zeros(40, 1).double(), lanes=1)
    guards = [NonFinite("skip")]
    Trainer(model, nn.MSELoss(), sgd, estimator, stream, guards=guards, monitors=[Seen()], checked=False).run(passes=1)
    assert refused == [False, False, True, *[False] * 7]
