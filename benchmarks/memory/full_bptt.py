"""Full backpropagation over sequences far longer than memory: `FullBPTT` against plain autograd.

    python benchmarks/memory/full_bptt.py [--rounds 7]

One lane of an LSTM of 64 units with a linear head, one update over the whole pass. In each round, in turn: 10^5 and
10^6 steps by plain autograd and by `FullBPTT()` from a stream, each in a process of its own, on one thread. Plain
autograd over 10^6 steps takes 4.3 GB; the ratio to ten times its time over 10^5 is given, too.

The memory is the peak resident set (VmHWM in /proc/self/status, Linux) above that right after `import torch`: the data,
32 bytes a step, and the library itself are in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

MIB = 2**20
SHORT, LONG = 10**5, 10**6


def status(key: str) -> int:
    """Return a field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def run(side: str, steps: int) -> dict[str, float]:
    """Compute one gradient over so many steps."""
    before = status("VmRSS")
    import tbptt

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tbptt.SequenceModel(4, 4, hidden=64)
    inputs, targets = torch.randn(steps, 4), torch.randn(steps, 4)
    begin = time.perf_counter()
    if side == "plain":
        outputs, _ = model(inputs[:, None], None)
        loss = torch.nn.functional.mse_loss(outputs, targets[:, None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    else:
        stream = tbptt.ArrayStream(inputs, targets, lanes=1)
        estimator = tbptt.FullBPTT()
        carry = estimator.init(model, 1)
        estimate, _ = estimator.estimate(model, torch.nn.MSELoss(), carry, estimator.read(stream, carry))
        assert estimate.num_injected == steps
        gradients = [estimate.gradients[name] for name, _ in model.named_parameters() if name in estimate.gradients]
    seconds = time.perf_counter() - begin
    norm = float(torch.nn.utils.get_total_norm(gradients))
    return {"seconds": seconds, "peak": status("VmHWM") - before, "norm": norm}


def measure(side: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(rounds: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from side_by_side import save

    sides = {
        "plain 1e5": ("plain", SHORT),
        "full 1e5": ("full", SHORT),
        "plain 1e6": ("plain", LONG),
        "full 1e6": ("full", LONG),
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides)[index % 4 :] + list(sides)[: index % 4]:
            samples[name].append(measure(*sides[name]))

    def middle(name: str, key: str) -> float:
        return median(each[key] for each in samples[name])

    def ratio(name: str, against: str, factor: float = 1.0) -> float:
        pairs = zip(samples[name], samples[against], strict=True)
        return median(a["seconds"] / (factor * b["seconds"]) for a, b in pairs)

    apart = abs(middle("full 1e5", "norm") / middle("plain 1e5", "norm") - 1)
    figures: dict[str, Any] = {
        "peak MiB above the import of torch, FullBPTT, 10^6 steps (< 1024)": middle("full 1e6", "peak") / MIB,
        "peak MiB, FullBPTT, 10^5 steps": middle("full 1e5", "peak") / MIB,
        "peak MiB, plain autograd, 10^5 steps": middle("plain 1e5", "peak") / MIB,
        "peak MiB, plain autograd, 10^6 steps": middle("plain 1e6", "peak") / MIB,
        "time, FullBPTT / plain autograd, 10^6 steps": ratio("full 1e6", "plain 1e6"),
        "time, FullBPTT / plain autograd extrapolated, 10^6 steps (<= 1.6)": ratio(
            "full 1e6", "plain 1e5", LONG / SHORT
        ),
        "time, FullBPTT / plain autograd, 10^5 steps": ratio("full 1e5", "plain 1e5"),
        "gradient norms apart, 10^5 steps, single precision, relative": f"{apart:.1e}",
    }
    save("memory_full_bptt", figures, samples, steps={"short": SHORT, "long": LONG}, sides="one thread each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", choices=["plain", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run(given.side, given.steps)))
    else:
        main(given.rounds)
