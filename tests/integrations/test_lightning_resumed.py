"""Under Lightning, too: what training changes besides weights is resumed, and a file names no strange class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
from lightning_nets import Losses, Model, Net, trainer

from tbptt.codec import UnknownClassError
from tbptt.errors import CheckpointWarning

pytestmark = [
    # Lightning's own: a class of torch's that is deprecated; and what lightning_nets needs it for.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Changing(Model):
    """A model with a counter, a buffer outside its state_dict and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.own = 0, torch.Generator().manual_seed(0)
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if self.training and torch.is_grad_enabled():
            self.count += 1
            self.decay.mul_(0.99)
            inputs = inputs * self.decay * torch.rand(inputs.shape, generator=self.own) / (1 + 0.1 * self.count)
        return super().forward(inputs, state)


class Spying(Net):
    """Validates before it trains, in train mode, which changes what the model keeps."""

    def val_dataloader(self) -> Any:
        return [0]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        del batch, batch_idx
        self.model.count += 100


def run(path: Path, stop: int, resume: bool) -> tuple[list[float], Spying]:
    net, losses = Spying(model=Changing()), Losses()
    made = trainer(losses, max_steps=stop, num_sanity_val_steps=1, limit_val_batches=1)
    made.fit(net, ckpt_path=path if resume else None)
    if not resume:
        made.save_checkpoint(path)
    return losses.seen, net


def test_what_training_changes_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected, whole = run(tmp_path / "whole.ckpt", 25, False)
    torch.manual_seed(0)
    run(tmp_path / "part.ckpt", 12, False)
    torch.manual_seed(7)
    losses, resumed = run(tmp_path / "part.ckpt", 25, True)
    assert losses == expected[12:]
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert resumed.model.count == whole.model.count
    torch.load(tmp_path / "part.ckpt", weights_only=True)


def test_a_strange_class_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "part.ckpt", 3, False)
    checkpoint = torch.load(tmp_path / "part.ckpt", weights_only=True)
    for entry in ("carry", "guards", "place", "side", "random"):
        changed = torch.load(tmp_path / "part.ckpt", weights_only=True)
        changed["tbptt"]["ranks"][0]["state"][entry] = {"$": "object", "class": "os:_Environ", "parts": []}
        torch.save(changed, tmp_path / "strange.ckpt")
        with pytest.raises(UnknownClassError, match=f"tbptt.{entry}.*os:_Environ"):
            run(tmp_path / "strange.ckpt", 5, True)
    assert checkpoint["tbptt"]["ranks"][0]["state"]["side"]["values"]  # the control


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Notes:
        total = 0

    class Keeping(Changing):
        def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            self.__dict__.setdefault("notes", Notes()).total += 1
            return super().forward(inputs, state)

    net = Net(model=Keeping())
    made = trainer(max_steps=3)
    made.fit(net)
    with pytest.warns(CheckpointWarning, match=r"model\.model\.notes of Net"):
        made.save_checkpoint(tmp_path / "one.ckpt")
