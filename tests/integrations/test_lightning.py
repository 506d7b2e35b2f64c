"""Lightning: the same numbers as our own trainer, also after a stop in mid-stream, and no setting ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import CheckError, CheckpointError, ConfigError, NonFiniteError, StreamError
from tbptt.randomness import seed_everything

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

from tbptt.integrations.lightning import TBPTTMixin  # noqa: E402

pytestmark = [
    # Lightning's own: it imports what is deprecated, and finds directories that it has written before
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

ESTIMATORS = [
    tbptt.TBPTT(8, 3),
    tbptt.TBPTT(8, 3, losses="all"),
    tbptt.TBPTT(8, 8),
    tbptt.TBPTT(8, 13),
    tbptt.TBPTT(8, 13, replay="retain"),
]


def rows(count: int = 3203) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, generator=generator), torch.randn(count, 1, generator=generator)


def stream(count: int = 3203) -> tbptt.ArrayStream:
    return tbptt.ArrayStream(*rows(count), lanes=4)


def guards() -> list[tbptt.Guard]:
    return [tbptt.NonFinite("raise"), tbptt.ClipNorm(0.05)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.GRU(1, 6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        return self.head(self.drop(outputs)), state


class Net(TBPTTMixin):
    def __init__(self, estimator: tbptt.Estimator | None = None, source: Any = None, **settings: Any) -> None:
        super().__init__()
        self.model = settings.pop("model", None) or Model()
        loss = settings.pop("loss", nn.MSELoss())
        settings = {"guards": guards(), "checked": False} | settings  # the check takes longer than such short runs
        self.use_tbptt(estimator or tbptt.TBPTT(8, 13), loss, source or stream(), **settings)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(inputs, state)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.epochs: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(outputs["loss"].item())
        self.epochs.append(trainer.current_epoch)


def trainer(*callbacks: Callback, **settings: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(callbacks=list(callbacks), **quiet | settings)


def fit(net: TBPTTMixin, path: Path | str | None = None, *callbacks: Callback, **settings: Any) -> list[float]:
    losses = Losses()
    seed_everything(0)
    trainer(losses, *callbacks, **settings).fit(net, ckpt_path=path)
    return losses.seen


def ours(estimator: tbptt.Estimator, updates: int) -> tuple[list[float], Model]:
    losses: list[float] = []

    class Collects(tbptt.Monitor):
        def update(self, update) -> None:
            losses.append(update.estimate.loss.item())

    model = Model()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    run = tbptt.Trainer(
        model,
        nn.MSELoss(),
        adam,
        estimator,
        stream(),
        guards=guards(),
        monitors=[Collects()],
        checked=False,
    )
    run.run(updates=updates)
    return losses, model


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_it_does_what_our_trainer_does(estimator: tbptt.Estimator) -> None:
    net = Net(estimator)
    losses = fit(net, max_steps=200)
    expected, model = ours(estimator, 200)
    assert losses == expected
    assert len(losses) == 200
    assert equal(net.model, model)
    other, _ = ours(tbptt.TBPTT(8, 5), 200)
    assert other != expected, "the comparison sees nothing"


class Stops(Callback):
    """A fault between two updates: nothing is saved on the way out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def checkpoint(path: Path, step: int, estimator: tbptt.Estimator | None = None, **settings: Any) -> Path:
    """Train up to a fault; return the checkpoint that was written every `step` updates."""
    saves = ModelCheckpoint(path, every_n_train_steps=step, save_top_k=-1)
    with pytest.raises(KeyError, match="stopped"):
        fit(Net(estimator), None, saves, Stops(step + 3), max_steps=200, **settings)
    return next(path.glob(f"*step={step}.ckpt"))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("step", [1, 87, 101])  # a pass has 101 windows
def test_a_run_in_pieces_is_a_run_in_one(tmp_path: Path, estimator: tbptt.Estimator, step: int) -> None:
    whole = Net(estimator)
    expected = fit(whole, max_steps=200)
    path = checkpoint(tmp_path, step, estimator)
    rest = Net(estimator)
    for value in rest.parameters():
        nn.init.zeros_(value)
    torch.manual_seed(99)  # whatever was drawn meanwhile must not matter
    losses = Losses()
    trainer(losses, max_steps=200).fit(rest, ckpt_path=path)
    assert losses.seen == expected[step:]
    assert equal(rest, whole)


def test_a_finished_run_goes_on(tmp_path: Path) -> None:
    expected = fit(Net(), max_steps=120)
    first = trainer(max_steps=87)
    seed_everything(0)
    first.fit(Net())
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.manual_seed(99)
    losses = Losses()
    trainer(losses, max_steps=120).fit(Net(), ckpt_path=tmp_path / "last.ckpt")
    assert losses.seen == expected[87:]


@pytest.mark.parametrize("lost", ["carry", "place", "random"])
def test_without_any_of_it_the_losses_are_others(tmp_path: Path, lost: str) -> None:
    expected = fit(Net(), max_steps=100)
    path = checkpoint(tmp_path, 87)
    net = Net()
    restore = type(net.tbptt_course)._restore

    def forgets(course, run, device) -> None:
        fresh = course.carry.state_dict()
        restore(course, run, device)
        if lost == "carry":
            course.carry.load_state_dict(fresh)
        elif lost == "place":
            course.stream.rewind()
            course.ahead = None
        else:
            course.random = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(net.tbptt_course), "_restore", forgets)
        assert fit(net, path, max_steps=100) != expected[87:]


@pytest.mark.parametrize("step", [40, 50, 51, 75])  # a pass has 51 windows; validated every 25
def test_validation_disturbs_nothing_on_either_side_of_a_stop(tmp_path: Path, step: int) -> None:
    class Validated(Net):
        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", tbptt.evaluate(self, nn.MSELoss(), stream(100))["loss"], batch_size=1)

    settings: dict[str, Any] = {"max_steps": 120, "val_check_interval": 25}
    expected = fit(Net(source=stream(1603)), max_steps=120)
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
    losses = Losses()
    seed_everything(0)
    trainer(losses, max_epochs=4, limit_train_batches=5).fit(Net())
    assert losses.seen == fit(Net(), max_steps=20)
    assert losses.epochs == [epoch for epoch in range(4) for _ in range(5)]


def test_a_second_fit_goes_on() -> None:
    net = Net()
    first = fit(net, max_steps=30)
    state = torch.get_rng_state()
    losses = Losses()
    torch.set_rng_state(state)
    run = trainer(losses, max_steps=10)
    run.fit(net)
    seen = first + losses.seen
    assert seen[:30] == fit(Net(), max_steps=40)[:30]
    assert net.tbptt_course.place["position"] == 40 * 8


def test_a_model_that_forgets_its_state_is_refused() -> None:
    class Forgets(Model):
        def forward(self, inputs, state=None):
            return super().forward(inputs, None)

    net = Net(model=Forgets(), checked=True)
    before = [value.clone() for value in net.parameters()]
    with pytest.raises(CheckError, match="forgets to pass its state on"):
        fit(net, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_the_check_disturbs_nothing() -> None:
    assert fit(Net(checked=True), max_steps=5) == fit(Net(), max_steps=5)


@pytest.mark.parametrize(
    ("settings", "says", "fix"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5", r"guards=\[NonFinite\(\), ClipNorm\(0\.5\)\]"),
        ({"gradient_clip_val": 2, "gradient_clip_algorithm": "value"}, "gradient_clip_val=2", r"ClipValue\(2\)"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2", "longer windows: TBPTT"),
        ({"overfit_batches": 3}, "overfit_batches=3", "overfit_batches=0"),
        ({"precision": "bf16-true"}, "precision='bf16-true'", "bf16-mixed"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], says: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"{says}(.|\n)*hint: .*{fix}"):
        fit(Net(), max_steps=3, **settings)


def test_hooks_that_would_not_be_called_are_refused() -> None:
    class Own(lightning.LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("never called")

        def configure_gradient_clipping(self, *arguments):
            raise AssertionError("never called")

    class WrongOrder(Own, Net):
        pass

    with pytest.raises(ConfigError, match=r"leave training_step to TBPTTMixin(.|\n)*the mixin first"):
        fit(WrongOrder(), max_steps=3)

    class Clips(Net, Own):
        pass

    with pytest.raises(ConfigError, match=r"leave configure_gradient_clipping to TBPTTMixin(.|\n)*ClipNorm"):
        fit(Clips(), max_steps=3)


def test_it_mixes_into_a_module_that_is_there() -> None:
    class Old(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, inputs, state=None):
            return self.model(inputs, state)

        def training_step(self, batch, batch_idx, hiddens):
            raise AssertionError("never called")

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class New(TBPTTMixin, Old):
        def __init__(self) -> None:
            super().__init__()
            self.use_tbptt(tbptt.TBPTT(8, 13), nn.MSELoss(), stream(), guards=guards())

    assert fit(New(), max_steps=5) == ours(tbptt.TBPTT(8, 13), 5)[0]


def test_what_is_set_wrongly_in_the_module_is_refused() -> None:
    class Automatic(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

    class Unsaid(TBPTTMixin):
        def configure_optimizers(self):
            raise AssertionError("too late")

    class Two(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    class Forgot(Net):
        def on_fit_start(self) -> None:
            pass

    with pytest.raises(ConfigError, match="automatic_optimization=False was expected"):
        fit(Automatic(), max_steps=3)
    with pytest.raises(ConfigError, match=r"use_tbptt was not called"):
        fit(Unsaid(), max_steps=3)
    with pytest.raises(ConfigError, match=r"one optimizer was expected, but .* 2"):
        fit(Two(), max_steps=3)
    with pytest.raises(ConfigError, match=r"on_fit_start was expected to reach TBPTTMixin"):
        fit(Forgot(), max_steps=3)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_data_loader_is_refused() -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(20, 1))
    with pytest.raises(ConfigError, match="the windows come from the stream"):
        trainer(max_steps=3).fit(Net(), loader)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError, match="another run: its estimator was expected"):
        fit(Net(tbptt.TBPTT(8, 14)), path, max_steps=9)
    with pytest.raises(CheckpointError, match="another run: its guards was expected"):
        fit(Net(guards=[]), path, max_steps=9)
    with pytest.raises(StreamError, match="rows"):
        fit(Net(source=stream(800)), path, max_steps=9)
    state = torch.load(path, weights_only=True)
    del state["tbptt"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="was expected to hold a carry"):
        fit(Net(), path, max_steps=9)


def test_weights_alone_begin_a_new_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    net = Net.load_from_checkpoint(path, map_location="cpu")
    fit(net, max_steps=3)
    assert net.tbptt_course.place["position"] == 3 * 8


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


def plateau(**changes: Any) -> Net:
    def config(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        each = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"scheduler": each, "monitor": "val_loss", **changes}

    return scheduled(config)


def test_reduce_on_plateau_steps_at_the_end_of_epochs() -> None:
    net = plateau()
    fit(net, max_epochs=3)
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1**2)  # the first is the best so far
    with pytest.raises(ConfigError, match="step at the end of epochs"):
        fit(plateau(interval="step"), max_epochs=3)
    with pytest.raises(ConfigError, match="to find the metric 'nothing'"):
        fit(plateau(monitor="nothing"), max_epochs=3)


def test_it_logs_what_was_measured() -> None:
    run = trainer(max_steps=3, log_every_n_steps=1)
    run.fit(Net())
    assert {"train_loss", "refused", "gradient_norm", "clip_scale"} <= set(run.callback_metrics)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(precision: str) -> None:
    net = Net(model=nn.GRU(1, 1), checked=True)
    losses = fit(net, max_steps=20, precision=precision)
    single = fit(Net(model=nn.GRU(1, 1)), max_steps=20)
    del losses, single


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
