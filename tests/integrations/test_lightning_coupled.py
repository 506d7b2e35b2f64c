"""Lightning: a loss that couples steps is refused at its first window, and a `WindowLoss` is trained on whole ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tbptt
from tbptt.errors import CapabilityError

pytest.importorskip("lightning")

from lightning_nets import Net, fit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),  # Lightning's
]


def error_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).squeeze(-1)


def pre_emphasis(outputs: Tensor, targets: Tensor) -> Tensor:
    error = error_of(outputs, targets)
    return (error - 0.95 * torch.cat([0 * error[:1], error[:-1]])).square()


def difference(outputs: Tensor, targets: Tensor) -> Tensor:
    error = error_of(outputs, targets)
    return error.diff(dim=0, prepend=0 * error[:1]).square()


def spectral(outputs: Tensor, targets: Tensor) -> Tensor:
    error = F.pad(error_of(outputs, targets).T, (2, 2))
    frames = torch.stft(error, 4, 1, window=torch.hann_window(4), center=False, return_complex=True)
    return frames.abs().mean(1)[:, : len(outputs)].T


def normalised(outputs: Tensor, targets: Tensor) -> Tensor:
    return (error_of(outputs, targets) / targets.std()).square()


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    soft = 0.8 * targets + 0.1 * targets.roll(1, 0) + 0.1 * targets.roll(-1, 0)
    return error_of(outputs, soft).square()


@pytest.mark.parametrize("loss", [pre_emphasis, difference, spectral, normalised, smoothed])
def test_a_coupled_loss_is_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Net(loss=loss)
    before = [value.clone() for value in net.parameters()]
    with pytest.raises(CapabilityError, match=rf"of {loss.__name__} at step \d+ depends on what stands at step"):
        fit(net, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_window_loss_is_trained() -> None:
    net = Net(loss=tbptt.WindowLoss(difference))
    before = [value.clone() for value in net.parameters()]
    fit(net, max_steps=3)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(CapabilityError, match="a window in one piece was expected for a WindowLoss"):
        fit(Net(tbptt.TBPTT(8, 3), loss=tbptt.WindowLoss(difference)), max_steps=1)
