"""Ratios measured side by side: every side in one process, in turn, many times; medians.

A time on a shared machine means little; the ratio of two that were taken in alternation means something.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return the seconds that each side took, round by round; the order rotates from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for each in range(rounds + warm_up):
        for name in names[each % len(names) :] + names[: each % len(names)]:
            begin = time.perf_counter()
            sides[name]()
            if each >= warm_up:
                samples[name].append(time.perf_counter() - begin)
    return samples


def ratio(samples: dict[str, list[float]], side: str, against: str) -> float:
    """Return the median, over the rounds, of the ratio of two sides of the same round."""
    return median(a / b for a, b in zip(samples[side], samples[against], strict=True))


def save(name: str, figures: dict[str, Any], samples: dict[str, Any], **about: Any) -> None:
    """Write figures and raw samples, with what is needed to judge them, and print the figures."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    document = {
        "benchmark": name,
        "figures": figures,
        "about": about
        | {
            "commit": git("rev-parse", "HEAD"),
            "changed_files": len(git("status", "--porcelain", "--", "src").splitlines()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        },
        "samples": samples,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    for key, value in figures.items():
        print(f"{key:<60} {value:.3f}" if isinstance(value, float) else f"{key:<60} {value}")
    print(f"written: {path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
