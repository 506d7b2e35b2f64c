"""`tbptt check`: a model of one's own, named on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., Any]

MODELS = """
import torch
from torch import nn
from tbptt import SequenceModel, Window

def good():
    return nn.GRU(3, 5)

def with_inputs():
    return nn.GRU(3, 5), torch.randn(24, 2, 3)

def with_window():
    return nn.GRU(3, 5), Window(torch.randn(24, 2, 3))

def text():
    return SequenceModel(11, 11, hidden=5, embedding=4)

class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.GRU(3, 5)

    def forward(self, inputs, state=None):
        return self.core(inputs)

forgetful = Forgetful()

def batch_first():
    return nn.GRU(3, 5, batch_first=True)

def nothing():
    return 3

def broken():
    return 1 / 0

class Space:
    good = good
"""


@pytest.fixture(autouse=True)
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of models in the current directory, under a name that no other test has imported."""
    name = f"models_{tmp_path.parent.name.replace('-', '_')}_{tmp_path.name}"
    Path(name).mkdir()
    Path(name, "__init__.py").touch()
    Path(name, "nets.py").write_text(MODELS, encoding="utf-8")
    Path(name, "needy.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return name


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        ("good", ("--input", "floats:2x24x3")),
        ("Space.good", ("--input", "floats:2x24x3")),
        ("with_inputs", ()),
        ("with_window", ("--k1", "4", "--k2", "6")),
        ("good", ("--input", "floats:2x96x3", "--chunks", "32,32,32")),
        ("text", ("--input", "tokens:2x24")),
        ("text", ("--input", "tokens:2x24:7", "--k2", "3")),
    ],
)
def test_models_that_pass(program: Program, name: str, build: str, arguments: tuple[str, ...]) -> None:
    ended = program("check", "--model", f"{name}.nets:{build}", *arguments)
    assert ended.code == 0, ended.err
    assert "value carry" in ended.out
    assert ("reach" in ended.out) == ("--k2" in arguments)
    assert ended.out.endswith("it carries its state\n")
    assert ended.err == ""


def test_a_report_for_programs(program: Program, name: str) -> None:
    for build, code in (("good", 0), ("forgetful", 1)):
        ended = program("check", "--model", f"{name}.nets:{build}", "--input", "floats:2x24x3", "--json")
        report = json.loads(ended.out)
        assert ended.code == code
        assert report["passed"] == (code == 0)
        assert {item["name"] for item in report["items"]} >= {"value carry", "gradient carry", "detached training"}


def test_a_model_that_fails(program: Program, name: str) -> None:
    ended = program("check", "--model", f"{name}.nets:forgetful", "--input", "floats:2x24x3")
    assert ended.code == 1
    assert "FAIL" in ended.out
    assert "do not train it" in ended.out


@pytest.mark.parametrize(
    ("build", "arguments", "code", "words", "hint"),
    [
        ("good", (), 2, "returns the model alone", "--input floats:2x24x8"),
        ("good", ("--input", "floats:2x24"), 2, "'floats:2x24' came", "floats:2x24x8"),
        ("good", ("--input", "floats:2x24x3", "--chunks", "8;8"), 2, "'8;8' came", "--chunks 32,32,32"),
        ("good", ("--input", "floats:2x24x3", "--chunks", "24"), 2, "two or more lengths", "chunks=(8, 8, 8)"),
        ("good", ("--input", "floats:2x24x3", "--chunks", "16,16"), 1, "at least 32 steps", "shorter chunks"),
        ("good", ("--input", "tokens:0x24"), 2, "whole numbers from 1", "tokens:2x24"),
        ("good", ("--input", "images:2x24"), 2, "tokens:LANESxSTEPS[:VOCABULARY]", "tokens:2x24"),
        ("goood", ("--input", "floats:2x24x3"), 2, "goood was expected", "did you mean good?"),
        ("batch_first", ("--input", "floats:2x24x3"), 1, "batch_first", "tbptt.stateful(model, batch_first=True)"),
        ("nothing", ("--input", "floats:2x24x3"), 1, "returned a int", "def build()"),
        ("broken", ("--input", "floats:2x24x3"), 1, "ZeroDivisionError", "--debug"),
    ],
)
def test_what_cannot_be_checked(
    program: Program, name: str, build: str, arguments: tuple[str, ...], code: int, words: str, hint: str
) -> None:
    ended = program("check", "--model", f"{name}.nets:{build}", *arguments)
    assert ended.code == code
    assert ended.out == ""
    assert words in ended.err
    message, last = ended.err.splitlines()
    assert message.startswith("error: ")
    assert last.startswith("hint: ")
    assert hint in last


def test_references_that_lead_nowhere(program: Program, name: str) -> None:
    ended = program("check", "--model", "nowhere", "--input", "floats:2x24x3")
    assert ended.code == 2
    assert "hint: --model nowhere:build" in ended.err
    ended = program("check", "--model", f"{name}.nowhere:build", "--input", "floats:2x24x3")
    assert ended.code == 2
    assert f"a module {name}.nowhere was expected, but there is none" in ended.err
    ended = program("check", "--model", f"{name}.needy:build", "--input", "floats:2x24x3")
    assert ended.code == 1
    assert "a_package_that_is_not_there" in ended.err
    assert program("check").code == 2
