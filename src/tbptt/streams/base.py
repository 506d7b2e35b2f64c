"""What every stream can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from tbptt.errors import ConfigError, EndOfStream
from tbptt.window import Window

__all__ = ["Stream"]


class Stream(Protocol):
    """Where the steps come from: resumable, of bounded memory, with a cursor of its own.

    A stream never knows the model. Its windows carry `reset` at the first step of each pass, so that
    a second pass does not start from the end of the first.

    Attributes:
        lanes: the number of sequences side by side, B.
    """

    lanes: int

    @abstractmethod
    def read(self, steps: int) -> Window:
        """Return the next `steps` steps, fewer at the end of a pass.

        Raises:
            EndOfStream: the pass is over.
        """

    @abstractmethod
    def rewind(self) -> None:
        """Go back to the first step: the next pass."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the place of the cursor, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the cursor where `state_dict` found it."""

    def windows(self, steps: int) -> Iterator[Window]:
        """Yield the rest of one pass in windows of `steps`, then rewind.

        Raises:
            ConfigError: `steps` is not a whole number of at least 1.
        """
        while True:
            try:
                window = self.read(steps)
            except EndOfStream:
                self.rewind()
                return
            yield window


def check_steps(steps: int) -> int:
    """Return `steps`, or refuse what cannot be a number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a whole number of steps, at least 1, was expected, but {steps!r} came", fix="read(64)")
    return steps
