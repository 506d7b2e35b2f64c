"""What has failed, without stopping what has not."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from tbptt.errors import TbpttError

__all__ = ["Failures"]

_Each = TypeVar("_Each")


class Failures:
    """The first failure of each estimator, in a sentence.

    Attributes:
        reasons: by name.
        errors: what was raised, by name; failures that are no errors are not among them.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}

    def add(self, name: str, reason: str) -> None:
        """Note what has gone wrong, unless something had before."""
        self.reasons.setdefault(name, reason)

    @contextmanager
    def kept(self, name: str) -> Generator[None]:
        """Note an error inside the block instead of letting it end the comparison."""
        try:
            yield
        except Exception as error:  # whatever an estimator or a model says is a result, and stands on the page
            self.errors.setdefault(name, error)
            told = error.message if isinstance(error, TbpttError) else f"{type(error).__name__}: {error}"
            self.add(name, told)

    def sound(self, given: Mapping[str, _Each]) -> dict[str, _Each]:
        """Return those of the given that have not failed."""
        return {name: each for name, each in given.items() if name not in self.reasons}

    def raise_if_all(self, names: Collection[str]) -> None:
        """Raise the first error, if all of these have raised one: then there is nothing to show."""
        if all(name in self.errors for name in names):
            raise next(iter(self.errors.values()))
