"""The display tells the truth, is legible anywhere, and always gives the terminal back."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate
from tbptt.monitors.base import Plan, Update, Validation
from tbptt.monitors.progress import Progress, _duration, _quantity

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def update_at(number: int, loss: float = 2.0, terms: int = 10, **changes: Any) -> Update:
    estimate = Estimate(
        None,
        torch.tensor(loss),
        torch.tensor(loss * terms),
        terms,
        {"w": torch.tensor([3.0, 4.0])},
        64,
        torch.zeros(0),
        changes.get("injected", terms),
    )
    return Update(number, 0, 0, 100, 32, estimate, changes.get("applied", True), 0.1)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


class Stderr:
    """All that has been written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.text = ""

    def getvalue(self) -> str:
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Stderr:
    return Stderr(capsys)


def terminal(width: int = 200, **options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, **options), file


def test_plain_lines_where_there_is_no_terminal(now: list[float], stderr: Stderr) -> None:
    progress = Progress()
    progress.begin(Plan(0, 100, 32))
    for number in range(1, 24):
        now[0] += 0.5
        progress.update(update_at(number, loss=float(number)))
    progress.validation(Validation(23, {"auc": 0.9812345, "loss": 0.5}))
    progress.message("checkpoint written")
    progress.end()
    lines = stderr.getvalue().splitlines()
    assert "\x1b" not in stderr.getvalue()
    assert lines[0] == (
        # 100 steps of 32 lanes in half a second
        "update 10/100  loss 5.5000  6.4k tokens/s  gradient norm 5  look-back 64  0:45 left"
    )
    assert lines[1].startswith("update 20/100  loss 15.5000")  # since the last line, not since the start
    assert lines[2] == "validation after update 23: auc 0.98123  loss 0.5"
    assert lines[3] == "checkpoint written"
    assert lines[4].startswith("update 23/100  loss 22.0000")  # the end is always told
    assert len(lines) == 5


def test_the_loss_is_sum_over_count(now: list[float], stderr: Stderr) -> None:
    progress = Progress(every_s=5)
    progress.begin(Plan(0, None, 32))
    progress.update(update_at(1, loss=1.0, terms=30))
    progress.update(update_at(2, loss=5.0, terms=10))
    now[0] += 61
    progress.update(update_at(3, loss=0.0, terms=0, injected=0, applied=False))
    progress.end()
    line = stderr.getvalue()
    assert "loss 2.0000" in line
    assert "no gradient" in line
    assert "1:01 gone" in line  # no end is known
    assert "refused" not in line


def test_refused_updates_and_nan_are_shown(now: list[float], stderr: Stderr) -> None:
    progress = Progress(every_s=0)
    progress.begin(Plan(4, 10, 32))
    progress.update(update_at(5, loss=math.nan, applied=False))
    assert "loss nan" in stderr.getvalue()
    assert "1 refused" in stderr.getvalue()
    progress.end()
    assert stderr.getvalue().count("\n") == 1  # nothing new at the end: nothing said


def test_on_a_terminal_it_draws_in_place_and_gives_the_cursor_back(now: list[float]) -> None:
    console, file = terminal()
    progress = Progress(console)
    progress.begin(Plan(0, 8, 32))
    for number in range(1, 9):
        now[0] += 0.3
        progress.update(update_at(number))
    progress.validation(Validation(8, {"auc": 0.98}))
    now[0] += 0.3
    progress.message("a [bold]literal[/bold] message")
    progress.update(update_at(8))
    progress.end()
    text = file.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.rindex(SHOW) > text.rindex("update 8/8")
    assert "a [bold]literal[/bold] message" in text
    assert "validation  auc 0.98" in text
    for fact in ("update 3/8", "loss 2.0000", "tokens/s", "gradient norm 5", "look-back 64", "left", "━"):
        assert fact in text


def test_it_redraws_at_most_four_times_a_second(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    console, _ = terminal()
    progress = Progress(console, every_s=0)
    progress.begin(Plan(0, None, 32))
    drawn: list[float] = []
    monkeypatch.setattr(progress._display, "draw", lambda *_: drawn.append(now[0]))
    for number in range(1, 1001):
        now[0] += 0.001
        progress.update(update_at(number))
    progress.end()
    assert 3 <= len(drawn) <= 5


def test_no_color_is_respected(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    for no_color in (False, True):
        monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
        console, file = terminal(color_system="truecolor")
        progress = Progress(console)
        progress.begin(Plan(0, 8, 32))
        now[0] += 1
        progress.update(update_at(4))
        progress.end()
        texts.append(file.getvalue())
    color = re.compile(r"\x1b\[[0-9;]*(?:[39][0-7]|38;)")
    assert color.search(texts[0])
    assert not color.search(texts[1])
    assert "update 4/8" in texts[1]


@pytest.mark.parametrize("width", [1, 20, 40])
def test_a_narrow_terminal_is_no_problem(now: list[float], width: int) -> None:
    console, file = terminal(width)
    progress = Progress(console)
    progress.begin(Plan(0, 8, 32))
    now[0] += 1
    progress.update(update_at(4))
    progress.end()
    assert file.getvalue().count(SHOW) == 1


def test_the_terminal_comes_back_when_drawing_fails(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = terminal()
    progress = Progress(console)
    progress.begin(Plan(0, 8, 32))

    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(progress._display, "draw", fail)
    progress.update(update_at(1))
    with pytest.raises(RuntimeError):
        progress.end()
    assert file.getvalue().count(HIDE) == file.getvalue().count(SHOW) == 1
    assert sys.stderr is sys.__stderr__ or "rich" not in type(sys.stderr).__module__
    progress.end()


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("breaks", [lambda file: file.close(), lambda file: setattr(file, "write", Broken().write)])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_goes_away_stops_no_training(
    now: list[float], breaks: Callable[[io.StringIO], None], is_terminal: bool
) -> None:
    file = io.StringIO()
    progress = Progress(Console(file=file, force_terminal=is_terminal), every_s=0)
    progress.begin(Plan(0, 8, 32))
    breaks(file)
    for number in range(1, 4):
        now[0] += 1
        progress.update(update_at(number))
        progress.message("still there?")
    progress.end()


def test_a_message_before_and_after_is_not_lost(stderr: Stderr) -> None:
    progress = Progress()
    progress.message("resumed from update-0000000310")
    progress.begin(Plan(310, None, 1))
    progress.end()
    progress.message("the run is in runs/a")
    assert stderr.getvalue().splitlines() == ["resumed from update-0000000310", "the run is in runs/a"]


def test_stdout_stays_where_it_is_when_it_is_no_terminal(now: list[float]) -> None:
    console, _ = terminal()
    before = sys.stdout
    progress = Progress(console)
    progress.begin(Plan(0, 8, 32))
    assert sys.stdout is before
    progress.end()


def test_beginning_twice_starts_anew(now: list[float], stderr: Stderr) -> None:
    progress = Progress(every_s=0)
    for begin in (0, 5):
        progress.begin(Plan(begin, 10, 32))
        now[0] += 1
        progress.update(update_at(begin + 1, applied=False))
        progress.end()
    assert stderr.getvalue().splitlines()[1].startswith("update 6/10")
    assert "1 refused" in stderr.getvalue().splitlines()[1]


def test_importing_takes_no_rich() -> None:
    code = "import sys, tbptt.monitors; sys.exit('rich' in sys.modules or 'tensorboard' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("every_s", [-1, math.nan, math.inf, True, "1"])
def test_every_s_is_checked(every_s: Any) -> None:
    with pytest.raises(ConfigError, match="every_s"):
        Progress(every_s=every_s)


def test_numbers_are_written_for_people() -> None:
    assert [_quantity(x) for x in (0.5, 999.0, 12_345.0, 3.4e6, 2e9)] == ["0.5", "999", "12.3k", "3.4M", "2G"]
    assert [_duration(x) for x in (0.4, 59.6, 3599.0, 3600.0, math.inf)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "?",
    ]
