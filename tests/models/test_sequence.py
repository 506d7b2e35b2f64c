"""SequenceModel: it carries its state, ties what it says, and refuses what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError, ShapeError, StreamError
from tbptt.models import SequenceModel
from tbptt.tree import tensors


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("core", "layers"),
    [
        *((core, layers) for core in ("lstm", "gru", "rnn", "elstm", "lru") for layers in (1, 2)),
        *(("attentive_lstm", 1), ("attentive_gru", 1)),
    ],
)
@pytest.mark.parametrize("symbols", [False, True])
def test_chunks_with_the_carried_state_equal_one_pass(core: Any, layers: int, symbols: bool) -> None:
    embedding = 4 if symbols else None
    model = SequenceModel(6, 5, hidden=8, core=core, layers=layers, embedding=embedding).double()
    inputs = torch.randint(6, (12, 3)) if symbols else torch.randn(12, 3, 6, dtype=torch.float64)
    whole, last = model(inputs)
    first, state = model(inputs[:5])
    second, ends = model(inputs[5:], state)
    assert tuple(whole.shape) == (12, 3, 5)
    assert torch.cat([first, second]).allclose(whole, rtol=0, atol=1e-12)
    for newest, wanted in zip(tensors(ends), tensors(last), strict=True):
        assert newest.allclose(wanted, rtol=0, atol=1e-12)
    forgotten, _ = model(inputs[5:])  # the control
    assert not forgotten.allclose(second, atol=1e-4)


def test_numbers_enter_the_core_as_they_are() -> None:
    model = SequenceModel(3, 2, hidden=4)
    inputs = torch.randn(5, 2, 3)
    assert isinstance(model.core, nn.LSTM)
    expected = model.head(model.core(inputs)[0])
    assert model(inputs)[0].equal(expected)
    assert sum(p.numel() for p in model.parameters()) == 4 * 4 * (3 + 4 + 2) + 4 * 2 + 2


def test_one_output_has_no_dimension_of_its_own() -> None:
    assert tuple(SequenceModel(2, 1, hidden=3)(torch.zeros(7, 4, 2))[0].shape) == (7, 4)
    assert tuple(SequenceModel(2, 1, hidden=3)(torch.zeros(1, 1, 2))[0].shape) == (1, 1)


def test_tied_weights_are_one_parameter_with_both_gradients() -> None:
    tied = SequenceModel(7, 7, hidden=5, embedding=5, tie_weights=True)
    assert tied.embedding is not None
    assert tied.head.weight is tied.embedding.weight
    free = SequenceModel(7, 7, hidden=5, embedding=5)
    assert free.embedding is not None
    free.load_state_dict(tied.state_dict())
    ids = torch.randint(7, (6, 2))

    def loss(model: SequenceModel) -> Tensor:
        return model(ids)[0].square().sum()

    loss(tied).backward()
    loss(free).backward()
    assert free.embedding.weight.grad is not None
    assert free.head.weight.grad is not None
    assert tied.head.weight.grad is not None
    assert tied.head.weight.grad.allclose(free.embedding.weight.grad + free.head.weight.grad, atol=1e-5)


def test_dropout_acts_in_training_only_and_one_layer_raises_no_warning() -> None:
    for layers in (1, 2):  # warnings are errors here
        model = SequenceModel(3, 2, hidden=4, layers=layers, dropout=0.5)
        inputs = torch.randn(5, 2, 3)
        assert not model(inputs)[0].equal(model(inputs)[0])
        model.eval()
        assert model(inputs)[0].equal(model(inputs)[0])


@pytest.mark.parametrize("wrong", [7, -1])
def test_an_unknown_id_is_named_with_its_place(wrong: int) -> None:
    model = SequenceModel(7, 7, hidden=4, embedding=4)
    ids = torch.zeros(5, 3, dtype=torch.int64)
    ids[4, 1] = wrong
    with pytest.raises(StreamError, match=rf"from 0 to 6 .* but {wrong} came at step 4 of the window, lane 1"):
        model(ids)


def test_inputs_of_another_kind_are_refused() -> None:
    numbers, ids = SequenceModel(3, 2, hidden=4), SequenceModel(3, 2, hidden=4, embedding=4)
    with pytest.raises(ShapeError, match=r"\(T, B, 3\) were expected.*\(5, 2\)"):
        numbers(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match=r"\(T, B, 3\) were expected.*\(5, 2, 4\)"):
        numbers(torch.zeros(5, 2, 4))
    with pytest.raises(ShapeError, match=r"torch.float32 of shape \(5, 2\)"):
        ids(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match=r"\(5, 2, 3\)"):
        ids(torch.zeros(5, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden was expected"),
        ({"hidden": 4.0}, "hidden was expected"),
        ({"inputs": -1}, "inputs was expected"),
        ({"outputs": True}, "outputs was expected"),
        ({"layers": 0}, "layers was expected"),
        ({"embedding": 0}, "embedding was expected"),
        ({"core": "transformer"}, "'lru', 'attentive_lstm' or 'attentive_gru'"),
        ({"dropout": 1.0}, "dropout from 0 to below 1"),
        ({"dropout": -0.1}, "dropout from 0 to below 1"),
        ({"tie_weights": True}, "tied weights need"),
        ({"tie_weights": True, "embedding": 3}, "embedding=3, hidden=4"),
        ({"tie_weights": True, "embedding": 4, "outputs": 9}, "outputs=9"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SequenceModel(**({"inputs": 5, "outputs": 5, "hidden": 4} | settings))
    assert "hint:" in str(caught.value)
