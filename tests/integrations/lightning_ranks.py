"""A run over several ranks, as a script: Lightning starts it once more for each of them.

python lightning_ranks.py DIRECTORY RANKS CASE [CHECKPOINT]

Leaves in DIRECTORY, for each rank, its weights and losses; and a checkpoint of update 20.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import tbptt
from tbptt.integrations.lightning import TBPTTMixin

LANES, STEPS = 8, 250
DIRECTORY, RANKS, CASE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


def lanes_of(rank: int, ranks: int) -> tbptt.ArrayStream:
    """The recording's lanes, cut as for one rank, and dealt out."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, LANES * STEPS, 1, generator=generator)
    mask = torch.rand(LANES * STEPS, generator=generator) < torch.linspace(0.05, 1, LANES * STEPS)
    mask[: 64 * LANES] &= torch.arange(64 * LANES) > 500  # so that the first rank has windows without a target
    part = slice(rank * LANES * STEPS // ranks, (rank + 1) * LANES * STEPS // ranks)
    if CASE == "short" and rank == 1:
        part = slice(part.start, part.stop - 60)
    counts = mask[part] if CASE == "masked" else None
    return tbptt.ArrayStream(inputs[part], targets[part], lanes=LANES // ranks, mask=counts)


class Net(TBPTTMixin):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.GRU(1, 6)
        self.head = nn.Linear(6, 1)
        source: Any = lanes_of(0, 1) if CASE == "shared" else lanes_of
        guards = [tbptt.NonFinite(), tbptt.ClipNorm(0.02)]
        self.use_tbptt(tbptt.TBPTT(8, 13), nn.MSELoss(), source, guards=guards)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        return self.head(outputs), state

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, outputs["loss"].item()))


def main() -> None:
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", category=FutureWarning)
    losses = Losses()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        max_steps=80,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, ModelCheckpoint(DIRECTORY, "at-{step}", every_n_train_steps=20, save_top_k=-1)],
    )
    net = Net()
    trainer.fit(net, ckpt_path=sys.argv[4] if len(sys.argv) > 4 else None)
    result = {"losses": losses.seen, "weights": net.state_dict(), "place": net.tbptt_course.place}
    torch.save(result, DIRECTORY / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
