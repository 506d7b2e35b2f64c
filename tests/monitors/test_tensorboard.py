"""The curves hold the numbers of the run, and a missing package is told of at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimate
from tbptt.monitors.base import Plan, Update, Validation
from tbptt.monitors.tensorboard import TensorBoard


def update_at(number: int, terms: int = 2, **metrics: float) -> Update:
    loss_sum = torch.tensor(float(number * terms))
    estimate = Estimate(
        None,
        torch.tensor(0.0),
        loss_sum,
        terms,
        {"w": torch.tensor([3.0, 4.0])},
        8,
        torch.zeros(0),
        terms,
        metrics,
    )
    return Update(number, 0, 0, 8, 4, estimate, True, 0.5)


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    monitor = TensorBoard(tmp_path, every=2)
    monitor.begin(Plan(0, 4, 4))
    monitor.update(update_at(1, terms=1))
    monitor.update(update_at(2, terms=3))
    monitor.update(update_at(3, clip_scale=0.25))
    monitor.update(update_at(4, clip_scale=0.25, gradient_norm=20.0))
    monitor.validation(Validation(4, {"auc": 0.75}))
    assert monitor.state_dict() == {}
    monitor.end()
    monitor.end()
    assert points(tmp_path) == {
        "train/loss": [(2, 1.75), (4, 3.5)],  # sum / count
        "train/gradient_norm": [(2, 5.0), (4, 20.0)],
        "train/lookback": [(2, 8.0), (4, 8.0)],
        "train/learning_rate": [(2, 0.5), (4, 0.5)],
        "train/refused": [(2, 0.0), (4, 0.0)],
        "train/clip_scale": [(4, 0.25)],
        "validation/auc": [(4, 0.75)],
    }


def test_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for begin, end in ((0, 6), (3, 5)):
        monitor = TensorBoard(tmp_path, every=1)
        monitor.begin(Plan(begin, None, 4))
        for number in range(begin + 1, end + 1):
            monitor.update(update_at(number, mark=float(begin)))
        monitor.end()
    assert points(tmp_path)["train/mark"] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 3.0), (5, 3.0)]


def test_a_missing_package_is_told_of_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(CapabilityError, match=r"pip install 'tbptt\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_checked(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        TensorBoard(tmp_path, every)
