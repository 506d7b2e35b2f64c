"""The segment transformer once more: in plain loops, row by row, with lists instead of tensors of one size.

It shares no code with the library: no mask, no padding, no split, no attention of torch's, no estimator.

Letters: T time, B lanes, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    heads: int
    layers: int
    memory: int
    sliding: bool = False
    detached: bool = False
    base: float = 10_000.0


@dataclass
class Past:
    """What came into each layer at the last steps, a list of (B, W), and the tokens, a list of (B, W)."""

    memory: list[list[Tensor]]
    tokens: list[Tensor] = field(default_factory=list)

    def cut(self) -> Past:
        return Past([[row.detach() for row in rows] for rows in self.memory], [row.detach() for row in self.tokens])


def start(weights: Weights, sizes: Sizes, lanes: int) -> Past:
    tokens = [] if "first_tokens" not in weights else [row.expand(lanes, -1) for row in weights["first_tokens"]]
    return Past([[] for _ in range(sizes.layers)], tokens)


def run_segment(weights: Weights, sizes: Sizes, inputs: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Return the outputs of one segment, (T, B, O), and what is carried on."""
    steps, count = len(inputs), len(past.tokens)
    rows = [("read", i, i - count - sizes.memory, row) for i, row in enumerate(past.tokens)]
    rows += [("step", t, t, _linear(weights, "enter", x)) for t, x in enumerate(inputs)]
    rows += [("write", i, steps + i, row) for i, row in enumerate(past.tokens)]
    after: list[list[Tensor]] = []
    for layer in range(sizes.layers):
        old = [row.detach() if sizes.detached else row for row in past.memory[layer]]
        remembered = [("memory", j, j - len(old), row) for j, row in enumerate(old)]
        after.append(([*old, *(row for kind, _, _, row in rows if kind == "step")])[-sizes.memory :])
        rows = [(*me[:3], _row_above(weights, f"blocks.{layer}.", sizes, me, [*remembered, *rows])) for me in rows]
    outputs = [_linear(weights, "head", _norm(weights, "norm", row)) for kind, *_, row in rows if kind == "step"]
    tokens = [_norm(weights, "token_norm", row) for kind, *_, row in rows if kind == "write"]
    return torch.stack(outputs), Past(after if sizes.memory else [[] for _ in after], tokens)


def _sees(sizes: Sizes, me: Any, other: Any) -> bool:
    kind, index, place = me[:3]
    if sizes.sliding and place - other[2] > sizes.memory:
        return False
    return {
        "memory": kind != "read",
        "read": True,
        "step": kind == "write" or (kind == "step" and other[1] <= index),
        "write": kind == "write",
    }[other[0]]


def _row_above(weights: Weights, prefix: str, sizes: Sizes, me: Any, line: list[Any]) -> Tensor:
    seen = [(place, _norm(weights, f"{prefix}attention_norm", row)) for *_, place, row in _seen(sizes, me, line)]
    own = _linear(weights, f"{prefix}query", _norm(weights, f"{prefix}attention_norm", me[3]))
    asked = [(place, _linear(weights, f"{prefix}key_value", row)) for place, row in seen]
    width = own.shape[-1]
    size = width // sizes.heads
    found: list[Tensor] = []
    for head in range(sizes.heads):
        part = slice(head * size, (head + 1) * size)
        query = own[:, part]
        scores = [(query * _turned(row[:, :width][:, part], place - me[2], sizes.base)).sum(-1) for place, row in asked]
        shares = torch.stack(scores).div(size**0.5).exp()
        values = torch.stack([row[:, width:][:, part] for _, row in asked])
        found.append((shares[..., None] * values).sum(0) / shares.sum(0)[:, None])
    row = me[3] + _linear(weights, f"{prefix}merge", torch.cat(found, -1))
    wide = _linear(weights, f"{prefix}expand", _norm(weights, f"{prefix}linear_norm", row))
    return row + _linear(weights, f"{prefix}contract", wide * 0.5 * (1 + torch.erf(wide / 2**0.5)))


def _seen(sizes: Sizes, me: Any, line: list[Any]) -> list[Any]:
    return [other for other in line if _sees(sizes, me, other)]


def _turned(row: Tensor, distance: int, base: float) -> Tensor:
    """Turn pairs of numbers, those half a row apart, as complex ones."""
    half = row.shape[-1] // 2
    rates = torch.tensor([base ** (-pair / half) for pair in range(half)], dtype=row.dtype)
    turned = torch.complex(row[:, :half], row[:, half:]) * torch.polar(torch.ones_like(rates), distance * rates)
    return torch.cat([turned.real, turned.imag], -1)


def _linear(weights: Weights, name: str, row: Tensor) -> Tensor:
    return row @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, row: Tensor) -> Tensor:
    centred = row - row.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
