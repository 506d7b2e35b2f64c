"""The program in this process: what it prints, what it exits with, and nothing of it left over."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tbptt.cli.main import main

TEXT = "".join(random.Random(0).choices("the quick brown fox\n", k=3000))
TINY = [*("--lanes", "2"), *("--hidden", "6"), *("--k1", "8"), *("--k2", "8"), *("--threads", "1")]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def run(self) -> Path:
        return Path(self.out.strip())


Program = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Program:
    def run(*arguments: str | Path) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(each) for each in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err or "--debug" in arguments
        return Ended(int(exit_.value.code or 0), out, err)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def train(program: Program, text: Path) -> Program:
    """A tiny run on a tiny text."""

    def start(*arguments: str | Path) -> Ended:
        return program("train", text, *TINY, "--updates", "6", *arguments)

    return start
