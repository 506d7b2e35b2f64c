"""The trainer: the same as a loop by hand, the same after a stop, and nothing lost when something fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tbptt
from tbptt.errors import CheckError, CheckpointError, CheckpointWarning, ConfigError, NonFiniteError, StreamError
from tbptt.streams import DelayedRecall


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


def rows(count: int = 403) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, generator=generator), torch.randn(count, 1, generator=generator)


def trainer(directory: Path | None = None, estimator: tbptt.Estimator | None = None, **changes) -> tbptt.Trainer:
    model = changes.pop("model", None) or Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    stream = changes.pop("stream", None) or tbptt.ArrayStream(*rows(), lanes=4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    settings = {
        "guards": [tbptt.NonFinite("raise"), tbptt.ClipNorm(0.5)],
        "scheduler": scheduler,
        "held_out": tbptt.HeldOut(tbptt.ArrayStream(*rows(50), lanes=1), every=5),
        "saving": tbptt.Saving(every=4, keep=2, log_every=1),
        "checked": False,  # it takes most of the time of such short runs; one test is about it
    }
    return tbptt.Trainer(
        model,
        nn.MSELoss(),
        optimizer,
        estimator or tbptt.TBPTT(8, 13),
        stream,
        directory=directory,
        **settings | changes,
    )


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    metrics = (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()
    return metrics and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_does_what_a_loop_by_hand_does() -> None:
    model, by_hand = Model(), Model()
    model.drop.eval(), by_hand.drop.eval()
    inputs, targets = (each.view(4, -1, 1).transpose(0, 1) for each in rows(400))
    stream = tbptt.ArrayStream(*rows(400), lanes=4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(10, 10), stream).run(passes=2)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        state = None
        for begin in range(0, 100, 10):
            outputs, state = by_hand(inputs[begin : begin + 10], state)
            optimizer.zero_grad()
            nn.functional.mse_loss(outputs, targets[begin : begin + 10]).backward()
            optimizer.step()
            state = state.detach()
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [tbptt.TBPTT(8, 8), tbptt.TBPTT(8, 3), tbptt.TBPTT(8, 13), tbptt.TBPTT(8, 13, replay="retain")],
    ids=str,
)
@pytest.mark.parametrize("stops", [[1], [3, 4, 17], [14, 26, 27]])
def test_a_run_in_pieces_is_a_run_in_one(tmp_path: Path, estimator: tbptt.Estimator, stops: list[int]) -> None:
    trainer(tmp_path / "one", estimator).run(updates=40)
    for updates in [*stops, 40]:
        torch.manual_seed(updates)  # whatever was drawn meanwhile must not matter
        summary = trainer(tmp_path / "pieces", estimator).run(updates=updates)
    assert summary.updates == 40
    # a run that ends at an update validates there; the one that goes through does not
    lines = [json.loads(line) for line in (tmp_path / "pieces" / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "update" or line["update"] % 5 == 0]
    assert [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()] == kept
    one, pieces = weights(tmp_path / "one"), weights(tmp_path / "pieces")
    assert all(torch.equal(one[name], pieces[name]) for name in one)


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    trainer(tmp_path / "one").run(updates=12)
    trainer(tmp_path / "other", seed=1).run(updates=12)
    assert not same(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_update(tmp_path: Path, number: signal.Signals) -> None:
    class Sends(tbptt.Monitor):
        def update(self, update) -> None:
            if update.number == 9:
                os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    stopped = trainer(tmp_path / "stopped", monitors=[Sends()]).run(updates=30)
    assert (stopped.updates, stopped.stopped_by) == (9, number.name)
    trainer(tmp_path / "stopped").run(updates=30)
    trainer(tmp_path / "undisturbed").run(updates=30)
    assert same(tmp_path / "stopped", tmp_path / "undisturbed")
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    done: list[tbptt.Summary] = []
    thread = threading.Thread(target=lambda: done.append(trainer().run(updates=2)))
    thread.start()
    thread.join()
    assert done[0].updates == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    trainer(tmp_path / "damaged").run(updates=11)
    newest = sorted((tmp_path / "damaged" / "checkpoints").iterdir())[-1]
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    with pytest.warns(CheckpointWarning, match="update-0000000011.*state.safetensors"):
        trainer(tmp_path / "damaged").run(updates=30)
    trainer(tmp_path / "undisturbed").run(updates=30)
    assert same(tmp_path / "damaged", tmp_path / "undisturbed")


def test_a_full_disk_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.run(updates=4)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tbptt.checkpoint.save_file", full)
    with pytest.warns(CheckpointWarning, match="NO CHECKPOINT at update.*No space left"):
        summary = run.run(updates=10)
    assert summary.updates == 10
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["update-0000000000", "update-0000000004"]
    monkeypatch.undo()
    run.run(updates=12)
    trainer(tmp_path / "undisturbed").run(updates=12)
    undisturbed = weights(tmp_path / "undisturbed")
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": nn.GRU(1, 1)}, "weights"),
        ({"estimator": tbptt.TBPTT(8, 14)}, "estimator"),
        ({"guards": []}, "guards"),
    ],
)
def test_the_directory_of_another_run_is_refused(tmp_path: Path, other: dict[str, object], says: str) -> None:
    trainer(tmp_path).run(updates=3)
    before = weights(tmp_path)
    with pytest.raises(CheckpointError, match=f"belongs to another run: its {says}"):
        trainer(tmp_path, **other).run(updates=5)
    assert before.keys() == weights(tmp_path).keys()


def test_an_error_in_the_data_says_where_and_loses_nothing(tmp_path: Path) -> None:
    inputs, targets = rows(400)
    inputs[61] = torch.nan  # lane 0, step 61: in the eighth window
    stream = tbptt.ArrayStream(inputs, targets, lanes=4)
    with pytest.raises(NonFiniteError, match=r"row 61 .*lane 0, step 61"):
        trainer(tmp_path, stream=stream, saving=tbptt.Saving(every=100, log_every=1)).run(updates=50)
    inputs[61] = 0.0
    trainer(tmp_path, stream=tbptt.ArrayStream(inputs, targets, lanes=4)).run(updates=20)
    whole = tbptt.ArrayStream(inputs, targets, lanes=4)
    trainer(tmp_path / "undisturbed", stream=whole).run(updates=20)
    assert same(tmp_path, tmp_path / "undisturbed")


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
def test_a_window_that_breaks_the_numbers_is_left_out(tmp_path: Path, where: str) -> None:
    inputs, targets = rows(400)
    inputs[61] = 100.0
    model = Bursts(where)
    stream = tbptt.ArrayStream(inputs, targets, lanes=4)
    run = trainer(tmp_path, model=model, stream=stream, guards=[tbptt.NonFinite("skip")], estimator=tbptt.TBPTT(8, 16))
    run.run(updates=20)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    refused = [line["update"] for line in lines if line.get("refused")]
    assert 8 in refused
    assert len(refused) <= 2  # the window itself, and the one whose look-back still runs through it
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert torch.isfinite(run.carry.state).all()


def test_a_model_that_fails_the_check_is_not_trained() -> None:
    class Forgets(Model):
        def forward(self, inputs, state=None):
            return super().forward(inputs, None)

    model = Forgets()
    before = [value.clone() for value in model.parameters()]
    with pytest.raises(CheckError, match="forgets to pass its state on"):
        trainer(model=model, checked=True).run(updates=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="not said when to stop"):
        trainer().run()
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ConfigError, match="validation loss to watch"):
        trainer(model=model, scheduler=plateau, held_out=None)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "8"])
def test_intervals_that_cannot_be_meant_are_refused(every: object) -> None:
    with pytest.raises(ConfigError, match=r"Saving\.every was expected to be a whole number of updates"):
        tbptt.Saving(every=every)
    with pytest.raises(ConfigError, match=r"HeldOut\.every was expected to be a whole number of updates"):
        tbptt.HeldOut(tbptt.ArrayStream(*rows(50), lanes=1), every=every)


def test_a_stream_without_steps_is_an_error_not_a_loop() -> None:
    class Dry(tbptt.ArrayStream):
        dry = False

        def read(self, steps: int) -> tbptt.Window:
            if self.dry:
                self._position = self.steps
            return super().read(steps)

    stream = Dry(*rows(), lanes=4)
    run = trainer(stream=stream)
    run.run(updates=1)
    stream.dry = True
    with pytest.raises(StreamError, match="no steps, not even after rewind"):
        run.run(updates=200)


def test_validation_has_a_state_of_its_own_and_draws_nothing(tmp_path: Path) -> None:
    often = tbptt.HeldOut(tbptt.ArrayStream(*rows(50), lanes=1), every=1)
    trainer(tmp_path / "often", held_out=often).run(updates=20)
    trainer(tmp_path / "never", held_out=None).run(updates=20)
    often_, never = weights(tmp_path / "often"), weights(tmp_path / "never")
    assert all(torch.equal(often_[name], never[name]) for name in often_)


def test_reduce_on_plateau_steps_at_validations() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs")
    stream, held_out = (
        tbptt.ArrayStream(*rows(), lanes=4),
        tbptt.HeldOut(tbptt.ArrayStream(*rows(50), lanes=1), every=5),
    )
    run = tbptt.Trainer(model, nn.MSELoss(), optimizer, tbptt.TBPTT(4, 4), stream, scheduler=plateau, held_out=held_out)
    run.run(updates=15)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)  # the first validation is the best so far


def test_windows_without_targets_change_nothing() -> None:
    stream = tbptt.ArrayStream(*rows(400), lanes=4, mask=torch.zeros(400, dtype=torch.bool))
    model = Model()
    before = [value.clone() for value in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    tbptt.Trainer(model, nn.MSELoss(), optimizer, tbptt.TBPTT(8, 8), stream).run(updates=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_it_learns_what_needs_the_look_back() -> None:
    torch.manual_seed(0)
    losses = {}
    for k2 in (2, 8):
        stream = DelayedRecall(4, 16, symbols=2, steps=2000)
        model = tbptt.SequenceModel(2, 2, hidden=24, embedding=8)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        tbptt.Trainer(model, nn.CrossEntropyLoss(), optimizer, tbptt.TBPTT(1 if k2 == 2 else 4, k2), stream).run(
            updates=400
        )
        losses[k2] = tbptt.evaluate(model, nn.CrossEntropyLoss(), DelayedRecall(4, 4, symbols=2, steps=300, seed=9))[
            "loss"
        ]
    assert losses[8] < 0.1 < 0.6 < losses[2]


def test_the_trainer_is_quick_to_stop() -> None:
    run = trainer()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    assert run.run(updates=10**9).stopped_by == "SIGINT"
    assert time.monotonic() - begin < 60


@pytest.mark.gpu
def test_a_gpu_trains_like_the_cpu() -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        model = Model().to(device)
        model.drop.eval()
        stream = tbptt.ArrayStream(*rows(), lanes=4)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(8, 13, replay="retain"), stream).run(updates=20)
        losses[device] = tbptt.evaluate(model, nn.MSELoss(), stream)["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_gradients_of_one_update_do_not_outlive_it(tmp_path: Path) -> None:
    """Else a run would need room for the gradients twice."""
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    class Watches(tbptt.Estimator):
        kind = "biased"
        inner = tbptt.TBPTT(8, 8)

        @classmethod
        def examples(cls):
            return (cls(),)

        def next_steps(self, carry):
            alive.append(sum(each() is not None for each in seen))
            return 8

        def init(self, model, lanes):
            return self.inner.init(model, lanes)

        def reach(self, steps):
            return self.inner.reach(steps)

        def estimate(self, model, loss, carry, window):
            alive.append(sum(each() is not None for each in seen))  # before the next backward pass
            result = self.inner.estimate(model, loss, carry, window)
            seen.extend(weakref.ref(gradient) for gradient in result[0].gradients.values())
            return result

    progress = tbptt.Progress(every_s=1e6)
    trainer(tmp_path, Watches(), guards=[], monitors=[progress], held_out=None).run(updates=4)
    assert len(seen) > 0
    before_estimates = alive[1::2]
    assert before_estimates == [0] * len(before_estimates)
