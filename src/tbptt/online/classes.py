"""Names of classes, and the outputs that stand for them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

from tbptt.errors import ConfigError

__all__ = ["Classes"]

_Name = TypeVar("_Name", bound=Hashable)


class Classes(Generic[_Name]):
    """Gives each class an output of the model: as they were named beforehand, or one after another as they appear.

    Args:
        names: all of them, in the order of the outputs; None: they are not known yet.
        most: how many outputs there are for those that appear.

    Attributes:
        names: those that are known, in the order of their outputs.

    Raises:
        ConfigError: fewer than two classes, or one of them twice.
    """

    def __init__(self, names: Sequence[_Name] | None, most: int) -> None:
        self.fixed = names is not None
        self.names: list[_Name] = [] if names is None else list(names)
        self.most = len(self.names) if self.fixed else most
        if self.most < 2 or len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"two classes or more were expected, each once, but {self.names if self.fixed else most} came: there "
                "would be nothing to tell apart",
                fix="name each class once",
            )
        self._index = {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def check(self, name: _Name) -> None:
        """Refuse a class that no output stands for, nor could.

        Raises:
            ConfigError: it is none of those named beforehand, or there is no output left for it.
        """
        if name in self._index or (not self.fixed and len(self.names) < self.most):
            return
        known = ", ".join(map(repr, self.names))
        why = "which were named beforehand" if self.fixed else f"as the model has no more than {self.most} outputs"
        raise ConfigError(
            f"one of the classes {known} was expected, {why}, but {name!r} came: no output stands for it",
            fix="name it among the classes" if self.fixed else "provide for more classes from the beginning",
        )

    def index(self, name: _Name) -> int:
        """Return the output of a class; of one that appears for the first time the next that is free.

        Raises:
            ConfigError: see `check`.
        """
        self.check(name)
        if name not in self._index:
            self._index[name] = len(self.names)
            self.names.append(name)
        return self._index[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the classes that are known."""
        return {"names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.names = list(state["names"])
        self._index = {name: index for index, name in enumerate(self.names)}
