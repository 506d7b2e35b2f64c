"""Lightning: no setting is ignored, and no run gone on with that is another one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt.errors import CheckError, CheckpointError, ConfigError, StreamError

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning_nets import Model, Net, checkpoint, fit, guards, ours, stream, trainer  # noqa: E402

from tbptt.integrations.lightning import TBPTTMixin  # noqa: E402
from tbptt.integrations.lightning.refusals import refuse_lengths  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own: a class of torch's that is deprecated; that a checkpoint holds the weights after the update,
    # which is what is wanted; and that a run is resumed without the callback that saved it, which is done here.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def test_a_model_that_forgets_its_state_is_refused() -> None:
    class Forgets(Model):
        def forward(self, inputs, state=None):
            return super().forward(inputs, None)

    net = Net(model=Forgets(), checked=True)
    before = [value.clone() for value in net.parameters()]
    with pytest.raises(CheckError, match="forgets to pass its state on"):
        fit(net, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_lengths_that_follow_the_data_are_refused_on_several_ranks() -> None:
    two = SimpleNamespace(world_size=2)
    adaptive = tbptt.TBPTT(8, tbptt.Adaptive())
    with pytest.raises(ConfigError, match="2 ranks"):
        refuse_lengths(adaptive, two)
    refuse_lengths(tbptt.TBPTT(tbptt.RandomLength(8), 16), two)  # drawn alike on all
    refuse_lengths(adaptive, SimpleNamespace(world_size=1))


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


def test_checkpoints_that_would_not_be_written_are_refused(tmp_path: Path) -> None:
    timed = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    with pytest.raises(ConfigError, match=r"train_time_interval=(.|\n)*hint: .*every_n_train_steps"):
        fit(Net(), None, timed, max_steps=3)


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
