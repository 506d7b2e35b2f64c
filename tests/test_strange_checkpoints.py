"""A checkpoint of a stranger calls nothing: every way of reading one refuses what this run's own state does not have.

The documents are written by hand, as a stranger would, around a real checkpoint that is sealed anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.checkpoint import Checkpoints, _digest, _seal
from tbptt.codec import UnknownClassError, decode, encode, known, registered_class
from tbptt.errors import CheckpointError, ConfigError

X = torch.randn(240, 2, generator=torch.Generator().manual_seed(0))
ran: list[str] = []


class Alert:
    """Runs something, whatever is done to it; in the program, but in no state."""

    def __new__(cls, *_: Any) -> Any:
        ran.append("new")
        return object.__new__(cls)

    def __set__(self, *_: Any) -> None:
        ran.append("set")

    def __setstate__(self, _: Any) -> None:
        ran.append("setstate")

    @property
    def door(self) -> None:
        ran.append("property")

    @door.setter
    def door(self, _: Any) -> None:
        ran.append("setter")

    def keys(self) -> list[str]:
        ran.append("keys")
        return []

    def __call__(self) -> int:
        ran.append("call")
        return 1


class AlertPair(NamedTuple):
    left: Any
    right: Any


class AlertEnum(Enum):
    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        ran.append(f"missing {value}")
        return cls.ONE


def named(name: str) -> dict[str, Any]:
    return {"$": "class", "class": name}


def made(name: str, /, **parts: Any) -> dict[str, Any]:
    return {"$": "object", "class": name, "parts": [[key, value] for key, value in parts.items()]}


def default(factory: Any) -> dict[str, Any]:
    return {"$": "defaultdict", "factory": factory, "items": []}


def pwned(path: str = "PWNED") -> dict[str, Any]:
    """What once ran a command: a mapping that decodes its values with `subprocess.Popen`."""
    text = named("builtins:str")
    coders = {"encodekey": text, "decodekey": text, "encodevalue": text, "decodevalue": named("subprocess:Popen")}
    return made("os:_Environ", **coders, _data={"estimator": ["/bin/sh", "-c", f"id > {path}"]})


HERE = __name__
STRANGE = {
    "environ": pwned(),
    "popen as a value": named("subprocess:Popen"),
    "eval": named("builtins:eval"),
    "a type as a value": named("builtins:type"),
    "popen object": made("subprocess:Popen", args="id"),
    "partial": made("functools:partial", func=named("subprocess:Popen"), args=[]),
    "methodcaller": made("operator:methodcaller", name="pop"),
    "popen as a default": default(named("subprocess:Popen")),
    "a class of ours as a default": default(named(f"{HERE}:Alert")),
    "an object as a default": default(made(f"{HERE}:Alert")),
    "a name as a default": default("builtins:eval"),
    "tuple as a default": default(named("builtins:tuple")),
    "properties": made(f"{HERE}:Alert", door=1),
    "a descriptor": made(f"{HERE}:Alert", x=made(f"{HERE}:Alert")),
    "a class in an object": made(f"{HERE}:Alert", __class__=named(f"{HERE}:AlertEnum")),
    "a named tuple": {"$": "namedtuple", "class": f"{HERE}:AlertPair", "fields": ["left", "right"], "items": [1, 2]},
    "a named tuple of the library": {"$": "namedtuple", "class": "inspect:ArgInfo", "fields": [], "items": []},
    "an enum": {"$": "enum", "class": f"{HERE}:AlertEnum", "name": "ONE"},
    "no member of an enum": {"$": "enum", "class": f"{HERE}:AlertEnum", "name": "_missing_"},
    "a module as a class": named("os:path"),
    "a function as a class": {"$": "object", "class": "os:system", "parts": []},
    "a tensordict": made("tensordict._td:TensorDict", **{"()": [[1], []]}),
    "nested": {"a": [{"b": {"$": "tuple", "items": [pwned()]}}]},
    "in an array": {"$": "array", "name": "x", "dtype": "O", "shape": [1], "order": "C"},
    "a function": {"$": "function", "class": "os:system"},
}


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_nothing_that_a_file_names_is_built_or_called(strange: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    own = {"about": {"estimator": "x"}, "carry": (torch.zeros(1), None)}
    for entry in ("about", "carry", "unknown"):
        with pytest.raises(CheckpointError):
            decode({entry: STRANGE[strange]}, {"x": torch.zeros(8, dtype=torch.uint8)}, own.get)
    assert ran == []
    assert set(sys.modules) == before
    assert list(tmp_path.iterdir()) == []


def test_a_class_is_known_where_the_run_has_it_and_nowhere_else() -> None:
    pair = {"$": "namedtuple", "class": f"{HERE}:AlertPair", "fields": ["left", "right"], "items": [1, 2]}
    own = {"carry": [AlertPair(0, AlertEnum.ONE)], "layers": {"kind": nn.GRU}, "about": {}}
    assert decode({"carry": {"state": pair}}, {}, own.get) == {"carry": {"state": AlertPair(1, 2)}}
    assert decode({"layers": [named("torch.nn.modules.rnn:GRU")]}, {}, own.get) == {"layers": [nn.GRU]}
    for place, value in (
        ("about", pair),
        ("carry", named(f"{HERE}:AlertPair")),  # as an object, not as a value
        ("layers", made("torch.nn.modules.rnn:GRU")),  # as a value, not as an object
        ("layers", default(named("torch.nn.modules.rnn:GRU"))),
        ("carry", named("torch.nn.modules.rnn:GRU")),
    ):
        with pytest.raises(CheckpointError, match=f"state.{place}"):
            decode({place: value}, {}, own.get)
    with pytest.raises(UnknownClassError, match=r"state\.about\.x"):  # what one entry has, the next one has not
        decode({"carry": pair, "about": {"x": pair}}, {}, own.get)
    for kind in (list, dict, set, int, float):  # these may be called
        made_of = decode({"carry": default(named(f"builtins:{kind.__name__}"))}, {}, own.get)["carry"]
        assert made_of.default_factory is kind


def test_the_door_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_registered", {})
    document = encode([AlertPair(1, AlertEnum.ONE)], "state", {})
    with pytest.raises(UnknownClassError, match=r"state\[0\].*AlertPair") as caught:
        decode(document, {})
    assert "hint: tbptt.registered_class(AlertPair)" in str(caught.value)
    assert registered_class(AlertPair) is AlertPair
    registered_class(AlertEnum)
    assert decode(document, {}) == [AlertPair(1, AlertEnum.ONE)]
    for wrong in (int, Tensor, print, "Alert", nn.GRU):
        with pytest.raises(ConfigError, match="named tuple"):
            registered_class(wrong)  # pyright: ignore[reportArgumentType, reportCallIssue]


# --- every way of reading a checkpoint


def spoil(folder: Path, change: Any) -> None:
    """Rewrite a checkpoint's document, and seal it again."""
    document = json.loads((folder / "state.json").read_text())
    change(document)
    (folder / "state.json").write_text(json.dumps(document))
    body = {key: value for key, value in json.loads((folder / "manifest.json").read_text()).items() if key != "sha256"}
    files = {name: folder / name for name in body["files"]}
    body["files"] = {name: {"sha256": _digest(path), "size": path.stat().st_size} for name, path in files.items()}
    (folder / "manifest.json").write_bytes(_seal(body))


def in_state(document: dict[str, Any]) -> None:
    document["state"]["about"] = pwned()


def in_carry(document: dict[str, Any]) -> None:
    document["state"]["carry"] = pwned()


def in_model(document: dict[str, Any]) -> None:
    document["model"] = pwned()


def in_weight(document: dict[str, Any]) -> None:
    document["model"][next(iter(document["model"]))] = pwned()


PLACES = [in_state, in_carry, in_model, in_weight]


class Cache:
    """A state of a class of its own."""

    kind = None


class Steps(NamedTuple):
    count: Any
    cache: Any


class Phase(Enum):
    FIRST = "first"
    LATER = "later"


class Caching(nn.Module):
    """An RNN whose state is a nest of objects, of which there are none before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.RNN(2, 3), nn.Linear(3, 2)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, hidden = self.core(inputs, None if state is None else state.cache.hidden)
        cache = Cache()
        cache.hidden = hidden
        return self.head(outputs), Steps(Phase.FIRST if state is None else Phase.LATER, cache)


def trainer(directory: Path, estimator: tbptt.Estimator) -> tbptt.Trainer:
    torch.manual_seed(0)
    model = Caching()
    stream = tbptt.ArrayStream(X, X, lanes=2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return tbptt.Trainer(model, nn.MSELoss(), sgd, estimator, stream, directory=directory, checked=False)


ESTIMATORS = [
    tbptt.TBPTT(4, 4),
    tbptt.TBPTT(4, 10),
    tbptt.TBPTT(4, 10, replay="retain"),
    tbptt.FullBPTT(),
    tbptt.ARTBP(mean_length=4, alpha="constant"),
    tbptt.Telescope(lengths=[4, 8], k1=4),
    tbptt.PES(4, 2, 0.1),
    tbptt.RTRL(4),
    tbptt.UORO(4),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda each: type(each).__name__)
def test_states_of_any_class_are_resumed_bit_for_bit(estimator: tbptt.Estimator, tmp_path: Path) -> None:
    """A new run has no state yet; the classes are found by running the model, wherever an estimator keeps states."""
    passes = isinstance(estimator, tbptt.FullBPTT)
    once, twice = ({"passes": 1}, {"passes": 2}) if passes else ({"updates": 5}, {"updates": 9})
    trainer(tmp_path / "two", estimator).run(**once)
    place = tmp_path / "two" / "checkpoints"
    assert f"{HERE}:Steps" in (Checkpoints(place).paths()[0] / "state.json").read_text()  # else it tests nothing
    resumed, whole = trainer(tmp_path / "two", estimator), trainer(tmp_path / "one", estimator)
    stream = resumed.stream.state_dict()
    resumed.run(**twice)
    whole.run(**twice)
    assert stream == {**stream, "position": 0}
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize("change", PLACES, ids=lambda each: each.__name__)
def test_the_trainer_refuses(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path / "run", ESTIMATORS[0]).run(updates=2)
    spoil(Checkpoints(tmp_path / "run" / "checkpoints").paths()[0], change)
    with pytest.raises(UnknownClassError, match="os:_Environ"):
        trainer(tmp_path / "run", ESTIMATORS[0]).run(updates=4)
    assert not Path("PWNED").exists()


def online() -> tbptt.Online:
    torch.manual_seed(0)
    model = Caching()
    return tbptt.Online(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), tbptt.TBPTT(2, 6))


def test_online_refuses_and_finds_the_classes_of_its_state_with_an_example(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one = online()
    one.learn_many(X[:7], X[:7])
    path = one.save(tmp_path / "saved")
    again = online()
    with pytest.raises(UnknownClassError, match=f"{HERE}:Steps") as caught:
        again.load(tmp_path / "saved")
    assert "hint: online.load(path, example=x)" in str(caught.value)
    again.load(tmp_path / "saved", example=X[7])
    for each in (one, again):
        each.learn_many(X[7:30], X[7:30])
    assert all(map(torch.equal, one.model.parameters(), again.model.parameters()))
    assert torch.equal(one.predict_one(X[30]), again.predict_one(X[30]))
    for change in PLACES:
        shutil.copytree(path, other := tmp_path / change.__name__ / path.name)
        spoil(other, change)
        with pytest.raises(UnknownClassError, match="os:_Environ"):
            online().load(other.parent, example=X[7])
    assert not Path("PWNED").exists()


def test_the_command_line_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """`evaluate`, `sample` and `horizon` read with one function."""
    from tbptt.cli.main import main

    def program(*arguments: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as exit_:
            main([*arguments])
        return exit_.value.code, capfd.readouterr().err

    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    Path("fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    tiny = ["--lanes", "2", "--hidden", "4", "--k1", "8", "--k2", "8", "--threads", "1", "--updates", "2"]
    assert program("train", "fox.txt", *tiny, "--out", "run")[0] in (0, None)
    for command in ("resume", "evaluate", "sample", "horizon"):
        for change in (in_state, in_model):
            name = f"{command}-{change.__name__}"
            shutil.copytree("run", name)
            spoil(Checkpoints(Path(name) / "checkpoints").paths()[0], change)
            code, said = program(command, name)
            assert code == 1, said
            assert said.count("error: ") == 1
            assert "os:_Environ" in said
            assert "Traceback" not in said
    assert not list(Path().rglob("PWNED"))
    torch.set_rng_state(before)


def test_the_stranger_s_command_would_run() -> None:
    """The control: what these documents describe does run a command, if it is built as it says."""
    import os

    environ = object.__new__(os._Environ)
    vars(environ).update(encodekey=str, decodekey=str, encodevalue=str, decodevalue=subprocess.Popen)
    vars(environ)["_data"] = {"estimator": ["/bin/sh", "-c", "exit 7"]}
    process = environ.get("estimator")
    assert process.wait() == 7
