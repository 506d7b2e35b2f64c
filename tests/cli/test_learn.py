"""`tbptt learn`: what is printed, what is kept, and that a stream stopped and resumed reads like one that never was."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tbptt
from tbptt.checkpoint import Checkpoints

ROWS = 240
SMALL = [*("--target", "y"), *("--hidden", "5"), *("--k1", "3"), *("--k2", "6"), *("--save-every", "50")]


ARTBP = ["--set", "estimator.name=ARTBP", "--set", "estimator.mean_length=4"]


def numbers(rows: int = ROWS) -> list[str]:
    """Rows whose label is a number that the rows before tell."""
    drawn = random.Random(3)
    values = [drawn.gauss(0.0, 1.0) for _ in range(rows + 1)]
    return [f"{values[i + 1]:.4f},{100.0 + 7.0 * values[i]:.4f},{drawn.random():.4f}" for i in range(rows)]


def words(rows: int = ROWS) -> list[str]:
    drawn = random.Random(4)
    values = [drawn.gauss(0.0, 1.0) for _ in range(rows)]
    return [f"{value:.4f},{'up' if value > 0 else 'down'},0" for value in values]


def write(path: Path, lines: list[str], header: str = "a,y,b") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.csv", numbers())


def reference(lines: list[str], k1: int, k2: int) -> list[str]:
    """The predictions, by a loop that shares nothing with the program but `TBPTT` and the model."""
    table = np.array([[float(field) for field in line.split(",")] for line in lines])
    inputs, labels = table[:, [0, 2]], table[:, 1]
    torch.manual_seed(0)
    model = tbptt.SequenceModel(2, 1, hidden=5)
    adam = torch.optim.Adam(model.parameters(), lr=0.03)
    estimator = tbptt.TBPTT(k1, k2)
    carry, said, xs, ys = estimator.init(model, 1), [], [], []
    state = None
    for row in range(len(lines)):
        mean, std = inputs[: row + 1].mean(0), inputs[: row + 1].std(0)
        xs.append(torch.tensor((inputs[row] - mean) / np.where(std > 0, std, 1.0), dtype=torch.float32))
        with torch.no_grad():
            output, state = model(xs[-1][None, None], state)
        center, width = (labels[:row].mean(), labels[:row].std()) if row else (0.0, 0.0)
        said.append(float(output) * (width or 1.0) + center)
        center, width = labels[: row + 1].mean(), labels[: row + 1].std()
        ys.append((labels[row] - center) / (width or 1.0))
        if len(xs) == k1:
            window = tbptt.Window(torch.stack(xs)[:, None], torch.tensor(ys, dtype=torch.float32)[:, None])
            estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
            estimate = tbptt.ClipNorm(1.0)(estimate)
            estimate.apply(model)
            adam.step()
            xs, ys, state = [], [], carry.state
    return said


def test_predictions_are_those_of_a_loop_written_by_hand(program: Any, rows: Path) -> None:
    ended = program("learn", "--input", f"csv:{rows}", *SMALL, "--lr", "0.03")
    assert ended.code == 0, ended.err
    said = [float(line) for line in ended.out.splitlines()]
    expected = reference(numbers(), 3, 6)
    assert len(said) == ROWS
    np.testing.assert_allclose(said, expected, rtol=1e-5)
    other = reference(numbers(), 3, 5)
    assert not np.allclose(said, other, rtol=1e-4, atol=0.0), "the comparison must see another look-back"
    assert "y is a number, as in the first row" in ended.err
    assert "inputs: a, b" in ended.err
    assert f"{ROWS} rows predicted" in ended.err


def test_a_prediction_is_made_before_its_label_is_seen(program: Any, rows: Path, tmp_path: Path) -> None:
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out.splitlines()
    lines = numbers()
    lines[100] = "0.5,-999,0.5"
    changed = write(tmp_path / "changed.csv", lines)
    other = program("learn", "--input", f"csv:{changed}", *SMALL).out.splitlines()
    lines[100] = lines[100].replace("-999", "999")
    third = program("learn", "--input", f"csv:{write(changed, lines)}", *SMALL).out.splitlines()
    assert whole[:100] == other[:100] == third[:100]
    assert other[:101] == third[:101]
    assert other[101] != third[101]  # the labels' scale has seen it


def test_words_are_classes(program: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "words.csv", words(400))
    ended = program("learn", "--input", f"csv:{path}", *SMALL, "--lr", "0.02")
    said = ended.out.splitlines()
    assert said[0] == ""  # no class is known yet
    assert set(said[1:]) == {"up", "down"}
    truth = [line.split(",")[1] for line in words(400)]
    assert np.mean([a == b for a, b in zip(said[200:], truth[200:], strict=True)]) > 0.9
    assert "one of at most 16 words, as the first row has the word" in ended.err
    assert "accuracy" in ended.err
    known = program("learn", "--input", f"csv:{path}", *SMALL, "--classes", "up,down")
    assert known.out.splitlines()[0] in ("up", "down")
    other = program("learn", "--input", f"csv:{path}", *SMALL, "--classes", "up,left")
    assert other.code == 1
    assert "'down' came" in other.err
    digits = write(tmp_path / "digits.csv", [line.replace("up", "1").replace("down", "0") for line in words(30)])
    assert set(program("learn", "--input", f"csv:{digits}", *SMALL, "--classes", "0,1").out.split()) <= {"0", "1"}
    crowded = program(
        "learn", "--input", f"csv:{write(path, ['1,a,0', '1,b,0', '1,c,0'])}", *SMALL, "--max-classes", "2"
    )
    assert crowded.code == 1
    assert "no more than 2 outputs" in crowded.err


def test_a_row_without_a_label_is_predicted_and_not_learned_from(program: Any, tmp_path: Path) -> None:
    lines = numbers(60)
    lines[20] = lines[20].split(",")[0] + ",," + lines[20].split(",")[2]
    ended = program("learn", "--input", f"csv:{write(tmp_path / 'a.csv', lines)}", *SMALL)
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 60
    assert float(ended.out.splitlines()[20])
    lines[0] = lines[20]
    first = program("learn", "--input", f"csv:{write(tmp_path / 'b.csv', lines)}", *SMALL)
    assert first.code == 2
    assert "cannot be told" in first.err


BAD = {
    "fields": ("1,2", "line 12 was expected to have 3 fields"),
    "empty": ("", "has none"),
    "word": ("1.0,2.0,many", "column 'b' of line 12 was expected to be a finite number, but is 'many'"),
    "missing": (",2.0,1.0", "column 'a' of line 12 was expected to be a finite number, but is '', empty"),
    "infinite": ("inf,2.0,1.0", "but is 'inf'"),
    "label": ("1.0,high,1.0", "column 'y' of line 12"),
    "underscore": ("1_0,2.0,1.0", "but is '1_0'"),
    "quote": ('1.0,"2.0,1.0', "line 12 was expected to be one row of CSV"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_named_and_skipped_or_the_end(program: Any, tmp_path: Path, name: str) -> None:
    bad, words_ = BAD[name]
    lines = numbers(30)
    with_bad = write(tmp_path / "bad.csv", [*lines[:10], bad, *lines[10:]])
    clean = program("learn", "--input", f"csv:{write(tmp_path / 'clean.csv', lines)}", *SMALL).out.splitlines()

    stopped = program("learn", "--input", f"csv:{with_bad}", *SMALL, "--out", tmp_path / "run")
    assert stopped.code == 1
    assert words_ in stopped.err
    assert stopped.out.splitlines() == clean[:10]

    skipped = program("learn", "--input", f"csv:{with_bad}", *SMALL, "--on-bad-row", "skip")
    assert skipped.code == 0
    assert words_ in skipped.err
    assert "1 malformed lines skipped" in skipped.err
    assert skipped.out.splitlines() == [*clean[:10], "", *clean[10:]]

    passing = program(
        "learn", "--input", f"csv:{with_bad}", *SMALL, "--out", tmp_path / "run", "--resume", "--on-bad-row", "skip"
    )
    assert stopped.out + passing.out == skipped.out
    shutil.rmtree(tmp_path / "run")
    program("learn", "--input", f"csv:{with_bad}", *SMALL, "--out", tmp_path / "run")
    mended = write(with_bad, lines)  # what came before the fault is kept
    resumed = program("learn", "--input", f"csv:{mended}", *SMALL, "--out", tmp_path / "run", "--resume")
    assert stopped.out.splitlines() + resumed.out.splitlines() == clean


@pytest.mark.parametrize("make", [numbers, words])
@pytest.mark.parametrize("to_file", [False, True])
def test_a_resumed_stream_reads_like_one_that_never_stopped(
    program: Any, tmp_path: Path, make: Callable[[], list[str]], to_file: bool
) -> None:
    path, out, said = write(tmp_path / "rows.csv", make()), tmp_path / "run", tmp_path / "said.txt"
    options = [*("--input", f"csv:{path}"), *SMALL, *("--out", out), *(("--predictions", said) if to_file else ())]
    whole = program("learn", "--input", f"csv:{path}", *SMALL).out
    first = program("learn", *options, "--limit", "101")
    second = program("learn", *options, "--resume")
    assert "goes on after 101 rows, at line 103" in second.err
    assert (said.read_text() if to_file else first.out + second.out) == whole
    assert program("learn", *options, "--resume").out == ""
    state = Checkpoints(out / "checkpoints").load_latest().state
    assert state["learner"]["rows"] == ROWS
    assert state["done"]["number"] == ROWS + 1


def test_a_file_of_predictions_is_cut_back_to_the_checkpoint(program: Any, rows: Path, tmp_path: Path) -> None:
    """As after a kill: rows were predicted, and written, after the last checkpoint."""
    said = tmp_path / "said.txt"
    options = [*("--input", f"csv:{rows}"), *SMALL, *("--out", tmp_path / "run"), *("--predictions", said)]
    program("learn", *options, "--limit", "100")
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out
    with said.open("a") as file:
        file.write("17.0\n17.0\n1")
    assert program("learn", *options, "--resume").code == 0
    assert said.read_text() == whole
    said.write_text("")
    ended = program("learn", *options, "--resume")
    assert ended.code == 1
    assert "bytes of predictions" in ended.err


def test_another_input_is_not_gone_on_with(program: Any, rows: Path, tmp_path: Path) -> None:
    options = [*SMALL, *("--out", tmp_path / "run")]
    program("learn", "--input", f"csv:{rows}", *options, "--limit", "50")
    lines = numbers()
    lines[20] = "0,0,0"
    other = program("learn", "--input", f"csv:{write(tmp_path / 'other.csv', lines)}", *options, "--resume")
    assert other.code == 1
    assert "others stand there" in other.err
    short = program("learn", "--input", f"csv:{write(tmp_path / 'short.csv', lines[:10])}", *options, "--resume")
    assert short.code == 1
    assert "51 lines to pass over were expected" in short.err
    settings = program("learn", "--input", f"csv:{rows}", *options, "--resume", "--lr", "0.5")
    assert settings.code == 2
    assert "optimizer was expected to be" in settings.err
    again = program("learn", "--input", f"csv:{rows}", *options)
    assert again.code == 2
    assert "--resume goes on with it" in again.err


def test_an_input_that_goes_on_where_it_ended(program: Any, rows: Path, tmp_path: Path) -> None:
    options = [*SMALL, *("--out", tmp_path / "run")]
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out
    first = program("learn", "--input", f"csv:{rows}", *options, "--limit", "90")
    rest = tmp_path / "rest.csv"
    rest.write_text("\n".join(numbers()[88:]) + "\n")
    second = program("learn", "--input", f"csv:{rest}", *options, "--resume", "--skip", "2")
    assert first.out + second.out == whole
    third = program("learn", "--input", f"csv:{rows}", *options, "--resume")
    assert (third.code, third.out) == (0, ""), "the places are those of the whole stream"


@pytest.mark.parametrize(
    ("arguments", "code", "words_"),
    [
        (["--input", "rows.csv", "--target", "y"], 2, "--input csv:rows.csv"),
        (["--input", "csv:nowhere.csv", "--target", "y"], 1, "is not there"),
        (["--input", "csv:rows.csv", "--target", "z"], 2, "one of the columns a, y, b"),
        (["--input", "csv:rows.csv", "--target", "y", "--ignore", "a,b"], 2, "none to learn from"),
        (["--input", "csv:rows.csv", "--target", "y", "--ignore", "y"], 2, "--ignore leaves it out"),
        (["--input", "csv:rows.csv", "--target", "y", "--resume"], 2, "--out DIR --resume"),
        (["--input", "csv:rows.csv", "--target", "y", "--skip", "3"], 2, "leave --skip out"),
        (["--input", "csv:-", "--target", "y", "--follow"], 2, "--input csv:FILE"),
        (["--input", "csv:rows.csv", "--target", "y", "--on-bad-row", "mend"], 2, "'mend' came"),
        (["--input", "csv:rows.csv", "--target", "y", "--k1", "0"], 2, "k1"),
        (["--input", "csv:rows.csv", "--target", "y", "--set", "data.lanes=4"], 2, "no effect on a live stream"),
        (["--input", "csv:rows.csv", "--target", "y", "--set", "guards.spike_rollback=9"], 2, "goes back"),
        (["--input", "csv:rows.csv", "--target", "y", "--set", "model.embedding=9"], 2, "no effect"),
        (["--input", "csv:rows.csv", "--target", "y", "--classes", "a,a"], 2, "each once"),
        (["--input", "csv:rows.csv", "--target", "y", "--predictions", "rows.csv"], 2, "holds something already"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    program: Any, rows: Path, arguments: list[str], code: int, words_: str
) -> None:
    ended = program("learn", *arguments)
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert words_ in ended.err


def test_headers_that_name_no_columns(program: Any, tmp_path: Path) -> None:
    twice = write(tmp_path / "twice.csv", numbers(5), "a,y,a")
    assert "a stands there twice" in program("learn", "--input", f"csv:{twice}", *SMALL).err
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    assert "the input is empty" in program("learn", "--input", f"csv:{empty}", *SMALL).err
    marked = write(tmp_path / "marked.csv", numbers(5), "\ufeffa,y,b")  # as spreadsheets write it
    assert "inputs: a, b" in program("learn", "--input", f"csv:{marked}", *SMALL).err


def test_another_estimator_and_a_column_left_out(program: Any, rows: Path) -> None:
    ended = program("learn", "--input", f"csv:{rows}", *SMALL[:2], "--ignore", "b", *ARTBP)
    assert ended.code == 0, ended.err  # the clipping of the defaults would be refused with it
    assert "inputs: a\n" in ended.err


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tbptt", "learn", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "nothing was predicted"
        time.sleep(0.01)


def test_a_pipe_that_is_ended_by_sigterm_and_fed_again(program: Any, rows: Path, tmp_path: Path) -> None:
    """Stopped while it waits for a row, exactly after those that it was given; the outputs joined are one."""
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out.encode()
    said = tmp_path / "said.txt"
    options = ["--input", "csv:-", *SMALL, "--out", tmp_path / "run"]
    content = rows.read_bytes().splitlines(keepends=True)
    with said.open("wb") as out, start(*options, stdin=subprocess.PIPE, stdout=out) as process:
        process.stdin.write(b"".join(content[:124]) + b"0.5,1")  # a row that is not complete yet
        process.stdin.flush()
        wait_for_lines(said, 123)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert b"stopped by SIGTERM" in process.stderr.read()
    with said.open("ab") as out, rows.open("rb") as again:
        process = start(*options, "--resume", stdin=again, stdout=out)
        assert process.communicate(timeout=60)[1].count(b"goes on after 123 rows") == 1
        assert process.returncode == 0
    assert said.read_bytes() == whole


def test_a_kill_without_warning_leaves_a_file_of_predictions_that_can_be_gone_on_with(
    program: Any, rows: Path, tmp_path: Path
) -> None:
    """Killed in mid-stream, between two checkpoints, while a file grows; then resumed until the file is complete."""
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out.encode()
    said, growing = tmp_path / "said.txt", tmp_path / "growing.csv"
    options = ["--input", f"csv:{growing}", *SMALL, "--out", tmp_path / "run", "--predictions", said, "--follow"]
    content = rows.read_bytes().splitlines(keepends=True)
    growing.write_bytes(b"".join(content[:132]))
    with start(*options) as process:
        wait_for_lines(said, 131)
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert Checkpoints(tmp_path / "run" / "checkpoints").load_latest().state["learner"]["rows"] == 100
    with start(*options, "--resume", "--limit", str(ROWS)) as process:
        with growing.open("ab") as file:
            for line in content[132:]:
                file.write(line[:3])
                file.flush()
                file.write(line[3:])
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert said.read_bytes() == whole


def test_a_reader_that_goes_away_ends_it_with_its_place_kept(rows: Path, tmp_path: Path, program: Any) -> None:
    options = ["--input", "csv:-", *SMALL, "--out", tmp_path / "run"]
    content = rows.read_bytes().splitlines(keepends=True)
    with start(*options, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"".join(content[:51]))
        process.stdin.flush()
        first = [process.stdout.readline() for _ in range(50)]
        process.stdout.close()
        process.stdin.write(b"".join(content[51:]))
        process.stdin.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert said.count(b"\n") == 1, "the usual first line, and no complaint"
    whole = program("learn", "--input", f"csv:{rows}", *SMALL).out
    rest = program("learn", "--input", f"csv:{rows}", *SMALL, "--out", tmp_path / "run", "--resume").out
    assert b"".join(first).decode() + rest == whole


def test_a_file_that_shrinks_is_not_followed(rows: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    with said.open("wb") as out, start("--input", f"csv:{rows}", *SMALL, "--follow", stdout=out) as process:
        wait_for_lines(said, ROWS)
        rows.write_text("a,y,b\n")
        assert process.wait(timeout=60) == 1
        assert b"was expected, but it was" in process.stderr.read()


def test_memory_does_not_hold_the_rows(tmp_path: Path, program: Any) -> None:
    """What is saved is as large after ten times the rows, and no line stays in the reader."""
    path = write(tmp_path / "rows.csv", numbers(600))
    sizes: list[int] = []
    for limit in (60, 600):
        out = tmp_path / f"run-{limit}"
        program("learn", "--input", f"csv:{path}", *SMALL, "--out", out, "--limit", str(limit))
        newest = Checkpoints(out / "checkpoints").paths()[0]
        sizes.append((newest / "state.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("default::tbptt.errors.AlarmWarning")
def test_drift_is_reported_with_its_row(program: Any, tmp_path: Path) -> None:
    pytest.importorskip("river")
    lines = numbers(900)
    turned = [*lines[:600], *(f"{a},{float(y) + 900.0},{b}" for a, y, b in (each.split(",") for each in lines[600:]))]
    found: list[list[int]] = []
    for rows_ in (lines, turned):
        path = write(tmp_path / "rows.csv", rows_)
        ended = program("learn", "--input", f"csv:{path}", *SMALL, "--drift", "PageHinkley")
        assert ended.code == 0, ended.err
        assert len(ended.out.splitlines()) == 900
        found.append([int(row) for row in re.findall(r"warning: drift at step (\d+)", ended.err)])
    calm, moved = found
    assert [row for row in moved if row < 600] == [row for row in calm if row < 600]
    assert moved != calm
    assert 600 in moved, (calm, moved)
    assert 600 not in calm
    assert program("learn", "--input", f"csv:{path}", *SMALL, "--drift", "PageHinkly").code == 2
