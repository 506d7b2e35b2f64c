"""From presets, a TOML file and options to one configuration, and plain words for what cannot be meant."""

from __future__ import annotations

import difflib
import inspect
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic import BaseModel, ValidationError

from tbptt.cli.config import CORE_KEYS, Config, Guards, Model, Optimizer, arguments_model, estimator_classes
from tbptt.cli.presets import TASKS, Kind, Tables, core_defaults, defaults_for, kind_of
from tbptt.errors import ConfigError
from tbptt.pathways import in_segments

__all__ = ["Given", "did_you_mean", "dotted", "read_toml", "resolve", "validate"]

_ONLY_FOR: dict[str, tuple[Kind, str]] = {
    "unit": ("text", "text"),
    "standardize": ("array", "arrays"),
    "task": ("task", "tasks"),
}
_TASK_SET_ELSEWHERE = ("lanes", "seed", "dtype", "one_hot")
_ESTIMATOR_SET_ELSEWHERE = ("keep_outputs",)
_CUT_BY = ("k1", "k2", "k_trunc", "lookback", "short", "long", "block", "longest", "segment")
"""The settings of estimators that say where a sequence is cut."""
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
}


@dataclass
class Given:
    """What a user has said, and where; later words replace earlier ones.

    Attributes:
        tables: sections of keys, as in TOML.
        origins: by dotted key, where its value comes from, for messages.
    """

    tables: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[str, str] = field(default_factory=dict[str, str])

    def add_tables(self, tables: Mapping[str, Any], origin: str) -> None:
        """Take over what a file says."""
        self.tables = _merged(self.tables, tables)
        self.origins |= {key: f"in {origin}" for key in dotted(tables)}

    def add(self, key: str, text: str, origin: str) -> None:
        """Take over one dotted key, its value as TOML has it or as bare text."""
        path = key.split(".")
        if len(path) < 2 or not all(path):
            raise ConfigError(
                f"section.key=value was expected after {origin}, but {key!r} came before the '='",
                fix="--set optimizer.lr=0.001",
            )
        nested: Any = _value(text)
        for part in reversed(path):
            nested = {part: nested}
        self.tables = _merged(self.tables, nested)
        self.origins[key] = f"given by {origin}"

    def add_assignments(self, assignments: Iterable[str]) -> None:
        """Take over `--set section.key=value`, each."""
        for each in assignments:
            key, equals, text = each.partition("=")
            if not equals:
                raise ConfigError(
                    f"section.key=value was expected after --set, but {each!r} came",
                    fix="--set optimizer.lr=0.001",
                )
            self.add(key.strip(), text.strip(), "--set")

    def add_source(self, source: str) -> None:
        """Take over what data to learn from; a name or a path is never TOML."""
        self.tables = _merged(self.tables, {"data": {"source": source}})
        self.origins["data.source"] = "given as DATA"

    def drop(self, section: str, key: str) -> None:
        """Forget a value that a later word replaces."""
        table = self.tables.get(section)
        if isinstance(table, dict):
            cast("dict[str, Any]", table).pop(key, None)

    def get(self, section: str, key: str) -> Any:
        """Return a value, None if it was not given."""
        table = self.tables.get(section)
        return cast("dict[str, Any]", table).get(key) if isinstance(table, dict) else None


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        ConfigError: it cannot be read, or is no TOML; says where.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"a configuration was expected in {path}, but it cannot be read: {error.strerror}",
            fix=f"check the path; it is looked for at {path.absolute()}",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} was expected to be TOML, but is not: {error}",
            fix='text stands in quotes: source = "ecg"; sections in brackets: [data]',
        ) from error


def resolve(given: Given) -> Config:
    """Return the configuration: what was given, over the defaults for its data.

    Raises:
        ConfigError: unknown keys, wrong types, values that cannot be meant alone or together.
    """
    source = given.get("data", "source")
    named = source if isinstance(source, str) and source else "ecg"
    defaults = _fitting(defaults_for(named), given)
    tables = _merged(defaults, given.tables)
    if kind_of(named) in ("text", "array") and named != "shakespeare" and isinstance(source, str):
        tables["data"]["source"] = str(Path(source).expanduser().absolute())  # so that resuming works from anywhere
    config = validate(tables, given.origins, defaults)
    if config.build_estimator().kind == "unbiased":  # the clipping of the defaults would bias it, and is nobody's wish
        guards = Guards.model_validate(given.tables.get("guards", {}))
        config = config.model_copy(update={"guards": guards})
    _refuse_unfitting(config, given)
    return config


def validate(tables: Mapping[str, Any], origins: Mapping[str, str], defaults: Tables | None = None) -> Config:
    """Return complete tables as a configuration, or say in plain words what is wrong with them.

    Args:
        origins: where the value of a dotted key comes from.
        defaults: to show one where it helps.

    Raises:
        ConfigError: unknown keys, wrong types, values that cannot be meant.
    """
    examples = dotted(defaults or {})
    try:
        config = Config.model_validate(tables)
    except ValidationError as error:
        _refuse(error, origins, examples)
    config = config.model_copy(update={"estimator": _checked_estimator(config, origins, examples)})
    _build_estimator(config, examples)
    if config.data.task is not None and config.data.source in TASKS:
        model = arguments_model(TASKS[config.data.source], _TASK_SET_ELSEWHERE)
        _validated(model, config.data.task, "data.task", origins, examples)
    _check_core(config.model, origins)
    _check_segments(config, origins)
    _check_optimizer(config.optimizer)
    if config.run.updates is None and config.run.passes is None:
        raise ConfigError("[run] was expected to say when to stop, but does not", fix="run.updates = 10000")
    return config


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the question, or nothing when no known word is near.

    Example:
        >>> did_you_mean("lstn", ["lstm", "gru"])
        'did you mean lstm?'
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _checked_estimator(config: Config, origins: Mapping[str, str], examples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section with all arguments of the class, those left out at their defaults."""
    classes = estimator_classes()
    name: object = config.estimator.get("name")
    if not isinstance(name, str) or name not in classes:
        known = ", ".join(sorted(classes))
        raise ConfigError(
            f"{_place('estimator.name', origins)} was expected to be one of {known}, but {name!r} came",
            fix=did_you_mean(str(name), classes) or f'estimator.name = "{next(iter(classes))}"',
        )
    given = {key: value for key, value in config.estimator.items() if key != "name"}
    model = arguments_model(classes[name], _ESTIMATOR_SET_ELSEWHERE)
    found = _validated(model, given, "estimator", origins, examples).model_dump(exclude_none=True)
    as_toml = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return {"name": name, **as_toml}


def _build_estimator(config: Config, examples: Mapping[str, Any]) -> None:
    try:
        config.build_estimator()
    except ConfigError as error:  # its hint is Python, for those who write it
        keys = [key for key in config.estimator if key != "name" and f"estimator.{key}" in examples]
        usual = ", ".join(f"{key}={examples[f'estimator.{key}']}" for key in keys)
        raise ConfigError(
            f"in [estimator], {error.message}", fix=f"the default is {usual}" if usual else error.fix
        ) from error


def _validated(
    model: type[BaseModel],
    table: Mapping[str, Any],
    prefix: str,
    origins: Mapping[str, str],
    examples: Mapping[str, Any],
) -> BaseModel:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        _refuse(error, origins, examples, prefix, model)


def _check_optimizer(optimizer: Optimizer) -> None:
    accepted = [key for key in inspect.signature(optimizer.kind).parameters if key in Optimizer.model_fields]
    for key in optimizer.arguments():
        if key not in accepted:
            raise ConfigError(
                f"optimizer.{key} was given, but {optimizer.name} has no such setting; it has {', '.join(accepted)}",
                fix="leave it out, or choose another optimizer.name",
            )


def _check_core(model: Model, origins: Mapping[str, str]) -> None:
    """Refuse what was set of a core that has no such thing; its default may be written down."""
    has = CORE_KEYS[model.core]
    for key in sorted({key for keys in CORE_KEYS.values() for key in keys} - {*has}):
        if getattr(model, key) != Model.model_fields[key].default:
            others = " or ".join(core for core, keys in CORE_KEYS.items() if key in keys)
            raise ConfigError(
                f"{_place(f'model.{key}', origins)} is not for core {model.core}, which has {', '.join(has)}",
                fix=f"leave it out, or choose --core {others}",
            )


def _check_segments(config: Config, origins: Mapping[str, str]) -> None:
    """Refuse what a model of segments could not be trained with; lengths that change are the trainer's to look at."""
    model, segment = config.model, config.model.segment or 1
    wrong = {key: config.estimator[key] for key in _CUT_BY if isinstance(config.estimator.get(key), int)}
    wrong = {key: steps for key, steps in wrong.items() if steps % segment}
    if wrong:
        came = ", ".join(f"{_place(f'estimator.{key}', origins)} = {steps}" for key, steps in wrong.items())
        fitting = " ".join(f"--set estimator.{key}={in_segments(steps, segment)}" for key, steps in wrong.items())
        raise ConfigError(
            f"multiples of model.segment = {segment} were expected, but {came}: a sequence may be cut where a segment "
            "ends, and nowhere else",
            fix=f"{fitting}; or leave model.segment out, with model.memory alone, which takes any length",
        )
    if model.memory_gradient is False and model.segment and not model.memory_tokens:
        raise ConfigError(
            f"memory tokens were expected together with {_place('model.memory_gradient', origins)} = false: with "
            "remembered steps alone no gradient comes from before a segment, and the check before the training takes "
            "such a model for one that drops it",
            fix=f"leave it out: with k1 = k2 = {segment} no gradient goes into remembered steps either",
        )


def _refuse_unfitting(config: Config, given: Given) -> None:
    """Refuse what was said of data that have no such thing, where saying nothing would hide a mistake."""
    kind = kind_of(config.data.source)
    for key, (only, plural) in _ONLY_FOR.items():
        if given.get("data", key) is not None and kind != only:
            raise ConfigError(
                f"{_place(f'data.{key}', given.origins)} is for {plural}, but {config.data.source} is not of that kind",
                fix=f"leave data.{key} out",
            )
    numbers = kind in ("ecg", "array") or config.data.source == "adding"
    if numbers and config.model.embedding is not None:
        raise ConfigError(
            f"{_place('model.embedding', given.origins)} is for symbols, but {config.data.source} has numbers",
            fix="leave model.embedding out",
        )
    if kind == "ecg" and config.data.held_out != 0.2:
        raise ConfigError(
            f"{_place('data.held_out', given.origins)} was expected to be 0.2, but {config.data.held_out} came: "
            "the embedded record has a fixed split",
            fix="leave data.held_out out",
        )


def _fitting(defaults: Tables, given: Given) -> Tables:
    """Put the defaults of the core over those of the data, and leave out what was given in other words."""
    core: object = given.get("model", "core")
    if isinstance(core, str):
        defaults = _merged(defaults, core_defaults(core))
    if given.get("model", "memory_tokens"):  # one of the two memories; both for those who ask for both
        defaults["model"].pop("memory", None)
    if any(given.get("run", key) is not None for key in ("updates", "passes")):
        defaults["run"] = {k: v for k, v in defaults["run"].items() if k not in ("updates", "passes")}
    name: object = given.get("estimator", "name")
    classes = estimator_classes()
    if isinstance(name, str) and name in classes:
        accepted = arguments_model(classes[name]).model_fields
        defaults["estimator"] = {k: v for k, v in defaults["estimator"].items() if k in ("name", *accepted)}
    return defaults


def _refuse(
    error: ValidationError,
    origins: Mapping[str, str],
    examples: Mapping[str, Any],
    prefix: str = "",
    model: type[BaseModel] = Config,
) -> NoReturn:
    """Raise the first fault in plain words: what was expected, what came, from where."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")  # a typo explains the rest
    fault = faults[0]
    parts = [*([prefix] if prefix else []), *(str(part) for part in fault["loc"])]
    key = ".".join(parts)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = [f"{prefix}.{name}" for name in model.model_fields] if prefix else _known_keys(key)
        fix = _nearest(key, known) or f"known are {', '.join(known)}"
        raise ConfigError(f"{_place(key, origins)} is not a setting{more}", fix=fix) from error
    if fault["type"] == "missing":
        raise ConfigError(f"{key} was expected, but was not given{more}", fix=f"--set {key}=...") from error
    expected = _EXPECTED.get(fault["type"], fault["msg"]).format(**fault.get("ctx", {}))
    came = fault["input"]
    example = f"{key} = {examples[key]!r} is the default" if key in examples else ""
    raise ConfigError(
        f"{_place(key, origins)} was expected to be {expected}, but {came!r} came{more}", fix=example
    ) from error


def _known_keys(key: str) -> list[str]:
    """Return the keys of the section that `key` is in; all sections' keys where that is no section."""
    section, dot, _ = key.partition(".")
    sections = Config.model_fields
    if not dot:
        return [*sections, *(each for name in sections for each in _known_keys(f"{name}."))]
    kind = sections[section].annotation if section in sections else None
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [f"{section}.{name}" for name in kind.model_fields]
    return ["estimator.name", "estimator.k1", "estimator.k2", "estimator.losses", "estimator.replay"]


def _nearest(key: str, known: list[str]) -> str:
    last = key.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    if same:
        return f"did you mean {same[0]}?"
    by_last = {each.rpartition(".")[2]: each for each in reversed(known)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.5)
    return f"did you mean {by_last[near[0]]}?" if near else ""


def _place(key: str, origins: Mapping[str, str]) -> str:
    return f"{key} ({origins[key]})" if key in origins else key


def dotted(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, of dotted keys; each table stands for itself, too."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat |= dotted(cast("dict[str, Any]", value), f"{prefix}{name}.")
        flat[f"{prefix}{name}"] = value
    return flat


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables, those of `above` over those of `below`; neither is changed."""
    merged: dict[str, Any] = {
        key: _merged(cast("dict[str, Any]", value), {}) if isinstance(value, dict) else value
        for key, value in below.items()
    }
    for key, value in above.items():
        if isinstance(value, dict):
            under: object = merged.get(key)
            base = cast("dict[str, Any]", under) if isinstance(under, dict) else {}
            merged[key] = _merged(base, cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
