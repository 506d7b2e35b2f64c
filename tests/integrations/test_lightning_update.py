"""What Lightning shares with all who train: who is trained, and in which mode; and what its ranks agree on."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import AlarmWarning, ConfigError
from tbptt.loss import StepLoss

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_nets import Model, Net, fit

from tbptt.integrations.lightning.ranks import LightningRanks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own: a class of torch's that is deprecated; that a checkpoint holds the weights after the update,
    # which is what is wanted; and that a run is resumed without the callback that saved it, which is done here.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.modes: set[bool] = set()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.modes.add(self.training)
        return (outputs * self.scale - targets).square().sum(-1)


class WithLoss(tbptt.TBPTT):
    """TBPTT whose estimates hold known gradients of the loss's own parameters."""

    def estimate(self, model: Any, loss: Any, carry: Any, window: Any) -> Any:
        estimate, carry = super().estimate(model, loss, carry, window)
        own = StepLoss.of(loss).own_parameters(model)
        return replace(estimate, loss_gradients={name: torch.full_like(each, 0.5) for name, each in own.items()}), carry


class LossNet(Net):
    def __init__(self, **settings: Any) -> None:
        super().__init__(WithLoss(8, 8), loss=Scaled(), **settings)

    def configure_optimizers(self) -> Any:
        loss = self.tbptt_course.loss
        assert isinstance(loss, nn.Module)
        return torch.optim.Adam([*self.parameters(), *loss.parameters()], lr=1e-2)


def test_a_loss_with_parameters_is_trained_and_resumed(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    whole, rest = LossNet(), LossNet()
    fit(whole, None, saves, max_steps=12)
    fit(rest, tmp_path / "step=6.ckpt", max_steps=12)
    scales = [each.tbptt_course.loss.scale for each in (whole, rest, LossNet())]
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])


def test_an_optimizer_that_leaves_the_loss_out_is_told_of() -> None:
    class Forgets(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    with pytest.warns(AlarmWarning, match="loss:scale"):
        fit(Forgets(loss=Scaled()), max_steps=1)


def test_an_optimizer_over_another_copy_is_refused() -> None:
    class Stale(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(Model().parameters())

    with pytest.raises(ConfigError, match="none of the model's"):
        fit(Stale(), max_steps=1)


@pytest.mark.filterwarnings("ignore:Found 5 module.s. in eval mode")  # Lightning says so, and trains it so
def test_a_net_in_eval_mode_is_trained_in_train_mode() -> None:
    loss = Scaled().requires_grad_(False)
    net = Net(loss=loss)
    net.eval()
    with pytest.warns(AlarmWarning, match="the model was expected in train mode"):
        fit(net, max_steps=2)
    assert net.model.drop.training
    assert loss.modes == {True}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.unused = (nn.Linear(2, 1) for _ in range(3))


def of_rank(model: Heads, rank: int) -> tbptt.Estimate:
    """The first rank's losses reach one head, the second's another and the loss's own parameter."""
    num = 3 + 2 * rank
    inputs = torch.randn(num, 2, generator=torch.Generator().manual_seed(rank))
    total = (model.right if rank else model.left)(inputs).square().sum()
    named = {name: each for name, each in model.named_parameters() if name.startswith("right" if rank else "left")}
    gradients = dict(zip(named, torch.autograd.grad(total / num, named.values()), strict=True))
    return tbptt.Estimate(
        outputs=None,
        loss=total.detach() / num,
        loss_sum=total.detach(),
        num_terms=num,
        gradients=gradients,
        lookback=1,
        boundary_norms=torch.zeros(0),
        num_injected=num,
        loss_gradients={"scale": torch.full((1,), 2.0)} if rank else {},
    )


class Placed(nn.Module):
    """A module with a trainer, and the heads as its own."""

    def __init__(self, heads: Heads, trainer: Any) -> None:
        super().__init__()
        self.left, self.right, self.unused = heads.left, heads.right, heads.unused
        self.__dict__["trainer"] = trainer


def both_ranks(model: Heads) -> list[tbptt.Estimate]:
    """Each rank is a thread; what they send must match in number and shape."""
    slots: list[Any] = [None, None]
    found: list[Any] = [None, None]
    meet = threading.Barrier(2, timeout=20)

    def work(rank: int) -> None:
        def reduce(value: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            slots[rank] = value.clone()
            meet.wait()
            assert slots[0].shape == slots[1].shape
            total = slots[0] + slots[1]
            meet.wait()
            return total

        strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
        placed: Any = Placed(model, SimpleNamespace(world_size=2, strategy=strategy))
        found[rank] = LightningRanks(placed, StepLoss.of(Scaled())).reduce(of_rank(model, rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def test_ranks_that_reach_other_parameters_reduce_the_same_ones() -> None:
    model = Heads()
    left, right = both_ranks(model)
    one, other = of_rank(model, 0), of_rank(model, 1)
    expected = {name: each * 3 / 8 for name, each in one.gradients.items()}
    expected |= {name: each * 5 / 8 for name, each in other.gradients.items()}
    for each in (left, right):
        assert each.gradients.keys() == expected.keys()  # the unused head has none on either
        for name, gradient in expected.items():
            torch.testing.assert_close(each.gradients[name], gradient)
        torch.testing.assert_close(each.loss_gradients, {"scale": torch.full((1,), 2.0 * 5 / 8)})
        assert (each.num_injected, each.num_terms, each.weight) == (8, 8, 8.0)
        torch.testing.assert_close(each.loss, (one.loss_sum + other.loss_sum) / 8)
