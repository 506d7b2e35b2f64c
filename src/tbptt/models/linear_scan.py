"""A linear recurrence with one decay for each unit, over many steps at once.

Letters: T time, B lanes, N units, C steps of a block, K blocks.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Scan", "linear_scan"]

Scan: TypeAlias = Literal["auto", "parallel", "sequential"]

_BLOCK = 16
"""Steps of a block, C: of 8, 16, 32 and 64 the fastest, or within a tenth of it, for most sizes."""

_FEWEST_STEPS, _MOST_NUMBERS = 64, 1024
"""Where "parallel" pays on a CPU: from so many steps on, for states of so many numbers at most (`benchmarks/speed`)."""


def linear_scan(inputs: Tensor, log_decay: Tensor, state: Tensor, scan: Scan = "auto") -> Tensor:
    """Return h_t = λ h_{t-1} + u_t for all t.

    In parallel, all blocks of C steps run side by side: each block's own contribution to its end is a weighted sum,
    the states at the ends are a recurrence again, K times shorter and with the decay λ^C, and from these all blocks
    are run at once. That is about C calls for each of log_C(T) levels instead of T in all, and twice the arithmetic: a
    gain where a step is so small that it is the call that takes the time.

    Args:
        inputs: u. Shape (T, B, N), complex.
        log_decay: log λ, with a real part below 0. Shape (N,), complex.
        state: h before the first step. Shape (B, N), complex.
        scan: "parallel", "sequential" (one step after another), or "auto": the faster by measurement on a CPU. On any
            other device, where a step costs a launch whatever its size, "auto" is parallel from 64 steps on; that is
            not measured.

    Exactness: the two differ by rounding only, in values and in gradients.

    Cost: sequential: T calls, T B N numbers of memory. Parallel: about C log_C(T) calls, twice that memory.
    """
    steps, *size = inputs.shape
    if scan == "auto":
        pays = not inputs.is_cpu or size[0] * size[1] <= _MOST_NUMBERS
        scan = "parallel" if steps >= _FEWEST_STEPS and pays else "sequential"
    if scan == "sequential":
        return torch.stack(_steps(inputs.unbind(), log_decay.exp(), state))
    return _blocks(inputs, log_decay, state)


def _steps(inputs: tuple[Tensor, ...], decay: Tensor, state: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for each in inputs:
        state = torch.addcmul(each, decay, state)
        found.append(state)
    return found


def _blocks(inputs: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    steps, lanes, units = inputs.shape
    if steps <= _BLOCK:
        return torch.stack(_steps(inputs.unbind(), log_decay.exp(), state))
    missing = -steps % _BLOCK
    if missing:  # zeros after the last step change no step before them
        inputs = torch.cat([inputs, inputs.new_zeros(missing, lanes, units)])
    blocks = inputs.reshape(-1, _BLOCK, lanes, units)
    lags = torch.arange(_BLOCK - 1, -1, -1, dtype=log_decay.real.dtype, device=log_decay.device)
    weights = (lags[:, None] * log_decay).exp()
    ends = (blocks[:-1] * weights[:, None]).sum(1)
    starts = torch.cat([state[None], _blocks(ends, _BLOCK * log_decay, state)])
    states = torch.stack(_steps(blocks.unbind(1), log_decay.exp(), starts), 1)
    return states.reshape(-1, lanes, units)[:steps]
