"""The same in a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tbptt.report.log import RunLog
from tbptt.report.run import alarms, best_validation

__all__ = ["brief", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_LETTERS = "_.-~=+*#"  # for a terminal that has no blocks


def sparkline(values: Sequence[float], width: int = 40, *, blocks: bool = True) -> str:
    """Return a picture of a curve in one line; "!" where not all of it is finite.

    Example:
        >>> sparkline([1.0, 2.0, 3.0, float("nan"), 1.0], blocks=False)
        '_=#!_'
    """
    if not len(values):
        return ""
    parts = np.array_split(np.asarray(values, dtype=np.float64), min(width, len(values)))
    means = np.array([part.mean() if np.isfinite(part).all() else np.nan for part in parts])
    finite = means[np.isfinite(means)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    signs = _BLOCKS if blocks else _LETTERS
    heights = (means - low) / (high - low or 1.0) * (len(signs) - 1)
    return "".join(signs[round(height)] if np.isfinite(height) else "!" for height in heights.tolist())


def brief(log: RunLog, *, blocks: bool = True) -> list[str]:
    """Return a run in lines for a terminal: loss, best validation, speed and memory, alarms, what is missing."""
    updates, timing = log.lines("update"), log.lines("timing")
    losses = updates.series("update", "loss").y.tolist()
    found: list[str] = []
    if losses:
        picture = sparkline(losses, blocks=blocks)
        found.append(f"loss      {picture}  {losses[0]:.4f} to {losses[-1]:.4f}, update {updates.last('update')}")
    best = best_validation(log)
    if best is not None:
        found.append(
            f"held out  best {best[1]:.4f} at update {best[0]}, last {log.lines('validation').last('loss'):.4f}"
        )
    rate, memory = timing.last("lane_steps_per_s"), timing.last("peak_rss_bytes")
    measured = [f"{rate:,.0f} steps/s in all lanes"] if rate is not None else []
    measured += [f"{memory / 1e6:,.0f} MB at most"] if memory is not None else []
    if measured:
        found.append(f"speed     {', '.join(measured)}")
    for name, each in alarms(log).items():
        update, message, fix = each[0]
        times = f" ({len(each)} times)" if len(each) > 1 else ""
        found.append(f"alarm     {name} at update {update}{times}: {message}")
        found += [f"hint: {fix}"] if fix else []
    return found + [f"note      {note}" for note in log.notes]
