"""`--core elstm` and `--core lru`: trained, resumed bit for bit, sampled from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., Any]


def weights(run: Path, update: int) -> bytes:
    return (run / f"checkpoints/update-{update:010d}/model.safetensors").read_bytes()


def updates(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == "update"]


@pytest.mark.parametrize("core", ["elstm", "lru"])
@pytest.mark.parametrize("layers", ["1", "2"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    train: Program, program: Program, core: str, layers: str
) -> None:
    how = ("--core", core, "--layers", layers, "--k2", "12", "--set", "model.dropout=0.1")
    run, never_stopped = train(*how), train(*how, "--updates", "10")
    assert run.code == 0, run.err
    assert core.upper() in run.err
    assert tomllib.loads((run.run / "config.toml").read_text())["model"]["core"] == core
    assert program("resume", run.run, "--updates", "10").code == 0
    assert weights(run.run, 10) == weights(never_stopped.run, 10)
    assert weights(run.run, 10) != weights(run.run, 6)
    assert updates(run.run) == updates(never_stopped.run)
    assert len(program("sample", run.run, "--length", "5").out) >= 5


def test_a_core_that_is_none_is_refused(train: Program) -> None:
    ended = train("--core", "mamba")
    assert ended.code == 2
    assert "--core" in ended.err
    assert "'transformer'" in ended.err
