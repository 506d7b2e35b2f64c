"""How an example is cut: into chunks that are aligned, uneven, and single steps."""

from __future__ import annotations

from collections.abc import Sequence

from tbptt.errors import ConfigError, ShapeError

__all__ = ["MAX_LANES", "MAX_STEPS", "TOLD_LANES", "cut_into", "other_sizes", "sizes_of"]

MAX_STEPS, MAX_LANES, TOLD_LANES = 24, 4, 2
"""What of the example is used, unless its chunks are given: enough to see every fault, little enough for a second."""


def sizes_of(steps: int, chunks: Sequence[int] | None, segment: int) -> list[int]:
    """Return the lengths of the chunks into which an example of so many steps is cut.

    Raises:
        ShapeError: the example is too short for its chunks, or to be cut at all.
        ConfigError: chunks that are none.
    """
    if chunks is None:
        if segment > 1:
            return _segments(steps, segment)
        if steps < 3:
            raise ShapeError(
                f"an example of at least 3 steps was expected, but {steps} came: "
                "one pass could not be compared with chunks of it",
                fix="tbptt.check(model, torch.randn(24, 4, features))",
            )
        return _thirds(min(steps, MAX_STEPS))
    sizes = list(chunks)
    if len(sizes) < 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"two or more lengths of chunks, in steps from 1, were expected, but {chunks!r} came: with one chunk "
            "nothing is carried",
            fix="chunks=(8, 8, 8)",
        )
    if sum(sizes) > steps:
        raise ShapeError(
            f"an example of at least {sum(sizes)} steps was expected, for chunks of {'+'.join(map(str, sizes))}, "
            f"but it has {steps}",
            fix="give a longer example, or shorter chunks",
        )
    return sizes


def cut_into(sizes: list[int], segment: int) -> dict[str, list[int]]:
    """Return the ways to cut the steps of some chunks, by name."""
    if segment == 1:
        return {"chunks": sizes, "uneven": _uneven(sizes), "steps": [1] * min(sum(sizes), MAX_STEPS)}
    longer = [sizes[0] + sizes[1], *sizes[2:]]  # in segments as well; and where it says that it must not be cut
    return {"chunks": sizes, "uneven": longer, "elsewhere": _uneven(sizes)}


def other_sizes(steps: int) -> list[list[int]]:
    """Return the chunks to try with a model that does not take the usual ones."""
    third = min(steps, MAX_STEPS) // 3
    return ([_thirds(steps)] if steps > MAX_STEPS else []) + [[each] * 3 for each in range(third - 1, 1, -1)]


def _segments(steps: int, segment: int) -> list[int]:
    """Return the chunks for a model that is cut into segments: three of one segment, or of several short ones."""
    chunk = segment * max(1, min(steps, MAX_STEPS) // 3 // segment)
    if steps < 3 * chunk:
        raise ShapeError(
            f"an example of at least three segments of {segment} steps was expected, but {steps} steps came: the "
            "model can be cut at the end of a segment only, and one pass is compared with chunks of it",
            fix=f"tbptt.check(model, torch.randn({3 * segment}, 4, features))",
        )
    return [chunk] * 3


def _thirds(steps: int) -> list[int]:
    third = steps // 3
    return [third, third, steps - 2 * third]


def _uneven(sizes: list[int]) -> list[int]:
    return [size for size in (sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1) if size]
