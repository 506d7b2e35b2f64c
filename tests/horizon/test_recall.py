"""Delayed recall: on a trained model the recommended k2 covers the lag, and is not wastefully long."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tbptt
from tbptt.horizon import measure
from tbptt.streams import DelayedRecall


def as_gated(model: tbptt.SequenceModel) -> None:
    del model  # torch's own initial weights will do


def as_rotation(model: tbptt.SequenceModel) -> None:
    with torch.no_grad():
        size = model.core.weight_hh_l0.shape[0]
        model.core.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(size, size))[0])


def as_delay_line(model: tbptt.SequenceModel) -> None:
    """Units that hand on, step by step, what enters the first of them; which is the symbol is still to be learned."""
    with torch.no_grad():
        first, second = model.embedding.weight
        size = model.core.weight_hh_l0.shape[0]
        model.core.weight_hh_l0.copy_(1.5 * torch.diag(torch.ones(size - 1), -1))
        model.core.weight_ih_l0.zero_()
        model.core.weight_ih_l0[0] = (first - second) / (first - second).square().sum() * 4
        model.core.bias_ih_l0.zero_()
        model.core.bias_hh_l0.zero_()
        model.core.bias_ih_l0[0] = -(first + second) @ model.core.weight_ih_l0[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lag", "core", "hidden", "symbols", "prepare", "k1", "k2", "updates"),
    [
        (5, "lstm", 32, 4, as_gated, 8, 16, 2000),
        (20, "rnn", 128, 2, as_rotation, 16, 40, 800),
        (80, "rnn", 100, 2, as_delay_line, 40, 120, 200),
    ],
    ids=["5", "20", "80"],
)
def test_the_recommended_lookback_covers_the_lag(
    lag: int, core: str, hidden: int, symbols: int, prepare: object, k1: int, k2: int, updates: int
) -> None:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(symbols, symbols, hidden=hidden, embedding=16, core=core)
    prepare(model)
    stream, loss = DelayedRecall(lag, 32, symbols=symbols), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    if prepare is as_delay_line:  # Adam would move every weight of the line as far as those that matter
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    trainer = tbptt.Trainer(
        model, loss, optimizer, tbptt.TBPTT(k1, k2), stream, guards=[tbptt.ClipNorm(1.0)], scheduler=decay
    )
    trainer.run(updates=updates)
    report = measure(model, loss, stream, costs=False, lyapunov=False)
    chosen = report.recommend(0.1)
    print(f"lag {lag}: loss {report.loss:.4g}, max_lag {report.max_lag}, {chosen}")
    assert report.loss < 0.5 * math.log(symbols)  # it has learned: knowing nothing it would be log(symbols)
    assert report.learned
    assert chosen.met
    assert lag + 1 <= chosen.needed
    assert lag + 1 <= chosen.k2 <= 3 * lag
