"""What `tbptt learn` does with a row: scale, predict, learn, and count how well it went.

Letters: D numbers of a row, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.cli.build import build_guards, build_model, build_optimizer
from tbptt.cli.config import Config
from tbptt.cli.rows import BadRow, Row, Table
from tbptt.cli.rundir import Facts
from tbptt.errors import ConfigError
from tbptt.online import Online
from tbptt.online.classes import Classes
from tbptt.online.scaling import Scaling
from tbptt.randomness import seed_everything

__all__ = ["ByClass", "ByNumber", "RowLearner", "Target", "target_of"]


class Target(ABC):
    """What is predicted: how many outputs that takes, and how they read.

    Attributes:
        outputs: of the model.
        loss: by the name that a run has for it.
        score: what `right` adds up to, by name, as a mean over the rows.
    """

    outputs: int
    loss: str
    score: str

    @abstractmethod
    def check(self, label: str, line: int) -> None:
        """Refuse a label that cannot be learned from, before anything has changed.

        Raises:
            BadRow: it is none.
        """

    @abstractmethod
    def text(self, outputs: Tensor) -> str:
        """Return a prediction as it is printed; empty where there is nothing to say yet."""

    @abstractmethod
    def right(self, text: str, label: str) -> float:
        """Return how good, or how far off, a printed prediction was."""

    @abstractmethod
    def learned(self, label: str) -> float | int:
        """Take a label in, and return what the loss compares with."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the labels so far."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""


class ByNumber(Target):
    """A number, scaled by the mean and deviation of the labels so far."""

    outputs, loss, score = 1, "mse", "mae"

    def __init__(self, table: Table) -> None:
        self.table = table
        self.scaling = Scaling.of(1)

    def check(self, label: str, line: int) -> None:
        """Refuse what is no number."""
        self.table.number(label, line)

    def text(self, outputs: Tensor) -> str:
        """Return the number in the labels' own unit, with all digits that it has."""
        return f"{self.scaling.unscaled(np.array([float(outputs)]))[0]:.9g}"

    def right(self, text: str, label: str) -> float:
        """Return the absolute error."""
        return abs(float(text) - float(label))

    def learned(self, label: str) -> float:
        """Return the label in standard deviations from the mean."""
        value = np.array([float(label)])
        self.scaling = self.scaling.seen(value)
        return float(self.scaling.scaled(value)[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the scaling."""
        return self.scaling.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.scaling = Scaling.from_state_dict(state)


class ByClass(Target):
    """One of several words; the most probable of those seen so far, or named beforehand, is predicted."""

    loss, score = "cross_entropy", "accuracy"

    def __init__(self, names: Sequence[str] | None, most: int) -> None:
        self.classes = Classes[str](names, most)
        self.outputs = self.classes.most

    def check(self, label: str, line: int) -> None:
        """Refuse a class that no output is left for."""
        try:
            self.classes.check(label)
        except ConfigError as error:
            raise BadRow(
                f"in line {line}, {error.message}", fix="--classes names them all; --max-classes provides for more"
            ) from error

    def text(self, outputs: Tensor) -> str:
        """Return the most probable class."""
        return self.classes.names[int(outputs[: len(self.classes)].argmax())] if len(self.classes) else ""

    def right(self, text: str, label: str) -> float:
        """Return 1 where they agree."""
        return float(text == label)

    def learned(self, label: str) -> int:
        """Return the output of the class."""
        return self.classes.index(label)

    def state_dict(self) -> dict[str, Any]:
        """Return the classes."""
        return self.classes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.classes.load_state_dict(state)


def target_of(table: Table, first: str, classes: Sequence[str] | None, most: int) -> tuple[Target, str]:
    """Return what is predicted, and why that.

    Args:
        table: the columns.
        first: the label of the first row.
        classes: as they were named; None: they were not.
        most: how many there may be then.

    Raises:
        ConfigError: the first row has no label to tell by.
    """
    name = table.target
    if classes is not None:
        return ByClass(classes, most), f"{name} is one of the {len(classes)} classes of --classes"
    if not first:
        raise ConfigError(
            f"a label was expected in the first row, but its column {name!r} is empty: whether numbers or words "
            "are to be predicted cannot be told",
            fix="--classes yes,no for words; or begin with a row that has a label",
        )
    try:
        table.number(first, 1)
    except BadRow:
        return ByClass(None, most), f"{name} is one of at most {most} words, as the first row has the word {first!r}"
    return ByNumber(table), f"{name} is a number, as in the first row ({first}); --classes for classes"


class RowLearner:
    """A learner of rows, with all that has to be remembered of them.

    Args:
        config: the model, the estimator, the optimizer and the guards.
        table: the columns.
        target: what is predicted.
        drift: a detector; None for none.

    Attributes:
        rows: predicted.
        labelled: of them, those that were learned from.
    """

    def __init__(self, config: Config, table: Table, target: Target, drift: Any = None) -> None:
        self.table, self.target = table, target
        seed_everything(config.run.seed)
        facts = Facts(inputs=len(table.features), outputs=target.outputs, symbols=False, loss=target.loss, metrics={})
        model, estimator = build_model(config, facts), config.build_estimator()
        optimizer = build_optimizer(config, estimator, model)
        loss = nn.MSELoss() if target.loss == "mse" else nn.CrossEntropyLoss()
        self.online = Online(model, loss, optimizer, estimator, guards=build_guards(config), drift=drift)
        self.scaling = Scaling.of(len(table.features))
        self.rows = self.labelled = 0
        self._all, self._lately = _Mean(), {"score": _Mean(), "loss": _Mean()}

    def predict(self, row: Row) -> str:
        """Return the prediction for a row, as text; nothing is changed by it."""
        return self.target.text(self.online.predict_one(self._scaled(row)))

    def learn(self, row: Row, predicted: str) -> None:
        """Learn from a row, of which this was the prediction."""
        inputs, updates = self._scaled(row), self.online.updates
        self.scaling = self.scaling.seen(row.numbers)
        self.rows += 1
        if not row.label:
            self.online.learn_one(inputs)
            return
        if predicted:
            score = self.target.right(predicted, row.label)
            self._all.add(score)
            self._lately["score"].add(score)
        self.labelled += 1
        self.online.learn_one(inputs, self.target.learned(row.label))
        if self.online.updates > updates:
            self._lately["loss"].add(self.online.metrics["loss"])

    @property
    def has_news(self) -> bool:
        """Whether a row was scored since the last report."""
        return self._lately["score"].count > 0

    def report(self) -> str:
        """Return how well it goes: since the last report, and since the beginning."""
        score, lately = self.target.score, self._lately
        said = (
            f"row {self.rows}: {score} {lately['score'].value():.6g} lately, {self._all.value():.6g} in all; "
            f"loss {lately['loss'].value():.6g}; {self.online.updates} updates"
        )
        for each in lately.values():
            each.forget()
        return said

    def state_dict(self) -> dict[str, Any]:
        """Return all but the model's own state_dict."""
        return {
            "online": self.online.state_dict(),
            "scaling": self.scaling.state_dict(),
            "target": self.target.state_dict(),
            "rows": self.rows,
            "labelled": self.labelled,
            "means": [vars(each) for each in (self._all, *self._lately.values())],
        }

    def load_state_dict(self, state: dict[str, Any], model_state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, and the model's own."""
        self.online.model.load_state_dict(model_state)
        self.online.load_state_dict(state["online"])
        self.scaling = Scaling.from_state_dict(state["scaling"])
        self.target.load_state_dict(state["target"])
        self.rows, self.labelled = state["rows"], state["labelled"]
        for each, saved in zip((self._all, *self._lately.values()), state["means"], strict=True):
            vars(each).update(saved)

    def _scaled(self, row: Row) -> Tensor:
        scaled = self.scaling.seen(row.numbers).scaled(row.numbers)  # the row itself is known when it is predicted
        return torch.tensor(scaled, dtype=torch.float32)


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    def forget(self) -> None:
        self.total, self.count = 0.0, 0
