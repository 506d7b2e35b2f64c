"""What the tests of monitors train: small, quick, and all of it known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tbptt


class Model(nn.Module):
    """An LSTM with dropout: two state tensors, one of them bounded."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.LSTM(1, 6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.core(inputs, state)
        return self.head(self.drop(outputs)), state


def rows(count: int = 403, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, generator=generator), torch.randn(count, 1, generator=generator)


def stream(count: int = 403, lanes: int = 4, seed: int = 1) -> tbptt.ArrayStream:
    return tbptt.ArrayStream(*rows(count, seed), lanes=lanes)


def trainer(directory: Path | None = None, estimator: tbptt.Estimator | None = None, **changes: Any) -> tbptt.Trainer:
    model = changes.pop("model", None) or Model()
    rate = changes.pop("rate", 0.1)
    optimizer = changes.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=rate)
    settings = {"guards": [tbptt.NonFinite("raise")], "saving": tbptt.Saving(every=4, keep=3, log_every=1)}
    settings |= {"checked": False, "directory": directory}  # the check takes most of the time of such short runs
    source = changes.pop("stream", None) or stream()
    loss = changes.pop("loss", None) or nn.MSELoss()
    return tbptt.Trainer(model, loss, optimizer, estimator or tbptt.TBPTT(4, 12), source, **settings | changes)


def lines_of(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]
