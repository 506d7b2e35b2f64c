"""Models of other libraries trained by the trainer: they learn, and a run in two pieces is a run in one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_libraries
from safetensors.torch import load_file
from torch import Tensor, nn

import tbptt

pytestmark = pytest.mark.usefixtures("one_thread")
UPDATES, STOP = 20, 7
PERIOD = 7


class Readout(nn.Module):
    """A layer that carries its state, and a linear map of what it returns."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 1)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.core(inputs, state)
        return self.head(outputs), state


@dataclass(frozen=True)
class Case:
    needs: str
    build: Callable[[], nn.Module]
    stream: Callable[[], tbptt.Stream]
    loss: nn.Module
    rate: float
    k1: int = 8

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def words() -> tbptt.Stream:
    """Tokens that count round and round: the next one is told by the last, at first it is not."""
    tokens = torch.arange(12_001) % PERIOD
    return tbptt.ArrayStream(tokens[:-1], tokens[1:], lanes=2)


def waves(width: int) -> Callable[[], tbptt.Stream]:
    def stream() -> tbptt.Stream:
        time = torch.arange(3001).unsqueeze(1) * 0.3 + torch.arange(width)
        return tbptt.ArrayStream(time[:-1].sin(), time[1:, :1].sin(), lanes=2)

    return stream


def language_model(kind: str, **changes: Any) -> Case:
    def build() -> nn.Module:
        from tbptt.integrations.transformers import recurrent

        return recurrent(zoo.transformer(kind, vocab_size=PERIOD, **changes))

    return Case("transformers", build, words, nn.CrossEntropyLoss(), 3e-3)


def signal_model(name: str, width: int, hidden: int) -> Case:
    entry = next(each for each in zoo_libraries.LIBRARIES if each.name == name)

    def build() -> nn.Module:
        return Readout(entry.adapt(entry.build()), hidden)

    return Case(entry.needs, build, waves(width), nn.MSELoss(), 1e-2)


CASES = {
    "Mamba2": language_model("Mamba2"),
    "Qwen3Next linear": language_model("Qwen3Next", layer_types=["linear_attention"] * 2),
    "Qwen3Next full": language_model("Qwen3Next"),
    "xLSTM": replace(language_model("xLSTM"), k1=16),  # it takes multiples of its chunks only
    "snnTorch": signal_model("snnTorch", 3, 2),
    "torchrecurrent": signal_model("LEM", 3, 6),
    "titans": signal_model("titans NeuralMemory", 8, 8),
}

OVERLAPPING = ["Mamba2", "Qwen3Next linear", "titans"]


def trainer(case: Case, directory: Path, windows: int = 1, *, checked: bool = False) -> tbptt.Trainer:
    """Return a trainer whose look-back is so many windows."""
    model = case.model()
    return tbptt.Trainer(
        model,
        case.loss,
        torch.optim.Adam(model.parameters(), lr=case.rate),
        tbptt.TBPTT(k1=case.k1, k2=windows * case.k1),
        case.stream(),
        guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)],
        directory=directory,
        saving=tbptt.Saving(every=5, log_every=1),
        checked=checked,
    )


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "update"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "windows"), [*((name, 1) for name in CASES), *((name, 2) for name in OVERLAPPING)])
def test_a_run_in_two_pieces_learns_as_one_does(tmp_path: Path, name: str, windows: int) -> None:
    case = CASES[name]
    pytest.importorskip(case.needs)
    checked = windows == (2 if name in OVERLAPPING else 1)  # once for each model: it takes most of the time
    trainer(case, tmp_path / "one", windows).run(updates=UPDATES)
    trainer(case, tmp_path / "two", windows, checked=checked).run(updates=STOP)
    torch.manual_seed(1)  # whatever was drawn meanwhile must not matter
    summary = trainer(case, tmp_path / "two", windows).run(updates=UPDATES)
    assert summary.updates == UPDATES

    found = losses(tmp_path / "one")
    assert len(found) == UPDATES
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_comparison_sees_a_state_that_is_lost(tmp_path: Path) -> None:
    """The negative control: resumed with weights and optimizer, but without the state."""
    pytest.importorskip("torchrecurrent")
    case = CASES["torchrecurrent"]
    trainer(case, tmp_path / "one").run(updates=UPDATES)
    trainer(case, tmp_path / "two").run(updates=STOP)
    forgetful = trainer(case, tmp_path / "two")
    forgetful.carry.load_state_dict = lambda state: None
    forgetful.run(updates=UPDATES)
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() != (tmp_path / "two" / "metrics.jsonl").read_bytes()


MEMORY = """
import sys
from pathlib import Path

sys.path.insert(0, {here!r})
import test_training
import torch

import tbptt

torch.set_num_threads(1)
case = test_training.CASES["Qwen3Next linear"]
loss = tbptt.loss.StepLoss.of(case.loss)
model, stream = case.model(), case.stream()
model.in_place = "protect"
estimator, optimizer = tbptt.TBPTT(k1=16, k2=32), torch.optim.Adam(model.parameters())
carry = estimator.init(model, stream.lanes)
for number, window in zip(range(1, 351), stream.windows(16)):
    estimate, carry = estimator.estimate(model, loss, carry, window)
    estimate.apply(model)
    optimizer.step()
    if number in (50, 350):
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory counters of Linux")
def test_memory_stays_flat_under_protection(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = MEMORY.format(here=str(Path(__file__).parent))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    early, late = map(int, ran.stdout.split())
    assert late < 1.01 * early, f"{early} kB after 50 windows, {late} kB after 350"
