"""What every estimator promises, tried on each of its own examples: a new one is here by being one file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from systems import SIMPLE, SYSTEMS, Attending, B, Forgetful, Plain, record, squared, takes
from torch import nn

import tbptt
from tbptt import Estimate, Estimator, Window
from tbptt.cli.config import estimator_classes
from tbptt.codec import decode, encode
from tbptt.errors import ShapeError
from tbptt.estimators.predictor import PREFIX
from tbptt.testing import Recording

EXAMPLES = [each for _, kind in sorted(estimator_classes().items()) for each in kind.examples()]
every = pytest.mark.parametrize("estimator", EXAMPLES, ids=str)
T = 30


def made(estimator: Estimator, name: str, *, resets: bool = True) -> tuple[nn.Module, Recording]:
    """A system, or where the estimator is for models of one kind only, the one that it takes."""
    for chosen in (SYSTEMS[name], *SIMPLE.values()):
        torch.manual_seed(0)
        system = chosen()
        recording = record(system, T, masks=True, resets=resets)
        if takes(estimator, copy.deepcopy(system.model), recording.inputs):
            break
    else:
        raise AssertionError(f"{estimator} takes none of the systems")
    recording.mask[:, 0] = True
    estimator.prepare(system.model, recording.inputs[:2])
    return system.model, recording


def suited(estimator: Estimator, model: nn.Module) -> nn.Module:
    """The model, or one that the estimator takes; three numbers in, at least three out."""
    for each in (model, tbptt.scan(Plain(3, 3)), Forgetful(3, 3), Attending(3, 3)):
        if takes(estimator, copy.deepcopy(each), torch.randn(12, 2, 3)):
            return each
    raise AssertionError(f"{estimator} takes none of these")


def cut(recording: Recording, begin: int, steps: int) -> Window:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    return Window(*(part[begin : begin + steps] for part in parts), start=begin)


def run(
    estimator: Estimator, model: nn.Module, recording: Recording, begin: int = 0, end: int = T, carry: Any = None
) -> tuple[list[Estimate], Any]:
    carry = estimator.init(model, B) if carry is None else carry
    estimates = []
    while begin < end:
        window = cut(recording, begin, min(estimator.next_steps(carry), end - begin))
        estimate, carry = estimator.estimate(model, squared, carry, window)
        estimates.append(estimate)
        begin += window.steps
    return estimates, carry


def same(left: Estimate, right: Estimate) -> bool:
    return all(torch.equal(left.gradients[name], right.gradients[name]) for name in left.gradients | right.gradients)


@every
@pytest.mark.parametrize("name", ["lstm", "leaky", "nested"])
def test_losses_are_the_models_and_gradients_are_the_parameters(estimator: Estimator, name: str) -> None:
    model, recording = made(estimator, name)
    estimates, carry = run(estimator, model, recording)
    with torch.no_grad():
        own = {key: value.detach() for key, value in model.named_parameters() if not key.startswith(PREFIX)}
        total, _ = recording.run([own] * T, None, 0, T, list(range(T)))
    assert sum(each.num_terms for each in estimates) == int(recording.mask.sum())
    torch.testing.assert_close(torch.stack([each.loss_sum for each in estimates]).sum(), total)
    for estimate in estimates:
        assert list(estimate.gradients) == [key for key, _ in model.named_parameters() if key in estimate.gradients]
        assert all(torch.isfinite(each).all() and not each.requires_grad for each in estimate.gradients.values())
        assert estimate.num_injected <= estimate.num_terms
        assert estimate.weight > 0
    assert {key for each in estimates for key in each.gradients} == {key for key, _ in model.named_parameters()}
    assert any(each.any() for each in estimates[-1].gradients.values())
    assert not any(leaf.requires_grad for leaf in tbptt.tree.tensors(carry.state))


@every
@pytest.mark.parametrize("name", ["lstm", "leaky", "nested"])
def test_nothing_of_the_time_before_a_reset_is_left_after_it(estimator: Estimator, name: str) -> None:
    """A reset of all lanes: with another past before it, the losses after it have the same gradient."""
    model, recording = made(estimator, name, resets=False)
    recording.reset[13] = True
    recording.mask[:] = torch.arange(T)[:, None] >= 13
    other = copy.deepcopy(recording)
    other.inputs[:13] += 1.0
    first, second = run(estimator, model, recording)[0], run(estimator, model, other)[0]
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.num_injected]
    assert pairs
    for a, b in pairs:
        for key in a.gradients:
            torch.testing.assert_close(a.gradients[key], b.gradients[key], rtol=1e-9, atol=1e-9)
    control = copy.deepcopy(recording)
    control.inputs[13:] += 1.0
    assert not all(same(a, b) for a, b in zip(first, run(estimator, model, control)[0], strict=True))


@every
@pytest.mark.parametrize("name", ["lstm", "nested"])
def test_a_saved_carry_goes_on_bit_for_bit(estimator: Estimator, name: str) -> None:
    model, recording = made(estimator, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train(carry: Any, begin: int, end: int) -> tuple[list[Estimate], Any, int]:
        estimates = []
        while begin < end:
            window = cut(recording, begin, estimator.next_steps(carry))
            estimate, carry = estimator.estimate(model, squared, carry, window)
            estimate.apply(model)
            optimizer.step()
            estimates.append(estimate)
            begin += window.steps
        return estimates, carry, begin

    _, carry, begin = train(estimator.init(model, B), 0, 12)
    tensors: dict[str, torch.Tensor] = {}
    document = encode(carry.state_dict(), "carry", tensors)
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    expected, _, _ = train(carry, begin, T)
    model.load_state_dict(weights)
    torch.set_rng_state(random)
    restored = estimator.init(model, B)
    restored.load_state_dict(decode(document, tensors))
    found, _, _ = train(restored, begin, T)
    assert len(found) == len(expected) > 0
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    other = estimator.init(model, B + 1)
    with pytest.raises(ShapeError, match="lanes"):
        other.load_state_dict(decode(document, tensors))


@every
def test_an_old_carry_can_be_used_again(estimator: Estimator) -> None:
    model, recording = made(estimator, "lstm")
    _, carry = run(estimator, model, recording, 0, 12)
    steps = estimator.next_steps(carry)
    first, _ = estimator.estimate(model, squared, carry, cut(recording, 12, steps))
    run(estimator, model, recording, 12, T, carry)
    again, _ = estimator.estimate(model, squared, carry, cut(recording, 12, steps))
    assert same(first, again)


@every
def test_a_window_without_targets_teaches_nothing(estimator: Estimator) -> None:
    model, recording = made(estimator, "lstm")
    recording.mask[:] = False
    estimates, _ = run(estimator, model, recording)
    for estimate in estimates:
        assert (estimate.num_terms, estimate.num_injected) == (0, 0)
        assert estimate.loss.isnan()
        assert not any(each.any() for each in estimate.gradients.values())
        estimate.apply(model)
        assert all(parameter.grad is None for parameter in model.parameters())


@every
def test_other_lanes_are_refused(estimator: Estimator) -> None:
    model, recording = made(estimator, "lstm")
    carry = estimator.init(model, B + 1)
    with pytest.raises(ShapeError, match=f"a window of {B + 1} lanes was expected"):
        estimator.estimate(model, squared, carry, cut(recording, 0, estimator.next_steps(carry)))


@every
def test_the_check_finds_the_reach_that_is_promised(estimator: Estimator) -> None:
    report = tbptt.check(suited(estimator, nn.LSTM(3, 4)), torch.randn(24, 2, 3), estimator)
    assert report, report


@every
def test_a_run_in_two_pieces_is_a_run_in_one(estimator: Estimator, tmp_path: Any) -> None:
    def trainer(directory: Any) -> tbptt.Trainer:
        torch.manual_seed(1)
        model = suited(estimator, nn.GRU(3, 3))
        stream = tbptt.ArrayStream(torch.randn(400, 3), torch.randn(400, 3), lanes=2)
        estimator.prepare(model, torch.zeros(2, 2, 3))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        return tbptt.Trainer(model, nn.MSELoss(), adam, estimator, stream, directory=directory, checked=False)

    whole = trainer(tmp_path / "whole")
    whole.run(updates=9)
    trainer(tmp_path / "parts").run(updates=4)
    parts = trainer(tmp_path / "parts")
    parts.run(updates=9)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()
