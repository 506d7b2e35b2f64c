"""Checkpoints that survive a kill at any moment, and that are never believed without proof.

    update-0000000310/
      model.safetensors   the model's state_dict, for anyone to load
      state.safetensors   every other tensor
      state.json          everything else, with references to the tensors
      manifest.json       format, versions, and the sha256 and size of each file, itself included

Nothing is pickled. A checkpoint is written aside under another name, made durable, and only then renamed to
its own; the ones before it are deleted after that. Names that end in .writing or .stale are left-overs;
.replaced is the good old one while a new one of the same number takes its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tbptt.codec import Like, decode, encode, nothing
from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError

__all__ = ["Checkpoints", "Loaded", "refuse_other", "weights_of"]

_FORMAT = 1
_MODEL, _TENSORS, _STATE, _MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"update-(\d{10,})(\.replaced|\.writing|\.stale)?")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint that was read and found sound.

    Args:
        update: the number of updates made when it was written.
        state: what was given to `save`; every tensor on the CPU.
        model_state: the model's state_dict; every tensor on the CPU.
        path: its directory.
    """

    update: int
    state: dict[str, Any]
    model_state: dict[str, Tensor]
    path: Path


class _Damage(CheckpointError):
    """The files are not those that were written; an older checkpoint may still be sound."""


class Checkpoints:
    """The checkpoints of one run; one process may write them, any number may read.

    Args:
        directory: the directory that holds them, one directory each; created by the first `save`.
        keep: how many are kept, at least 1. With 1, a disk that damages the newest leaves nothing.

    Example:
        >>> import tempfile
        >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()) / "checkpoints")
        >>> checkpoints.save(310, {"passes": 2}, {"weight": torch.ones(2)}).name
        'update-0000000310'
        >>> checkpoints.load_latest().state
        {'passes': 2}
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"keep was expected to be a whole number of checkpoints, 1 or more, but is {keep!r}: with "
                "none kept, "
                "nothing could be resumed",
                fix="Checkpoints(directory, keep=3)",
            )
        self.directory = Path(directory)
        self.keep = keep

    def paths(self) -> list[Path]:
        """Return the directories of all checkpoints, the newest first, sound or not."""
        found: dict[int, Path] = {}
        for number, suffix, path in self._entries():
            if suffix == "" or (suffix == ".replaced" and number not in found):
                found[number] = path
        return [found[number] for number in sorted(found, reverse=True)]

    def save(self, update: int, state: dict[str, Any], model_state: dict[str, Tensor]) -> Path:
        """Write a checkpoint durably, then delete those older than the last `keep`.

        One of the same number is replaced. One of a higher number, left from a future that was given up,
        stays until the run gets there.

        Args:
            update: the number of updates made so far; it names the checkpoint.
            state: everything but the model, as `tbptt.codec.encode` takes it.
            model_state: the model's state_dict; tied weights are written under each of their names.

        Raises:
            CheckpointError: a value that cannot be stored, or a disk that did not take it. The checkpoints
                that were there are still there.
        """
        if isinstance(update, bool) or not isinstance(update, int) or update < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"update was expected to be a number of updates, 0 or more, but is {update!r}")
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        # Detached, each weight is a tensor of its own, so that a tied one is found under both of its names.
        named = {k: v.detach() if type(v) in (Tensor, torch.nn.Parameter) else v for k, v in model_state.items()}
        document = {"model": encode(named, "model", weights), "state": encode(state, "state", tensors)}

        final = self.directory / f"update-{update:010d}"
        writing = final.with_name(f"{final.name}.writing")
        try:
            self._make_directory()
            self.tidy()
            writing.mkdir()
            save_file(weights, writing / _MODEL, metadata={"format": "pt"})
            save_file(tensors, writing / _TENSORS)
            (writing / _STATE).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
            (writing / _MANIFEST).write_bytes(_manifest(update, writing))
            for name in (_MODEL, _TENSORS, _STATE, _MANIFEST):
                _sync(writing / name)
            _sync(writing)
            self._publish(writing, final)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
            shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final.name} was expected to fit into {self.directory}, but writing it "
                f"failed: {error}. "
                "The checkpoints before it are untouched "
                f"({', '.join(p.name for p in self.paths()) or 'none'})",
                fix=f"make room there (df -h {self.directory}), or resume with another directory",
            ) from error
        self._prune(update)
        return final

    def load_latest(self, like: Like = nothing, like_model: Like = nothing) -> Loaded | None:
        """Return the newest sound checkpoint; None if there are none at all.

        Args:
            like: `like(name)` is this run's own value of an entry of the state: a class that is named there must be
                one of its classes, see `tbptt.codec`.
            like_model: likewise, of an entry of the model's state_dict.

        Warns:
            CheckpointWarning: for each damaged one that was passed over, by name.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged; or one is sound but cannot be
                understood here, which an older one would not change.
        """
        damages: list[str] = []
        for path in self.paths():
            try:
                return self.load(path, like, like_model)
            except _Damage as damage:
                damages.append(damage.message)
                warnings.warn(f"{damage.message}; it is passed over", CheckpointWarning, stacklevel=2)
        if damages:
            raise CheckpointError(
                f"a sound checkpoint was expected in {self.directory}, but none is, so that the run "
                "cannot be "
                "resumed: " + "; ".join(damages),
                fix="restore one from a copy, or start anew in another directory",
            )
        return None

    def load(self, path: str | Path, like: Like = nothing, like_model: Like = nothing) -> Loaded:
        """Return the checkpoint in the directory `path`, wherever that is; `like` as for `load_latest`.

        Raises:
            CheckpointError: a file is missing, or is not, byte for byte, the one that was written; or it was
                written by a newer version; or it names a class that this run does not have at that place.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, facts in manifest["files"].items():
            _verify(path, name, facts)
        try:
            document = json.loads((path / _STATE).read_bytes())
            # The files stay mapped only in here: decoding copies every tensor into memory of its own.
            state = decode(document["state"], _mapped(path / _TENSORS), like)
            model_state = decode(document["model"], _mapped(path / _MODEL), like_model, "model")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _Damage(f"checkpoint {path.name} is damaged: its files cannot be read ({error!r})") from error
        return Loaded(manifest["update"], state, model_state, path)

    def tidy(self) -> None:
        """Clear away what interrupted writes have left; only for the process that writes.

        `save` does it first. Reading does not need it, and would disturb a run that is writing.
        """
        for _, suffix, path in self._entries():
            whole = path.with_name(path.name.removesuffix(suffix))
            if suffix == ".replaced" and not whole.exists():
                path.rename(whole)  # interrupted between two renames: the old one is all there is
            elif suffix:
                shutil.rmtree(path)

    def _entries(self) -> Iterator[tuple[int, str, Path]]:
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), match[2] or "", path

    def _make_directory(self) -> None:
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            _sync(self.directory.parent)

    def _publish(self, writing: Path, final: Path) -> None:
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        try:
            writing.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        _sync(self.directory)
        if replaced.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # what is left of it is tidied up next time

    def _prune(self, update: int) -> None:
        made = sorted((entry for entry in self._entries() if entry[0] <= update and not entry[1]), reverse=True)
        for _, _, path in made[self.keep :]:
            stale = path.with_name(f"{path.name}.stale")
            try:
                path.rename(stale)  # first, so that a half-deleted one is never taken for a damaged one
                shutil.rmtree(stale)
            except OSError as error:
                warnings.warn(
                    f"the old checkpoint {path.name} could not be deleted ({error}); the new one is safe, "
                    "but the "
                    "disk may fill up",
                    CheckpointWarning,
                    stacklevel=3,
                )


def _sync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, durable."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory, and needs no such call
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        return {"tbptt": metadata.version("tbptt"), **versions}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {"tbptt": "unknown", **versions}


def _seal(body: dict[str, Any]) -> bytes:
    """Return the manifest as its one and only sequence of bytes, its own sha256 included."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=2, sort_keys=True) + "\n").encode()


def _manifest(update: int, directory: Path) -> bytes:
    files: dict[str, dict[str, Any]] = {}
    for name in (_MODEL, _TENSORS, _STATE):
        path = directory / name
        files[name] = {"sha256": _digest(path), "size": path.stat().st_size}
    return _seal({"format": _FORMAT, "update": update, "versions": _versions(), "files": files})


def _damage(path: Path, name: str, what: str) -> _Damage:
    return _Damage(
        f"checkpoint {path.name} is damaged: {name} {what}, so that what it holds cannot be trusted",
        fix=f"delete {path} and resume from another one",
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = (path / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        sound = raw == _seal(body)
    except FileNotFoundError:
        raise _damage(path, _MANIFEST, "is missing") from None
    except OSError as error:
        raise _damage(path, _MANIFEST, f"cannot be read ({error})") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _damage(path, _MANIFEST, "is not the JSON that was written") from error
    if not sound:
        raise _damage(path, _MANIFEST, "has another sha256 than was written")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path.name} was expected to have format {_FORMAT}, but has "
            f"{manifest.get('format')!r}, as "
            f"tbptt {manifest.get('versions', {}).get('tbptt')} writes it: its meaning is not known here",
            fix="pip install --upgrade tbptt",
        )
    return manifest


def _verify(path: Path, name: str, facts: dict[str, Any]) -> None:
    try:
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise _damage(path, name, f"has {size} bytes instead of {facts['size']}")
        if _digest(path / name) != facts["sha256"]:
            raise _damage(path, name, "has another sha256 than its manifest says")
    except FileNotFoundError:
        raise _damage(path, name, "is missing") from None
    except OSError as error:
        raise _damage(path, name, f"cannot be read ({error})") from error


def _mapped(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: cast(Tensor, file.get_tensor(name)) for name in file.keys()}


def weights_of(model_state: Mapping[str, Tensor]) -> str:
    """Return the names and shapes of a model's weights, for what is said of whose a checkpoint is."""
    return ", ".join(f"{name}{list(each.shape)}" for name, each in model_state.items())


def refuse_other(there: Mapping[str, str], here: Mapping[str, str], what: str, whose: str, fix: str) -> None:
    """Refuse a state that was saved by something else than what is to go on from it.

    Args:
        there: what was said of its owner when it was saved.
        here: what is said of the one that is to go on.
        what: the state, for people.
        whose: its owner, for people.
        fix: what to do.

    Raises:
        CheckpointError: they differ.
    """
    for name, wanted in here.items():
        if there.get(name) != wanted:
            raise CheckpointError(
                f"{what} belongs to another {whose}: its {name} was expected to be {wanted}, but is {there.get(name)}. "
                "Going on from it would not be going on",
                fix=fix,
            )
