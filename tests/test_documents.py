"""Every code block of README and docs runs, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tbptt
from tbptt.cli.settings import Given, resolve

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tbptt.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for path in DOCUMENTS:
        for number, match in enumerate(BLOCK.finditer(path.read_text(encoding="utf-8")), 1):
            if match[1] == language:
                found.append((f"{path.name}-{number}", match[2]))
    return found


def test_every_block_says_what_it_is_and_is_run() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(BLOCK.findall(text)), path
        assert {language for language, _ in BLOCK.findall(text)} <= {"python", "sh", "toml", "text"}, path


FORKING = """
import json, os, runpy, sys, warnings
import torch

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # of fork, since 3.12
torch.compiler.reset()  # imports what every optimizer asks for at its first step
for line in sys.stdin:
    directory, words = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(directory)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.path[0], sys.argv = directory, words
    if words[0] == "tbptt":
        runpy.run_module("tbptt", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
    sys.exit()
"""
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a script, or the program, in a process of its own: forked from one that has imported torch and no more."""
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        orders, codes = parent.stdin, parent.stdout
        assert orders is not None
        assert codes is not None

        def run(directory: Path, *words: str) -> tuple[int, str]:
            orders.write(f"{json.dumps([str(directory), words])}\n")
            orders.flush()
            return int(codes.readline()), (directory / "said.txt").read_text(encoding="utf-8")

        yield run


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in blocks("python")])
def test_python_blocks_run(name: str, code: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    ended, said = run(tmp_path, "block.py")
    assert ended == 0, f"{name}\n{said}"


def test_what_goes_wrong_in_a_block_is_seen(tmp_path: Path, run: Run) -> None:
    for code, word in (("1 / 0", "ZeroDivisionError"), ("import warnings; warnings.warn('odd')", "UserWarning: odd")):
        (tmp_path / "block.py").write_text(code, encoding="utf-8")
        ended, said = run(tmp_path, "block.py")
        assert ended == 1
        assert word in said
    (tmp_path / "block.py").write_text("import sys; assert 'tbptt' not in sys.modules", encoding="utf-8")
    assert run(tmp_path, "block.py")[0] == 0
    assert run(tmp_path, "tbptt", "evaluate", "nowhere")[0] == 2


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in blocks("toml")])
def test_configurations_are_accepted(name: str, code: str) -> None:
    given = Given()
    given.add_tables(tomllib.loads(code), name)
    assert resolve(given)


def commands() -> list[tuple[str, str]]:
    """Shell blocks line by line, without those that install (continuous integration runs these)."""
    return [(name, line) for name, code in blocks("sh") for line in code.splitlines() if line.startswith("tbptt ")]


# What is put behind a command to make it short; the rest of it runs as it is written.
SHORT = {
    "train": "--updates 20 --hidden 16 --lanes 8",
    "resume": "--updates 30",
    "compare": "--updates 3 --points 2 --span 16 --burn-in 32",
    "horizon": "--max-lag 32 --probes 3",
}


def test_shell_blocks_run_one_after_another(tmp_path: Path, run: Run) -> None:
    (tmp_path / "my_package.py").write_text(
        "import tbptt\n\ndef build():\n    return tbptt.SequenceModel(8, 8, hidden=16)\n", encoding="utf-8"
    )
    rows = "".join(f"{number % 7},{number % 7 + 0.5},{number % 3}\n" for number in range(60))
    (tmp_path / "rows.csv").write_text(f"humidity,temperature,wind\n{rows}", encoding="utf-8")
    assert commands()
    for name, line in commands():
        words = shlex.split(line, comments=True)
        ended, said = run(tmp_path, *words, *SHORT.get(words[1], "").split())
        assert ended == 0, f"{name}: {line}\n{said}"


MODULES = sorted(
    ".".join(("tbptt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # in Lightning
@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    import torch

    torch.manual_seed(0)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:  # an integration whose library is not here
        if not module.startswith("tbptt.integrations.") or str(error.name).startswith("tbptt"):
            raise
        pytest.skip(f"{error.name} is not installed")
    result = doctest.testmod(found, extraglobs={"torch": torch, "nn": torch.nn}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
