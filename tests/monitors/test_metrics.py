"""The metrics file repeats byte for byte, whenever the run is killed; the timing file does not pretend to."""

from __future__ import annotations

import errno
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError
from tbptt.estimators.base import Estimate
from tbptt.monitors.base import Plan, Update, Validation
from tbptt.monitors.metrics import MetricsFile
from tbptt.monitors.timing import TimingFile


def update_at(number: int, **changes: Any) -> Update:
    """Make an update that depends on nothing but its number."""
    rng = random.Random(number)
    loss_sum = torch.tensor(rng.gauss(3, 1))
    gradients = {"w": torch.tensor([rng.gauss(0, 1), rng.gauss(0, 1)])}
    terms = changes.pop("terms", rng.randrange(1, 50))
    injected = changes.pop("injected", terms)
    loss = loss_sum / terms if terms else torch.tensor(math.nan)
    metrics = changes.pop("metrics", {})
    loss_sum = changes.pop("loss_sum", loss_sum)
    estimate = Estimate(None, loss, loss_sum, terms, gradients, 8, torch.zeros(0), injected, metrics)
    facts: dict[str, Any] = {"passes": number // 7, "position": number * 8 % 56, "steps": 8, "lanes": 4}
    return Update(number, **facts, estimate=estimate, applied=changes.pop("applied", True), learning_rate=0.1 / number)


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def drive(monitor: MetricsFile, first: int, last: int) -> None:
    for number in range(first, last + 1):
        refused = number % 9 == 0
        monitor.update(update_at(number, applied=not refused))
        if number % 10 == 0:
            monitor.validation(Validation(number, {"loss": 1.0 / number, "auc": 0.5}))


def test_a_line_says_what_the_interval_was(tmp_path: Path) -> None:
    monitor = MetricsFile(tmp_path / "run" / "metrics.jsonl", every=3)
    monitor.begin(Plan(0, 6, 4))
    updates = [update_at(1), update_at(2, applied=False), update_at(3, metrics={"gradient_norm": 12.5})]
    for update in updates:
        monitor.update(update)
    monitor.end()
    (line,) = lines_of(monitor.path)
    total = sum(update.estimate.loss_sum.item() for update in updates)
    terms = sum(update.estimate.num_terms for update in updates)
    assert line == {
        "kind": "update",
        "update": 3,
        "passes": 0,
        "position": 24,
        "steps": 8,
        "loss": total / terms,  # not the mean of the updates' losses
        "terms": terms,
        "gradient_norm": 12.5,
        "lookback": 8,
        "learning_rate": 0.1 / 3,
        "refused": 1,
    }


def test_without_a_guard_the_gradient_norm_is_measured(tmp_path: Path) -> None:
    monitor = MetricsFile(tmp_path / "m.jsonl")
    monitor.begin(Plan(0, None, 4))
    monitor.update(update_at(5))
    monitor.end()
    expected = update_at(5).estimate.gradients["w"].norm().item()
    assert lines_of(monitor.path)[0]["gradient_norm"] == pytest.approx(expected, rel=1e-6)


def test_what_is_no_number_is_said_and_not_hidden(tmp_path: Path) -> None:
    monitor = MetricsFile(tmp_path / "m.jsonl")
    monitor.begin(Plan(0, None, 4))
    monitor.update(update_at(1, loss_sum=torch.tensor(math.nan), applied=False))
    monitor.update(update_at(2, loss_sum=torch.tensor(-math.inf), metrics={"gradient_norm": math.inf}))
    monitor.update(update_at(3, terms=0, loss_sum=torch.tensor(0.0), applied=False))
    monitor.update(update_at(4, metrics={"gradient_norm": 1e300}))
    monitor.validation(Validation(4, {"loss": math.nan, "update": 3.0}))
    monitor.end()
    first, second, third, fourth, validation = lines_of(monitor.path)
    assert (first["loss"], first["refused"]) == ("nan", 1)
    assert (second["loss"], second["gradient_norm"]) == ("-inf", "inf")
    # There was nothing to learn from: that is neither zero, nor NaN, nor a refusal.
    assert (third["loss"], third["terms"], third["gradient_norm"], third["refused"]) == (None, 0, None, 0)
    assert fourth["gradient_norm"] == 1e300
    assert validation == {"kind": "validation", "update": 4, "loss": "nan", "update_": 3.0}


@pytest.mark.parametrize("every", [1, 7, 150])
@pytest.mark.parametrize("load_first", [True, False], ids=["load-begin", "begin-load"])
def test_killed_and_resumed_it_equals_the_undisturbed_file(tmp_path: Path, every: int, load_first: bool) -> None:
    whole = MetricsFile(tmp_path / "whole.jsonl", every)
    whole.begin(Plan(0, 400, 4))
    drive(whole, 1, 400)
    whole.end()
    for seed in range(6):
        rng = random.Random(seed)
        path = tmp_path / f"killed-{seed}.jsonl"
        path.write_bytes(b"an older run's\n")
        number, state = 0, None
        while number < 400:
            monitor = MetricsFile(path, every)
            if state is not None and load_first:
                monitor.load_state_dict(state)
            monitor.begin(Plan(number, 400, 4))
            if state is not None and not load_first:
                monitor.load_state_dict(state)
            checkpoint = min(number + rng.randrange(1, 150), 400)
            drive(monitor, number + 1, checkpoint)
            state = json.loads(json.dumps(monitor.state_dict()))
            number = checkpoint
            if number < 400:  # work that is lost, in whatever way the process ends
                drive(monitor, number + 1, number + rng.randrange(40))
                if rng.random() < 0.5:
                    assert monitor._lines._file is not None
                    monitor._lines._file.close()  # as a kill does: nothing more is written
                    continue
            monitor.end()
        assert path.read_bytes() == whole.path.read_bytes()


def test_the_clock_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents: list[bytes] = []
    for speed in (0.001, 10.0):
        now = [0.0]

        def tick(now: list[float] = now, speed: float = speed) -> float:
            now[0] += speed
            return now[0]

        monkeypatch.setattr(time, "monotonic", tick)
        monitor = MetricsFile(tmp_path / f"{speed}.jsonl", every=2)
        monitor.begin(Plan(0, 30, 4))
        drive(monitor, 1, 30)
        monitor.end()
        contents.append(monitor.path.read_bytes())
    assert contents[0] == contents[1]


def test_running_on_in_one_process_joins_the_interval(tmp_path: Path) -> None:
    whole = MetricsFile(tmp_path / "whole.jsonl", every=4)
    whole.begin(Plan(0, 20, 4))
    drive(whole, 1, 20)
    whole.end()
    twice = MetricsFile(tmp_path / "twice.jsonl", every=4)
    twice.begin(Plan(0, 10, 4))
    drive(twice, 1, 10)
    twice.end()
    assert lines_of(twice.path)[-1]["update"] == 10  # what was left has been written
    assert twice.state_dict()["updates"] == 2
    twice.begin(Plan(10, 20, 4))
    drive(twice, 11, 20)
    twice.end()
    twice.end()
    assert twice.path.read_bytes() == whole.path.read_bytes()


def test_a_run_that_was_over_and_is_resumed_for_nothing_keeps_its_shorter_line(tmp_path: Path) -> None:
    monitor = MetricsFile(tmp_path / "m.jsonl", every=4)
    monitor.begin(Plan(0, 10, 4))
    drive(monitor, 1, 10)
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.end()
    content = monitor.path.read_bytes()
    resumed = MetricsFile(monitor.path, every=4)
    resumed.load_state_dict(state)
    resumed.begin(Plan(10, 10, 4))
    resumed.end()
    assert lines_of(monitor.path)[-1]["update"] == 10
    assert monitor.path.read_bytes() == content


def test_a_fresh_start_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("old\n" * 100)
    monitor = MetricsFile(path)
    monitor.begin(Plan(0, None, 4))
    assert monitor.state_dict()["offset"] == 0
    drive(monitor, 1, 2)
    monitor.end()
    assert len(lines_of(path)) == 2


def test_state_dict_makes_the_lines_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    monitor = MetricsFile(tmp_path / "m.jsonl")
    monitor.begin(Plan(0, None, 4))
    drive(monitor, 1, 5)
    offset = monitor.state_dict()["offset"]
    assert len(synced) == 1
    assert monitor.path.stat().st_size == offset > 0
    monitor.end()


def test_a_file_that_was_cut_meanwhile_is_told_of(tmp_path: Path) -> None:
    monitor = MetricsFile(tmp_path / "m.jsonl")
    monitor.begin(Plan(0, None, 4))
    drive(monitor, 1, 5)
    state = monitor.state_dict()
    monitor.end()
    monitor.path.write_text('{"kind": "update"}\n')
    resumed = MetricsFile(monitor.path)
    resumed.load_state_dict(state)
    with pytest.warns(CheckpointWarning, match="lost"):
        resumed.begin(Plan(5, None, 4))
    drive(resumed, 6, 6)
    resumed.end()
    assert b"\0" not in monitor.path.read_bytes()
    assert len(lines_of(monitor.path)) == 2


class FullDisk:
    """A file that takes nothing until there is room, and then a few bytes at a time."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.is_full = True

    def write(self, data: bytes) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(bytes(data[:13]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_stops_no_training_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbptt.monitors.lines._FLUSH_S", 0.0)
    monitor = MetricsFile(tmp_path / "m.jsonl")
    monitor.begin(Plan(0, None, 4))
    disk = FullDisk(monitor._lines._file)
    monitor._lines._file = disk
    with pytest.warns(CheckpointWarning, match="No space left") as caught:
        drive(monitor, 1, 9)
    assert len(caught) == 1  # loud, but once
    with pytest.raises(CheckpointError, match="No space left"):
        monitor.state_dict()
    disk.is_full = False
    assert monitor.state_dict()["offset"] == monitor.path.stat().st_size
    drive(monitor, 10, 12)
    monitor.end()
    assert [line["update"] for line in lines_of(monitor.path) if line["kind"] == "update"] == list(range(1, 13))


def test_an_update_before_begin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begin"):
        MetricsFile(tmp_path / "m.jsonl").update(update_at(1))


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_checked(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        MetricsFile(tmp_path / "m.jsonl", every)


def test_timing_counts_steps_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor = TimingFile(tmp_path / "run" / "timing.jsonl", every_s=10)
    monitor.begin(Plan(0, None, 4))
    for number in range(1, 11):
        now[0] += 2.5
        monitor.update(update_at(number))
    monitor.end()
    monitor.end()
    lines = lines_of(monitor.path)
    assert [line["update"] for line in lines] == [4, 8, 10]
    assert [line["elapsed_s"] for line in lines] == [10.0, 20.0, 25.0]
    assert [line["steps_per_s"] for line in lines] == [3.2, 3.2, 3.2]
    assert [line["lane_steps_per_s"] for line in lines] == [12.8, 12.8, 12.8]
    assert all(line["peak_rss_bytes"] > 10_000_000 for line in lines)
    assert all(line["peak_device_bytes"] is None for line in lines)  # the losses are on the CPU


@pytest.mark.gpu
def test_timing_counts_the_devices_memory(tmp_path: Path) -> None:
    monitor = TimingFile(tmp_path / "timing.jsonl", every_s=0)
    monitor.begin(Plan(0, None, 4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    del block
    monitor.update(update_at(1, loss_sum=torch.tensor(1.0, device="cuda")))
    (line,) = lines_of(monitor.path)
    assert before + (64 << 20) <= line["peak_device_bytes"] <= before + (68 << 20)


def test_timing_is_appended_to_and_holds_no_state(tmp_path: Path) -> None:
    for begin in (0, 1):
        monitor = TimingFile(tmp_path / "timing.jsonl", every_s=0)
        monitor.begin(Plan(begin, None, 4))
        monitor.update(update_at(begin + 1))
        monitor.end()
        assert monitor.state_dict() == {}
    assert [line["update"] for line in lines_of(tmp_path / "timing.jsonl")] == [1, 2]


def test_timing_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "timing.jsonl").mkdir()
    monitor = TimingFile(tmp_path / "timing.jsonl", every_s=0)
    monitor.begin(Plan(0, None, 4))
    with pytest.warns(CheckpointWarning, match="training goes on"):
        monitor.update(update_at(1))


@pytest.mark.parametrize("every_s", [-1, math.nan, math.inf, True, "1"])
def test_every_s_is_checked(tmp_path: Path, every_s: Any) -> None:
    with pytest.raises(ConfigError, match="every_s"):
        TimingFile(tmp_path / "t.jsonl", every_s)
