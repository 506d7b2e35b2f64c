"""What the tests of Lightning share: a net, a quiet trainer, and a run that is stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import tbptt
from tbptt.integrations.lightning import TBPTTMixin
from tbptt.randomness import seed_everything


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


@cache
def undisturbed(
    estimator: tbptt.Estimator | None = None, count: int = 3203, steps: int = 120
) -> tuple[list[float], TBPTTMixin]:
    """Return the losses of a run that nobody stops, and its net; several tests compare with it."""
    net = Net(estimator, stream(count))
    return fit(net, max_steps=steps), net


@cache
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
