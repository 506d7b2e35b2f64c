"""What training needs of memory: on long files, and with a short look-back.

    python benchmarks/memory/training.py

1. A file of 10^5 and one of 10^7 steps, memory-mapped, trained on for the same number of updates (one pass of
   the long one): peak anonymous memory (RssAnon), and how much of the file is mapped in (RssFile).
2. k1 = 256, k2 = 64, "tail", against k1 = k2 = 256: peak anonymous memory above that before the first
   window, and the bytes that autograd saves for the backward pass.

Each measurement is a process of its own; the memory is read from /proc/self/status (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

import tbptt

REPEATS = 3
MIB = 2**20


def status(key: str) -> int:
    """Return a field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Peak(tbptt.Monitor):
    """Remembers the most that was seen, after each update."""

    def __init__(self) -> None:
        self.anonymous = self.file = 0

    def update(self, update: object) -> None:
        del update  # only the process is looked at
        self.anonymous = max(self.anonymous, status("RssAnon"))
        self.file = max(self.file, status("RssFile"))


def on_file(path: str, updates: int) -> dict[str, int]:
    """Train on a mapped file of (inputs, target) rows."""
    torch.set_num_threads(1)
    rows = np.load(path, mmap_mode="r")
    stream = tbptt.ArrayStream(rows[:, :3], rows[:, 3], lanes=32)
    model = tbptt.SequenceModel(3, 1, hidden=32)
    adam = torch.optim.Adam(model.parameters())
    before, peak = status("RssFile"), Peak()
    directory = tempfile.mkdtemp()
    trainer = tbptt.Trainer(
        model, nn.MSELoss(), adam, tbptt.TBPTT(64, 64), stream, monitors=[peak], directory=directory
    )
    trainer.run(updates=updates)
    return {"anonymous": peak.anonymous, "mapped": peak.file - before, "updates": trainer.updates}


def look_back(k2: int) -> dict[str, int]:
    """Make updates of k1 = 256 and look-back k2; the peak is read inside the backward pass."""
    torch.set_num_threads(1)
    model = tbptt.SequenceModel(64, 64, hidden=256)
    inputs, targets = torch.randn(1024, 32, 64), torch.randn(1024, 32, 64)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    estimator = tbptt.TBPTT(256, k2)
    carry = estimator.init(model, 32)
    first = tbptt.Window(inputs[:1], targets[:1])
    estimator.estimate(model, nn.MSELoss(), carry, first)  # libraries take their workspaces
    parameters = [tensor.numel() * 4 for tensor in model.parameters()]
    before = status("RssAnon")
    peaks: list[int] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: peaks.append(status("RssAnon")))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, carry = estimator.estimate(model, nn.MSELoss(), carry, tbptt.Window(inputs[:256], targets[:256]))
    return {"peak": max([*peaks, status("RssAnon")]) - before, "saved": sum(saved.values()), "weights": sum(parameters)}


def measure(*words: object) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as directory:
        for rows in (10**5, 10**7):
            path = Path(directory) / f"{rows}.npy"
            array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 4))
            generator = np.random.default_rng(0)
            for begin in range(0, rows, 10**5):
                array[begin : begin + 10**5] = generator.standard_normal((10**5, 4), np.float32)
            array.flush()
            del array
        updates = -(-(10**7 // 32) // 64)
        for _ in range(REPEATS):
            for rows in (10**5, 10**7):
                found = measure("file", Path(directory) / f"{rows}.npy", updates)
                note(f"anonymous, {rows} steps", found["anonymous"])
                note(f"mapped, {rows} steps", found["mapped"])
            for k2 in (64, 256):
                found = measure("look-back", k2)
                note(f"peak, k2={k2}", found["peak"])
                note(f"saved, k2={k2}", found["saved"])
    middle = {name: median(values) for name, values in samples.items()}
    figures = {
        "RssAnon, 10^7 / 10^5 steps (within 1 %)": middle["anonymous, 10000000 steps"]
        / middle["anonymous, 100000 steps"],
        "file pages mapped in, 10^7 steps, MiB of 153": middle["mapped, 10000000 steps"] / MIB,
        "peak activation memory, k2=64 tail / k2=256 (< 0.45)": middle["peak, k2=64"] / middle["peak, k2=256"],
        "bytes saved for backward, k2=64 tail / k2=256": middle["saved, k2=64"] / middle["saved, k2=256"],
    }
    save(
        "memory_training", figures | {f"median MiB: {k}": v / MIB for k, v in middle.items()}, samples, updates=updates
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["file"]:
        print(json.dumps(on_file(sys.argv[2], int(sys.argv[3]))))
    elif sys.argv[1:2] == ["look-back"]:
        print(json.dumps(look_back(int(sys.argv[2]))))
    else:
        main()
