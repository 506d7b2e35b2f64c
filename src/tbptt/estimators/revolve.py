"""Where to keep states, when a long chain of segments is to be walked back with room for few of them.

Letters: N segments, S slots.
"""

from __future__ import annotations

from math import comb

__all__ = ["next_kept", "num_advances"]


def num_advances(segments: int, slots: int) -> int:
    """Return how many segments the best schedule runs without a graph, to walk back over all of them.

    t(N, S) = r N - C(S + r, S + 1), with r the smallest number for which C(S + r, S) >= N. Each segment is run once
    more, with a graph, which is not counted. With a slot for each segment that is N - 1.

    Args:
        segments: N, at least 1.
        slots: S, states kept at any time, that before the first segment among them; at least 1.

    Reference: Griewank & Walther (2000), "Algorithm 799: revolve", doi:10.1145/347837.347846.

    Example:
        >>> num_advances(10, 3), num_advances(100, 5), num_advances(1000, 50)
        (15, 316, 1948)
    """
    repeats = _repeats(segments, slots)
    return repeats * segments - comb(slots + repeats, slots + 1)


def next_kept(segments: int, slots: int) -> int:
    """Return after how many segments the next state is to be kept, on the way to the last of them.

    Args:
        segments: N, from the newest state that is kept to the end; at least 2.
        slots: S, that newest state's own among them; with one alone there is no room for another, and the answer is
            all but the last segment.
    """
    if slots == 1:
        return segments - 1
    repeats = _repeats(segments, slots)
    # Any split with C(S+r-2, S) <= y <= C(S+r-1, S) and C(S+r-2, S-1) <= N-y <= C(S+r-1, S-1) is a best one.
    return min(comb(slots + repeats - 1, slots), segments - comb(slots + repeats - 2, slots - 1))


def _repeats(segments: int, slots: int) -> int:
    """Return how often a segment is run without a graph at most."""
    repeats = 0
    while comb(slots + repeats, slots) < segments:
        repeats += 1
    return repeats
