"""What a run is, as a small typed configuration; the TOML file has the same sections and keys."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, create_model
from pydantic_core import PydanticCustomError

from tbptt import estimators
from tbptt.errors import ConfigError
from tbptt.estimators import ClipBoundary, Estimator
from tbptt.estimators.boundary import parse_boundary
from tbptt.length import Length, parse_length

__all__ = [
    "CORE_KEYS",
    "Config",
    "Data",
    "Guards",
    "Model",
    "Optimizer",
    "Run",
    "Schedule",
    "arguments_model",
    "estimator_classes",
]

Whole: TypeAlias = Annotated[int, Field(ge=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def _spelled_length(value: object) -> int | str:
    """Return a length as a configuration has it: a number, or a policy in its full spelling."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        parsed = parse_length(value) if isinstance(value, str) else None
    except ConfigError as error:
        if isinstance(value, str) and "(" in value:
            raise PydanticCustomError("length", "a length ({why})", {"why": error.message}) from error
        parsed = None
    if not isinstance(parsed, Length):
        raise PydanticCustomError("length", 'a whole number of steps, or a length as "Adaptive(tolerance=0.1)"')
    return str(parsed)


def _spelled_boundary(value: object) -> str | None:
    """Return a `ClipBoundary` as a configuration has it, in its full spelling."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            return str(parse_boundary(value))
    except ConfigError as error:
        raise PydanticCustomError("boundary", '"ClipBoundary(1.0)" ({why})', {"why": error.message}) from error
    raise PydanticCustomError("boundary", '"ClipBoundary(1.0)"')


SpelledLength: TypeAlias = Annotated[Any, PlainValidator(_spelled_length)]
SpelledBoundary: TypeAlias = Annotated[Any, PlainValidator(_spelled_boundary)]
_SPELLED: dict[type, tuple[Any, Callable[[str], Any]]] = {
    Length: (SpelledLength, parse_length),
    ClipBoundary: (SpelledBoundary, parse_boundary),
}
"""What stands in a configuration as it is written in Python: how it is checked, and how it is read."""


class _Section(BaseModel):
    model_config = _STRICT


class Data(_Section):
    """What is learned from.

    Args:
        source: "ecg", "shakespeare", a task ("copy", "delayed-recall", "adding"), or the path of a file: .npy,
            .npz, or any text.
        lanes: pieces read side by side, B.
        held_out: the share at the end that is validated on, not trained on; 0 for none.
        held_out_lanes: pieces that part is read in; left out: lanes. Each piece has to find its state anew.
        unit: of text: "characters" or "bytes".
        standardize: of arrays: whether inputs are scaled by the training part's mean and standard deviation.
        task: of tasks: the arguments of the stream, such as lag or length.
    """

    source: str
    lanes: Whole
    held_out: Annotated[float, Field(ge=0, lt=1)]
    held_out_lanes: Whole | None = None
    unit: Literal["characters", "bytes"] | None = None
    standardize: bool | None = None
    task: dict[str, Any] | None = None

    @property
    def lanes_held_out(self) -> int:
        """The pieces that the held-out part is read in."""
        return self.held_out_lanes or self.lanes


class Model(_Section):
    """A `tbptt.SequenceModel`, or with core = "transformer" a `tbptt.models.SegmentTransformer`; see there.

    An embedding is for symbols only. Not every core has all of the keys; `CORE_KEYS` says which.

    Args:
        hidden: the units of each recurrent layer, or the width of a transformer.
        memory: of an attentive core the slots; of a transformer the remembered steps of each layer, 0 for none.
    """

    core: Literal["lstm", "gru", "rnn", "elstm", "lru", "attentive_lstm", "attentive_gru", "transformer"] = "lstm"
    hidden: Whole
    layers: Whole = 1
    embedding: Whole | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tie_weights: bool = False
    k_att: Whole | None = None
    k_top: Whole | None = None
    memory: Annotated[int, Field(ge=0)] | None = None
    heads: Whole | None = None
    memory_tokens: Annotated[int, Field(ge=0)] | None = None
    memory_gradient: bool | None = None
    segment: Whole | None = None

    def own(self) -> dict[str, Any]:
        """Return what was set of the keys that not every core has."""
        return {key: getattr(self, key) for key in CORE_KEYS[self.core] if getattr(self, key) is not None}


CORE_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lstm", "gru", "rnn", "elstm", "lru"), ("layers", "tie_weights")),
    **dict.fromkeys(("attentive_lstm", "attentive_gru"), ("tie_weights", "k_att", "k_top", "memory")),
    "transformer": ("layers", "heads", "memory", "memory_tokens", "memory_gradient", "segment"),
}
"""The keys of [model] that each core has, besides core, hidden, embedding and dropout, which all have."""


class Optimizer(_Section):
    """One of torch's; what is left out has torch's own default.

    `predictor_lr` is the rate of the predictor of `SyntheticGradients`; left out: `lr`.
    """

    name: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    lr: Positive
    weight_decay: NotNegative | None = None
    momentum: NotNegative | None = None
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    eps: Positive | None = None
    alpha: NotNegative | None = None
    predictor_lr: Positive | None = None

    @property
    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer's class."""
        return {
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "sgd": torch.optim.SGD,
            "rmsprop": torch.optim.RMSprop,
        }[self.name]

    def arguments(self) -> dict[str, Any]:
        """Return what was set, for the class."""
        given = self.model_dump(exclude={"name", "predictor_lr"})
        return {name: value for name, value in given.items() if value is not None}


class Schedule(_Section):
    """The learning rate over a run: up linearly, then constant or down along a cosine.

    Args:
        name: "constant" or "cosine".
        warmup: updates until the full rate is reached; 0 for at once.
        final: the share of the rate that a cosine ends at.
        updates: where a cosine ends; left out: with the run.
    """

    name: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    updates: Whole | None = None


class Guards(_Section):
    """What may happen to a gradient before the optimizer sees it, in this order; what is left out does not happen.

    Args:
        non_finite: whether NaN and infinity end the run, or are left out.
        spike_rollback: updates between two snapshots for `SpikeRollback` to go back to.
        clip_value: the largest size of an element.
        adaptive_clip: the largest norm of a unit's gradient, in norms of its weights.
        z_clip: how many deviations above its running mean the norm may be.
        clip_norm: the largest norm; 0 for any, where the default for the data is another.
        allow_bias: whether they may all be used with an unbiased estimator, whose promise they break; left out: no.
    """

    non_finite: Literal["raise", "skip"] = "raise"
    spike_rollback: Whole | None = None
    clip_value: Positive | None = None
    adaptive_clip: Positive | None = None
    z_clip: Positive | None = None
    clip_norm: NotNegative | None = None
    allow_bias: bool | None = None


class Run(_Section):
    """How long, how often, and where from.

    Args:
        updates: after how many updates it ends; with passes as well: whichever comes first.
        passes: after how many passes over the data it ends.
        seed: of all random generators, and of a task's data.
        threads: torch's threads; left out: torch's own choice, which is then recorded.
        validate_every: updates between validations.
        save_every: updates between checkpoints.
        keep: checkpoints that are kept.
        log_every: updates to a line of metrics.jsonl.
        tensorboard: whether to write curves for TensorBoard, too.
    """

    updates: Whole | None = None
    passes: Whole | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    threads: Whole | None = None
    validate_every: Whole = 1000
    save_every: Whole = 1000
    keep: Whole = 3
    log_every: Whole = 1
    tensorboard: bool = False


class Config(_Section):
    """A run.

    Args:
        estimator: the `name` of an estimator class, and the arguments of that class.
    """

    data: Data
    model: Model
    estimator: dict[str, Any]
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    guards: Guards = Guards()
    run: Run = Run()

    def changed(self, section: Literal["data", "schedule", "run"], **values: Any) -> Config:
        """Return the configuration with other values in a section, checked like the first ones."""
        table = self.model_dump()
        table[section] |= values
        return Config.model_validate(table)

    def to_tables(self) -> dict[str, Any]:
        """Return it as TOML has it: what is left out is left out."""
        return self.model_dump(exclude_none=True)

    def build_estimator(self) -> Estimator:
        """Return the estimator that is described.

        Raises:
            ConfigError: its arguments cannot be meant.
        """
        kind = estimator_classes()[self.estimator["name"]]
        spelled = _spelled_in(kind)

        def read(name: str, value: Any) -> Any:
            if name in spelled and isinstance(value, str):
                return _SPELLED[spelled[name]][1](value)
            return tuple(value) if isinstance(value, list) else value

        return kind(**{name: read(name, value) for name, value in self.estimator.items() if name != "name"})


def estimator_classes() -> dict[str, Callable[..., Estimator]]:
    """Return every estimator in the files of `tbptt.estimators`, by name: a new one is here by being there."""
    found: dict[str, Callable[..., Estimator]] = {}
    for file in pkgutil.iter_modules(estimators.__path__):
        module = importlib.import_module(f"{estimators.__name__}.{file.name}")
        for name, each in vars(module).items():
            its_own = isinstance(each, type) and each.__module__ == module.__name__
            if its_own and issubclass(each, Estimator) and not inspect.isabstract(each):
                found[name] = each
    return found


def arguments_model(target: Callable[..., Any], without: Collection[str] = ()) -> type[BaseModel]:
    """Return a model of the arguments of a class, so that they are checked as every section is.

    A length that may change is a number, or the policy as text: `"Adaptive(tolerance=0.1)"`; so is a `ClipBoundary`.
    """
    hints = {name: _from_list(hint) for name, hint in _hints(target).items()}
    hints |= {name: _SPELLED[kind][0] for name, kind in _spelled_in(target).items()}
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name not in without:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return create_model(getattr(target, "__name__", "arguments"), __config__=config, **fields)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(target if isinstance(target, type) and is_dataclass(target) else target.__init__)


def _from_list(hint: Any) -> Any:
    """Return a hint that takes a list, which is all that TOML has, where it says tuple."""
    if tuple not in (get_origin(each) for each in (hint, *get_args(hint))):
        return hint
    return Annotated[hint, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]  # pyright: ignore[reportUnknownLambdaType]


def _spelled_in(target: Callable[..., Any]) -> dict[str, type]:
    """Return the arguments that are spelled as in Python, with what they may be."""
    return {name: kind for name, hint in _hints(target).items() for kind in _SPELLED if kind in get_args(hint)}
