"""Lightning: the same numbers as our own trainer, also after a stop in mid-stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import ConfigError, NonFiniteError
from tbptt.randomness import seed_everything

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning_nets import (  # noqa: E402
    Losses,
    Model,
    Net,
    checkpoint,
    equal,
    fit,
    ours,
    rows,
    stream,
    trainer,
    undisturbed,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own: a class of torch's that is deprecated; that a checkpoint holds the weights after the update,
    # which is what is wanted; and that a run is resumed without the callback that saved it, which is done here.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

ESTIMATORS = [
    tbptt.TBPTT(8, 3),
    tbptt.TBPTT(8, 3, losses="all"),
    tbptt.TBPTT(8, 8),
    tbptt.TBPTT(8, 13),
    tbptt.TBPTT(8, 13, replay="retain"),
    tbptt.TBPTT(tbptt.RandomLength(8, deviation=2), tbptt.Adaptive(max=20, every=5)),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_it_does_what_our_trainer_does(estimator: tbptt.Estimator) -> None:
    losses, net = undisturbed(estimator)  # longer than a pass, which has 101 windows
    expected, model = ours(estimator, 120)
    assert losses == expected
    assert len(losses) == 120
    assert equal(net.model, model)
    other, _ = ours(tbptt.TBPTT(8, 5), 120)
    assert other != expected, "the comparison sees nothing"


@pytest.mark.parametrize(
    ("step", "estimator"),
    [*((87, each) for each in ESTIMATORS), (1, ESTIMATORS[-2]), (101, ESTIMATORS[-2])],  # a pass has 101 windows
    ids=str,
)
def test_a_run_in_pieces_is_a_run_in_one(tmp_path: Path, estimator: tbptt.Estimator, step: int) -> None:
    expected, whole = undisturbed(estimator)
    path = checkpoint(tmp_path, step, estimator)
    rest = Net(estimator)
    for value in rest.parameters():
        nn.init.zeros_(value)
    torch.manual_seed(99)  # whatever was drawn meanwhile must not matter
    losses = Losses()
    trainer(losses, max_steps=120).fit(rest, ckpt_path=path)
    assert losses.seen == expected[step:]
    assert equal(rest, whole)


def test_a_finished_run_goes_on(tmp_path: Path) -> None:
    expected, _ = undisturbed()
    first, net = trainer(max_steps=87), Net()
    seed_everything(0)
    first.fit(net)
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.manual_seed(99)
    losses = Losses()
    trainer(losses, max_steps=120).fit(Net(), ckpt_path=tmp_path / "last.ckpt")
    assert losses.seen == expected[87:]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that a fault has stopped."""
    return checkpoint(tmp_path_factory.mktemp("stopped"), 87)


@pytest.mark.parametrize("lost", ["carry", "place", "random"])
def test_without_any_of_it_the_losses_are_others(stopped: Path, lost: str) -> None:
    expected, _ = undisturbed()
    net = Net()
    restore = type(net.tbptt_course)._restore

    def forgets(course, run) -> None:
        fresh = course.carry.state_dict()
        restore(course, run)
        if lost == "carry":
            course.carry.load_state_dict(fresh)
        elif lost == "place":
            course.stream.rewind()
            course.ahead = None
        else:
            course.random = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(net.tbptt_course), "_restore", forgets)
        assert fit(net, stopped, max_steps=100) != expected[87:100]


@pytest.mark.parametrize("step", [40, 50, 51, 75])  # a pass has 51 windows; validated every 25
def test_validation_disturbs_nothing_on_either_side_of_a_stop(tmp_path: Path, step: int) -> None:
    class Validated(Net):
        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", tbptt.evaluate(self, nn.MSELoss(), stream(100))["loss"], batch_size=1)

    settings: dict[str, Any] = {"max_steps": 120, "val_check_interval": 25}
    expected, _ = undisturbed(count=1603)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
    assert fit(Validated(source=stream(1603)), None, saves, **settings) == expected
    path = next(tmp_path.glob(f"*step={step}.ckpt"))
    again = Validated(source=stream(1603))
    assert fit(again, path, **settings) == expected[step:]
    assert again.trainer.callback_metrics["val_loss"] > 0


def test_an_epoch_is_a_pass() -> None:
    validations = []

    class Validated(Net):
        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            validations.append(self.global_step)

    losses = Losses()
    run = trainer(losses, max_epochs=3, num_sanity_val_steps=0)
    run.fit(Validated(source=stream(403)))
    windows = 13  # 101 steps in windows of 8
    assert losses.epochs == [epoch for epoch in range(3) for _ in range(windows)]
    assert run.global_step == 3 * windows
    assert run.current_epoch == 3
    assert validations == [windows, 2 * windows, 3 * windows]


@pytest.mark.parametrize("step", [13, 20, 26])
def test_epochs_are_counted_on_after_a_stop(tmp_path: Path, step: int) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
    expected = fit(Net(source=stream(403)), None, saves, max_epochs=3)
    path = next(tmp_path.glob(f"*step={step}.ckpt"))
    losses = Losses()
    run = trainer(losses, max_epochs=3)
    run.fit(Net(source=stream(403)), ckpt_path=path)
    assert losses.seen == expected[step:]
    assert run.global_step == 39


def test_an_epoch_may_be_a_part_of_a_pass() -> None:
    losses, net = Losses(), Net()
    seed_everything(0)
    trainer(losses, max_epochs=4, limit_train_batches=5).fit(net)
    assert losses.seen == undisturbed()[0][:20]
    assert losses.epochs == [epoch for epoch in range(4) for _ in range(5)]


def test_a_second_fit_goes_on() -> None:
    expected, _ = undisturbed()
    net, losses = Net(), Losses()
    assert fit(net, max_steps=30) == expected[:30]
    trainer(losses, max_steps=10).fit(net)
    assert losses.seen[0] == expected[30]  # the next have another optimizer
    assert net.tbptt_course.place["position"] == 40 * 8


class Bursts(nn.Module):
    """Adds what is not a number to its outputs, or its state, at a marked step."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.where = nn.GRU(1, 1), where

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        burst = torch.where((inputs > 50).any(), torch.nan, 0.0)
        return (outputs + burst, state) if self.where == "outputs" else (outputs + burst, state + burst)


@pytest.mark.parametrize("where", ["outputs", "state"])
def test_a_window_that_breaks_the_numbers_is_left_out(where: str) -> None:
    inputs, targets = rows(400)
    inputs[61] = 100.0

    def source() -> tbptt.ArrayStream:
        return tbptt.ArrayStream(inputs, targets, lanes=4)

    run = trainer(max_epochs=1)
    net = Net(tbptt.TBPTT(8, 8), source(), model=Bursts(where), guards=[tbptt.NonFinite("skip")])
    run.fit(net)
    assert run.global_step == 12  # of 13 windows
    assert all(torch.isfinite(value).all() for value in net.parameters())
    assert torch.isfinite(net.tbptt_course.carry.state).all()
    with pytest.raises(NonFiniteError):
        fit(Net(tbptt.TBPTT(8, 8), source(), model=Bursts(where), guards=None), max_epochs=1)


def test_windows_without_targets_change_nothing() -> None:
    class Decays(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), weight_decay=0.5)

    nothing = tbptt.ArrayStream(*rows(400), lanes=4, mask=torch.zeros(400, dtype=torch.bool))
    run = trainer(max_epochs=1)
    net = Decays(source=nothing)
    run.fit(net)
    assert equal(net.model, Model())
    assert run.global_step == 0


def scheduled(config: Callable[[torch.optim.Optimizer], dict[str, Any]]) -> Net:
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": config(optimizer)}

        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0, batch_size=1)

    return Scheduled(source=stream(403))


@pytest.mark.parametrize(
    ("interval", "frequency", "rate"),
    [("step", 1, 0.5**5), ("step", 3, 0.5**1), ("epoch", 1, 0.5**2), ("epoch", 2, 0.5**1)],
)
def test_schedulers_step(interval: str, frequency: int, rate: float) -> None:
    def config(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        each = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"scheduler": each, "interval": interval, "frequency": frequency}

    net = scheduled(config)
    fit(net, **({"max_steps": 5} if interval == "step" else {"max_epochs": 2}))
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def plateau(**settings: Any) -> Net:
    class Watches(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            each = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": each}

        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0, batch_size=1)

    return Watches(source=stream(403), **settings)


def test_reduce_on_plateau_steps_at_validations(tmp_path: Path) -> None:
    net = plateau()
    saves = ModelCheckpoint(tmp_path, save_top_k=-1)
    expected = fit(net, None, saves, max_epochs=4)
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)  # the first is the best
    assert fit(plateau(), next(tmp_path.glob("epoch=1-*.ckpt")), max_epochs=4) == expected[2 * 13 :]
    with pytest.raises(ConfigError, match=r"metric 'other' was expected .*train_loss.*val_loss"):
        fit(plateau(monitor="other"), max_epochs=4)
    with pytest.raises(ConfigError, match="validation was expected, for ReduceLROnPlateau"):
        fit(plateau(), max_epochs=4, limit_val_batches=0)


def test_it_logs_what_was_measured() -> None:
    run = trainer(max_steps=3, log_every_n_steps=1)
    run.fit(Net())
    assert {"train_loss", "refused", "gradient_norm", "clip_scale"} <= set(run.callback_metrics)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-mixed", 0.05)])
def test_other_precisions(precision: str, tolerance: float) -> None:
    net = Net(model=torch.nn.GRU(1, 1))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    losses = fit(net, max_steps=20, precision=precision)
    single = Net(model=torch.nn.GRU(1, 1))
    single.load_state_dict(start)
    expected = fit(single, max_steps=20)
    assert losses != expected
    assert losses == pytest.approx(expected, rel=tolerance)


def test_the_loss_is_moved_with_the_module() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    data = torch.randn(400, 1), torch.randint(2, (400,))
    fit(Net(tbptt.TBPTT(8, 8), tbptt.ArrayStream(*data, lanes=4), loss=loss, model=nn.GRU(1, 2)), max_steps=2)


@pytest.mark.gpu
def test_the_carry_lives_where_the_module_does(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
    expected = fit(Net(), max_steps=40, **settings)
    path = checkpoint(tmp_path, 17, **settings)
    net = Net()
    assert fit(net, path, max_steps=40, **settings) == expected[17:]
    assert net.tbptt_course.carry.state.is_cuda
    fit(net, max_steps=5)  # goes on, on the CPU
    assert not net.tbptt_course.carry.state.is_cuda
