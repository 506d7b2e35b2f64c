"""Independent answers to compare an estimator with.

Nothing here uses the library's trees, windows, unrolling or segments: a model is a step function, a state
is a flat tuple of tensors with the lanes first, and every gradient is plain autograd over a plain loop.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]
Parameters: TypeAlias = dict[str, Tensor]
StepFunction: TypeAlias = Callable[[Parameters, Tensor, State], tuple[Tensor, State]]
"""`step(parameters, inputs, state) -> (outputs, state)` for one step; leaves (B, ...), lanes first."""


@dataclass(frozen=True)
class Recording:
    """A whole sequence, as an oracle needs it.

    Args:
        inputs: shape (T, B, ...).
        targets: shape (T, B, ...).
        mask: the targets that count. Shape (T, B), bool.
        reset: where a lane starts anew. Shape (T, B), bool.
        step: the model.
        initial: parameters -> the state before the first step, and of a lane that is reset.
        loss: outputs, targets of one step -> losses. Shape (B,).
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    reset: Tensor
    step: StepFunction
    initial: Callable[[Parameters], State]
    loss: Callable[[Tensor, Tensor], Tensor]

    def run(
        self, weights: Sequence[Parameters], state: State | None, begin: int, end: int, injected: Sequence[int]
    ) -> tuple[Tensor, list[State]]:
        """Return the loss sum over the `injected` steps, and the state before each step and after the last.

        Args:
            weights: the parameters to use at each step, indexed by step.
            state: the state before `begin`; None for the initial one.
            begin: first step.
            end: one past the last.
            injected: the steps whose losses are summed.
        """
        now = self.initial(weights[begin]) if state is None else state
        states: list[State] = []
        total = torch.zeros((), dtype=self.inputs.dtype)
        for t in range(begin, end):
            states.append(now)
            anew = self.initial(weights[t])
            now = tuple(
                torch.stack([a[lane] if self.reset[t, lane] else n[lane] for lane in range(n.shape[0])])
                for a, n in zip(anew, now, strict=True)
            )
            output, now = self.step(weights[t], self.inputs[t], now)
            if t in injected:
                losses = self.loss(output, self.targets[t])
                total = total + sum((losses[lane] for lane in range(len(losses)) if self.mask[t, lane]), total * 0)
        return total, [*states, now]


def look_backs(begin: int, end: int, k1: int, k2: int, losses: str) -> list[tuple[int, int, list[int]]]:
    """Return what an update of the window [begin, end) consists of: runs (from, to, injected steps).

    Williams & Peng's definition, word for word: from the window's last step, k2 steps back; every loss
    of the window enters once.
    """
    steps = end - begin
    if k2 > k1 or k2 >= steps:
        return [(max(0, end - k2) if k2 > k1 else begin, end, list(range(begin, end)))]
    if losses == "tail":
        return [(end - k2, end, list(range(end - k2, end)))]
    return [(p, min(p + k2, end), list(range(p, min(p + k2, end)))) for p in range(begin, end, k2)]


def frozen_boundary(
    recording: Recording, parameters: Parameters, begin: int, end: int, *, k1: int, k2: int, losses: str
) -> Parameters:
    """Return the truncated gradient of one window, as the exact gradient of the frozen-boundary objective.

    The states at the boundaries are computed once, with no graph, by one pass from the very first step;
    with them held fixed, the truncated gradient is the gradient of an ordinary function of the weights.
    """
    with torch.no_grad():
        _, states = recording.run([parameters] * end, None, 0, end, [])
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    total = torch.zeros((), dtype=recording.inputs.dtype)
    count = 0
    for first, last, injected in look_backs(begin, end, k1, k2, losses):
        start = states[first] if first else None
        total = total + recording.run([leaves] * last, start, first, last, injected)[0]
        count += int(recording.mask[injected].sum())
    if not count or not total.requires_grad:
        return {name: torch.zeros_like(value) for name, value in leaves.items()}
    found = torch.autograd.grad(total / count, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def influence_sums(longest: int, n: int = 23, positive: int = 10) -> list[float]:
    """Return S_K for K = 1..longest of the influence-balancing system, in closed form.

    S_K = sum over k < K of (A^k v)_1 with (A^k)_{1,1+j} = C(k, j) 2^-k, and v = +1 for the first
    `positive` units, -1 for the others.

    Reference: Vicol, Metz & Sohl-Dickstein (2021), section 5; the binomial form follows from A = (I + N) / 2.
    """
    sums: list[float] = []
    total = 0.0
    for k in range(longest):
        total += sum(comb(k, j) * (1 if j < positive else -1) for j in range(min(k, n - 1) + 1)) / 2.0**k
        sums.append(total)
    return sums
