"""One update step serves all who train: the trainer, races, `Online` and Lightning come to the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.comparison.races import Race, Runner
from tbptt.loss import StepLoss
from tbptt.randomness import seed_everything
from tbptt.snapshots import Snapshots

LANES, K1, WINDOWS, PASSES = 2, 4, 100, 3
NAN, BREAKS = 99.0, 9.0


class Fragile(nn.Module):
    """An input of 9 at the last step of a call breaks the state of its lane, but no output."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.drop, self.head = nn.RNN(2, 5), nn.Dropout(dropout), nn.Linear(5, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs.clamp(max=3.0), state)
        return self.head(self.drop(outputs)), state / (inputs[-1, :, :1] != BREAKS)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A target of 99 makes NaN of all gradients of its window."""
    return ((outputs - targets).square() * torch.where(targets == NAN, math.nan, 1.0))[..., 0]


def recording(*, spikes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and resets, (T, B, ...): some windows have no gradient, and a third of these break the state."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(WINDOWS * K1, LANES, 2, generator=generator)
    targets = inputs.cumsum(0).sin()[..., :1]
    reset = torch.rand(WINDOWS * K1, LANES, generator=generator) < 0.03
    for window in range(3, WINDOWS, 4):
        lane = window % LANES
        targets[window * K1 + window % K1, lane] = NAN
        if window % 3 == 0:
            inputs[window * K1 + K1 - 1, lane, 0] = BREAKS
            reset[window * K1 + 1, (lane + 1) % LANES] = True
    for window in range(40, WINDOWS, 30) if spikes else ():
        targets[window * K1] *= 1e4
    return inputs, targets, reset


def stream(*, spikes: bool = False, dtype: torch.dtype | None = None) -> tbptt.ArrayStream:
    """The recording, lane after lane."""
    inputs, targets, reset = (each.transpose(0, 1).flatten(0, 1) for each in recording(spikes=spikes))
    return tbptt.ArrayStream(inputs, targets, reset=reset, lanes=LANES, dtype=dtype)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def guards(*, spikes: bool = False) -> list[tbptt.Guard]:
    back = [tbptt.SpikeRollback(every=5, warm_up=10)] if spikes else []
    return [tbptt.NonFinite("skip"), *back, tbptt.ClipNorm(0.5)]


class Backs(tbptt.Monitor):
    count = 0

    def message(self, text: str) -> None:
        self.count += "went back" in text


def by_trainer(
    estimator: tbptt.Estimator,
    model: nn.Module | None = None,
    *,
    spikes: bool = False,
    dtype: torch.dtype | None = None,
    passes: int = PASSES,
) -> nn.Module:
    model, backs = model or Fragile(), Backs()
    run = tbptt.Trainer(
        model,
        loss,
        adam(model.parameters()),
        estimator,
        stream(spikes=spikes, dtype=dtype),
        guards=guards(spikes=spikes),
        monitors=[tbptt.Alarms(watch=()), backs],
        checked=False,
    )
    assert run.run(passes=passes).updates == WINDOWS * passes
    assert (backs.count > 2) == spikes
    return model


def by_race(estimator: tbptt.Estimator, *, spikes: bool = False) -> nn.Module:
    model, setting = Fragile(), Race(adam, None, WINDOWS * PASSES, guards(spikes=spikes))
    example = recording()[0][:K1]
    seed_everything(0)
    runner = Runner(model, estimator, StepLoss.of(loss), stream(spikes=spikes), setting, example)
    while not runner.over:
        runner.turn(0.2)
    assert (runner.fault, runner.updates) == ("", WINDOWS * PASSES)
    return runner.model


def by_online(estimator: tbptt.Estimator) -> nn.Module:
    model = Fragile()
    online = tbptt.online.Online(model, loss, adam(model.parameters()), estimator, guards=guards(), lanes=LANES)
    seed_everything(0)
    inputs, targets, reset = recording()
    reset[0] = True  # where a pass begins
    for number in range(PASSES):
        for step in range(len(inputs)):
            if number + step and reset[step].any():
                online.reset(reset[step])
            if step % 7 == 0:
                online.predict_one(inputs[step])  # which disturbs nothing
            online.learn_one(inputs[step], targets[step])
    assert online.updates + online.refused == WINDOWS * PASSES
    return model


def by_lightning(estimator: tbptt.Estimator) -> nn.Module:
    pytest.importorskip("lightning")
    from lightning_nets import Net, fit

    net = Net(estimator, stream(), model=Fragile(), loss=loss, guards=guards())
    assert len(fit(net, max_epochs=PASSES)) == WINDOWS * PASSES
    return net.model


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


RECOMPUTE, RETAIN = tbptt.TBPTT(K1, 10), tbptt.TBPTT(K1, 10, replay="retain")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning's own, of torch
@pytest.mark.parametrize("estimator", [RECOMPUTE, pytest.param(RETAIN, marks=pytest.mark.slow)], ids=str)
def test_all_who_train_come_to_the_same_weights(estimator: tbptt.Estimator) -> None:
    """Over 300 updates with resets and refused windows, some of which leave a state that is not carried on."""
    expected = by_trainer(estimator)
    assert same(by_race(estimator), expected)
    assert same(by_online(estimator), expected)
    assert same(by_lightning(estimator), expected)


def test_without_the_resets_owed_the_weights_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before, and what Lightning did once."""
    expected = by_trainer(RECOMPUTE, passes=1)
    monkeypatch.setattr(Snapshots, "with_resets", lambda snapshots, window: window)
    assert not same(by_trainer(RECOMPUTE, passes=1), expected)


def test_trainer_and_races_go_back_alike() -> None:
    expected = by_trainer(RECOMPUTE, spikes=True)
    assert same(by_race(RECOMPUTE, spikes=True), expected)


def loop_by_hand() -> nn.Module:
    """What must come out, in plain torch."""
    model = Fragile(dropout=0.0).double()
    optimizer = adam(model.parameters())
    inputs, targets, reset = recording()
    inputs, targets, reset[0] = inputs.double(), targets.double(), True
    state, owed = torch.zeros(1, LANES, 5, dtype=torch.float64), torch.zeros(LANES, dtype=torch.bool)
    for _ in range(PASSES):
        for begin in range(0, len(inputs), K1):
            now, total = state.masked_fill(owed[:, None], 0.0), 0.0
            for step in range(begin, begin + K1):
                now = now.masked_fill(reset[step][:, None], 0.0)
                outputs, now = model.core(inputs[step : step + 1].clamp(max=3.0), now)
                total = total + loss(model.head(outputs), targets[step : step + 1]).sum()
            now = (now / (inputs[begin + K1 - 1, :, :1] != BREAKS)).detach()
            optimizer.zero_grad()
            (total / (K1 * LANES)).backward()
            if torch.isfinite(total):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            if now.isfinite().all():
                state, owed = now, torch.zeros_like(owed)
            else:  # as if the window had never been, but for the sequences that it begins
                owed = owed | reset[begin : begin + K1].any(0)
    return model


def test_it_is_what_a_loop_by_hand_does() -> None:
    made, expected = by_trainer(tbptt.TBPTT(K1, K1), Fragile(dropout=0.0).double(), dtype=torch.float64), loop_by_hand()
    for a, b in zip(made.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
