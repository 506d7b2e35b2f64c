"""One deliberately broken model for each fault; the right ones pass."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import CapabilityError, CheckError, ConfigError, ShapeError

EXAMPLE = torch.randn(24, 3, 2)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(2, 5)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.core(inputs, state)


class Forgets(Base):
    def forward(self, inputs, state=None):
        return self.core(inputs)


class Detaches(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs, state.detach()


class DetachesInside(Base):
    def forward(self, inputs, state=None):
        outputs = []
        for step in inputs:
            output, state = self.core(step[None], None if state is None else state.detach())
            outputs.append(output)
        return torch.cat(outputs), state


class MixesLanes(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs - 0.1 * outputs.mean(1, keepdim=True), state


class MixesInTraining(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return self.norm(outputs.flatten(0, 1)).view_as(outputs), state


class WritesInPlace(Base):
    def forward(self, inputs, state=None):
        outputs, new = self.core(inputs, state)
        if state is not None:
            with torch.no_grad():
                state.copy_(new)
        return outputs, new


class StartsElsewhere(Base):
    def forward(self, inputs, state=None):
        return self.core(inputs, torch.ones(1, inputs.shape[1], 5).to(inputs) if state is None else state)


class SaysWhereItStarts(StartsElsewhere):
    def initial_state(self, lanes):
        return self.core.weight_hh_l0.new_ones(1, lanes, 5)


class Random(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs + torch.randn_like(outputs), state


class DependsOnChunks(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs * len(inputs), state


class LooksAhead(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs - inputs.mean(0), state)
        return outputs, state


class AlwaysDropsOut(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return nn.functional.dropout(outputs, 0.5), state


class OneStateForAll(Base):
    """The state of lane 0 alone is passed on: nothing raises, as it is broadcast."""

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, None if state is None else state.expand(1, inputs.shape[1], 5).contiguous())
        return outputs, state[:, :1]


class WrongBatchSize(Base):
    """As before, and torch itself refuses the next call."""

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs, state[:, :1]


class DropsAPart(nn.Module):
    """As Mamba, FalconMamba and Jamba of transformers: of two states one is used in single steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRU(2, 5), nn.GRU(5, 5)

    def forward(self, inputs, state=None):
        one, two = (None, None) if state is None else (state["conv"], state["ssm"])
        outputs, one = self.one(inputs, one)
        outputs, two = self.two(outputs, two if len(inputs) == 1 else None)
        return outputs, {"conv": one, "ssm": two}


class OverwritesWithinACall(nn.Module):
    """As Qwen3-Next: the state that is given is used, and then written over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, 2))

    def forward(self, inputs, state=None):
        state = inputs.new_zeros(inputs.shape[1:]) if state is None else state.clone()
        outputs = []
        for step in inputs:
            new = torch.tanh(step + state @ self.weight) * (1 + state)
            state.copy_(new)
            outputs.append(new)
        return torch.stack(outputs), state


class NotFinite(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return outputs / 0, state


class KeepsMoreInside(Base):
    """It returns a state, and goes on from something else as well."""

    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs + getattr(self, "last", 0.0), state)
        self.last = inputs[-1]
        return outputs, state


class KeepsItInside(Base):
    def forward(self, inputs, state=None):
        outputs, self.kept = self.core(inputs, getattr(self, "kept", None))
        return outputs, None


class Stateless(Base):
    def forward(self, inputs, state=None):
        return self.core(inputs)[0], None


class OneValue(Base):
    def forward(self, inputs, state=None):
        return self.core(inputs)[0]


class WithDropout(Base):
    def forward(self, inputs, state=None):
        outputs, state = self.core(inputs, state)
        return nn.functional.dropout(outputs, 0.5, self.training), state


@pytest.mark.parametrize(
    "model",
    [
        nn.RNN(2, 5),
        nn.GRU(2, 5, num_layers=2),
        nn.LSTM(2, 5, proj_size=3),
        nn.LSTM(2, 5, num_layers=2, dropout=0.5),
        tbptt.scan(nn.LSTMCell(2, 5)),
        WithDropout(),
        SaysWhereItStarts(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_right_models_pass(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = tbptt.check(model, EXAMPLE, tbptt.TBPTT(k1=4, k2=9))
    assert report, str(report)
    assert "9 steps asked, 9 measured" in str(report)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    ("model", "fails", "cause"),
    [
        (Forgets(), "value carry", "forgets to pass its state on"),
        (Detaches(), "gradient carry", "detaches the state that it takes or returns"),
        (DetachesInside(), "gradient carry", "detaches its state inside"),
        (
            DropsAPart(),
            "value carry",
            "drops a part of its state: when 8 steps come at once, nothing that follows depends on ssm",
        ),
        (OneStateForAll(), "value carry", r"wrong batch size: state (1, 1, 5) is the same for any number of lanes"),
        (WrongBatchSize(), "value carry", r"wrong batch size: state (1, 1, 5) is the same for any number of lanes"),
        (LooksAhead(), "value carry", "depend on the length of the chunk, before any state is passed"),
        (AlwaysDropsOut(), "randomness", "a dropout that is always on (dropout)"),
        (OverwritesWithinACall(), "gradient carry", "writes in place, over what the backward pass needs"),
        (OverwritesWithinACall(), "detached training", "writes in place, over what the backward pass needs"),
        (NotFinite(), "value carry", "its outputs are not finite"),
        (KeepsMoreInside(), "value carry", "it keeps something inside"),
        (KeepsItInside(), "state", "returns no state"),
        (MixesLanes(), "lane independence", "mixes lanes"),
        (WritesInPlace(), "in-place safety", "writes in place, over what the backward pass needs"),
        (StartsElsewhere(), "reset", "state=None means something else than zeros"),
        (DependsOnChunks(), "value carry", "depend on the length of the chunk"),
        (Stateless(), "state", "returns no state"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_wrong_models_are_refused_by_the_name_of_their_fault(model: nn.Module, fails: str, cause: str) -> None:
    report = tbptt.check(model, EXAMPLE)
    found = {item.name: item for item in report.items if not item.passed}
    assert fails in found
    assert cause in found[fails].cause
    assert found[fails].fix
    with pytest.raises(CheckError, match=re.escape(cause)):
        report.raise_if_failed()


@pytest.mark.parametrize(
    ("model", "fixed"),
    [
        (OverwritesWithinACall(), tbptt.stateful(OverwritesWithinACall())),
        (WritesInPlace(), tbptt.stateful(WritesInPlace())),
        (DropsAPart(), tbptt.stateful(DropsAPart(), max_steps=1)),
        (StartsElsewhere(), tbptt.stateful(StartsElsewhere(), initial=lambda lanes: torch.ones(1, lanes, 5))),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_fix_that_is_named_is_one(model: nn.Module, fixed: nn.Module) -> None:
    assert not tbptt.check(model, EXAMPLE)
    if isinstance(model, StartsElsewhere):  # its state must have the precision that the model is tried in
        fixed = tbptt.stateful(model, initial=lambda lanes: model.core.weight_hh_l0.new_ones(1, lanes, 5))
    report = tbptt.check(fixed, EXAMPLE, tbptt.TBPTT(4, 6))
    assert report, str(report)
    assert ("protected" in str(report)) == isinstance(model, OverwritesWithinACall | WritesInPlace)


class TakesFoursOnly(Base):
    def forward(self, inputs, state=None):
        assert len(inputs) % 4 == 0, "length is no multiple of 4"
        return self.core(inputs, state)


def test_a_limit_that_the_model_speaks_of_is_no_fault() -> None:
    report = tbptt.check(TakesFoursOnly(), EXAMPLE, tbptt.TBPTT(4, 8))
    assert report
    found = {item.name: item for item in report.items}
    assert found["value carry"].verdict == "note"
    assert "takes no single steps: AssertionError: length is no multiple of 4" in found["value carry"].detail
    assert found["reach"].verdict == "note"
    assert "within the limits noted" in str(report)


def test_lengths_that_need_more_of_the_example_get_it() -> None:
    class TakesTens(Base):
        def forward(self, inputs, state=None):
            assert len(inputs) % 10 == 0
            return self.core(inputs, state)

    report = tbptt.check(TakesTens(), torch.randn(30, 2, 2))
    assert report
    assert "10+10+10 steps" in report.tried


def test_shorter_chunks_are_tried_where_the_usual_ones_are_not_taken() -> None:
    class GoesOnAfterSixes(Base):
        """It takes any length, but goes on from multiples of 6 only: the first chunk alone does not tell."""

        def forward(self, inputs, state=None):
            memory, odd = (None, inputs.new_zeros(1)) if state is None else state
            assert not bool(odd.any()), "in mid-segment"
            outputs, memory = self.core(inputs, memory)
            return outputs, (memory, odd + len(inputs) % 6)

    for steps in (24, 40):
        report = tbptt.check(GoesOnAfterSixes(), torch.randn(steps, 2, 2))
        assert report, str(report)
        assert "6+6+6 steps" in report.tried


def test_a_state_that_grows_is_reset_for_all_lanes_together() -> None:
    class Attends(nn.Module):
        """Attention over all that was: right, and no lane of its cache has a length of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(2, 4), nn.Linear(2, 4)

        def forward(self, inputs, state=None):
            past = 0 if state is None else len(state)
            seen = inputs if state is None else torch.cat([state, inputs])
            scores = torch.einsum("tbh,sbh->tsb", self.query(inputs), self.key(seen))
            later = torch.ones(scores.shape[:2], dtype=torch.bool).triu(past + 1)
            weights = scores.masked_fill(later[..., None], -torch.inf).softmax(1)
            return torch.einsum("tsb,sbd->tbd", weights, seen), seen + 0 * self.key.weight.sum()

    report = tbptt.check(Attends(), EXAMPLE)
    assert report, str(report)
    assert {item.name: item.verdict for item in report.items}["reset"] == "note"
    window = tbptt.Window(EXAMPLE, reset=torch.zeros(24, 3, dtype=torch.bool).index_fill_(0, torch.tensor(5), True))
    flags = window.reset.clone()
    flags[5, 0] = False
    estimator = tbptt.TBPTT(24, 24)
    model = Attends()
    estimator.estimate(model, nn.MSELoss(), estimator.init(model, 3), replace_reset(window, window.reset))
    with pytest.raises(CapabilityError, match="grows with every step, so one lane cannot be reset"):
        estimator.estimate(model, nn.MSELoss(), estimator.init(model, 3), replace_reset(window, flags))


def replace_reset(window: tbptt.Window, reset: Tensor) -> tbptt.Window:
    return tbptt.Window(window.inputs, torch.zeros(24, 3, 2), reset=reset)


def test_rounding_inside_is_measured_and_no_fault() -> None:
    class RoundsInside(Base):
        def forward(self, inputs, state=None):
            outputs, state = self.core(inputs, state)
            return (outputs.float() * (1 + 1e-7 * len(inputs))).to(inputs), state

    torch.manual_seed(0)  # what its rounding does depends on its weights
    report = tbptt.check(RoundsInside(), EXAMPLE)
    assert report, str(report)
    assert "rounding" in report.tried

    class Wrong(RoundsInside):
        def forward(self, inputs, state=None):
            outputs, state = super().forward(inputs, state)
            return outputs * (1 + 2e-5 * len(inputs)), state

    assert not tbptt.check(Wrong(), EXAMPLE)


def test_the_reach_of_what_is_too_large_is_left_out_and_said_so() -> None:
    for model, estimator, says in [
        (nn.GRU(2, 5), tbptt.TBPTT(1, 300), "300 steps back would take minutes"),
        (nn.GRU(2, 700), tbptt.TBPTT(8, 200), "216 copies of the weights"),
    ]:
        item = tbptt.check(model, EXAMPLE, estimator).items[-1]
        assert item.name == "reach"
        assert f"not measured here: {says}" in item.detail.replace("it takes ", "")


def test_chunks_are_used_as_given_and_refused_where_they_are_none() -> None:
    assert "5+7+9 steps" in tbptt.check(nn.GRU(2, 5), EXAMPLE, chunks=(5, 7, 9)).tried
    for chunks in [(8,), (8, 0), (8, 1.5)]:
        with pytest.raises(ConfigError, match="two or more lengths"):
            tbptt.check(nn.GRU(2, 5), EXAMPLE, chunks=chunks)
    with pytest.raises(ShapeError, match="at least 32 steps"):
        tbptt.check(nn.GRU(2, 5), EXAMPLE, chunks=(16, 16))


def test_the_report_is_a_page_a_table_and_json() -> None:
    good, bad = tbptt.check(nn.GRU(2, 5), EXAMPLE), tbptt.check(DropsAPart(), EXAMPLE)
    data = json.loads(bad.to_json())
    assert not data["passed"]
    item = next(item for item in data["items"] if item["name"] == "value carry")
    assert item["verdict"] == "fail"
    assert item["measured"]["chunks"] > 1e-3
    assert item["measured"]["steps"] < 1e-12
    assert "max_steps=1" in item["fix"]
    assert json.loads(good.to_json())["conclusion"] == "it carries its state"
    table = bad._repr_html_()
    assert "<td><b>FAIL</b></td><td>value carry</td>" in table
    assert "<code>tbptt.stateful(model, max_steps=1): in single steps it is right</code>" in table
    assert all(line in str(bad) for line in ("tbptt check: DropsAPart", "  FAIL  value carry"))


def test_a_model_returning_one_value_is_told_what_to_return() -> None:
    with pytest.raises(CapabilityError, match=r"expected to return \(outputs, state\), but returned one Tensor"):
        tbptt.check(OneValue(), EXAMPLE)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.LSTM(2, 5, batch_first=True), "batch_first=True"),
        (nn.LSTM(2, 5, bidirectional=True), "needs the future"),
        (lambda inputs, state: (inputs, state), "nn.Module was expected"),
    ],
)
def test_what_cannot_be_trained_in_windows_is_refused_at_once(model: nn.Module, says: str) -> None:
    with pytest.raises(CapabilityError, match=says):
        tbptt.check(model, EXAMPLE)


def test_an_example_too_short_to_cut_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least 3 steps"):
        tbptt.check(nn.GRU(2, 5), EXAMPLE[:2])


def test_random_numbers_and_weights_are_left_alone() -> None:
    model = nn.LSTM(2, 5, num_layers=2, dropout=0.5)
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    tbptt.check(model, EXAMPLE, tbptt.TBPTT(2, 5))
    assert torch.equal(torch.randn(4), wanted)


def test_failures_that_are_accepted_are_notes_and_unknown_names_are_refused() -> None:
    report = tbptt.check(MixesLanes(), EXAMPLE, accept=["lane independence"])
    item = next(item for item in report.items if item.name == "lane independence")
    assert report
    assert item.verdict == "note"
    assert item.detail.startswith("accepted: ")
    assert "mixes lanes" in item.cause
    assert not tbptt.check(MixesLanes(), EXAMPLE, accept=["reset"])
    with pytest.raises(ConfigError, match="'lanes' came"):
        tbptt.check(MixesLanes(), EXAMPLE, accept=["lanes"])


def trained(model: nn.Module, **settings: object) -> int:
    stream = tbptt.ArrayStream(torch.randn(160, 2), torch.randn(160, 5), lanes=2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(8, 8), stream, **settings).run(passes=1).updates


def test_the_trainer_trains_with_what_is_accepted_and_with_batch_normalisation() -> None:
    assert trained(MixesLanes(), accept=["lane independence"]) == 10
    assert trained(MixesInTraining()) == 10
    with pytest.raises(CheckError, match="mixes lanes"):
        trained(MixesLanes())
    with pytest.raises(ConfigError, match="nothing would be asked"):
        trained(MixesLanes(), accept=["lane independence"], checked=False)
    with pytest.raises(ConfigError, match="'lanes' came"):
        trained(MixesLanes(), accept=["lanes"])


def test_windows_that_the_example_is_too_short_for_are_said_to_be_untried() -> None:
    report = tbptt.check(Base(), EXAMPLE, tbptt.TBPTT(64, 64))
    assert report
    assert "not tried: windows of 64 steps: the example has 24, and 72 are needed" in report.tried
    assert "windows of 64 steps" in tbptt.check(Base(), torch.randn(80, 2, 2), tbptt.TBPTT(64, 64)).tried


def test_random_generators_of_numpy_and_python_are_left_alone() -> None:
    np.random.seed(3)
    random.seed(3)
    wanted = np.random.rand(), random.random()
    np.random.seed(3)
    random.seed(3)
    tbptt.check(Base(), EXAMPLE)
    assert (np.random.rand(), random.random()) == wanted
