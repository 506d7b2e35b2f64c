"""The predictor as a part of the model, the carry, states of every kind, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import PREFIX, made, own_parameters, predictor_of, ran, windows
from systems import SYSTEMS, B, D, H, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import SyntheticGradients, Window
from tbptt.codec import decode, encode
from tbptt.errors import CapabilityError, ConfigError, ShapeError, TbpttError
from tbptt.estimators.predictor import attached
from tbptt.estimators.predictor_traces import MOST_TRACED

# The predictor in the model


def test_what_is_attached_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(D, H, num_layers=2, dropout=0.5)
    inputs = torch.randn(5, B, D)
    names, random = list(dict(model.named_parameters())), torch.get_rng_state()
    outputs, _ = model(inputs)
    torch.set_rng_state(random)
    estimator = SyntheticGradients(3, 7)
    estimator.attach(model, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(inputs)[0], outputs)
    assert not torch.equal(model(inputs)[0], outputs)  # the control: there is dropout
    assert list(own_parameters(model)) == names
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimator.prepare(model, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    added = [name for name in before if name.startswith(PREFIX)]
    assert [list(before[name].shape) for name in added] == [[7, 12], [7], [12, 7], [12]]  # two layers of h and c
    assert not before[added[2]].any()
    assert not before[added[3]].any()


def test_it_is_saved_loaded_and_moved_with_the_model() -> None:
    estimator = SyntheticGradients(4, lambda_=1.0)
    system, recording = made("lstm", 26, estimator, scale=0.3)
    fresh = SYSTEMS["lstm"]().model
    estimator.prepare(fresh, recording.inputs)
    assert not any(each.any() for each in predictor_of(fresh).parameters())
    fresh.load_state_dict(system.model.state_dict())
    given = windows(recording, 4)
    for a, b in zip(ran(estimator, system.model, given), ran(estimator, fresh, given), strict=True):
        assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)
    assert next(predictor_of(fresh.float()).parameters()).dtype == torch.float32
    single = [Window(w.inputs.float(), w.targets.float(), w.mask, w.reset) for w in given]
    assert all(value.dtype == torch.float32 for value in ran(estimator, fresh, single)[-1].gradients.values())


def test_two_groups_hold_each_parameter_once() -> None:
    model, estimator = nn.GRU(D, H), SyntheticGradients(4)
    with pytest.raises(CapabilityError, match="with a predictor was expected"):
        estimator.parameter_groups(model, lr=0.1, predictor_lr=0.2)
    estimator.attach(model, torch.zeros(2, B, D))
    optimizer = torch.optim.SGD(estimator.parameter_groups(model, lr=0.1, predictor_lr=0.2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    found = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    assert [id(each) for each in optimizer.param_groups[1]["params"]] == list(map(id, predictor_of(model).parameters()))


def test_frozen_parts_of_the_predictor_stay() -> None:
    estimator = SyntheticGradients(4, 5, lambda_=1.0)
    system, recording = made("gru", 26, estimator, scale=0.3)
    given, predictor = windows(recording, 4), predictor_of(system.model)
    free = ran(estimator, system.model, given)
    for kept in (["net.2.weight", "net.2.bias"], []):
        for name, each in predictor.named_parameters():
            each.requires_grad_(name in kept)
        for a, b in zip(ran(estimator, system.model, given), free, strict=True):
            frozen = {name for name in b.gradients if name.removeprefix(PREFIX) not in kept and PREFIX in name}
            assert a.gradients.keys() == b.gradients.keys() - frozen
            for name in a.gradients:
                torch.testing.assert_close(a.gradients[name], b.gradients[name], rtol=1e-12, atol=1e-12)


class Spiral(nn.Module):
    """h' = a h + x with a complex state, and a count of its steps; or the same in pairs of real numbers."""

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([[0.5, 0.6], [0.8, -0.3]]).double())
        self.real = real

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            zeros = torch.zeros(inputs.shape[1], 2, 2).double()
            state = (
                torch.zeros(inputs.shape[1], dtype=torch.int64),
                zeros if self.real else torch.view_as_complex(zeros),
            )
        count, h = state
        outputs = []
        for step in inputs:
            pairs = step.view(-1, 2, 2)
            if self.real:
                a, b = self.turn.unbind(-1)
                h = torch.stack([a * h[..., 0] - b * h[..., 1], a * h[..., 1] + b * h[..., 0]], -1) + pairs
            else:
                h = torch.view_as_complex(self.turn) * h + torch.view_as_complex(pairs.contiguous())
            count = count + 1
            shown = h if self.real else torch.view_as_real(h)
            outputs.append(torch.tanh(shown).flatten(1) + shown.flatten(1).square())
        return torch.stack(outputs), (count, h)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_complex_number_is_two_real_ones_and_a_count_is_none(gamma: float) -> None:
    torch.manual_seed(1)
    inputs, targets, reset = torch.randn(20, B, 4).double(), torch.randn(20, B, 4).double(), torch.rand(20, B) < 0.1
    given = [Window(inputs[at : at + 4], targets[at : at + 4], reset=reset[at : at + 4]) for at in range(0, 20, 4)]
    estimator, found = SyntheticGradients(4, lambda_=1.0, gamma=gamma), []
    for real in (True, False):
        model = Spiral(real=real)
        estimator.attach(model, inputs)
        assert predictor_of(model).size == 4
        torch.manual_seed(2)
        for each in predictor_of(model).parameters():
            nn.init.normal_(each, std=0.3)
        found.append(ran(estimator, model, given))
    for a, b in zip(*found, strict=True):
        assert relative(a.gradients, b.gradients) < 1e-12
    assert relative(found[0][-1].gradients, found[0][-2].gradients) > 1e-3  # the control: they are not all alike


def test_a_state_in_half_precision_is_predicted_in_single() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.GRU(D, H)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, state = self.core(inputs, None if state is None else state.float())
            return outputs, state.bfloat16()

    torch.manual_seed(0)
    model, estimator = Halved(), SyntheticGradients(4)
    given = [Window(torch.randn(4, B, D), torch.randn(4, B, H)) for _ in range(4)]
    estimator.attach(model, given[0].inputs)
    nn.init.normal_(predictor_of(model).get_parameter("net.weight"), std=0.3)
    estimates = ran(estimator, model, given)
    assert {each.dtype for each in estimates[-1].gradients.values()} == {torch.float32}
    assert estimates[-1].gradients[PREFIX + "net.weight"].any()


# The carry


@pytest.mark.parametrize("estimator", SyntheticGradients.examples(), ids=str)
def test_a_saved_carry_goes_on_bit_for_bit(estimator: SyntheticGradients) -> None:
    """Through the codec, while model and predictor move; also right after a window without a target."""
    steps = 8 * estimator.k1 + 1
    system, recording = made("nested", steps, estimator, scale=0.1)
    model, given = system.model, windows(recording, estimator.k1)
    begin = copy.deepcopy(model.state_dict())

    def train(carry: Any, part: list[Window]) -> tuple[list[Any], Any]:
        optimizer, estimates = torch.optim.SGD(model.parameters(), lr=1e-2), []
        for window in part:
            estimate, carry = estimator.estimate(model, squared, carry, window)
            estimate.apply(model)
            optimizer.step()
            estimates.append(estimate)
        return estimates, carry

    whole, _ = train(estimator.init(model, B), given)
    for stop in range(1, len(given)):
        model.load_state_dict(begin)
        _, carry = train(estimator.init(model, B), given[:stop])
        tensors: dict[str, Tensor] = {}
        document = encode(carry.state_dict(), "carry", tensors)
        fresh = estimator.init(model, B)
        fresh.load_state_dict(decode(document, tensors))
        assert bool(fresh.owed) == (stop in (2, 3))  # the second and third window have no target
        assert (fresh.trace is not None) == (estimator.lambda_ > 0 and stop > 1)
        rest, _ = train(fresh, given[stop:])
        for a, b in zip(rest, whole[stop:], strict=True):
            assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)
    with pytest.raises(ShapeError, match=f"carry of 5 lanes was expected, but the saved one has {B}"):
        estimator.init(model, 5).load_state_dict(fresh.state_dict())


def test_an_old_carry_can_be_used_again() -> None:
    estimator = SyntheticGradients(4, lambda_=1.0)
    system, recording = made("lstm", 26, estimator, scale=0.3)
    given, carry = windows(recording, 4), estimator.init(system.model, B)
    for window in given[:3]:
        _, carry = estimator.estimate(system.model, squared, carry, window)
    first, after = estimator.estimate(system.model, squared, carry, given[3])
    estimator.estimate(system.model, squared, after, given[4])
    again, _ = estimator.estimate(system.model, squared, carry, given[3])
    assert all(torch.equal(first.gradients[name], again.gradients[name]) for name in first.gradients)
    other, _ = estimator.estimate(system.model, squared, after, given[3])
    assert not all(torch.equal(first.gradients[name], other.gradients[name]) for name in first.gradients)
    assert not any(leaf.requires_grad for leaf in tbptt.tree.tensors(carry.state_dict()))


def test_outputs_are_kept_when_asked_for() -> None:
    estimator = SyntheticGradients(4, lambda_=1.0, keep_outputs=True)
    system, recording = made("gru", 26, estimator, scale=0.3)
    recording.reset[:] = False
    kept = torch.cat([each.outputs for each in ran(estimator, system.model, windows(recording, 4))])
    with torch.no_grad():
        torch.testing.assert_close(kept, system.model(recording.inputs)[0], rtol=1e-12, atol=1e-12)
    assert not kept.requires_grad


def test_what_it_says_of_itself() -> None:
    assert SyntheticGradients.kind == "biased"
    assert SyntheticGradients(5).reach(4) == (1, 2, 3, 4)
    estimator = SyntheticGradients(np.int64(5), np.int64(3), 1, 1)  # type: ignore[arg-type]
    assert repr(estimator) == repr(SyntheticGradients(5, 3, 1.0, 1.0))
    model = nn.GRU(D, H)
    estimator.attach(model, torch.zeros(2, B, D))
    assert estimator.next_steps(estimator.init(model, B)) == 5


# What is refused


def refusal(caught: pytest.ExceptionInfo[Any], *parts: str, fix: str) -> None:
    assert isinstance(caught.value, TbpttError)
    message, _, hint = str(caught.value).partition("\nhint: ")
    for part in parts:
        assert part in message
    assert fix in hint


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"k1": 0}, "k1 of SyntheticGradients"),
        ({"k1": 2.5}, "k1 of SyntheticGradients"),
        ({"k1": True}, "k1 of SyntheticGradients"),
        ({"predictor": "mlp"}, "predictor was expected"),
        ({"predictor": 0}, "predictor was expected"),
        ({"predictor": True}, "predictor was expected"),
        ({"predictor": 2.0}, "predictor was expected"),
        ({"predictor": None}, "predictor was expected"),
        ({"lambda_": -0.1}, "lambda_ was expected"),
        ({"lambda_": 1.1}, "lambda_ was expected"),
        ({"lambda_": float("nan")}, "lambda_ was expected"),
        ({"lambda_": "1"}, "lambda_ was expected"),
        ({"lambda_": True}, "lambda_ was expected"),
        ({"gamma": 0.0}, "gamma was expected"),
        ({"gamma": 1.01}, "gamma was expected"),
        ({"gamma": float("inf")}, "gamma was expected"),
    ],
)
def test_settings_that_cannot_be_meant(given: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyntheticGradients(**({"k1": 4} | given))
    refusal(caught, part, repr(next(iter(given.values()))), fix="SyntheticGradients(k1=")


def test_a_model_without_a_predictor() -> None:
    model, estimator = nn.GRU(D, H), SyntheticGradients(4)
    with pytest.raises(CapabilityError) as caught:
        estimator.init(model, B)
    refusal(caught, "a GRU with a predictor was expected, but it has none", fix="estimator.attach(model, inputs)")


def test_a_second_predictor_and_another_kind() -> None:
    model, inputs = nn.GRU(D, H), torch.zeros(2, B, D)
    SyntheticGradients(4).attach(model, inputs)
    with pytest.raises(ConfigError) as caught:
        SyntheticGradients(4).attach(model, inputs)
    refusal(caught, "it has one already", fix="estimator.prepare(model, inputs)")
    for refused in (
        lambda: SyntheticGradients(4, 8).prepare(model, inputs),
        lambda: SyntheticGradients(4, 8).init(model, B),
        lambda: SyntheticGradients(4, "own").init(model, B),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        refusal(caught, "the model has one of the kind 'linear'", fix="predictor='linear'")


def test_a_module_of_ones_own() -> None:
    inputs = torch.zeros(2, B, D)
    with pytest.raises(ConfigError) as caught:
        SyntheticGradients(4, "own").prepare(nn.GRU(D, H), inputs)
    refusal(caught, "a predictor of your own was expected", fix="estimator.attach(model, inputs, module)")
    for estimator, module in ((SyntheticGradients(4, "own"), None), (SyntheticGradients(4), nn.Linear(H, H))):
        with pytest.raises(ConfigError) as caught:
            estimator.attach(nn.GRU(D, H), inputs, module)
        refusal(caught, "and only then", fix="attach(model, inputs, module)")
    model = nn.GRU(D, H)
    with pytest.raises(ShapeError) as caught:
        SyntheticGradients(4, "own").attach(model, inputs, nn.Linear(H, H + 1))
    refusal(caught, f"shape {(B, H)}, was expected, but shape {(B, H + 1)} came", fix=f"nn.Linear(..., {H})")
    assert attached(model) is None  # and nothing is left of it
    SyntheticGradients(4, "own").attach(model, inputs, nn.Linear(H, H))
    assert attached(model) is not None


def test_a_name_that_is_taken() -> None:
    model = nn.GRU(D, H)
    model.synthetic_gradients = nn.Linear(1, 1)
    with pytest.raises(ConfigError) as caught:
        SyntheticGradients(4).attach(model, torch.zeros(2, B, D))
    refusal(caught, "GRU.synthetic_gradients was expected to be free", "Linear", fix="another name")


def test_a_model_that_runs_whatever_submodules_it_has() -> None:
    class Layers(nn.Sequential):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            states = []
            for each in self:
                inputs = each(inputs)
                if isinstance(inputs, tuple):
                    inputs, last = inputs
                    states.append(last)
            return inputs, states

    model = Layers(nn.GRU(D, H))
    with pytest.raises(CapabilityError) as caught:
        SyntheticGradients(4).attach(model, torch.zeros(2, B, D))
    refusal(caught, "they changed when it got one more", fix="a module of your own")
    assert [name for name, _ in model.named_children()] == ["0"]


class Common(nn.Module):
    """A state that all lanes share, beside one of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(D, H)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h, mean = (None, torch.zeros(H)) if state is None else state
        outputs, h = self.core(inputs, h)
        return outputs + mean, (h, 0.9 * mean + outputs.mean((0, 1)))


class Counting(nn.Module):
    """Nothing in the state has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, H)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        count = torch.zeros(inputs.shape[1], dtype=torch.int64) if state is None else state
        return self.head(inputs), count + 1


@pytest.mark.parametrize(
    ("model", "why"), [(Common, "a tensor of it has no lanes"), (Counting, "it has no tensor with a gradient")]
)
def test_states_that_cannot_be_taken_apart(model: type[nn.Module], why: str) -> None:
    made = model()
    with pytest.raises(CapabilityError) as caught:
        SyntheticGradients(4).attach(made, torch.zeros(2, B, D))
    refusal(caught, "a state of a fixed size in each lane was expected", why, fix="TBPTT(k1, k2)")
    assert attached(made) is None


def test_traces_that_are_too_large() -> None:
    model = nn.GRU(1, 128)
    SyntheticGradients(4).attach(model, torch.zeros(2, B, 1))
    lanes = MOST_TRACED // (128 * 128 * 129)
    assert SyntheticGradients(4, lambda_=1.0).init(model, lanes).chain.lanes == lanes
    assert SyntheticGradients(4, lambda_=0.0).init(model, lanes + 1).chain.lanes == lanes + 1
    with pytest.raises(CapabilityError) as caught:
        SyntheticGradients(4, lambda_=1.0).init(model, lanes + 1)
    refusal(caught, f"traces of at most {MOST_TRACED} numbers", f"{lanes + 1} lanes", fix="lambda_=0")


def test_a_predictor_that_mixes_lanes_has_no_traces() -> None:
    model, module = nn.GRU(D, H), nn.Sequential(nn.BatchNorm1d(H), nn.Linear(H, H))
    estimator = SyntheticGradients(4, "own", lambda_=1.0)
    estimator.attach(model, torch.zeros(2, B, D), module)
    given = [Window(torch.randn(4, B, D), torch.randn(4, B, H)) for _ in range(2)]
    with pytest.raises(CapabilityError) as caught:
        ran(estimator, model, given)
    refusal(caught, "takes each lane by itself", fix="lambda_=0")
    assert len(ran(SyntheticGradients(4, "own", lambda_=0.0), model, given)) == 2


@pytest.mark.parametrize("kind", ["linear", 5, "own"])
def test_traces_are_made_while_what_autograd_holds_is_measured(kind: Any) -> None:
    """As `tbptt.compare` does it."""
    estimator = SyntheticGradients(4, kind, lambda_=1.0)
    system, recording = made("gru", 26, estimator, scale=0.3)
    given, sizes = windows(recording, 4), []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    plain = ran(estimator, system.model, given)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        measured = ran(estimator, system.model, given)
    assert sizes
    for a, b in zip(plain, measured, strict=True):
        assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)


def test_weights_that_are_frozen_in_between() -> None:
    model, estimator = nn.GRU(D, H), SyntheticGradients(4, lambda_=1.0)
    estimator.attach(model, torch.zeros(2, B, D))
    carry = estimator.init(model, B)
    given = Window(torch.randn(4, B, D), torch.randn(4, B, H))
    for _ in range(2):
        _, carry = estimator.estimate(model, squared, carry, given)
    predictor_of(model).get_parameter("net.bias").requires_grad_(False)
    with pytest.raises(CapabilityError) as caught:
        estimator.estimate(model, squared, carry, given)
    refusal(caught, f"traces of {H * H} weights", f"are of {H * (H + 1)}", fix="estimator.init(model, lanes)")


def test_windows_of_another_size() -> None:
    model, estimator = nn.GRU(D, H), SyntheticGradients(4, lambda_=1.0)
    estimator.attach(model, torch.zeros(2, B, D))
    for size in ((5, B), (4, B + 1)):
        with pytest.raises(ShapeError) as caught:
            estimator.estimate(
                model, squared, estimator.init(model, B), Window(torch.randn(*size, D), torch.randn(*size, H))
            )
        refusal(caught, f"but {max(size)} came" if size[0] == 5 else f"but {size[1]} came", fix="")
