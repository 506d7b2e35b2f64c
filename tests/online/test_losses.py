"""A loss is for `Online` what it is for a loop over windows: its weights, its terms, and windows without a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Online, Window, WindowLoss
from tbptt.errors import CapabilityError
from tbptt.update import Updater

STEPS, LANES, CLASSES = 36, 2, 4


class Uncertain(nn.Module):
    """Has a parameter of its own, and two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        error = (outputs - torch.nn.functional.one_hot(targets, CLASSES)).square()
        return {"fit": (error * torch.exp(-self.log_scale)).sum(-1), "size": self.log_scale.sum().expand(targets.shape)}


def confident(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logs = outputs.log_softmax(-1)
    found = -logs.gather(-1, targets[..., None])[..., 0]
    return {"found": found, "entropy": 0.1 * (logs.exp() * logs).sum(-1)}


LOSSES: dict[str, Any] = {
    "torch's": nn.CrossEntropyLoss,
    "class weights": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5, 2.0]), ignore_index=3),
    "terms": lambda: confident,
    "parameters": Uncertain,
}
ESTIMATORS: list[Any] = [
    TBPTT(1, 4),
    TBPTT(4, 4),
    TBPTT(2, 7),
    TBPTT(2, 7, replay="retain"),
    TBPTT(3, 2),
    TBPTT(2, 7, losses="all"),
    TBPTT(2, 7, losses="all", replay="retain"),
    tbptt.FullBPTT(3),
    tbptt.ARTBP(mean_length=4),
    *tbptt.Telescope.examples()[:1],
    tbptt.Mixture(2, 4, 12, 0.5),
    tbptt.RTRL(2),
    tbptt.UORO(2),
    tbptt.PES(3, 6, 0.1),
]


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, which of them are there, and where sequences begin; for some steps in a row none is there."""
    torch.manual_seed(1)
    mask = torch.rand(STEPS, LANES) < 0.8
    mask[5:12] = mask[20] = mask[29:] = False
    reset = torch.zeros(STEPS, LANES, dtype=torch.bool)
    reset[15, 1] = reset[22] = True
    return torch.randn(STEPS, LANES, 2), torch.randint(CLASSES, (STEPS, LANES)), mask, reset


def parts(kind: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, loss = tbptt.SequenceModel(2, CLASSES, hidden=5), kind()
    weights = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else [])]
    return model, loss, torch.optim.SGD(weights, 0.05)


def numbers(model: nn.Module, loss: Any) -> list[Tensor]:
    modules = [model, loss] if isinstance(loss, nn.Module) else [model]
    return [each.detach().clone() for module in modules for each in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_what_it_is_in_a_loop_over_windows(kind: Any, estimator: Any) -> None:
    x, y, mask, reset = rows()
    model, loss, sgd = parts(kind)
    updater, begin, wanted = Updater(model, tbptt.loss.StepLoss.of(loss), sgd, estimator, LANES), 0, []
    while begin + (steps := estimator.next_steps(updater.carry)) <= STEPS:
        here = slice(begin, begin + steps)
        found = updater.update(Window(x[here], y[here], mask[here], reset[here], begin))
        wanted.append({"loss": float(found.seen.loss)} | found.seen.metrics)
        begin += steps
    hand = numbers(model, loss)

    model, loss, sgd = parts(kind)
    online, metrics = Online(model, loss, sgd, estimator, lanes=LANES), []
    before = numbers(model, loss)
    for step in range(STEPS):
        if reset[step].any():
            online.reset(reset[step])
        windows = len(online._pending)
        there = bool(mask[step].any())
        online.learn_one(x[step], y[step] if there else None, mask=mask[step] if there else None)
        if len(online._pending) <= windows:
            metrics.append(online.metrics)
    assert same(numbers(model, loss), hand)
    assert not any(torch.equal(a, b) for a, b in zip(hand, before, strict=True))
    for ours, theirs in zip(metrics, wanted, strict=True):
        known = {name: value for name, value in theirs.items() if value == value}
        assert known == {name: ours[name] for name in known}
        assert all(ours[name] != ours[name] for name in theirs.keys() & ours.keys() - known.keys())


def difference(outputs: Tensor, targets: Tensor) -> Tensor:
    error = (outputs - targets[..., None]).square().mean(-1)
    return error.diff(dim=0, prepend=0 * error[:1])


def test_a_coupled_loss_is_refused_at_the_first_labels_however_late_they_come() -> None:
    x, y, _, _ = rows()
    model, _, sgd = parts(lambda: difference)
    online = Online(model, difference, sgd, TBPTT(3, 6), lanes=LANES)
    for step in range(6):
        online.learn_one(x[step])
    before = numbers(model, difference)
    online.learn_one(x[6])
    online.learn_one(x[7], y[7])
    with pytest.raises(CapabilityError, match="of difference at step"):
        online.learn_one(x[8], y[8])
    assert same(numbers(model, difference), before)


def test_a_window_loss_with_weights_is_trained_as_in_a_loop() -> None:
    class Whole(Uncertain):
        def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            terms = super().forward(outputs, targets)
            return terms | {"change": terms["fit"].diff(dim=0, prepend=0 * terms["fit"][:1])}

    x, y, _, _ = rows()
    estimator = TBPTT(4, 8)
    model, loss, sgd = parts(Whole)
    updater = Updater(model, tbptt.loss.StepLoss.of(WindowLoss(loss)), sgd, estimator, LANES)
    for begin in (0, 4, 8):
        found = updater.update(Window(x[begin : begin + 4], y[begin : begin + 4], start=begin))
    hand = numbers(model, loss)
    model, loss, sgd = parts(Whole)
    online = Online(model, WindowLoss(loss), sgd, estimator, lanes=LANES)
    for step in range(12):
        online.learn_one(x[step], y[step])
    assert same(numbers(model, loss), hand)
    assert bool(loss.log_scale.any())
    assert found.seen.metrics == {name: online.metrics[name] for name in found.seen.metrics}
    assert {"loss/fit", "loss/size", "loss/change"} <= online.metrics.keys()
