"""One deliberately broken model for each fault; the right ones pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import CapabilityError, CheckError, ShapeError

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
        (MixesLanes(), "lane independence", "mixes lanes"),
        (MixesInTraining(), "lane independence", "mixes lanes"),
        (WritesInPlace(), "in-place safety", "overwrites what the backward pass needs"),
        (StartsElsewhere(), "reset", "state=None means something else than zeros"),
        (Random(), "value carry", "random even in eval mode"),
        (DependsOnChunks(), "value carry", "depend on where the sequence is cut"),
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
    with pytest.raises(CheckError, match=cause):
        report.raise_if_failed()


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
