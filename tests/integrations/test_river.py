"""river's own checks, its progressive validation and its detectors, on the estimators made for it."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt import TBPTT

pytest.importorskip("river")

from river import checks, compose, datasets, drift, evaluate, metrics, preprocessing

from tbptt.integrations.river import Classifier, Regressor, detector

TOLERANT = {"missing": 0.0, "ignore_new": True}
COMING_AND_GOING = {"check_emerging_features", "check_disappearing_features", "check_radically_disappearing_features"}


def all_checks(model: Any) -> list[Callable[[Any], None]]:
    """What river would try on a model. It imports scikit-learn for data that only other kinds of models are shown."""
    with pytest.MonkeyPatch.context() as patch:
        stub = ModuleType("sklearn")
        stub.datasets = None  # pyright: ignore[reportAttributeAccessIssue]
        patch.setitem(sys.modules, "sklearn", stub)
        return list(checks.yield_checks(model))


@pytest.mark.parametrize("kind", [Classifier, Regressor])
def test_rivers_own_checks(kind: Any) -> None:
    """All of them with features that may come and go; without, all but those that let them."""
    tolerant, strict = kind(**TOLERANT), kind()
    tried = all_checks(tolerant)
    assert {each.__name__ for each in tried} >= COMING_AND_GOING | {"check_pickling", "check_bounded_memory_growth"}
    assert tolerant._unit_test_skips() == set()
    random.seed(0)
    for each in tried:
        each(tolerant.clone())
    assert strict._unit_test_skips() == COMING_AND_GOING
    for each in all_checks(strict):
        if each.__name__ in COMING_AND_GOING:
            with pytest.raises(ValueError, match="the features of the first row were expected"):
                each(strict.clone())
        elif each.__name__ != "check_bounded_memory_growth":  # long, and has just been tried
            each(strict.clone())


def echo(rows: int = 300) -> list[tuple[dict[str, float], float]]:
    """The label is the feature of the row before: nothing without a state can tell it."""
    drawn = random.Random(1)
    values = [float(drawn.random() > 0.5) for _ in range(rows + 1)]
    return [({"now": values[row + 1], "other": 0.5}, values[row]) for row in range(rows)]


def build(features: int, outputs: int) -> nn.Module:
    return tbptt.SequenceModel(features, outputs, hidden=12)


SETTINGS: dict[str, Any] = {
    "build": build,
    "estimator": TBPTT(k1=2, k2=6),
    "optimizer": functools.partial(torch.optim.Adam, lr=0.02),
}


def test_progressive_validation_runs_it_unchanged() -> None:
    """And what it reports is what a loop by hand over `Online` measures."""
    metric = evaluate.progressive_val_score(echo(), Regressor(**SETTINGS), metrics.MAE())
    torch.manual_seed(0)
    model = build(2, 1)
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    guards = [tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)]
    online = tbptt.Online(model, nn.MSELoss(), adam, TBPTT(2, 6), guards=guards)
    errors: list[float] = []
    for x, y in echo():
        inputs = torch.tensor([x["now"], x["other"]])
        errors.append(abs(float(online.predict_one(inputs)) - y))
        online.learn_one(inputs, y)
    assert metric.get() == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    assert metric.get() < 0.4
    forgetful = evaluate.progressive_val_score(
        echo(), Regressor(**SETTINGS | {"estimator": TBPTT(k1=1, k2=1)}), metrics.MAE()
    )
    assert forgetful.get() > metric.get(), "with a look-back of one row there is less to learn"


def test_a_pipeline_of_river_with_classes_as_they_appear() -> None:
    stream = [(x, "yes" if y else "no") for x, y in echo(800)]
    model = preprocessing.StandardScaler() | Classifier(**SETTINGS)
    metric = evaluate.progressive_val_score(stream, model, metrics.Accuracy())
    assert metric.get() > 0.8
    stateless = preprocessing.StandardScaler() | Classifier(**SETTINGS, classes=("no", "yes"))
    shuffled = random.Random(2).sample(stream, len(stream))
    assert evaluate.progressive_val_score(shuffled, stateless, metrics.Accuracy()).get() < 0.7


def test_probabilities_are_of_the_classes_that_are_known() -> None:
    classifier = Classifier()
    assert classifier.predict_proba_one({"a": 1.0}) == {}
    assert classifier.predict_one({"a": 1.0}) is None
    classifier.learn_one({"a": 1.0}, "left")
    assert classifier.predict_proba_one({"a": 1.0}) == {"left": 1.0}
    with pytest.raises(ValueError, match="did not come"):
        classifier.learn_one({}, "right")
    assert list(classifier.predict_proba_one({"a": 1.0})) == ["left"], "a refused row makes no class known"
    few = Classifier(max_classes=2)
    for name in ("one", "two"):
        few.learn_one({"a": 1.0}, name)
    with pytest.raises(ValueError, match="no more than 2 outputs"):
        few.learn_one({"a": 1.0}, "three")
    named = Classifier(classes=(0, 1, 2))
    assert sum(named.predict_proba_one({"a": 1.0}).values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="named beforehand"):
        named.learn_one({"a": 1.0}, 3)


def test_a_pickled_one_goes_on_as_if_nothing_had_been() -> None:
    rows = echo(60)
    for make in (
        lambda: Regressor(**SETTINGS, drift=drift.PageHinkley()),
        lambda: Regressor(**SETTINGS | {"estimator": TBPTT(3, 7, replay="retain")}, drift=drift.ADWIN()),
    ):
        whole, stopped = make(), make()
        for x, y in rows[:31]:
            whole.learn_one(x, y)
            stopped.learn_one(x, y)
        before = torch.get_rng_state()
        loaded, copied = pickle.loads(pickle.dumps(stopped)), copy.deepcopy(stopped)
        assert torch.equal(before, torch.get_rng_state())
        for x, y in rows[31:]:
            expected = whole.predict_one(x)
            assert expected == loaded.predict_one(x) == copied.predict_one(x)
            for each in (whole, loaded, copied):
                each.learn_one(x, y)
        assert whole.predict_one(rows[0][0]) != stopped.predict_one(rows[0][0])
        assert whole.clone().online is None


@pytest.mark.filterwarnings("ignore:drift at step:tbptt.errors.AlarmWarning")  # looked at below
def test_a_detector_of_river_reports_a_change() -> None:
    """Labels that turn round; the same without is the control. The detector that was given stays as it was."""
    given = drift.PageHinkley(min_instances=200, mode="up")
    found: list[list[int]] = []
    for turn in (math.inf, 400):
        regressor = Regressor(**SETTINGS, drift=given)
        for row, (x, y) in enumerate(echo(500)):
            regressor.learn_one(x, 5.0 - y if row >= turn else y)
        found.append(regressor.online.drifts)
    assert [row for row in found[0] if row >= 400] == []
    assert [row for row in found[1] if row < 400] == found[0]
    assert 400 <= next(row for row in found[1] if row >= 400) < 450
    assert not given.drift_detected
    assert (type(detector("ADWIN")), type(detector("PageHinkley"))) == (drift.ADWIN, drift.PageHinkley)
    with pytest.raises(ValueError, match="ADWIN, KSWIN, PageHinkley, was expected"):
        detector("ADVIN")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"now": 1.0}, "other did not come"),
        ({"now": 1.0, "other": 1.0, "more": 1.0}, "more came as well"),
        ({"now": "red", "other": 1.0}, "feature 'now' is 'red'"),
        ({"now": math.nan, "other": 1.0}, "x holds nan"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x: dict[str, Any], words: str) -> None:
    regressor = Regressor(**SETTINGS)
    regressor.learn_one({"now": 1.0, "other": 0.0}, 1.0)
    before = regressor.predict_one({"now": 1.0, "other": 0.0})
    for call in (lambda: regressor.predict_one(x), lambda: regressor.learn_one(x, 1.0)):
        with pytest.raises((ValueError, ArithmeticError), match=words):
            call()
    assert regressor.predict_one({"now": 1.0, "other": 0.0}) == before
    with pytest.raises(ValueError, match="none: there is nothing to read"):
        Regressor().predict_one({})


def test_features_that_may_come_and_go() -> None:
    tolerant, plain = Regressor(**SETTINGS, **TOLERANT), Regressor(**SETTINGS)
    for x, y in echo(20):
        tolerant.learn_one({"now": x["now"], "new": 7.0} if tolerant.online else {"now": x["now"], "other": 0.0}, y)
        plain.learn_one({"now": x["now"], "other": 0.0}, y)
    assert tolerant.predict_one({"now": 1.0}) == plain.predict_one({"other": 0.0, "now": 1.0})


def test_rivers_own_data() -> None:
    scaled = preprocessing.StandardScaler() | Classifier(**SETTINGS)
    assert evaluate.progressive_val_score(datasets.Phishing().take(400), scaled, metrics.Accuracy()).get() > 0.6
    target = preprocessing.TargetStandardScaler(regressor=Regressor(**SETTINGS))
    model = compose.Pipeline(preprocessing.StandardScaler(), target)
    mae = evaluate.progressive_val_score(datasets.TrumpApproval().take(400), model, metrics.MAE()).get()
    assert mae < 4.0
