"""`tbptt evaluate` and `tbptt sample`: the model that was trained, on what it was not trained on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Program = Callable[..., Any]
TINY = [*("--lanes", "2"), *("--hidden", "6"), *("--k1", "8"), *("--k2", "8"), *("--threads", "1")]


def measured(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in out.splitlines())}


def last_validation(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_held_out_part_has_the_metrics_of_the_last_validation(train: Program, program: Program) -> None:
    run = train().run
    ended = program("evaluate", run)
    expected = last_validation(run)
    assert ended.code == 0
    assert measured(ended.out) == pytest.approx(
        {k: v for k, v in expected.items() if k not in ("kind", "update")}, rel=1e-5
    )
    assert "update 6 of runs/fox-1 on the held-out part" in ended.err
    as_json = json.loads(program("evaluate", run, "--json").out)
    assert as_json["update"] == 6
    assert as_json["loss"] == expected["loss"]


def test_other_text_is_read_with_the_vocabulary_of_the_run(train: Program, program: Program) -> None:
    run = train().run
    Path("other.txt").write_text("quick fox " * 20, encoding="utf-8")
    ended = program("evaluate", run, "other.txt", "--lanes", "1")
    assert ended.code == 0
    assert measured(ended.out)["targets"] == 199
    assert measured(ended.out)["bits_per_character"] == pytest.approx(
        measured(ended.out)["loss"] / math.log(2), rel=1e-4
    )
    Path("other.txt").write_text("quick fox\nsly dog", encoding="utf-8")
    ended = program("evaluate", run, "other.txt")
    assert ended.code == 1
    assert "'s'" in ended.err
    assert "line 2, column 1" in ended.err


def test_other_arrays_are_standardised_as_the_run_was(program: Program) -> None:
    wave = np.sin(np.arange(400) / 5.0)
    np.save("wave.npy", wave)
    run = program("train", "wave.npy", *TINY, "--passes", "15", "--lr", "0.02").run
    good = measured(program("evaluate", run, "wave.npy").out)["loss"]
    np.save("shifted.npy", wave + 100)
    assert good < 0.2
    assert measured(program("evaluate", run, "shifted.npy").out)["loss"] > 100
    np.save("wide.npy", np.ones((50, 2)))
    ended = program("evaluate", run, "wide.npy")
    assert "inputs of 1 columns were expected" in ended.err
    ended = program("evaluate", run, "ecg")
    assert ended.code == 2
    assert "ecg came" in ended.err


def test_nothing_held_out_is_nothing_to_measure(train: Program, program: Program) -> None:
    run = train("--set", "data.held_out=0").run
    ended = program("evaluate", run)
    assert ended.code == 2
    assert f"hint: tbptt evaluate {run} DATA" in ended.err


@pytest.mark.parametrize("source", ["ecg", "copy"])
def test_data_without_a_file(program: Program, source: str) -> None:
    run = program("train", source, *TINY, "--updates", "3").run
    held_out, everything = (measured(program("evaluate", run, *data).out) for data in ((), (source,)))
    assert held_out["targets"] == (3588 if source == "ecg" else 20_000)
    assert everything["targets"] == (17_988 if source == "ecg" else 20_000)
    ended = program("sample", run)
    assert ended.code == 2
    assert "a run that learned text was expected" in ended.err


def test_text_is_written_and_depends_on_seed_prompt_and_temperature(train: Program, program: Program) -> None:
    run = train("--updates", "60", "--lr", "0.02").run

    def written(*arguments: str) -> str:
        ended = program("sample", run, "--length", "60", *arguments)
        assert ended.code == 0, ended.err
        return ended.out

    first = written()
    assert len(first) == 60
    assert set(first) <= set("the quick brown fox\n")
    assert written() == first
    assert written("--seed", "1") != first
    prompted = written("--prompt", "the quick")
    assert prompted.startswith("the quick")
    assert len(prompted) == 69
    assert written("--temperature", "0") == written("--temperature", "0", "--seed", "1")
    assert len(set(written("--temperature", "50"))) > len(set(written("--temperature", "0.01")))


def test_a_model_that_knows_its_text_writes_it(program: Program) -> None:
    """The state is carried: the next letter of a cycle in which each letter comes twice needs the one before it."""
    cycle = "abacadcb"
    Path("cycle.txt").write_text(cycle * 200, encoding="utf-8")
    arguments = [*TINY, "--hidden", "24", "--updates", "250", "--lr", "0.02"]
    run = program("train", "cycle.txt", *arguments).run
    assert last_validation(run)["bits_per_character"] < 0.1
    ended = program("sample", run, "--length", "40", "--temperature", "0", "--prompt", cycle * 2)
    assert ended.out == cycle * 7


def test_bytes_are_written_as_they_are(train: Program, program: Program) -> None:
    run = train("--set", "data.unit=bytes", "--updates", "40", "--lr", "0.05").run
    command = [
        sys.executable,
        "-m",
        "tbptt",
        "sample",
        str(run),
        "--length",
        "50",
        "--prompt",
        "ü",
        "--temperature",
        "2",
    ]
    ended = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(ended.stdout) == 52
    assert ended.stdout.startswith("ü".encode())


def test_prompts_and_settings_that_cannot_be_meant(train: Program, program: Program) -> None:
    run = train().run
    ended = program("sample", run, "--prompt", "sly")
    assert ended.code == 1
    assert "'l', 's', 'y' came" in ended.err
    assert ended.out == ""
    for arguments in (("--length", "0"), ("--temperature", "-1"), ("--length", "2.5")):
        assert program("sample", run, *arguments).code == 2


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(train: Program) -> None:
    run = train("--set", "run.save_every=3").run
    path = run / "checkpoints/update-0000000006/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    command = [sys.executable, "-m", "tbptt", "evaluate", str(run), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["update"] == 3
    assert ended.stderr.startswith("warning: checkpoint update-0000000006 is damaged")
