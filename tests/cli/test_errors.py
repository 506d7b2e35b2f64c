"""How the program fails: in words, on stderr, with the right exit code and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tbptt
from tbptt.cli import train as train_module

Program = Callable[..., Any]
TINY = [*("--lanes", "2"), *("--hidden", "6"), *("--k1", "8"), *("--k2", "8"), *("--threads", "1"), *("--updates", "4")]


def refused(program: Program, *arguments: str | Path, code: int = 1) -> str:
    ended = program("train", *arguments)
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert not Path("runs").exists()
    return ended.err


def test_version_and_help(program: Program) -> None:
    assert program("--version").out == f"tbptt {tbptt.__version__}\n"
    everything = program("--help")
    assert everything.code == 0
    for command in ("train", "resume", "evaluate", "sample", "check"):
        assert f"  {command} " in everything.out
        assert program(command, "--help").code == 0


@pytest.mark.parametrize(
    "arguments",
    [("trian",), ("train", "--lanez", "3"), ("resume",), ("resume", "run", "--updates", "0"), ("sample", "a", "b")],
)
def test_usage(program: Program, arguments: tuple[str, ...]) -> None:
    ended = program(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: tbptt" in ended.err


def test_files_that_hold_nothing_to_learn_from(program: Program) -> None:
    assert "is not there\nhint: check the path" in refused(program, "missing.txt", *TINY)
    assert "did you mean shakespeare?" in refused(program, "shakespear", *TINY)
    assert "is not there" in refused(program, "missing.npy", *TINY)
    Path("empty.txt").touch()
    assert "is empty" in refused(program, "empty.txt", *TINY)
    Path("empty.npy").touch()
    assert "is empty" in refused(program, "empty.npy", *TINY)
    Path("text.npy").write_text("no array", encoding="utf-8")
    assert "cannot be read" in refused(program, "text.npy", *TINY)
    Path("text.npz").write_text("no archive", encoding="utf-8")
    assert "cannot be read" in refused(program, "text.npz", *TINY)
    Path("latin.txt").write_bytes("für immer".encode("latin1") * 20)
    assert "UTF-8" in refused(program, "latin.txt", *TINY)
    Path("folder").mkdir()
    assert "is a directory" in refused(program, "folder", *TINY)


def test_a_stream_shorter_than_the_lanes(program: Program) -> None:
    Path("short.txt").write_text("abcde" * 4, encoding="utf-8")
    assert "each of the 100 lanes" in refused(program, "short.txt", *TINY, "--lanes", "100")
    message = refused(program, "short.txt", *TINY, "--lanes", "3")
    assert "error: in the held-out part: " in message


@pytest.mark.parametrize(
    ("option", "value"), [("--k1", "0"), ("--k1", "-2"), ("--k1", "2.5"), ("--k2", "0"), ("--k2", "x")]
)
def test_lengths_that_are_none(program: Program, option: str, value: str) -> None:
    message = refused(program, "ecg", f"{option}={value}", code=2)
    assert option[2:] in message
    assert value in message
    assert "hint: " in message


def test_numbers_that_are_none_are_found_before_training_and_placed_in_the_file(program: Program) -> None:
    inputs = np.zeros((200, 2), dtype=np.float32)
    inputs[190, 1] = np.nan
    np.save("some.npy", inputs)
    assert "inputs of" in refused(program, "some.npy", *TINY)
    assert "holds nan at row 190, column 1" in refused(program, "some.npy", *TINY)
    targets = np.zeros(200)
    targets[7] = np.inf
    np.savez("some.npz", inputs=np.zeros(200), targets=targets)
    message = refused(program, "some.npz", *TINY)
    assert "holds inf at row 7" in message
    assert "mask" in message
    np.savez("some.npz", inputs=np.zeros(200), targets=targets, mask=np.isfinite(targets))
    assert program("train", "some.npz", *TINY).code == 0


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(50)}, "the arrays inputs and targets were expected"),
        ({"inputs": np.zeros(50), "targets": np.zeros(49)}, "has 49"),
        ({"inputs": np.zeros(50), "targets": np.zeros(50), "maks": np.zeros(50)}, "did you mean mask?"),
        ({"inputs": np.zeros(50), "targets": np.zeros(50), "mask": np.zeros(50)}, "expected to be bool"),
        ({"inputs": np.zeros((50, 2, 2)), "targets": np.zeros(50)}, "shape (N,) or (N, D)"),
        ({"inputs": np.zeros(50), "targets": np.arange(50) - 3}, "classes"),
        ({"inputs": np.array(["a"] * 50), "targets": np.zeros(50)}, "real numbers"),
    ],
)
def test_archives_of_other_arrays_than_agreed(program: Program, arrays: dict[str, Any], words: str) -> None:
    np.savez("some.npz", **arrays)
    assert words in refused(program, "some.npz", *TINY)


@pytest.mark.parametrize("command", ["resume", "evaluate", "sample"])
def test_directories_that_are_no_runs(program: Program, command: str) -> None:
    ended = program(command, "nowhere")
    assert ended.code == 2
    assert "there is no such directory\nhint: tbptt train --out RUN" in ended.err
    Path("empty").mkdir()
    ended = program(command, "empty")
    assert ended.code == 2
    assert "it has no config.toml" in ended.err


def test_a_near_run_is_offered_and_a_damaged_record_named(train: Program, program: Program) -> None:
    run = train().run
    assert f"hint: did you mean {run}?" in program("resume", "runs/fox-2").err
    (run / "run.json").write_text("{}", encoding="utf-8")
    ended = program("resume", run)
    assert ended.code == 1
    assert "run.json" in ended.err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "error: the memory of this machine is not enough\nhint: fewer --lanes"),
        (
            OSError(28, "No space left on device", "runs/x"),
            "error: the system refused: No space left on device (runs/x)\n",
        ),
        (RuntimeError("deep inside"), "error: RuntimeError: deep inside\nhint: tbptt --debug"),
    ],
)
def test_what_is_not_ours_is_told_in_a_sentence(
    program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(train_module, "start", fail)
    ended = program("train")
    assert ended.code == 1
    assert ended.err.startswith(words)
    debugged = program("--debug", "train")
    assert "Traceback" in debugged.err
    assert words in debugged.err


def test_a_loss_that_is_lost_leaves_a_run_to_look_at(train: Program) -> None:
    ended = train("--updates", "200", "--lr", "1e38", "--set", "optimizer.name=sgd", "--set", "guards.clip_norm=1e30")
    assert ended.code == 1
    assert "error: " in ended.err
    assert Path("runs/fox-1/checkpoints").is_dir()


def test_as_a_process_without_colour_or_traceback() -> None:
    command = [sys.executable, "-m", "tbptt", "train", "nowhere.txt"]
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: a file was expected")
    assert "\x1b" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [("train", "no.txt"), ("resume", "no-run"), ("learn", "no.csv"), ("compare", "no.txt")],
    ids=lambda arguments: arguments[0],
)
def test_one_of_several_ranks_is_refused_before_anything_is_read(
    program: Program, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str]
) -> None:
    """Each rank would train a model of its own, on the same data, and all write into one directory."""
    alone = program(*arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = program(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert f"tbptt {arguments[0]} does not sum gradients over ranks" in ended.err
    assert "lightning" in ended.err
    assert "Accelerate" in ended.err
    assert not list(Path().iterdir())
    assert "over ranks" not in alone.err  # and of one process it says what is wrong with the data
    assert program("--version").code == 0
