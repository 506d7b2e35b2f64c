"""Losses: torch's own mean, whatever counts; and no wrong shape gets through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbptt import TBPTT, Window
from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.loss import StepLoss

T, B, C, D = 6, 3, 5, 2


def window(targets: Tensor, mask: Tensor | None = None) -> Window:
    return Window(torch.zeros(*targets.shape[:2], 1), targets, mask)


def mean(loss: Any, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    total, count = StepLoss.of(loss).total(outputs, window(targets, mask))
    return total / count


def some() -> Tensor:
    mask = torch.rand(T, B) < 0.6
    mask[0, 0] = True
    mask[1, 1] = False
    return mask


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


BY_CLASS: list[Any] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.NLLLoss(),
    nn.MultiMarginLoss(),
    F.cross_entropy,
    F.nll_loss,
]
BY_ELEMENT: list[Any] = [
    nn.MSELoss(),
    nn.L1Loss(),
    nn.SmoothL1Loss(beta=0.3),
    nn.HuberLoss(delta=0.4),
    nn.BCEWithLogitsLoss(),
    nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    nn.PoissonNLLLoss(),
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
]


def name(loss: Any) -> str:
    return loss.__name__ if not isinstance(loss, nn.Module) else type(loss).__name__


@pytest.mark.parametrize("loss", BY_CLASS, ids=name)
def test_losses_over_classes_are_torchs_own_mean(loss: Any) -> None:
    outputs, targets, mask = torch.randn(T, B, C).log_softmax(-1), torch.randint(C, (T, B)), some()
    torch.testing.assert_close(mean(loss, outputs, targets), loss(outputs.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))
    # The control: the mean over steps of the means over lanes is another number.
    by_step = torch.stack([loss(o[m], t[m]) for o, t, m in zip(outputs, targets, mask, strict=True) if m.any()])
    assert not torch.allclose(mean(loss, outputs, targets, mask), by_step.mean(), rtol=1e-3)


@pytest.mark.parametrize("loss", BY_ELEMENT, ids=name)
@pytest.mark.parametrize("trailing", [(), (D,), (D, 4)])
def test_losses_over_elements_are_torchs_own_mean(loss: Any, trailing: tuple[int, ...]) -> None:
    outputs, targets, mask = torch.randn(T, B, *trailing), torch.rand(T, B, *trailing), some()
    torch.testing.assert_close(mean(loss, outputs, targets), loss(outputs, targets))
    torch.testing.assert_close(mean(loss, outputs, targets, mask), loss(outputs[mask], targets[mask]))


@pytest.mark.parametrize("loss", [nn.BCELoss(), F.binary_cross_entropy])
def test_probabilities(loss: Any) -> None:
    outputs, targets, mask = torch.rand(T, B), torch.randint(2, (T, B)), some()  # whole numbers as targets
    torch.testing.assert_close(
        mean(loss, outputs, targets, mask), F.binary_cross_entropy(outputs[mask], targets[mask].float())
    )


@pytest.mark.parametrize("ignore", [-100, -1, 0, 3])
def test_an_ignored_class_does_not_count(ignore: int) -> None:
    outputs, targets, mask = torch.randn(T, B, C), torch.randint(C, (T, B)), some()
    targets[0, 1] = targets[3, 2] = ignore
    loss = nn.CrossEntropyLoss(ignore_index=ignore)
    total, count = StepLoss.of(loss).total(outputs, window(targets, mask))
    assert count == int((mask & (targets != ignore)).sum())
    torch.testing.assert_close(total / count, loss(outputs[mask], targets[mask]))


def test_class_weights_scale_the_losses_and_not_the_count() -> None:
    outputs, targets, weight = torch.randn(T, B, C), torch.randint(C, (T, B)), torch.rand(C)
    weighted = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), weight, reduction="sum") / (T * B)
    torch.testing.assert_close(mean(nn.CrossEntropyLoss(weight), outputs, targets), weighted)
    torchs = nn.CrossEntropyLoss(weight)(outputs.flatten(0, 1), targets.flatten())
    assert not torch.allclose(weighted, torchs)  # torch divides by the sum of the weights: documented


def test_class_probabilities_as_targets() -> None:
    outputs, targets = torch.randn(T, B, C), torch.rand(T, B, C).softmax(-1)
    wanted = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1))
    torch.testing.assert_close(mean(nn.CrossEntropyLoss(), outputs, targets), wanted)


def test_the_users_loss_is_left_as_it_is() -> None:
    loss = nn.MSELoss()
    StepLoss.of(loss)
    assert loss.reduction == "mean"
    ready = StepLoss.of(loss)
    assert StepLoss.of(ready) is ready


def test_a_loss_that_cannot_be_hashed() -> None:
    @dataclass  # with eq and without frozen: Python takes its hash away
    class Scaled:
        factor: float

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.factor * (outputs - targets).square()

    outputs, targets = torch.randn(T, B), torch.randn(T, B)
    torch.testing.assert_close(mean(Scaled(2.0), outputs, targets), 2 * F.mse_loss(outputs, targets))


def gradient(loss: Any, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    model = nn.RNN(D, C)
    inputs = torch.randn(T, B, D)
    estimator = TBPTT(T, T)
    estimate, _ = estimator.estimate(model, loss, estimator.init(model, B), Window(inputs, targets, mask))
    return estimate.loss, estimate.gradients["weight_hh_l0"]


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda o, t: (o - t).square().sum(-1)], ids=["torch", "own"])
def test_missing_targets_do_not_reach_the_gradient_unless_they_count(loss: Any, missing: float) -> None:
    targets, mask = torch.randn(T, B, C), some()
    torch.manual_seed(1)
    value, wanted = gradient(loss, targets, mask)
    targets[~mask] = missing
    torch.manual_seed(1)
    again, found = gradient(loss, targets, mask)
    assert torch.equal(again, value)
    assert torch.equal(found, wanted)
    targets[0, 0] = missing  # this one counts
    value, found = gradient(loss, targets, mask)
    assert not value.isfinite()
    assert not found.isfinite().all()


# Refusals


def test_sums_are_refused() -> None:
    with pytest.raises(ConfigError, match='reduction="sum" was asked for') as caught:
        StepLoss.of(nn.MSELoss(reduction="sum"))
    assert "torch.nn.MSELoss()" in caught.value.fix


@pytest.mark.parametrize("loss", [nn.CTCLoss(), nn.TripletMarginLoss(), nn.CosineEmbeddingLoss(), nn.KLDivLoss()])
def test_losses_that_compare_something_else_are_refused(loss: nn.Module) -> None:
    with pytest.raises(CapabilityError, match=f"{type(loss).__name__} is not a loss of outputs against targets"):
        StepLoss.of(loss)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(CapabilityError, match="but a str came"):
        StepLoss.of("mse")


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (o - t).square().mean(),
        lambda o, t: (o - t).square().mean((1, 2)),
        lambda o, t: (o - t).square().mean((0, 2)),
        lambda o, t: (o - t).square().mean((0, 2), keepdim=True),
        lambda o, t: (o - t).square().mean(-1).T,
        lambda o, t: (o - t).square(),
    ],
    ids=["scalar", "T", "B", "1 B 1", "B T", "T B D"],
)
def test_shapes_other_than_steps_and_lanes_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match=rf"shape \(T, B\) = \({T}, {B}\), but returned shape") as caught:
        mean(loss, torch.randn(T, B, D), torch.randn(T, B, D))
    assert 'reduction="none"' in caught.value.fix


def test_elements_are_not_broadcast() -> None:
    """(T, B, 1) against (T, B) would compare every lane with every other, or every step."""
    with pytest.raises(ShapeError, match="one shape") as caught:
        mean(nn.MSELoss(), torch.randn(T, B, 1), torch.randn(T, B))
    assert "squeeze(-1)" in caught.value.fix


def test_classes_come_last() -> None:
    with pytest.raises(ShapeError, match=r"outputs \(T, B, C\), class last"):
        mean(nn.CrossEntropyLoss(), torch.randn(T, C, B), torch.randint(C, (T, B)))
    with pytest.raises(ShapeError, match="class last"):
        mean(nn.CrossEntropyLoss(), torch.randn(T, B), torch.randint(C, (T, B)))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MultiMarginLoss()], ids=name)
@pytest.mark.parametrize("wrong", [C, C + 6, -2])
def test_a_class_out_of_range_says_where(loss: nn.Module, wrong: int) -> None:
    targets, mask = torch.randint(C, (T, B)), torch.ones(T, B, dtype=torch.bool)
    targets[4, 2] = wrong
    targets[1, 0], mask[1, 0] = 1000, False  # does not count
    with pytest.raises(ShapeError, match=rf"target {wrong} stands at step 4 of the window, lane 2 \(1 such\)"):
        mean(loss, torch.randn(T, B, C), targets, mask)
