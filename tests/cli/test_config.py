"""A run's configuration: what is laid over what, and what is refused in which words."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import tomli_w

from tbptt import TBPTT, estimators
from tbptt.cli.config import Config, estimator_classes
from tbptt.cli.presets import NAMES, defaults_for
from tbptt.cli.settings import Given, did_you_mean, dotted, read_toml, resolve
from tbptt.errors import ConfigError


def given(*assignments: str, source: str = "ecg") -> Given:
    made = Given()
    made.add_source(source)
    made.add_assignments(assignments)
    return made


def refusal(*assignments: str, source: str = "ecg") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve(given(*assignments, source=source))
    return caught.value


@pytest.mark.parametrize("source", [*NAMES, "some.npy", "some.txt"])
def test_defaults_are_complete_and_toml_brings_them_back(source: str) -> None:
    config = resolve(given(source=source))
    assert config.data.source.endswith(source)
    assert Config.model_validate(tomllib.loads(tomli_w.dumps(config.to_tables()))) == config
    assert isinstance(config.build_estimator(), TBPTT)


def test_options_win_over_the_file_and_the_file_over_the_defaults() -> None:
    made = Given()
    made.add_tables({"estimator": {"k1": 3, "k2": 5}, "optimizer": {"lr": 1}}, "a.toml")
    made.add("estimator.k2", "7", "--k2")
    config = resolve(made)
    assert (config.estimator["k1"], config.estimator["k2"], config.optimizer.lr) == (3, 7, 1.0)
    assert config.model.hidden == defaults_for("ecg")["model"]["hidden"]


def test_nothing_that_was_given_is_changed_by_resolving() -> None:
    tables = {"estimator": {"k1": 3}, "data": {"source": "copy", "task": {"delay": 2}}}
    made = Given()
    made.add_tables(tables, "a.toml")
    config = resolve(made)
    assert config.data.task is not None
    assert (config.data.task["length"], config.data.task["delay"]) == (10, 2)
    assert tables == {"estimator": {"k1": 3}, "data": {"source": "copy", "task": {"delay": 2}}}
    assert "task" in defaults_for("copy")["data"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("true", True), ("retain", "retain"), ('"all"', "all"), ("[0.9, 0.99]", [0.9, 0.99])],
)
def test_a_value_is_toml_or_else_text(text: str, value: object) -> None:
    assert dotted(given(f"a.b={text}").tables)["a.b"] == value


def test_a_new_end_replaces_the_default_one() -> None:
    assert resolve(given("run.updates=9")).run.passes is None
    assert resolve(given("run.passes=9")).run.updates is None
    both = resolve(given("run.passes=9", "run.updates=7")).run
    assert (both.passes, both.updates) == (9, 7)


@pytest.mark.parametrize(
    ("assignment", "words", "hint"),
    [
        ("estimator.k1=2.5", ["estimator.k1 (given by --set)", "a whole number", "2.5"], "8 is the default"),
        ("estimator.k1=true", ["a whole number", "True"], "8 is the default"),
        ("estimator.k1=many", ["a whole number", "'many'"], "8 is the default"),
        ("estimator.k1=0", ["k1", "at least 1", "0"], "k1=8"),
        ("estimator.k2=-3", ["k2", "at least 1", "-3"], "k1=8"),
        ("estimator.k3=3", ["estimator.k3 (given by --set) is not a setting"], "did you mean estimator.k"),
        ("estimator.lozzes=all", ["not a setting"], "did you mean estimator.losses?"),
        ("estimator.losses=none", ["'tail' or 'all'", "'none'"], ""),
        ("estimator.name=TBTT", ["TBPTT", "'TBTT'"], "did you mean TBPTT?"),
        ("modle.hidden=3", ["modle is not a setting"], "did you mean model?"),
        ("model.hiden=3", ["model.hiden", "not a setting"], "did you mean model.hidden?"),
        ("model.lr=3", ["model.lr", "not a setting"], ""),
        ("data.lanes=0", ["data.lanes", "at least 1", "0"], "16 is the default"),
        ("optimizer.lr=-1", ["optimizer.lr", "above 0", "-1"], "0.003 is the default"),
        ("optimizer.lr=nan", ["optimizer.lr", "nan"], "0.003 is the default"),
        ("optimizer.momentum=0.9", ["optimizer.momentum", "adam has no such setting", "betas"], "leave it out"),
        ("model=3", ["section.key=value"], "--set optimizer.lr=0.001"),
        ("model.hidden", ["section.key=value", "'model.hidden'"], "--set optimizer.lr=0.001"),
        ("model.dropout=1", ["model.dropout", "below 1"], ""),
        ("data.unit=bytes", ["data.unit", "for text", "ecg"], "leave data.unit out"),
        ("model.embedding=8", ["model.embedding", "for symbols"], "leave model.embedding out"),
        ("data.held_out=0.5", ["data.held_out", "0.2", "0.5"], "leave data.held_out out"),
        ("run.seed=-1", ["run.seed", "at least 0"], ""),
    ],
)
def test_what_cannot_be_meant_is_refused_in_plain_words(assignment: str, words: list[str], hint: str) -> None:
    error = refusal(assignment)
    for word in words:
        assert word in error.message
    assert hint in error.fix


def test_a_tasks_arguments_are_checked_like_a_section() -> None:
    assert "did you mean data.task.delay?" in refusal("data.task.dealy=3", source="copy").fix
    assert "a whole number" in refusal("data.task.lag=x", source="delayed-recall").message
    assert "not a setting" in refusal("data.task.seed=3", source="copy").message


def test_a_section_that_is_no_table() -> None:
    made = Given()
    made.add_tables({"model": 3}, "a.toml")
    with pytest.raises(ConfigError, match=r"model \(in a.toml\) was expected to be a table, but 3 came"):
        resolve(made)


def test_several_faults_are_counted_and_typos_come_first() -> None:
    error = refusal("model.hiden=3", "data.lanes=0")
    assert "model.hiden" in error.message
    assert "(and 1 more)" in error.message


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[data]\nsource = ecg\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path / "b.toml")


def test_an_estimator_is_here_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_for_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from tbptt.estimators.tbptt import TBPTT\n"
        "@dataclass(frozen=True)\n"
        "class Other(TBPTT):\n"
        "    k1: int\n"
        "    k2: int = 3\n"
        "    mean_length: float = 2.0\n",
        encoding="utf-8",
    )
    before = set(estimator_classes())
    assert "TBPTT" in before
    assert "Other" not in before
    monkeypatch.setattr(estimators, "__path__", [*estimators.__path__, str(tmp_path)])
    assert set(estimator_classes()) == {*before, "Other"}
    Other = estimator_classes()["Other"]
    config = resolve(given("estimator.name=Other", "estimator.mean_length=4", "estimator.k1=2"))
    assert config.build_estimator() == Other(2, 8, mean_length=4.0)
    assert "did you mean estimator.mean_length?" in refusal("estimator.name=Other", "estimator.mean_lenght=4").fix


def test_did_you_mean() -> None:
    assert did_you_mean("lstn", ["lstm", "gru"]) == "did you mean lstm?"
    assert did_you_mean("transformer", ["lstm", "gru"]) == ""


def test_a_boundary_is_spelled_as_in_python() -> None:
    overlapping = ("estimator.k1=8", "estimator.k2=32")
    config = resolve(given(*overlapping, "estimator.boundary=ClipBoundary(0.5)"))
    assert config.build_estimator() == TBPTT(8, 32, boundary=estimators.ClipBoundary(0.5))
    assert Config.model_validate(tomllib.loads(tomli_w.dumps(config.to_tables()))) == config
    assert resolve(given(*overlapping)).build_estimator() == TBPTT(8, 32)
    for wrong in ("ClipBoundary(-1.0)", "ClipNorm(1.0)", "0.5"):
        assert "ClipBoundary" in str(refusal(*overlapping, f"estimator.boundary={wrong}"))
    assert "crosses none" in str(refusal("estimator.k1=8", "estimator.k2=8", "estimator.boundary=ClipBoundary(0.5)"))


EXAMPLES = [each for _, kind in sorted(estimator_classes().items()) for each in kind.examples()]


@pytest.mark.parametrize("estimator", EXAMPLES, ids=str)
def test_every_example_of_an_estimator_can_be_written_as_toml(estimator: estimators.Estimator) -> None:
    """As a user writes it: numbers, lists, and what is spelled as in Python as text."""
    table: dict[str, object] = {"name": type(estimator).__name__}
    for each in fields(estimator):
        value = getattr(estimator, each.name)
        if value is not None and each.name != "keep_outputs":
            plain = isinstance(value, bool | int | float | str | tuple)
            table[each.name] = (list(value) if isinstance(value, tuple) else value) if plain else str(value)
    made = Given()
    made.add_tables(tomllib.loads(tomli_w.dumps({"estimator": table})), "a.toml")
    made.add_assignments(["guards.clip_norm=0"])
    config = resolve(made)
    assert config.build_estimator() == estimator
    again = Given()
    again.add_tables(tomllib.loads(tomli_w.dumps(config.to_tables())), "the run's own")
    assert resolve(again).build_estimator() == estimator


def test_a_list_of_the_wrong_kind_is_refused_in_plain_words() -> None:
    for wrong in ("[8, 16.5]", "8", '["8"]'):
        error = refusal("estimator.name=Telescope", f"estimator.lengths={wrong}")
        assert "estimator.lengths" in error.message
        assert "Input should be" not in error.message
