"""What a piece of work costs: the memory that autograd holds for it, and its time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

__all__ = ["HeldBytes", "held_for_backward", "in_turn"]


@dataclass(eq=False)
class HeldBytes:
    """The memory held for backward passes.

    Attributes:
        now: bytes held at the moment.
        peak: the most that was held at one time.
    """

    now: int = 0
    peak: int = 0


@contextmanager
def held_for_backward(without: Iterable[Tensor] = ()) -> Generator[HeldBytes]:
    """Count the bytes of the tensors that autograd keeps for backward passes, whatever the device.

    What is counted is what grows with the look-back: each storage once, as long as some graph holds it. The
    parameters, gradients and the allocator's own reserve are not in it.

    Args:
        without: tensors that are there anyway, as the parameters are.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> with held_for_backward([x]) as held:
        ...     y = x.exp().sum()
        >>> held.peak
        4000
    """
    held = HeldBytes()
    known = {each.untyped_storage().data_ptr() for each in without}
    users: dict[int, int] = {}

    def release(storage: int, size: int) -> None:
        users[storage] -= 1
        if not users[storage]:
            held.now -= size

    def pack(tensor: Tensor) -> _Packed:
        packed = _Packed(tensor.detach())  # a saved result would hold its own graph, in a circle
        if tensor.layout == torch.strided:
            memory = tensor.untyped_storage()
            storage, size = memory.data_ptr(), memory.nbytes()
            if storage and storage not in known:
                users[storage] = users.get(storage, 0) + 1
                if users[storage] == 1:
                    held.now += size
                    held.peak = max(held.peak, held.now)
                weakref.finalize(packed, release, storage, size)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, _Packed.unpack):
        yield held


class _Packed:
    """A saved tensor; that it is no longer there says that the graph has let go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Return the median seconds that each side took; they take turns, so that a busy machine is busy for all."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for each in range(rounds + warm_up):
        for name, work in sides.items():
            begin = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if each >= warm_up:
                samples[name].append(time.perf_counter() - begin)
    return {name: median(taken) for name, taken in samples.items()}
