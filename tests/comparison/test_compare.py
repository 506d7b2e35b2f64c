"""What `compare` takes, refuses and hands out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt import TBPTT, Adaptive, ArrayStream, Choice
from tbptt.comparison import Comparison, Curve, Row, compare
from tbptt.comparison.settings import reseeded, spell
from tbptt.errors import CapabilityError, CheckError, ConfigError, StreamError


def stream(rows: int = 600, **settings: Any) -> ArrayStream:
    generator = torch.Generator().manual_seed(0)
    return ArrayStream(torch.randn(rows, 2, generator=generator), torch.zeros(rows, 3), lanes=2, **settings)


def found(estimators: Any = None, data: Any = None, model: Any = None, **settings: Any) -> Comparison:
    given: dict[str, Any] = {"loss": nn.MSELoss(), "points": 2, "span": 8, "burn_in": 8} | settings
    return compare(
        [TBPTT(4, 4)] if estimators is None else estimators, model or nn.GRU(2, 3), data or stream(), **given
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("settings", "kind", "words", "hint"),
    [
        ({"estimators": []}, ConfigError, "at least one estimator was expected", "compare([TBPTT"),
        ({"estimators": {}}, ConfigError, "at least one estimator was expected", "compare([TBPTT"),
        (
            {"estimators": [TBPTT(4, 4), TBPTT(4, 4)]},
            ConfigError,
            "came more than once",
            'compare({"first": TBPTT(k1=4',
        ),
        ({"estimators": [nn.GRU(2, 3)]}, CapabilityError, "is a GRU", "compare([TBPTT"),
        ({"points": 0}, ConfigError, "points was expected to be a whole number", "points=1"),
        ({"span": 0}, ConfigError, "span was expected", "span=1"),
        ({"burn_in": -1}, ConfigError, "burn_in was expected", "burn_in=0"),
        ({"longest": 0}, ConfigError, "longest was expected", "longest=1"),
        ({"repeats": 2}, ConfigError, "at least 3, but 2 came", "repeats=3"),
        ({"seed": -1}, ConfigError, "seed was expected", "seed=0"),
        ({"seed": 2**32}, ConfigError, "a seed below 2**32", "seed=0"),
        ({"optimizer": sgd}, ConfigError, "how long each estimator trains", "seconds=30"),
        ({"optimizer": sgd, "seconds": 0}, ConfigError, "a number above 0, but are 0", "seconds=30"),
        ({"optimizer": sgd, "seconds": math.inf}, ConfigError, "but are inf", "seconds=30"),
        ({"optimizer": sgd, "seconds": math.nan}, ConfigError, "but are nan", "seconds=30"),
        ({"optimizer": sgd, "updates": 0}, ConfigError, "updates was expected", "updates=1"),
        ({"optimizer": sgd, "updates": 3, "metrics": {"auc": None}}, ConfigError, "together with metrics", "held_out="),
        ({"seconds": 3.0}, ConfigError, "an optimizer was expected together with seconds", "torch.optim.Adam"),
        ({"held_out": stream()}, ConfigError, "together with held_out", "torch.optim.Adam"),
        (
            {"optimizer": torch.optim.SGD(nn.GRU(2, 3).parameters(), lr=0.1), "updates": 3},
            CapabilityError,
            "but a SGD came",
            "lambda parameters: torch.optim.SGD",
        ),
        ({"points": 1000}, StreamError, "8008 steps were expected", "points=36"),
        ({"span": 1000, "burn_in": 1000}, StreamError, "there are 300", "points=2, span=75, burn_in=75"),
        ({"model": nn.GRU(2, 3, batch_first=True)}, CapabilityError, "batch_first", "tbptt.stateful"),
        ({"loss": nn.MSELoss(reduction="sum")}, ConfigError, "sum / count", "torch.nn.MSELoss()"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, Any], kind: type[Exception], words: str, hint: str) -> None:
    with pytest.raises(kind) as caught:
        found(**settings)
    assert isinstance(caught.value, tbptt.TbpttError)
    assert words in caught.value.message
    assert hint in caught.value.fix


def test_the_stream_to_train_on_is_not_held_out() -> None:
    data = stream()
    with pytest.raises(ConfigError, match="a held-out stream of its own"):
        found(data=data, held_out=data, optimizer=sgd, updates=3)


def test_no_target_at_all() -> None:
    with pytest.raises(ConfigError, match="all of them are masked out"):
        found(data=stream(mask=torch.zeros(600, dtype=torch.bool)))


def test_a_stream_at_its_end() -> None:
    data = stream()
    data.read(300)
    with pytest.raises(StreamError, match=r"there are 0(.|\n)*stream.rewind"):
        found(data=data)


def test_a_model_that_does_not_carry_its_state() -> None:
    class Forgetful(nn.GRU):
        def forward(self, inputs: Any, state: Any = None) -> Any:  # type: ignore[override]
            return super().forward(inputs)

    with pytest.raises(CheckError):
        found(model=Forgetful(2, 3))


def test_names_are_what_one_would_write() -> None:
    assert spell(TBPTT(8, 4, losses="all")) == "TBPTT(k1=8, k2=4, losses='all')"
    assert (
        spell(TBPTT(8, Choice([8, 64], weights=[9, 1])))
        == "TBPTT(k1=8, k2=Choice(lengths=(8, 64), weights=(9.0, 1.0)))"
    )
    rows = found([TBPTT(4, 4), TBPTT(4, 8, keep_outputs=True)]).rows
    assert [row.name for row in rows] == ["TBPTT(k1=4, k2=4)", "TBPTT(k1=4, k2=8, keep_outputs=True)"]
    assert rows[0].estimator == repr(TBPTT(4, 4))
    assert rows[0].kind == "biased"


def test_seeds_are_found_wherever_they_stand() -> None:
    both = TBPTT(Choice([4], seed=1), Choice([8], seed=2))
    assert reseeded(both, 10) == TBPTT(Choice([4], seed=11), Choice([8], seed=12))
    assert reseeded(both, 0) is both
    assert reseeded(TBPTT(4, Adaptive()), 3) == TBPTT(4, Adaptive())


def test_it_prints_as_a_table_and_shows_as_one() -> None:
    result = found([TBPTT(4, 4), TBPTT(4, 8)])
    lines = str(result).splitlines()
    assert lines[0].split() == [
        "estimator",
        "bias",
        "(95",
        "%)",
        "variance",
        "cosine",
        "look-back",
        "us/step",
        "KiB",
        "held",
    ]
    assert lines[2].startswith("TBPTT(k1=4, k2=4)")
    assert lines[4].startswith("note: gradients at 2 points of 8 steps")
    assert all("\x1b" not in line for line in lines)
    shown = result._repr_html_()
    assert "<th>bias</th>" in shown
    assert "<td>TBPTT(k1=4, k2=8)</td>" in shown
    raced = str(found(optimizer=sgd, updates=3, held_out=stream()))
    assert "held-out" in raced
    failed = Comparison((Row("<a>", "a", "biased", failed="it & that"),), {}, 1, 8, 8)
    assert "<a> failed: it & that" in str(failed)
    assert "&lt;a&gt; failed: it &amp; that" in failed._repr_html_()


def test_it_hands_out_its_numbers() -> None:
    result = found([TBPTT(4, 4), TBPTT(4, 8)], optimizer=sgd, updates=3, held_out=stream())
    tables = result.tables()
    assert set(tables) == {"estimators", "training", "validation"}
    for columns in tables.values():
        assert len({len(column) for column in columns.values()}) == 1
    assert tables["estimators"]["name"] == [row.name for row in result.rows]
    assert tables["training"]["name"].count("TBPTT(k1=4, k2=8)") == 3
    assert tables["training"]["updates"] == [1, 2, 3, 1, 2, 3]
    assert tables["validation"]["loss"][-1] == result.rows[1].final_validation
    plain = json.loads(result.to_json())
    assert plain["rows"][0]["relative_bias"] == result.rows[0].relative_bias
    assert plain["curves"]["TBPTT(k1=4, k2=4)"]["updates"] == [1, 2, 3]
    unmeasured = Comparison((Row("a", "a", "biased"),), {"a": Curve()}, 1, 8, 8)
    assert json.loads(unmeasured.to_json())["rows"][0]["cosine"] == "nan"


def test_the_same_figures_each_time() -> None:
    settings: dict[str, Any] = {"estimators": [TBPTT(4, Choice([4, 16]))], "model": nn.GRU(2, 3)}
    first, second = found(**settings).rows[0], found(**settings).rows[0]
    assert first.relative_bias == second.relative_bias
    assert first.relative_variance == second.relative_variance
    assert found(**settings, seed=2**32 - 1).rows[0].relative_variance != first.relative_variance
