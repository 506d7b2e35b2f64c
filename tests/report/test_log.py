"""A run is read as it lies there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pyarrow import parquet

import tbptt
from tbptt.report import brief, read_run, run_page, sparkline


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tbptt.errors.ConfigError, match="there is no such directory") as missing:
        read_run(tmp_path / "nowhere")
    assert "tbptt train" in missing.value.fix
    with pytest.raises(tbptt.errors.ConfigError, match="it has none"):
        read_run(tmp_path)


def test_names_of_numbers_become_numbers(run: Path) -> None:
    updates = read_run(run).lines("update")
    losses = updates.columns["loss"][6:9]
    assert math.isnan(losses[0])
    assert losses[1:] == [math.inf, -math.inf]
    assert math.isnan(read_run(run).lines("stability").columns["boundary_norms"][1][2])
    assert type(updates.columns["update"][0]) is int


def test_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind":"note","by":"nan"}\n{"kind":"note","by":"me"}\n', encoding="utf-8")
    assert read_run(tmp_path).lines("note").columns["by"] == ["nan", "me"]


def test_parquet_has_every_line(run: Path) -> None:
    log = read_run(run)
    page = run_page(log).write(run / "report.html")
    table = parquet.read_table(page.with_name("report_tables") / "updates.parquet").to_pydict()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["kind"] == "update"]
    assert [str(value) for value in table["loss"]] == [str(float(line["loss"])) for line in lines]
    for name in ("update", "terms", "learning_rate", "lookback", "refused"):
        assert table[name] == [line[name] for line in lines]
    names = {path.stem for path in page.with_name("report_tables").iterdir()}
    assert {"updates", "validation", "timing", "stability", "lengths", "lags", "alarms", "configuration"} < names


@pytest.mark.parametrize("name", ["timing.jsonl", "stability.jsonl", "config.toml", "run.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "half"])
def test_a_page_whatever_is_missing(run: Path, name: str, damage: str) -> None:
    path = run / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"\xff\x00{]\n[1]\n\n3\n", "half": whole[:-9]}[damage])
    log = read_run(run)
    run_page(log).write(run / "report.html")
    assert brief(log)
    is_told = any(name in note for note in log.notes)
    assert is_told != ((name, damage) in [("config.toml", "empty"), ("run.json", "missing")])  # nothing is lost there


def test_a_line_cut_short_and_damaged_ones_are_told_apart(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'null\n{"kind"')
    notes = read_run(run).notes
    assert notes == [
        "metrics.jsonl ends in half a line: the run is going on, or was killed.",
        "metrics.jsonl has 1 line that cannot be read.",
    ]


@pytest.mark.parametrize("text", ["", '{"kind":"upd', '{"kind":"update","update":1,"loss":"nan"}\n', "{}\n"])
def test_a_run_that_has_just_begun(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    log = read_run(tmp_path)
    page = run_page(log)
    page.write(tmp_path / "report.html")
    assert "no finite loss yet" in page.summary
    assert brief(log)


def test_curves_by_lag_are_found_in_a_file_of_any_name(run: Path) -> None:
    line = {"kind": "lags", "update": 30, "lags": [1, 2], "norms": [1.0, 0.1], "needed_lookback": 2}
    (run / "mine.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert read_run(run).lines("lags").columns["update"] == [10, 20, 30]


def test_the_summary_answers_first(run: Path) -> None:
    summary = run_page(read_run(run)).summary
    assert summary.startswith("The best validation loss is 0.05, at update 40 of 40 made so far.")
    assert "There was an alarm: non finite." in summary
    assert "3 of 40 lines have a loss that is not finite." in summary
    assert "It took 10 s, at 64 steps a second" in summary


def test_in_the_terminal(run: Path) -> None:
    loss, held_out, speed, *rest = brief(read_run(run), blocks=False)
    assert loss.startswith("loss      #")
    assert "!!!" in loss
    assert held_out == "held out  best 0.0500 at update 40, last 0.0500"
    assert speed == "speed     64 steps/s in all lanes, 100 MB at most"
    assert rest[0].startswith("alarm     non_finite at update 8: ")
    assert rest[1] == "hint: lower <the> rate"


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([math.nan]) == "!"
    assert len(sparkline([float(each) for each in range(1000)], width=40)) == 40


def test_a_real_run_of_the_trainer(tmp_path: Path) -> None:
    import torch
    from torch import nn

    data = torch.randn(400, 2)
    model = nn.RNN(2, 2)
    tbptt.Trainer(
        model,
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), 0.01),
        tbptt.TBPTT(4, 8),
        tbptt.ArrayStream(data, data, lanes=2),
        directory=tmp_path / "run",
        saving=tbptt.Saving(log_every=1),
    ).run(updates=30)
    log = read_run(tmp_path / "run")
    page = run_page(log)
    page.write(tmp_path / "report.html")
    headings = [section.heading for section in page.sections]
    assert {"Loss", "Gradient", "Lengths", "Boundaries", "State and updates", "Speed and memory"} <= set(headings)
    assert "Other lines" not in headings
    assert log.lines("update").columns["update"] == list(range(1, 31))
    assert log.notes == [
        "config.toml is not there: the run was made from Python, or by something else than tbptt train."
    ]
