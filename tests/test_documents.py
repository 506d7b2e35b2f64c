"""Every code block of README and docs runs, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
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


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in blocks("python")])
def test_python_blocks_run(name: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name}\n{done.stderr}"


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in blocks("toml")])
def test_configurations_are_accepted(name: str, code: str) -> None:
    given = Given()
    given.add_tables(tomllib.loads(code), name)
    assert resolve(given)


def commands() -> list[tuple[str, str]]:
    """Shell blocks line by line, without those that install (continuous integration runs these)."""
    return [(name, line) for name, code in blocks("sh") for line in code.splitlines() if line.startswith("tbptt ")]


def test_shell_blocks_run_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "my_package.py").write_text(
        "import tbptt\n\ndef build():\n    return tbptt.SequenceModel(8, 8, hidden=16)\n", encoding="utf-8"
    )
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "100"}
    assert commands()
    for name, line in commands():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":
            words += ["--updates", "20"]
        if words[0] == "resume":
            words += ["--updates", "30"]
        if words[0] == "compare":
            words += ["--updates", "3", "--points", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "tbptt", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {line}\n{done.stderr}"


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
    found = importlib.import_module(module)
    result = doctest.testmod(found, extraglobs={"torch": torch, "nn": torch.nn}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
