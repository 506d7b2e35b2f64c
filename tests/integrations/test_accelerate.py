"""The example with Accelerate: it learns, and a stop in mid-stream changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("accelerate_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_learns() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 < 0.3 < losses[0]


@pytest.mark.parametrize("stop", [1, 13, 25, 30])  # a pass has 25 windows
def test_a_run_in_pieces_is_a_run_in_one(example: ModuleType, tmp_path: Path, stop: int) -> None:
    whole = example.Run(steps=200)
    expected = whole.train(60)
    first = example.Run(steps=200)
    assert first.train(stop) == expected[:stop]
    first.accelerator.save_state(str(tmp_path))
    rest = example.Run(steps=200)
    rest.accelerator.load_state(str(tmp_path))
    assert rest.train(60 - stop) == expected[stop:]
    pairs = zip(whole.bare.parameters(), rest.bare.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("lost", ["carry", "stream"])
def test_without_its_place_the_losses_are_others(example: ModuleType, tmp_path: Path, lost: str) -> None:
    first = example.Run(steps=200)
    first.train(13)
    first.accelerator.save_state(str(tmp_path))
    expected = first.train(10)
    rest = example.Run(steps=200)
    fresh = {"carry": rest.place.carry.state_dict(), "stream": rest.stream.state_dict()}
    rest.accelerator.load_state(str(tmp_path))
    (rest.place.carry if lost == "carry" else rest.stream).load_state_dict(fresh[lost])
    assert rest.train(10) != expected


@pytest.mark.slow
def test_two_processes_learn_together() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("updates")]
    assert len(losses) == 4
    assert losses[-1] < 0.05 < 0.3 < losses[0]
