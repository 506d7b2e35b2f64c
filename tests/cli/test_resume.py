"""`tbptt resume`: a run that was stopped, however, and one that never was are the same, bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., Any]
TINY = [*("--lanes", "2"), *("--hidden", "6"), *("--k1", "8"), *("--k2", "8"), *("--threads", "1")]
LONG = [*TINY, "--updates", "200", "--set", "run.save_every=20", "--set", "run.validate_every=45"]
# dropout, a schedule, windows that overlap and a held-out stream: everything that has a state
LONG += ["--replay", "retain", "--k2", "12", "--set", "model.dropout=0.1", "--set", "schedule.name=cosine"]


def weights(run: Path, update: int) -> bytes:
    return (run / f"checkpoints/update-{update:010d}/model.safetensors").read_bytes()


def stop_amid(text: Path, number: int, out: str = "run") -> subprocess.CompletedProcess[str]:
    """Start the long run in a process of its own, and send it a signal after its first checkpoints."""
    command = [sys.executable, "-m", "tbptt", "train", str(text), *LONG, "--out", out]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline_s = time.monotonic() + 60
    while not Path(out, "checkpoints", "update-0000000040").is_dir() and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_a_run_stopped_three_ways_equals_one_that_never_was(program: Program, text: Path) -> None:
    undisturbed = program("train", text, *LONG).run
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        name = signal.Signals(number).name
        ended = stop_amid(text, number, out=name)
        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr
        if code > 0:
            assert f"stopped by {name} after update" in ended.stderr
            assert f"checkpoint written\nhint: tbptt resume {name}\n" in ended.stderr
            assert ended.stdout == f"{name}\n"
        resumed = program("resume", name)
        assert resumed.code == 0
        assert "goes on after update" in resumed.err
        assert (undisturbed / "metrics.jsonl").read_bytes() == Path(name, "metrics.jsonl").read_bytes()
        assert weights(undisturbed, 200) == weights(Path(name), 200)


def test_more_updates_are_made_and_recorded(train: Program, program: Program) -> None:
    run = train().run
    longer = program("resume", run, "--updates", "10")
    assert longer.code == 0, longer.err
    assert tomllib.loads((run / "config.toml").read_text())["run"]["updates"] == 10
    assert "fox-1: goes on after update 6 of 10" in longer.err
    never_stopped = train("--updates", "10").run
    assert weights(run, 10) == weights(never_stopped, 10)
    assert program("resume", run, "--passes", "1", "--schedule-updates", "169").code == 0
    settings = tomllib.loads((run / "config.toml").read_text())["run"]
    assert settings["passes"] == 1
    assert "updates" not in settings


def test_a_finished_run_has_nothing_left_to_do(train: Program, program: Program) -> None:
    run = train().run
    before = (run / "metrics.jsonl").read_bytes()
    ended = program("resume", run)
    assert ended.code == 0
    assert "nothing is left to do\nhint: tbptt resume runs/fox-1 --updates 12\n" in ended.err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_does_not_stretch_the_schedule(train: Program, program: Program) -> None:
    run = train("--set", "schedule.name=cosine", "--set", "schedule.warmup=0", "--set", "schedule.final=0.5").run
    ended = program("resume", run, "--updates", "9")
    assert "the learning-rate schedule ends at update 6; after that the rate stays 0.002" in ended.err
    assert rates(run)[6:] == [0.002] * 3


def rates(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["learning_rate"] for row in rows if row["kind"] == "update"]


def test_a_schedule_that_has_fallen_to_zero_is_refused_and_can_be_made_longer(train: Program, program: Program) -> None:
    begun = train("--set", "schedule.warmup=0", "--set", "run.log_every=1")  # a text has a cosine
    run, proposed = begun.run, "tbptt resume runs/fox-1 --updates 12 --schedule-updates 12"
    assert f"          {proposed}\n" in begun.err
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    refused = program("resume", run, "--updates", "9")
    assert refused.code == 2
    assert "but it ends at update 6, with schedule.final = 0" in refused.err
    assert "hint: tbptt resume RUN --updates 9 --schedule-updates 9" in refused.err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert f"hint: {proposed}\n" in program("resume", run).err
    assert program(*proposed.split()[1:]).code == 0

    def cosine(update: int, length: int) -> float:
        return 0.004 * 0.5 * (1 + math.cos(math.pi * update / length))

    expected = [cosine(update, 6) for update in range(6)] + [cosine(update, 12) for update in range(6, 12)]
    assert rates(run) == pytest.approx(expected, rel=1e-12)
    assert program("resume", run).code == 0  # config.toml holds it
    assert program("resume", run, "--updates", "13").code == 2


def test_a_schedule_too_short_is_refused_when_a_run_starts(train: Program, program: Program) -> None:
    refused = train("--set", "schedule.warmup=0", "--set", "schedule.updates=4")
    assert refused.code == 2
    assert "hint: --set schedule.updates=6; or --set schedule.final=0.1" in refused.err
    assert not Path("runs").exists()
    assert train("--set", "schedule.warmup=5", "--set", "schedule.updates=4").code == 0  # still rising at the end
    constant = train("--set", "schedule.name=constant").run
    assert program("resume", constant, "--updates", "8", "--schedule-updates", "8").code == 2


def test_a_run_without_a_checkpoint_starts_from_the_beginning(train: Program, program: Program) -> None:
    run, other = train().run, train().run
    for path in sorted((other / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for command in ("evaluate", "sample"):
        ended = program(command, other)
        assert ended.code == 1
        assert "there is none yet" in ended.err
        assert f"hint: tbptt resume {other}\n" in ended.err
    ended = program("resume", other)
    assert ended.code == 0
    assert "starts from the beginning, with the same seed" in ended.err
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert weights(run, 6) == weights(other, 6)


def test_a_text_that_has_changed_is_refused(train: Program, program: Program, text: Path) -> None:
    run = train().run
    content = text.read_text(encoding="utf-8")
    text.write_text(content[:-1] + "q", encoding="utf-8")
    for command in (("resume", run, "--updates", "9"), ("evaluate", run)):
        ended = program(*command)
        assert ended.code == 1
        assert "has changed (3000 bytes" in ended.err
        assert "hint: restore the file" in ended.err
    assert tomllib.loads((run / "config.toml").read_text())["run"]["updates"] == 6
    assert program("sample", run, "--length", "3").code == 0
    text.write_text(content, encoding="utf-8")
    assert program("resume", run, "--updates", "9").code == 0
    text.unlink()
    assert f"{text} is not there" in program("resume", run).err


def test_the_embedded_text_has_no_path_to_lose(program: Program) -> None:
    run = program("train", "shakespeare", *TINY, "--lanes", "2000", "--updates", "2", "--set", "data.held_out=0").run
    assert program("resume", run, "--updates", "3").code == 0


def test_a_run_can_be_moved(train: Program, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train().run
    Path("elsewhere").mkdir()
    run.rename("elsewhere/moved")
    monkeypatch.chdir("elsewhere")
    assert program("resume", "moved", "--updates", "8").code == 0


def test_what_cannot_change_any_more_is_refused(train: Program, program: Program) -> None:
    run = train().run
    path = run / "config.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("lr = 0.004", "lr = 0.01"), encoding="utf-8")
    ended = program("resume", run)
    assert ended.code == 2
    assert "optimizer.lr in runs/fox-1/config.toml was expected to be 0.004" in ended.err
    path.write_text(text.replace("keep = 3", "keep = 1"), encoding="utf-8")
    assert program("resume", run, "--updates", "8").code == 0
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_weights_of_another_model_are_refused(train: Program, program: Program) -> None:
    run, other = train().run, train("--hidden", "7").run
    (run / "checkpoints").rename("aside")
    (other / "checkpoints").rename(run / "checkpoints")
    ended = program("resume", run)
    assert ended.code == 1
    assert "belongs to another run: its weights" in ended.err


@pytest.mark.parametrize(
    "settings",
    [
        ("name=Telescope", "lengths=[4, 8]", "k1=4"),
        ("name=ARTBP", "mean_length=4", 'alpha="constant"'),
        ("name=TBPTT", "k1=4", "k2=8", 'boundary="ClipBoundary(0.5)"'),
    ],
)
def test_estimators_with_lists_and_words_are_resumed(program: Program, text: Path, settings: tuple[str, ...]) -> None:
    given = [part for each in (*(f"estimator.{s}" for s in settings), "guards.clip_norm=0") for part in ("--set", each)]
    started = program("train", text, "--lanes", "2", "--hidden", "6", "--threads", "1", "--updates", "3", *given)
    assert started.code == 0, started.err
    resumed = program("resume", started.out.strip(), "--updates", "5")
    assert resumed.code == 0, resumed.err
    assert "5 updates" in resumed.err
