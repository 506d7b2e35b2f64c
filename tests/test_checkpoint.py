"""A checkpoint comes back exactly or not at all, whatever the disk and the moment of a kill do."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import tbptt.checkpoint as checkpoint_module
from tbptt.checkpoint import Checkpoints
from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError
from tbptt.randomness import random_state, set_random_state

FILES = {"model.safetensors", "state.safetensors", "state.json", "manifest.json"}


def state_at(update: int) -> dict[str, Any]:
    return {"update": update, "optimizer": {0: (torch.full((3,), float(update)), None)}, "metrics": [1, 2.5]}


def weights_at(update: int) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 2), float(update)), "bias": torch.zeros(0)}


def fill(directory: Path, *updates: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep)
    for update in updates:
        checkpoints.save(update, state_at(update), weights_at(update))
    return checkpoints


def latest(checkpoints: Checkpoints) -> int | None:
    """Load, see that all of it belongs together, and return its number."""
    loaded = checkpoints.load_latest()
    if loaded is None:
        return None
    assert loaded.state["update"] == loaded.update
    assert torch.equal(loaded.state["optimizer"][0][0], torch.full((3,), float(loaded.update)))
    assert torch.equal(loaded.model_state["weight"], torch.full((2, 2), float(loaded.update)))
    return loaded.update


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.load_latest() is None
    path = checkpoints.save(310, state_at(310), weights_at(310))
    assert path == tmp_path / "run" / "checkpoints" / "update-0000000310"
    assert {file.name for file in path.iterdir()} == FILES
    loaded = checkpoints.load(path)
    assert (loaded.update, loaded.path) == (310, path)
    assert latest(checkpoints) == 310
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["update"] == 310
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == FILES - {"manifest.json"}


def test_a_moved_checkpoint_still_loads(tmp_path: Path) -> None:
    path = fill(tmp_path / "a", 5).paths()[0]
    best = shutil.copytree(path, tmp_path / "best")
    assert Checkpoints(tmp_path / "a").load(best).update == 5


def test_the_model_is_loadable_by_anyone_with_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5)
            self.head.weight = self.embedding.weight
            self.register_buffer("spectrum", torch.randn(3, dtype=torch.complex64))
            self.register_buffer("transposed", torch.randn(3, 4).t())

    model, other = Tied(), Tied()
    state = model.state_dict()
    path = Checkpoints(tmp_path).save(1, {}, state)
    plain = load_file(path / "model.safetensors")
    assert set(plain) == set(state)
    assert all(torch.equal(plain[k], state[k]) for k in state if k != "spectrum")
    other.load_state_dict(Checkpoints(tmp_path).load(path).model_state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.head.weight is other.embedding.weight


def test_a_weight_given_under_two_names_is_written_under_both(tmp_path: Path) -> None:
    weight = torch.randn(3)
    path = Checkpoints(tmp_path).save(1, {}, {"a": weight, "b": weight})
    assert torch.equal(load_file(path / "model.safetensors")["b"], weight)


def test_a_loaded_checkpoint_does_not_depend_on_its_files(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, 1)
    gc.disable()  # what is let go of only by a collection has been held for too long
    try:
        loaded = checkpoints.load_latest()
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(tmp_path) not in maps.read_text()
    finally:
        gc.enable()
    assert loaded is not None
    for file in loaded.path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(loaded.model_state["weight"], torch.ones(2, 2))
    assert torch.equal(loaded.state["optimizer"][0][0], torch.ones(3))


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert [path.name[-2:] for path in checkpoints.paths()] == ["05", "04"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_checkpoint_never_loses_to_an_abandoned_future(tmp_path: Path) -> None:
    fill(tmp_path, 100, 200, 300, keep=1 + 2)
    fill(tmp_path, 150, keep=1)
    assert sorted(path.name[-3:] for path in tmp_path.iterdir()) == ["150", "200", "300"]


@pytest.mark.parametrize("number", [-1, True, 2.0, None])
def test_arguments_are_checked(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ConfigError, match="keep"):
        Checkpoints(tmp_path, number)
    with pytest.raises(ConfigError, match="update"):
        Checkpoints(tmp_path).save(number, {}, {})


def flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_bit_anywhere_is_refused_by_name(tmp_path: Path, name: str) -> None:
    checkpoints = fill(tmp_path, 10, 20)
    file = tmp_path / "update-0000000020" / name
    good = file.read_bytes()
    rng = random.Random(name)
    for _ in range(40):
        flip(file, rng)
        with pytest.raises(CheckpointError, match=rf"update-0000000020 .*{name}"):
            checkpoints.load(file.parent)
        with pytest.warns(CheckpointWarning, match=rf"update-0000000020 .*{name}"):
            assert latest(checkpoints) == 10
        file.write_bytes(good)
    assert latest(checkpoints) == 20


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        lambda path: path.write_bytes(b"\xff\xfe{not json" * 20),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"[1]"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "empty", "truncated", "longer", "garbage", "nested", "list", "directory"],
)
def test_other_damage_is_refused_by_name(tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    checkpoints = fill(tmp_path, 10, 20)
    damage(tmp_path / "update-0000000020" / name)
    with pytest.warns(CheckpointWarning, match=rf"update-0000000020 .*{name}"):
        assert latest(checkpoints) == 10


def test_when_none_is_sound_all_are_named(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, 10, 20)
    (tmp_path / "update-0000000010" / "state.json").unlink()
    flip(tmp_path / "update-0000000020" / "manifest.json", random.Random(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        with pytest.raises(CheckpointError, match=r"update-0000000020.*update-0000000010.*state\.json"):
            checkpoints.load_latest()


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        Checkpoints(tmp_path).load(tmp_path)


def test_a_newer_format_is_not_passed_over_for_an_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = fill(tmp_path, 10)
    monkeypatch.setattr(checkpoint_module, "_FORMAT", 99)
    fill(tmp_path, 20)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 1, but has 99"):
        checkpoints.load_latest()


def test_leftovers_are_cleared_by_the_next_save_and_ignored_before(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, 10)
    for name in ("update-0000000020.writing", "update-0000000001.stale", "update-0000000010.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    assert latest(checkpoints) == 10
    assert len(list(tmp_path.iterdir())) == 6  # a reader touches nothing
    checkpoints.save(30, state_at(30), weights_at(30))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"update-0000000010", "update-0000000030", "notes.txt", "best"}


class Killed(BaseException):
    """As sudden as SIGKILL: nothing may catch it."""


STEPS = [
    (os, "fsync"),
    (os, "open"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_text"),
]


class Saboteur:
    """Raise at the n-th step that touches the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.count = 0
        self.is_done = False
        for owner, name in STEPS:
            self.patch(monkeypatch, owner, name, fail_at, error)
        self.patch(monkeypatch, checkpoint_module, "save_file", fail_at, error)

    def patch(self, monkeypatch: Any, owner: Any, name: str, fail_at: int, error: BaseException) -> None:
        real = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == fail_at and not self.is_done:
                self.is_done = True
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)


@pytest.mark.parametrize("update", [20, 30], ids=["overwriting", "new"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path: Path, update: int) -> None:
    fill(tmp_path / "template", 10, 20)
    for fail_at in range(1, 100):
        directory = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "template", directory)
        checkpoints = Checkpoints(directory, keep=2)
        marked = state_at(update) | {"new": True}
        with pytest.MonkeyPatch.context() as monkeypatch:
            saboteur = Saboteur(monkeypatch, fail_at, Killed())
            try:
                checkpoints.save(update, marked, weights_at(update))
            except Killed:
                pass
        found = checkpoints.load_latest()  # no warning either: what is visible is sound
        assert found is not None
        assert found.update in (20, update)
        assert latest(checkpoints) == found.update
        # The next process finds its way, and clears up.
        checkpoints.save(40, state_at(40), weights_at(40))
        assert latest(checkpoints) == 40
        assert len(list(directory.iterdir())) == 2
        if not saboteur.is_done:
            assert found.state["new"]
            assert fail_at > 15
            return
    pytest.fail("the save never went through")


@pytest.mark.parametrize("update", [20, 30], ids=["overwriting", "new"])
def test_a_disk_that_fails_at_any_step_loses_nothing(tmp_path: Path, update: int) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    num_refused = 0
    fill(tmp_path / "template", 10, 20)
    for fail_at in range(1, 100):
        directory = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "template", directory)
        checkpoints = Checkpoints(directory, keep=2)
        with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)  # an old one that could not be deleted
            saboteur = Saboteur(monkeypatch, fail_at, error)
            refused = None
            try:
                checkpoints.save(update, state_at(update), weights_at(update))
            except CheckpointError as caught:
                refused = caught
        if refused is not None:
            num_refused += 1
            assert refused.__cause__ is error
            assert f"update-{update:010d}" in str(refused)
        assert not list(directory.glob("*.writing"))
        assert latest(checkpoints) in (20, update)
        assert (directory / "update-0000000020").is_dir()
        if not saboteur.is_done:
            assert num_refused > 10
            return
    pytest.fail("the save never went through")


def test_a_disk_found_full_by_safetensors_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = fill(tmp_path, 10)

    def fail(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"(?s)update-0000000020.*No space left.*update-0000000010.*hint"):
        checkpoints.save(20, state_at(20), weights_at(20))
    assert [path.name for path in tmp_path.iterdir()] == ["update-0000000010"]
    assert latest(checkpoints) == 10


def test_everything_is_synced_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1)
    events: list[str] = []
    real_sync, real_rename = checkpoint_module._sync, Path.rename
    monkeypatch.setattr(checkpoint_module, "_sync", lambda path: (events.append(path.name), real_sync(path)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), real_rename(a, b))[1])
    fill(tmp_path, 2)
    writing = "update-0000000002.writing"
    assert set(events[:4]) == FILES
    assert events[4:] == [writing, "rename", tmp_path.name]


def test_nothing_touches_the_disk_when_a_value_cannot_be_stored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"state\.optimizer\.foo\[2\].*object"):
        checkpoints.save(1, {"optimizer": {"foo": [0, 1, object()]}}, {})
    assert not (tmp_path / "new").exists()


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert latest(fill(tmp_path, 3)) == 3


def draw() -> tuple[Any, ...]:
    return torch.randn(5).tolist(), np.random.standard_normal(3).tolist(), random.random(), random.gauss(0, 1)


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    before = random_state()
    try:
        draw()  # odd numbers of normal draws leave one kept for the next
        saved = Checkpoints(tmp_path).save(1, {"random": random_state()}, {})
        expected = [draw(), draw()]
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        assert draw() != expected[0]
        set_random_state(Checkpoints(tmp_path).load(saved).state["random"])
        assert [draw(), draw()] == expected
    finally:
        set_random_state(before)


def test_generators_of_devices_that_are_gone_are_told_of() -> None:
    state = random_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    if torch.cuda.device_count():
        pytest.skip("there are devices here that would be set")
    with pytest.warns(CheckpointWarning, match="1 CUDA devices"):
        set_random_state(state)
