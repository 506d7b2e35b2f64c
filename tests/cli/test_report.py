"""`tbptt report`: the page of a run, whatever lies in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

Program = Any


def test_the_page_of_a_run(train: Program, program: Program) -> None:
    run = train("--out", "a").run
    ended = program("report", run)
    assert (ended.code, ended.out) == (0, f"{run / 'report.html'}\n")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "estimator.k1" in page
    assert (run / "report_tables" / "updates.parquet").is_file()
    assert ended.err.startswith("loss ")
    assert "held out  best " in ended.err


def test_a_run_can_be_resumed_and_reported_again(train: Program, program: Program) -> None:
    run = train("--out", "a").run
    program("report", run)
    assert program("resume", run, "--updates", "12").code == 0
    assert program("report", run).code == 0
    assert "update 12" in program("report", run).err


def test_another_file(train: Program, program: Program, tmp_path: Path) -> None:
    run = train().run
    out = tmp_path / "deep" / "page.html"
    assert program("report", run, "--out", out).out == f"{out}\n"
    assert out.is_file()
    assert (out.parent / "page_tables").is_dir()
    assert not (run / "report.html").exists()


def test_the_browser_is_opened_on_demand(
    train: Program, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = train("--out", "a").run
    program("report", run)
    assert opened == []
    program("report", run, "--open")
    assert opened == [(tmp_path / "a" / "report.html").as_uri()]


def test_what_is_no_run(program: Program, tmp_path: Path) -> None:
    ended = program("report", "nowhere")
    assert (ended.code, ended.out) == (2, "")
    assert "there is no such directory" in ended.err
    assert "hint: tbptt train --out RUN" in ended.err
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_is_no_page(train: Program, program: Program, tmp_path: Path) -> None:
    ended = program("report", train().run, "--out", tmp_path)
    assert ended.code == 2
    assert f"hint: --out {tmp_path / 'report.html'}" in ended.err
