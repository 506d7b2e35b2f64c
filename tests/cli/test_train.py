"""`tbptt train`: where the run is, what lies in it, and every kind of data."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import tbptt

Program = Callable[..., Any]
TINY = [*("--lanes", "2"), *("--hidden", "6"), *("--k1", "8"), *("--k2", "8"), *("--threads", "1")]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_stdout_is_the_run_and_stderr_says_what_was_done(train: Program) -> None:
    ended = train()
    assert ended.code == 0
    assert ended.out == "runs/fox-1\n"
    for word in ("LSTM 6", "TBPTT(k1=8, k2=8)", "6 updates", "bits_per_character", "tbptt evaluate runs/fox-1"):
        assert word in ended.err
    assert "tbptt sample runs/fox-1" in ended.err
    assert "\x1b" not in ended.err
    assert [line["update"] for line in lines(ended.run) if line["kind"] == "update"] == [1, 2, 3, 4, 5, 6]


def test_the_configuration_in_the_run_is_whole_and_starts_the_same_run(train: Program, program: Program) -> None:
    first = train("--set", "schedule.warmup=3").run
    written = (first / "config.toml").read_text(encoding="utf-8")
    assert f"# the configuration of this run, as tbptt {tbptt.__version__}" in written.splitlines()[0]
    tables = tomllib.loads(written)
    assert tables["estimator"] == {"name": "TBPTT", "k1": 8, "k2": 8, "losses": "tail", "replay": "recompute"}
    assert (tables["run"]["updates"], tables["run"]["threads"], tables["schedule"]["warmup"]) == (6, 1, 3)
    second = program("train", "--config", first / "config.toml").run
    assert second == Path("runs/fox-2")
    for name in ("metrics.jsonl", "config.toml", "checkpoints/update-0000000006/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    other = train("--seed", "1").run
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


def test_no_run_is_ever_overwritten(train: Program) -> None:
    assert train("--out", "mine").run == Path("mine")
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    again = train("--out", "mine")
    assert again.code == 2
    assert "hint: tbptt resume mine\n" in again.err
    assert {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()} == before
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine", encoding="utf-8")
    assert train("--out", "full").code == 2
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]


def test_nothing_is_written_before_everything_was_built(train: Program) -> None:
    assert train("--lanes", "9999").code == 1
    assert train("--set", "model.tie_weights=true").code == 2
    assert not Path("runs").exists()


def test_ecg_is_the_default(program: Program) -> None:
    ended = program("train", "--passes", "1", "--threads", "1", "--hidden", "4", "--set", "run.log_every=50")
    assert ended.run == Path("runs/ecg-1")
    assert "auc 0." in ended.err
    assert [line["update"] for line in lines(ended.run) if line["kind"] == "update"] == [50, 100, 113]


@pytest.mark.parametrize("source", ["copy", "delayed-recall", "adding"])
def test_tasks(program: Program, source: str) -> None:
    ended = program(
        "train", source, *TINY, "--updates", "4", "--set", "data.task.steps=60", "--set", "run.validate_every=2"
    )
    assert ended.code == 0, ended.err
    assert [line["update"] for line in lines(ended.run) if line["kind"] == "validation"] == [2, 4]


def test_validations_of_a_task_are_all_on_the_same_data(program: Program) -> None:
    arguments = ("--set", "data.task.steps=60", "--set", "run.validate_every=1", "--lr", "1e-30")
    ended = program("train", "copy", *TINY, "--updates", "3", *arguments)
    assert len({line["loss"] for line in lines(ended.run) if line["kind"] == "validation"}) == 1


def test_text_as_bytes(train: Program) -> None:
    ended = train("--set", "data.unit=bytes")
    assert "bits_per_byte" in ended.err


def test_the_next_row_of_an_array(program: Program) -> None:
    wave = np.sin(np.arange(400) / 5.0)
    np.save("wave.npy", wave)
    np.save("two.npy", np.stack([wave * 1000 + 7, np.full(400, 3.0)], 1))
    for name in ("wave.npy", "two.npy"):
        ended = program("train", name, *TINY, "--passes", "15", "--lr", "0.02", "--set", "optimizer.name=adamw")
        assert ended.code == 0, ended.err
        last = lines(ended.run)[-1]
        assert last["kind"] == "validation"
        assert last["loss"] < 0.25, "a constant would have a loss of 1, or 1/2 with a constant column"


@pytest.mark.parametrize(
    ("targets", "metric"),
    [
        (lambda x: np.roll(x, 1), None),
        (lambda x: (x > 0).astype(np.int64), "accuracy"),
        (lambda x: x > 0, "auc"),
    ],
)
def test_inputs_and_targets_of_an_archive(program: Program, targets: Any, metric: str | None) -> None:
    inputs = np.random.default_rng(0).standard_normal(300)
    reset = np.arange(300) % 50 == 0
    np.savez("some.npz", inputs=inputs, targets=targets(inputs), mask=~reset, reset=reset)
    ended = program("train", "some.npz", *TINY, "--passes", "2")
    assert ended.code == 0, ended.err
    last = lines(ended.run)[-1]
    assert math.isfinite(last["loss"])
    assert metric is None or 0.5 < last[metric] <= 1


def test_the_schedule_is_as_long_as_the_run(train: Program) -> None:
    run = train(
        "--lr", "1", "--set", "optimizer.name=sgd", "--set", "schedule.warmup=2", "--set", "schedule.final=0.1"
    ).run
    rates = [line["learning_rate"] for line in lines(run) if line["kind"] == "update"]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *cosine])


def test_guards_and_tensorboard(train: Program) -> None:
    pytest.importorskip("tensorboard")
    settings = ("guards.clip_norm=1e-9", "guards.clip_value=1", "run.tensorboard=true", "data.held_out=0")
    run = train(*(part for each in settings for part in ("--set", each)), "--set", "optimizer.name=sgd").run
    assert list((run / "tensorboard").iterdir())
    assert all(line["kind"] == "update" for line in lines(run))


def test_threads_are_set_and_recorded(train: Program) -> None:
    run = train("--threads", "2", "--updates", "1").run
    assert torch.get_num_threads() == 2
    assert tomllib.loads((run / "config.toml").read_text())["run"]["threads"] == 2


def test_all_guards_can_be_set_and_a_run_with_them_goes_on(train: Program, program: Program) -> None:
    settings = {
        "non_finite": '"skip"',
        "spike_rollback": "2",
        "clip_value": "10",
        "adaptive_clip": "0.1",
        "z_clip": "2.5",
        "clip_norm": "1",
        "allow_bias": "true",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"guards.{name}={value}")]
    whole, pieces = train(*words, "--updates", "6").run, train(*words, "--updates", "3").run
    assert program("resume", pieces, "--updates", "6").code == 0
    last = "checkpoints/update-0000000006/model.safetensors"
    assert (whole / last).read_bytes() == (pieces / last).read_bytes()
    written = tomllib.loads((whole / "config.toml").read_text(encoding="utf-8"))["guards"]
    assert written == {name: tomllib.loads(f"x = {value}")["x"] for name, value in settings.items()}
    about = json.loads((whole / "checkpoints/update-0000000006/state.json").read_text())["state"]["about"]
    assert about["guards"] == "NonFinite, SpikeRollback, ClipValue, AdaptiveClip, ZClip, ClipNorm"


def test_no_clipping_where_the_defaults_have_some(train: Program) -> None:
    def guards(*words: str) -> str:
        run = train("--updates", "1", *words).run
        state = json.loads((run / "checkpoints/update-0000000001/state.json").read_text())
        return state["state"]["about"]["guards"]

    assert guards() == "NonFinite, ClipNorm"
    assert guards("--set", "guards.clip_norm=0") == "NonFinite"


def unbiased(program: Program, text: Path, *words: str) -> Any:
    tiny = ("--lanes", "2", "--hidden", "6", "--threads", "1", "--updates", "1", "--k1", "8")
    settings = ("estimator.name=PES", "estimator.num_particles=2", "estimator.sigma=0.1", *words)
    return program("train", text, *tiny, *(part for each in settings for part in ("--set", each)))


def test_clipping_by_default_is_not_for_an_unbiased_estimator(program: Program, train: Program, text: Path) -> None:
    def guards(run: Path) -> dict[str, Any]:
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["guards"]

    assert guards(unbiased(program, text, "guards.non_finite=skip").run) == {"non_finite": "skip"}
    assert guards(train("--updates", "1").run)["clip_norm"] == 1.0


def test_clipping_that_was_asked_for_is_refused_for_one_before_anything_is_written(
    program: Program, text: Path
) -> None:
    ended = unbiased(program, text, "guards.clip_norm=1")
    assert ended.code == 2
    assert "in [guards], guards that leave the mean alone were expected with PES(" in ended.err
    assert "hint: leave it out and lower --lr against the noise; or --set guards.allow_bias=true" in ended.err
    assert not Path("runs").exists()
    assert unbiased(program, text, "guards.clip_norm=1", "guards.allow_bias=true").code == 0


@pytest.mark.parametrize("word", ["spike_rollback=0", "spike_rollback=true", "z_clip=-1", "allow_bias=1", "agc=0.1"])
def test_guards_that_cannot_be_meant_are_refused(train: Program, word: str) -> None:
    ended = train("--set", f"guards.{word}")
    assert ended.code == 2
    assert f"guards.{word.partition('=')[0]}" in ended.err


@pytest.mark.parametrize(
    "estimator",
    [("--k1", "Ramp(2, 8, over=10)"), ("--set", "estimator.name=ARTBP", "--set", "estimator.mean_length=4")],
)
def test_a_schedule_without_a_known_end_is_refused(program: Program, text: Path, estimator: tuple[str, ...]) -> None:
    small = ("--lanes", "2", "--hidden", "6", "--threads", "1", *estimator)
    decaying = ("--set", "schedule.name=cosine", "--set", "guards.clip_norm=0")
    refused = program("train", text, *small, *decaying, "--passes", "2")
    assert refused.code != 0
    assert "not all alike" in refused.err
    assert program("train", text, *small, *decaying, "--updates", "3").code == 0  # the control: with a known end


SYNTHETIC = ("--set", "estimator.name=SyntheticGradients", "--k1", "8")


def test_a_predictor_is_in_the_run_with_a_rate_of_its_own(program: Program, text: Path) -> None:
    """Trained, resumed bit for bit, evaluated, and compared with its weights."""
    small = ("--lanes", "2", "--hidden", "6", "--threads", "1", *SYNTHETIC, "--set", "optimizer.predictor_lr=0.05")
    whole, parts = (program("train", text, *small, "--updates", number).run for number in ("6", "3"))
    assert program("resume", parts, "--updates", "6").code == 0
    last = "checkpoints/update-0000000006/model.safetensors"
    assert (whole / last).read_bytes() == (parts / last).read_bytes()
    weights = safetensors.torch.load_file(whole / last)
    assert weights["synthetic_gradients.net.weight"].any()
    state = json.loads((whole / "checkpoints/update-0000000006/state.json").read_text())["state"]
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates[1] / rates[0] == pytest.approx(0.05 / 0.004)  # after the schedule
    assert program("evaluate", whole).code == 0
    ended = program("compare", whole, "-e", "TBPTT(8, 8)", "-e", "SyntheticGradients(8)", "--updates", "2", "--json")
    found = json.loads(ended.out)
    assert [row["failed"] for row in found["rows"]] == ["", ""]
    assert any("optimizer.predictor_lr is for tbptt train" in note for note in found["notes"])


def test_a_rate_for_a_predictor_that_there_is_not_is_refused(train: Program) -> None:
    ended = train("--set", "optimizer.predictor_lr=0.05")
    assert ended.code == 2
    assert "an estimator with a predictor was expected" in ended.err
    assert "hint: leave optimizer.predictor_lr out" in ended.err
