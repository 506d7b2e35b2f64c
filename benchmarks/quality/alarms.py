"""How far healthy runs stay from the thresholds of `tbptt.Alarms`, and when sick ones cross them.

    python benchmarks/quality/alarms.py [NAME ...]

Each run is trained with the alarms as they are by default. For the healthy ones the file has the largest gradient norm
over the highest level before it, recomputed here, which is what `explosion=` is compared with; no alarm should be
raised. Each sick one is sick in one way, and named after the alarm that should be. The names pick runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first, and copy.py there is not its own module of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from side_by_side import save
from torch import Tensor, nn

import tbptt
from tbptt.errors import AlarmWarning, NonFiniteError
from tbptt.streams import Adding, CopyTask, DelayedRecall, ecg, shakespeare

CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
UNCLIPPED, CLIPPED = (tbptt.NonFinite("raise"),), (tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0))


class Recurrent(nn.Module):
    """A plain recurrent layer, its matrix scaled to a spectral radius."""

    def __init__(self, symbols: int, hidden: int, radius: float, nonlinearity: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 16)
        self.core = nn.RNN(16, hidden, nonlinearity=nonlinearity)
        self.head = nn.Linear(hidden, symbols)
        matrix = torch.randn(hidden, hidden)
        with torch.no_grad():
            self.core.weight_hh_l0.copy_(matrix * radius / torch.linalg.eigvals(matrix).abs().max())

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(self.embedding(inputs), state)
        return self.head(outputs), state


class Adds(nn.Module):
    """A state that only adds up what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.head = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sums = self.feed(inputs).cumsum(0) + (0 if state is None else state)
        return self.head(torch.tanh(sums)).squeeze(-1), sums[-1]


def layer(inputs: int, outputs: int, hidden: int, embedding: int | None = None, core: str = "lstm") -> nn.Module:
    return tbptt.SequenceModel(inputs, outputs, hidden=hidden, embedding=embedding, core=core)


def beats() -> tbptt.Stream:
    return ecg(lanes=16)


def plays() -> tbptt.Stream:
    return shakespeare(lanes=16)


def numbers() -> tbptt.Stream:
    inputs = torch.rand(16 * 20_000, 2)
    return tbptt.ArrayStream(inputs, inputs.mean(1), lanes=16)


def recall(lag: int = 10) -> tbptt.Stream:
    return DelayedRecall(lag, 16, symbols=8)


@dataclass(frozen=True)
class Run:
    """What is trained: a model on a stream, with Adam unless `sgd` is its learning rate."""

    model: Callable[[], nn.Module]
    stream: Callable[[], tbptt.Stream]
    loss: nn.Module
    estimator: tbptt.TBPTT
    updates: int
    adam: float = 3e-3
    sgd: float | None = None
    momentum: float = 0.0
    guards: tuple[tbptt.Guard, ...] = UNCLIPPED


TBPTT = tbptt.TBPTT
RUNS: dict[str, Run] = {
    "healthy: ecg, LSTM, 8/8": Run(lambda: layer(2, 1, 32), beats, BCE, TBPTT(8, 8), 7000),
    "healthy: ecg, LSTM, 8/64": Run(lambda: layer(2, 1, 32), beats, BCE, TBPTT(8, 64), 4000),
    "healthy: ecg, GRU, 4/64 retain": Run(
        lambda: layer(2, 1, 32, core="gru"), beats, BCE, TBPTT(4, 64, replay="retain"), 4000
    ),
    "healthy: ecg, LSTM, 8/32, SGD": Run(
        lambda: layer(2, 1, 32), beats, BCE, TBPTT(8, 32), 4000, sgd=0.1, momentum=0.9
    ),
    "healthy: ecg, LSTM, 8/adaptive": Run(lambda: layer(2, 1, 32), beats, BCE, TBPTT(8, tbptt.Adaptive(max=64)), 4000),
    "healthy: text, LSTM, 32/32": Run(lambda: layer(65, 65, 64, 32), plays, CE, TBPTT(32, 32), 4000, adam=4e-3),
    "healthy: text, LSTM, 8/64, clipped": Run(
        lambda: layer(65, 65, 64, 32), plays, CE, TBPTT(8, 64), 4000, adam=4e-3, guards=CLIPPED
    ),
    "healthy: recall, LSTM, 4/32": Run(lambda: layer(8, 8, 48, 16), recall, CE, TBPTT(4, 32), 5000, adam=5e-3),
    "healthy: recall, GRU, 16/32": Run(lambda: layer(8, 8, 48, 16, "gru"), recall, CE, TBPTT(16, 32), 3000, adam=5e-3),
    "healthy: recall, RNN, 4/32": Run(lambda: layer(8, 8, 48, 16, "rnn"), recall, CE, TBPTT(4, 32), 4000, adam=2e-3),
    "healthy: copy, LSTM, 8/40": Run(
        lambda: layer(10, 10, 48, 16), lambda: CopyTask(5, 16), CE, TBPTT(8, 40), 4000, adam=5e-3
    ),
    "healthy: adding, LSTM, 16/64": Run(lambda: layer(2, 1, 48), lambda: Adding(30, 16), MSE, TBPTT(16, 64), 3000),
    "explosion: ecg, RNN, 8/32, SGD, learning rate 1": Run(
        lambda: layer(2, 1, 32, core="rnn"), beats, BCE, TBPTT(8, 32), 1500, sgd=1.0
    ),
    "explosion: ecg, GRU, 8/32, SGD, learning rate 3": Run(
        lambda: layer(2, 1, 32, core="gru"), beats, BCE, TBPTT(8, 32), 2500, sgd=3.0
    ),
    "explosion: recall, ReLU, spectral radius 1.8": Run(
        lambda: Recurrent(8, 48, 1.8, "relu"), recall, CE, TBPTT(4, 32), 200, sgd=0.0
    ),
    "vanishing: recall, RNN, spectral radius 0.3": Run(
        lambda: Recurrent(8, 48, 0.3, "tanh"), recall, CE, TBPTT(4, 32), 3500, sgd=1e-2
    ),
    "vanishing: text, RNN, 8/32": Run(lambda: layer(65, 65, 64, 32, "rnn"), plays, CE, TBPTT(8, 32), 4000, adam=1e-3),
    "stalled: recall at lag 20, LSTM, 2/2": Run(
        lambda: layer(8, 8, 24, 8), lambda: recall(20), CE, TBPTT(2, 2), 12_000, adam=5e-3
    ),
    "drift: numbers, a state that adds up": Run(Adds, numbers, MSE, TBPTT(8, 8), 2000),
    "non_finite: recall, ReLU, spectral radius 3, no guard": Run(
        lambda: Recurrent(8, 48, 3.0, "relu"), recall, CE, TBPTT(8, 8), 400, guards=()
    ),
}


@dataclass
class Spikes(tbptt.Monitor):
    """The largest gradient norm over the highest level before it, by a loop of its own."""

    largest: float = 0.0
    losses: list[float] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)
    level: float = 0.0
    looks: int = 0
    highest: float = math.inf

    def update(self, update: tbptt.monitors.Update) -> None:
        norm, loss = update.gradient_norm(), float(update.estimate.loss)
        if norm is not None and 0 < norm < math.inf:
            self.logs.append(math.log(norm))
        if math.isfinite(loss):
            self.losses.append(loss)
        if update.number % 10 == 0 and self.logs:
            self.largest = max(self.largest, math.exp(max(self.logs) - self.highest))
            self.looks += 1
            self.level += max(0.05, 1 / self.looks) * (sum(self.logs) / len(self.logs) - self.level)
            if self.looks >= 5:
                self.highest = self.level if self.highest == math.inf else max(self.highest, self.level)
            self.logs.clear()


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float | str] = {}
    for name, run in RUNS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        torch.manual_seed(0)
        model = run.model()
        if run.sgd is None:
            optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=run.adam)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=run.sgd, momentum=run.momentum)
        alarms, spikes = tbptt.Alarms(), Spikes()
        trainer = tbptt.Trainer(
            model, run.loss, optimizer, run.estimator, run.stream(), guards=run.guards, monitors=[spikes, alarms]
        )
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AlarmWarning)
            try:
                trainer.run(updates=run.updates)
            except NonFiniteError as error:
                figures[f"{name}: ended by"] = f"NonFiniteError at update {trainer.updates + 1}: {error.message[:80]}"
        figures[f"{name}: alarms in {trainer.updates} updates"] = (
            ", ".join(f"{alarm.name} at {alarm.update}" for alarm in alarms.raised) or "none"
        )
        figures[f"{name}: largest norm over level"] = spikes.largest
        losses = spikes.losses
        figures[f"{name}: loss, first and last 50"] = (
            f"{sum(losses[:50]) / len(losses[:50]):.4f} {sum(losses[-50:]) / len(losses[-50:]):.4f}"
        )
        print(name, f"{time.perf_counter() - begin:.0f} s", figures[f"{name}: alarms in {trainer.updates} updates"])
    save("quality_alarms", figures, {}, command=" ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
