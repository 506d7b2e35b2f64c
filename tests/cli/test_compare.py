"""`tbptt compare`: estimators spelled on the command line, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbptt import TBPTT, Adaptive, Choice, Ramp
from tbptt.cli.spelling import parse_estimator
from tbptt.errors import ConfigError

Program = Callable[..., Any]
SMALL = [
    *("--set", "data.lanes=2"),
    *("--set", "model.hidden=6"),
    *("--set", "run.threads=1"),
    *("--points", "2"),
    *("--span", "8"),
    *("--burn-in", "8"),
]


def test_data_with_a_fresh_model(program: Program, text: Path) -> None:
    given = ("-e", "TBPTT(8, 8)", "--estimator", "TBPTT(k1=8, k2=16)")
    ended = program("compare", text, *SMALL, *given, "--updates", "3")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("estimator")
    assert "held-out" in lines[0]
    assert lines[2].startswith("TBPTT(k1=8, k2=8)")
    assert lines[3].startswith("TBPTT(k1=8, k2=16)")
    assert "note: fresh weights" in ended.out
    assert "comparing 2 estimators" in ended.err
    assert ended.err.endswith("page      compare.html\n")
    page = Path("compare.html").read_text(encoding="utf-8")
    assert "TBPTT(k1=8, k2=16)" in page
    assert {each.name for each in Path().iterdir()} <= {"compare.html", "compare_tables", "fox.txt"}


def test_a_run_with_its_trained_model_which_stays_as_it_is(program: Program, train: Program) -> None:
    run = train().run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = ("-e", "TBPTT(8, 8)", "--points", "2", "--updates", "3", "--out", "pages/it.html", "--json")
    ended = program("compare", run, *options)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["rows"][0]["updates"] == 3
    assert found["rows"][0]["failed"] == ""
    assert any(f"weights of update 6 of {run}" in note for note in found["notes"])
    assert Path("pages/it.html").is_file()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = json.loads(program("compare", run, *options).out)
    assert again["curves"]["TBPTT(k1=8, k2=8)"]["train_loss"] == found["curves"]["TBPTT(k1=8, k2=8)"]["train_loss"]
    other = json.loads(program("compare", run, *options, "--seed", "5").out)
    assert other["rows"][0]["relative_bias"] == found["rows"][0]["relative_bias"]  # the weights are the run's


def test_estimators_around_the_usual_k1_where_none_are_named(program: Program, train: Program) -> None:
    run = train("--k2", "12").run
    ended = program("compare", run, "--points", "1", "--seconds", "0.1", "--json")
    assert ended.code == 0, ended.err
    names = [row["name"] for row in json.loads(ended.out)["rows"]]
    assert names == [
        "TBPTT(k1=8, k2=12)",
        "TBPTT(k1=8, k2=8)",
        "TBPTT(k1=8, k2=16)",
        "TBPTT(k1=8, k2=32)",
        "TBPTT(k1=8, k2=Adaptive(max=64))",
    ]


def test_one_that_cannot_be_trained_stands_in_the_table(program: Program, text: Path) -> None:
    bad = ("--set", "optimizer.name=sgd", "--set", "optimizer.lr=1e38", "--set", "guards.clip_norm=1e30")
    ended = program("compare", text, *SMALL, *bad, "-e", "TBPTT(8, 8)", "--updates", "20")
    assert ended.code == 0, ended.err
    assert "TBPTT(k1=8, k2=8) failed: " in ended.out


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [
        ("TBPTT(8, 64)", TBPTT(8, 64)),
        (" TBPTT(k1=8, k2=4, losses='all') ", TBPTT(8, 4, losses="all")),
        ("TBPTT(8, Adaptive(tolerance=0.1))", TBPTT(8, Adaptive(tolerance=0.1))),
        ("TBPTT(k1=Choice([4, 8], weights=(1, 2)), k2=16)", TBPTT(Choice([4, 8], weights=[1, 2]), 16)),
        ("TBPTT(8, k2=Ramp(8, 64, over=10, shape='doubling'))", TBPTT(8, Ramp(8, 64, over=10, shape="doubling"))),
    ],
)
def test_estimators_as_in_python(spelled: str, wanted: TBPTT) -> None:
    assert parse_estimator(spelled) == wanted


@pytest.mark.parametrize(
    ("spelled", "words", "hint"),
    [
        ("TBPTT", "'TBPTT' came, which is no call", "-e 'TBPTT(k1=8, k2=64)'"),
        ("TBPTT(8, ", "which is not Python", "-e 'TBPTT"),
        ("", "'' came, which is not Python", "-e 'TBPTT"),
        ("8", "which is no call", "-e 'TBPTT"),
        ("Adaptive()", "which is a Adaptive", "-e 'TBPTT"),
        ("TBTT(8, 8)", "but TBTT came", "did you mean TBPTT?"),
        ("TBPTT(8, Adaptve())", "but Adaptve came", "did you mean Adaptive?"),
        ("TBPTT(k1=8, k3=8)", "TBPTT(k1, k2, losses, replay, keep_outputs, boundary) was expected", "-e 'TBPTT"),
        ("TBPTT(8, 4, loses='all')", "it has no loses", "did you mean losses?"),
        ("TBPTT(8)", "missing a required argument: 'k2'", "-e 'TBPTT"),
        ("TBPTT(8, k)", "but k came: nothing else is looked up", "-e 'TBPTT"),
        ("TBPTT(8, 2 * 4 ** 2)", "but 2 * 4 ** 2 came", "-e 'TBPTT"),
        ("TBPTT(8, *[8])", "but *[8] came", "-e 'TBPTT"),
        ("TBPTT(8, **{'k2': 8})", "came: it has no **", "-e 'TBPTT"),
        ("TBPTT(8, 0)", "k2 was expected to be a whole number", "TBPTT(k1=64"),
        ("TBPTT(8, __import__('os').getcwd())", "but __import__('os').getcwd came", "-e 'TBPTT"),
        ("TBPTT(8, [open][0]('x'))", "but [open][0] came", "-e 'TBPTT"),
    ],
)
def test_what_spells_no_estimator(spelled: str, words: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_estimator(spelled)
    assert words in caught.value.message
    assert hint in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ecg", "-e", "TBTT(8, 8)"), 2, "hint: did you mean TBPTT?"),
        (("ecg", "-e", "TBPTT(8, 8)", "-e", "TBPTT(k1=8, k2=8)"), 2, "came more than once"),
        (("ecg", "--seconds", "0"), 2, "a number above 0"),
        (("ecg", "--seconds", "-1"), 2, "a number above 0"),
        (("ecg", "--points", "1000"), 1, "hint: points="),
        (("ecg", "--set", "model.hiden=3"), 2, "hint: did you mean model.hidden?"),
        (("nowhere.txt",), 1, "is not there"),
        (("shakespear",), 1, "did you mean shakespeare?"),
        (("ecg", "--out", "."), 2, "hint: --out compare.html"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    program: Program, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ended = program("compare", *arguments)
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "error: " in ended.err
    assert words in ended.err
    assert not Path("compare.html").exists()


def test_settings_of_a_run_are_not_changed(program: Program, train: Program) -> None:
    run = train().run
    ended = program("compare", run, "--set", "model.hidden=9")
    assert ended.code == 2
    assert "--set is for DATA" in ended.err


def test_usage(program: Program) -> None:
    assert program("compare").code == 2
    assert program("compare", "ecg", "--points", "0").code == 2
    assert program("compare", "ecg", "--repeats", "2").code == 2
    assert program("compare", "--help").code == 0
