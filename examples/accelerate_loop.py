"""Hugging Face Accelerate: the bare loop, with a stop in mid-stream.

    python examples/accelerate_loop.py                            one process
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Trains a small GRU to recall a symbol of 4 steps ago, in two halves: the second goes on from what `save_state` wrote.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

import tbptt
from tbptt.errors import EndOfStream
from tbptt.streams import DelayedRecall
from tbptt.tree import to


class Place:
    """What Accelerate must save besides weights, optimizer and random generators: the carry and the stream's place.

    Each rank has its own, and Accelerate has one file for all: so they are gathered.
    """

    def __init__(self, accelerator: Accelerator, carry: tbptt.Carry, stream: tbptt.Stream) -> None:
        self.accelerator, self.carry, self.stream = accelerator, carry, stream

    def state_dict(self) -> dict[str, Any]:
        """Return the place of every rank; Accelerate calls this on all of them."""
        mine = {"carry": self.carry.state_dict(), "stream": self.stream.state_dict()}
        return {"ranks": gather_object([mine])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place of this rank."""
        mine = state["ranks"][self.accelerator.process_index]
        self.carry.load_state_dict(to(mine["carry"], self.accelerator.device))
        self.stream.load_state_dict(mine["stream"])


def over_ranks(accelerator: Accelerator, estimate: tbptt.Estimate) -> tbptt.Estimate:
    """Return the estimate for the lanes of all ranks: sums over all, divided by counts over all."""
    if accelerator.num_processes == 1:
        return estimate
    counts = torch.tensor([estimate.num_injected, estimate.num_terms], device=accelerator.device)
    num_injected, num_terms = accelerator.reduce(counts, "sum").tolist()
    share = estimate.num_injected / max(num_injected, 1)
    loss_sum = accelerator.reduce(estimate.loss_sum, "sum")
    return replace(
        estimate,
        loss=loss_sum / num_terms,
        loss_sum=loss_sum,
        num_terms=num_terms,
        num_injected=num_injected,
        gradients={name: accelerator.reduce(each * share, "sum") for name, each in estimate.gradients.items()},
    )


class Run:
    """Model, optimizer, stream and carry, made ready by Accelerate."""

    def __init__(self, steps: int = 4000) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(0)
        model = tbptt.SequenceModel(2, 2, hidden=24, embedding=8)
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, adam)
        # The estimator makes the gradient without .backward(), so DistributedDataParallel has nothing to do.
        self.bare: nn.Module = self.accelerator.unwrap_model(self.model)
        self.stream = DelayedRecall(4, 16, symbols=2, steps=steps, seed=self.accelerator.process_index)
        self.estimator = tbptt.TBPTT(k1=8, k2=12)
        self.clip = tbptt.ClipNorm(1.0)
        self.place = Place(self.accelerator, self.estimator.init(self.bare, self.stream.lanes), self.stream)
        self.accelerator.register_for_checkpointing(self.place)

    def train(self, updates: int) -> list[float]:
        """Go on for so many updates; return their losses."""
        losses: list[float] = []
        while len(losses) < updates:
            try:
                window = self.stream.read(self.estimator.next_steps(self.place.carry))
            except EndOfStream:  # at the same step on every rank
                self.stream.rewind()
                continue
            window = window.to(self.accelerator.device)
            estimate, self.place.carry = self.estimator.estimate(
                self.bare, nn.CrossEntropyLoss(), self.place.carry, window
            )
            estimate = self.clip(over_ranks(self.accelerator, estimate))
            estimate.apply(self.bare)
            self.optimizer.step()
            losses.append(float(estimate.loss))
        return losses


def main(half: int = 200) -> list[float]:
    """Train in two halves, as after a stop, and return all losses."""
    first = Run()
    folder = [tempfile.mkdtemp() if first.accelerator.is_main_process else ""]
    directory = Path(broadcast_object_list(folder)[0])
    losses = first.train(half)
    first.accelerator.save_state(str(directory))

    second = Run()  # a new process would do the same
    second.accelerator.load_state(str(directory))
    losses += second.train(half)
    for begin in range(0, 2 * half, half // 2):
        mean = sum(losses[begin : begin + half // 2]) / (half // 2)
        second.accelerator.print(f"updates {begin:4d} to {begin + half // 2:4d}: loss {mean:.4f}")
    return losses


if __name__ == "__main__":
    main()
