"""river's classifiers and regressors, made of a model that carries its state from row to row.

They are called as all of river's are: dicts in, one row at a time, in pipelines, with its metrics, its progressive
validation and its drift detectors. The rows have an order: each prediction depends on all rows before it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from river import base, drift
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt.errors import CheckpointWarning, ConfigError, ShapeError
from tbptt.estimators import TBPTT, Estimator
from tbptt.guards import ClipNorm, Guard, NonFinite
from tbptt.loss import Loss
from tbptt.models import SequenceModel
from tbptt.online import Online
from tbptt.online.classes import Classes
from tbptt.randomness import random_state

__all__ = ["Classifier", "Regressor", "detector"]

Build = Callable[[int, int], nn.Module]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Features = dict[Hashable, Any]


def _lstm(num_features: int, num_outputs: int) -> nn.Module:
    return SequenceModel(num_features, num_outputs, hidden=32)


def _adam(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def detector(name: str) -> Any:
    """Return a drift detector of `river.drift`, as it is by default.

    Args:
        name: of its class, such as "ADWIN", "PageHinkley" or "KSWIN".

    Raises:
        ConfigError: there is none of that name.
    """
    known = {each: kind for each, kind in vars(drift).items() if isinstance(kind, type) and _detects(kind)}
    if name not in known:
        raise ConfigError(
            f"a drift detector of river, one of {', '.join(sorted(known))}, was expected, but {name!r} came",
            fix="ADWIN",
        )
    return known[name]()


def _detects(kind: type) -> bool:
    detects = issubclass(kind, base.DriftDetector | base.DriftAndWarningDetector)
    return detects and kind.__name__ not in ("DummyDriftDetector", "NoDrift")


class _Rows:
    """An `Online` that is built at the first row, when the features are known; pickled as numbers, without graphs.

    Args:
        outputs: of the model.
        loss: of the model's outputs.
        settings: the arguments of the estimator that it belongs to.
    """

    def __init__(self, outputs: int, loss: Loss, settings: dict[str, Any]) -> None:
        self.outputs, self.loss, self.settings = outputs, loss, settings
        self.names: tuple[Hashable, ...] | None = None
        self.online: Online | None = None

    def check(self, x: Features) -> None:
        """Refuse a row that has other features."""
        self._ready(x)
        self._numbers(x)

    def predict(self, x: Features) -> Tensor:
        """Return the model's outputs for a row."""
        return self._ready(x).predict_one(self._numbers(x))

    def learn(self, x: Features, y: float | int) -> None:
        """Learn from a row."""
        self._ready(x).learn_one(self._numbers(x), y)

    def _ready(self, x: Features) -> Online:
        if self.online is None:
            if not x:
                raise ConfigError("a row with features was expected first, but it has none: there is nothing to read")
            self.names = tuple(sorted(x, key=str))  # so that the order in a dict says nothing
            self.online = self._built(len(self.names))
        return self.online

    def _built(self, num_features: int) -> Online:
        given = self.settings
        build: Build = given["build"] or _lstm
        make: MakeOptimizer = given["optimizer"] or _adam
        estimator: Estimator = given["estimator"] or TBPTT(k1=8, k2=24)
        with torch.random.fork_rng(devices=[]):  # the global generator is somebody else's
            torch.manual_seed(given["seed"])
            model = build(num_features, self.outputs)
            estimator.prepare(model, torch.zeros(1, 1, num_features))
        guards: Sequence[Guard] | None = copy.deepcopy(given["guards"])
        if guards is None:
            unbiased = estimator.kind == "unbiased"  # clipping would destroy what it promises
            guards = [NonFinite("raise"), *([] if unbiased else [ClipNorm(1.0)])]
        watch = copy.deepcopy(given["drift"])
        return Online(model, self.loss, make(model.parameters()), estimator, guards=guards, drift=watch)

    def _numbers(self, x: Features) -> Tensor:
        assert self.names is not None
        missing, unknown = self.settings["missing"], [] if self.settings["ignore_new"] else x.keys() - set(self.names)
        if unknown:
            raise ShapeError(
                f"the features of the first row were expected, {_shown(self.names)}, but {_shown(unknown)} came as "
                "well: the model has no input for what is new",
                fix="ignore_new=True leaves new features out; compose.Select(...) before it chooses them",
            )
        if missing is None and len(x) < len(self.names) + len(unknown):
            absent = [name for name in self.names if name not in x]
            if absent:
                raise ShapeError(
                    f"the features of the first row were expected, {_shown(self.names)}, but {_shown(absent)} did not "
                    "come: no number can be made up for what is missing",
                    fix="missing=0.0 puts a number in its place; or preprocessing.StatImputer() before it",
                )
        return torch.tensor([_number(name, x.get(name, missing)) for name in self.names], dtype=torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.online is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # a pickle can hold any detector
                saved = self.online.state_dict()
            saved["drift"]["detector"] = self.online.drift
            del saved["random"]  # global, and not this model's to set
            state["online"] = {"model": self.online.model.state_dict(), "rest": saved}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        saved: Any = state["online"]
        if saved is not None:
            assert self.names is not None
            self.online = self._built(len(self.names))
            self.online.model.load_state_dict(saved["model"])
            self.online.load_state_dict(saved["rest"] | {"random": random_state()})


def _number(name: Hashable, value: Any) -> float:
    if isinstance(value, str) or value is None:
        raise ShapeError(
            f"numbers were expected, but feature {name!r} is {value!r}: the model reads nothing else",
            fix="preprocessing.OneHotEncoder() before it, or compose.SelectType(numbers.Number)",
        )
    return float(value)


def _skipped(missing: float | None, ignore_new: bool) -> set[str]:
    """Return those of river's checks in which features come and go, where such rows are refused."""
    if missing is not None and ignore_new:
        return set()
    return {"check_emerging_features", "check_disappearing_features", "check_radically_disappearing_features"}


def _shown(names: Iterable[Hashable]) -> str:
    return ", ".join(sorted(map(str, names)))


class Regressor(base.Regressor):
    """Predict a number from each row and all rows before it.

    Scale features and target as for any gradient method: `preprocessing.StandardScaler() | Regressor()`, and
    `preprocessing.TargetStandardScaler(regressor=...)` around it. The model is built at the first row.

    Args:
        build: (features, outputs) -> model; `outputs` is 1, and the model's outputs are (T, B). None: an LSTM of 32
            units. A function of a module, not a lambda, if the regressor is to be pickled.
        estimator: how the gradient is made; None: `TBPTT(k1=8, k2=24)`.
        optimizer: parameters -> optimizer; None: Adam at 3e-3. `functools.partial(torch.optim.SGD, lr=0.1)`.
        loss: None: the squared error.
        guards: None: `NonFinite("raise")`, and `ClipNorm(1.0)` unless the estimator is unbiased.
        drift: a detector that sees the loss of each prediction; a copy of it is used.
        missing: what stands in for a feature that a row does not have; None: such a row is refused.
        ignore_new: whether features that the first row did not have are left out; else such a row is refused.
        seed: of the weights. Whatever draws later draws from torch's global generator.

    Raises:
        ShapeError: when called with a row of other features, or with words for numbers.
        NonFiniteError: when called with NaN or infinity.

    Exactness: as `tbptt.Online`; passes river's estimator checks (tests/integrations/test_river.py, river 0.26.1).
        `missing` and `ignore_new` are needed for those in which features come and go.

    Example:
        >>> regressor = Regressor(estimator=TBPTT(k1=1, k2=8))
        >>> for number in range(3):
        ...     prediction = regressor.predict_one({"a": 0.1 * number, "b": 1.0})
        ...     regressor.learn_one({"a": 0.1 * number, "b": 1.0}, 0.5)
        >>> regressor.online.updates
        3
    """

    def __init__(
        self,
        build: Build | None = None,
        *,
        estimator: Estimator | None = None,
        optimizer: MakeOptimizer | None = None,
        loss: Loss | None = None,
        guards: Sequence[Guard] | None = None,
        drift: Any = None,
        missing: float | None = None,
        ignore_new: bool = False,
        seed: int = 0,
    ) -> None:
        self.build, self.estimator, self.optimizer, self.loss = build, estimator, optimizer, loss
        self.guards, self.drift, self.missing = guards, drift, missing
        self.ignore_new, self.seed = ignore_new, seed
        self._rows = _Rows(1, loss or nn.MSELoss(), dict(vars(self)))

    def _unit_test_skips(self) -> set[str]:
        return _skipped(self.missing, self.ignore_new)

    @property
    def online(self) -> Online | None:
        """The learner inside; None before the first row."""
        return self._rows.online

    def predict_one(self, x: Features) -> float:
        """Return the prediction for a row; nothing is changed by it, but that the first row builds the model."""
        return float(self._rows.predict(x))

    def learn_one(self, x: Features, y: float) -> None:
        """Learn from a row."""
        self._rows.learn(x, float(y))


class Classifier(base.Classifier):
    """Predict the class of each row from it and all rows before it.

    Scale the features: `preprocessing.StandardScaler() | Classifier()`. The model is built at the first row.

    Args:
        build: (features, outputs) -> model of outputs (T, B, outputs); None: an LSTM of 32 units. A function of a
            module, not a lambda, if the classifier is to be pickled.
        classes: all of them; None: they are learned as they appear.
        max_classes: outputs for those that appear; only without `classes`.
        estimator: how the gradient is made; None: `TBPTT(k1=8, k2=24)`.
        optimizer: parameters -> optimizer; None: Adam at 3e-3.
        guards: None: `NonFinite("raise")`, and `ClipNorm(1.0)` unless the estimator is unbiased.
        drift: a detector that sees the loss of each prediction; a copy of it is used.
        missing: what stands in for a feature that a row does not have; None: such a row is refused.
        ignore_new: whether features that the first row did not have are left out; else such a row is refused.
        seed: of the weights. Whatever draws later draws from torch's global generator.

    Raises:
        ConfigError: when called with a class that is none of them, or one too many.
        ShapeError: when called with a row of other features, or with words for numbers.
        NonFiniteError: when called with NaN or infinity.

    Exactness: as `tbptt.Online`; passes river's estimator checks (tests/integrations/test_river.py, river 0.26.1).
        `missing` and `ignore_new` are needed for those in which features come and go.

    Example:
        >>> classifier = Classifier(classes=("no", "yes"))
        >>> classifier.learn_one({"a": 1.0}, "yes")
        >>> sorted(classifier.predict_proba_one({"a": 1.0}))
        ['no', 'yes']
    """

    def __init__(
        self,
        build: Build | None = None,
        *,
        classes: tuple[Hashable, ...] | None = None,
        max_classes: int = 16,
        estimator: Estimator | None = None,
        optimizer: MakeOptimizer | None = None,
        guards: Sequence[Guard] | None = None,
        drift: Any = None,
        missing: float | None = None,
        ignore_new: bool = False,
        seed: int = 0,
    ) -> None:
        self.build, self.estimator, self.optimizer = build, estimator, optimizer
        self.guards, self.drift, self.missing = guards, drift, missing
        self.ignore_new, self.seed = ignore_new, seed
        self.classes, self.max_classes = classes, max_classes
        settings = dict(vars(self))
        self._known = Classes[Hashable](classes, max_classes)
        self._rows = _Rows(self._known.most, nn.CrossEntropyLoss(), settings)

    def _unit_test_skips(self) -> set[str]:
        return _skipped(self.missing, self.ignore_new)

    @property
    def _multiclass(self) -> bool:
        return True

    @property
    def online(self) -> Online | None:
        """The learner inside; None before the first row."""
        return self._rows.online

    def predict_proba_one(self, x: Features, **kwargs: Any) -> dict[Any, float]:
        """Return the probability of each class that is known; empty before there is one.

        Outputs that stand for no class yet are left out, and the rest add up to 1.
        """
        del kwargs  # river's signature has them, for others
        scores = self._rows.predict(x)[: len(self._known)]
        return dict(zip(self._known.names, scores.double().softmax(0).tolist(), strict=True))

    def learn_one(self, x: Features, y: Any) -> None:
        """Learn from a row."""
        self._known.check(y)
        self._rows.check(x)  # first: a row that is refused makes no class known
        self._rows.learn(x, self._known.index(y))
