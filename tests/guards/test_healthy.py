"""Healthy runs of some length: SpikeRollback leaves them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt.errors import DivergedError
from tbptt.streams import CopyTask, ecg

RUNS: dict[str, tuple[Callable[[], Any], int, nn.Module, tbptt.TBPTT]] = {
    "ecg, 8/adaptive": (lambda: ecg(lanes=16), 2, nn.BCEWithLogitsLoss(), tbptt.TBPTT(8, tbptt.Adaptive(max=64))),
    "ecg, gru, 4/64 retain": (lambda: ecg(lanes=16), 2, nn.BCEWithLogitsLoss(), tbptt.TBPTT(4, 64, replay="retain")),
    "ecg, 8/8": (lambda: ecg(lanes=16), 2, nn.BCEWithLogitsLoss(), tbptt.TBPTT(8, 8)),
    "ecg, 8/64": (lambda: ecg(lanes=16), 2, nn.BCEWithLogitsLoss(), tbptt.TBPTT(8, 64)),
    "copy, 8/40": (lambda: CopyTask(5, 16), 10, nn.CrossEntropyLoss(), tbptt.TBPTT(8, 40)),
}


def times_gone_back(name: str, guard: tbptt.SpikeRollback) -> int:
    source, inputs, loss, estimator = RUNS[name]
    went: list[int] = []

    class Notes(tbptt.Monitor):
        def update(self, update: Any) -> None:
            if "rolled_back" in update.estimate.metrics:
                went.append(update.number)

    torch.manual_seed(0)
    symbols = inputs == 10
    core = "gru" if "gru" in name else "lstm"
    model = tbptt.SequenceModel(
        inputs, inputs if symbols else 1, hidden=32, embedding=16 if symbols else None, core=core
    )
    adam = torch.optim.Adam(model.parameters(), lr=5e-3 if symbols else 3e-3)
    trainer = tbptt.Trainer(
        model, loss, adam, estimator, source(), guards=[tbptt.NonFinite(), guard], monitors=[Notes()], checked=False
    )
    try:
        trainer.run(updates=3000)
    except DivergedError:
        went.append(trainer.updates)
    return len(went)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::tbptt.errors.AlarmWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_does_not_go_back(name: str) -> None:
    assert times_gone_back(name, tbptt.SpikeRollback()) == 0
    # The control: a test that is five times as strict, and asks for no factor, has it go back.
    assert times_gone_back(name, tbptt.SpikeRollback(z=2.0, loss_factor=1.1, norm_factor=1.1)) > 0
