"""kill -9 at random moments, resumed each time: the end is that of a run that was never disturbed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 25
UPDATES = 16_000


def start(*words: str, cwd: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tbptt", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def result(run: Path) -> tuple[bytes, bytes]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return (run / "metrics.jsonl").read_bytes(), (newest / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_25_kills_change_nothing(tmp_path: Path) -> None:
    settings = [
        "--updates",
        str(UPDATES),
        "--k2",
        "12",
        "--set",
        "run.save_every=50",
        "--set",
        "run.validate_every=997",
    ]
    assert start("train", *settings, "--out", "calm", cwd=tmp_path).wait() == 0
    chance = random.Random(0)
    kills, finished = 0, False
    process = start("train", *settings, "--out", "killed", cwd=tmp_path)
    wrote = tmp_path / "killed" / "metrics.jsonl"
    while kills < KILLS:
        before = wrote.stat().st_mtime_ns if wrote.exists() else 0
        while process.poll() is None and (not wrote.exists() or wrote.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until it trains: a kill while Python starts proves little
        time.sleep(chance.uniform(0.0, 1.0))
        finished = process.poll() is not None
        if finished:
            break
        process.kill()
        process.wait()
        kills += 1
        process = start("resume", "killed", cwd=tmp_path)
    assert process.wait() == 0
    assert not finished, f"the run was over after {kills} kills: make it longer"
    assert result(tmp_path / "killed") == result(tmp_path / "calm")
