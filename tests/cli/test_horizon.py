"""`tbptt horizon`: a look-back for a run or for data, or a sentence that says why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., Any]
SHORT = ["--max-lag", "24", "--probes", "3"]


def test_a_run_with_its_trained_model_which_stays_as_it_is(program: Program, train: Program) -> None:
    run = train().run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = program("horizon", run, *SHORT, "--out", "pages/it.html")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("How far back SequenceModel looks: 3 losses in 2 lanes, each sent 24 steps back")
    assert "\n\nTBPTT(k1=" in ended.out
    assert f"weights   of update 6 of {run}\npage      pages/it.html\n" in ended.err
    page = Path("pages/it.html").read_text(encoding="utf-8")
    assert "Use TBPTT(k1=" in page
    assert 'id="strip-6"' in page  # what single characters did to six predictions
    assert (Path("pages/it_tables") / "strips.parquet").is_file()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_data_with_fresh_weights_as_one_object(program: Program) -> None:
    fresh = [*("--set", "data.lanes=2"), *("--set", "model.hidden=6"), *("--set", "run.threads=1")]
    ended = program("horizon", "ecg", *SHORT, *fresh, "--json", "--k1", "3")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["max_lag"] == 24
    assert found["recommendation"]["k1"] == 3
    assert found["loss"] == pytest.approx(found["fresh_loss"], rel=0.5)  # they are fresh
    assert "weights " not in ended.err
    assert Path("horizon.html").is_file()
    assert 'id="strip-' not in Path("horizon.html").read_text(encoding="utf-8")  # an ECG has no characters


def test_a_run_that_diverged_gets_a_page_and_a_sentence(program: Program, train: Program) -> None:
    run = train("--lr", "1e3", "--updates", "20").run
    ended = program("horizon", run, *SHORT)
    assert ended.code == 1
    assert "error: a model that learns was expected, but the model's loss is " in ended.err
    assert "it has diverged, and its gradients say nothing: any k2 would be a guess\nhint: weights from" in ended.err
    assert "TBPTT(k1=" not in ended.out
    page = Path("horizon.html").read_text(encoding="utf-8")
    assert "it has diverged, and its gradients say nothing." in page
    assert "Use TBPTT(" not in page


def test_a_stream_that_is_too_short(program: Program, train: Program) -> None:
    ended = program("horizon", train().run, "--max-lag", "2000")
    assert ended.code == 2
    assert ended.out == ""
    assert "to look 2000 steps back, but one has " in ended.err
    assert "hint: max_lag=" in ended.err
    assert not Path("horizon.html").exists()


def test_held_out_text_too_short_for_strips_costs_no_more_than_them(program: Program, train: Program) -> None:
    run = train("--set", "data.held_out=0.01").run
    ended = program("horizon", run, *SHORT)
    assert ended.code == 0, ended.err
    assert "too short to show what each character did" in ended.err
    assert 'id="strip-' not in Path("horizon.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tolerance", "2"), "a tolerance above 0 and below 1"),
        (("--memory", "much"), "hint: --memory 2GB"),
        (("--memory", "-1"), "a size above 0"),
        (("--time", "0"), "time was expected to be a number above 0"),
        (("--out", "."), "hint: --out horizon.html"),
        (("--max-lag", "1"), ""),
        (("--probes", "2"), ""),
        (("--set", "model.hiden=3"), "did you mean model.hidden?"),
    ],
)
def test_what_is_refused_before_anything_is_measured(program: Program, arguments: tuple[str, ...], words: str) -> None:
    ended = program("horizon", "ecg", *arguments)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert words in ended.err
    assert "sending " not in ended.err
    assert not Path("horizon.html").exists()
