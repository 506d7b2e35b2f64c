"""What a run is when nothing else is said, by what it learns from: one small function a kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tbptt.streams import Adding, CopyTask, DelayedRecall, SyntheticStream

__all__ = ["NAMES", "TASKS", "Kind", "Tables", "core_defaults", "defaults_for", "kind_of"]

Kind: TypeAlias = Literal["ecg", "text", "array", "task"]
Tables: TypeAlias = dict[str, dict[str, Any]]

TASKS: dict[str, type[SyntheticStream]] = {"copy": CopyTask, "delayed-recall": DelayedRecall, "adding": Adding}

NAMES = ("ecg", "shakespeare", *TASKS)
"""Sources that are no files."""


def kind_of(source: str) -> Kind:
    """Return what kind of data a source is, by its name alone."""
    if source == "ecg":
        return "ecg"
    if source in TASKS:
        return "task"
    return "array" if Path(source).suffix.lower() in (".npy", ".npz") else "text"


def defaults_for(source: str) -> Tables:
    """Return the defaults for what is learned from."""
    functions: dict[Kind, Callable[[], Tables]] = {
        "ecg": ecg_defaults,
        "text": text_defaults,
        "array": array_defaults,
        "task": task_defaults,
    }
    tables = functions[kind_of(source)]()
    tables["data"]["source"] = source
    if source in TASKS:
        tables["data"]["task"] = {"copy": {"length": 10}, "delayed-recall": {"lag": 10}, "adding": {"length": 50}}[
            source
        ]
    if source == "adding":
        del tables["model"]["embedding"]  # it reads numbers, the other tasks symbols
    return tables


def core_defaults(core: str) -> Tables:
    """Return the defaults for a core, which go over those for the data; empty where these were made for it."""
    functions: dict[str, Callable[[], Tables]] = {
        "attentive_lstm": attentive_defaults,
        "attentive_gru": attentive_defaults,
        "transformer": transformer_defaults,
    }
    return functions[core]() if core in functions else {}


def attentive_defaults() -> Tables:
    """A state stored every other step, five of the last 64 looked up."""
    return {"model": {"k_att": 2, "k_top": 5, "memory": 64}}


def transformer_defaults() -> Tables:
    """Two layers over a sliding memory, which takes windows of any length, and a lane that starts anew anywhere.

    Its rate is half of what recurrent layers have on text: at theirs it learns more slowly.
    """
    return {"model": {"layers": 2, "heads": 4, "memory": 64}, "optimizer": {"lr": 2e-3}}


def ecg_defaults() -> Tables:
    """Seconds of training: whether the heart will beat within the next 0.2 s, from windows much shorter than a beat.

    Dropout and the cosine keep the last updates from wandering: without them the AUC on the held-out fifth swings
    by 0.015 from one thousand updates to the next. One thread: so small a layer gains nothing from a second, and
    loses much where the cores are busy.
    """
    return {
        "data": {"lanes": 16, "held_out": 0.2, "held_out_lanes": 1},
        "model": {"hidden": 32, "dropout": 0.2},
        "estimator": {"name": "TBPTT", "k1": 8, "k2": 8},
        "optimizer": {"lr": 3e-3},
        "schedule": {"name": "cosine", "final": 0.1},
        "run": {"passes": 60, "threads": 1},
    }


def text_defaults() -> Tables:
    """One layer that learns words and lines of a megabyte within minutes on two cores."""
    return {
        "data": {"lanes": 32, "held_out": 0.1, "unit": "characters"},
        "model": {"hidden": 256, "embedding": 64},
        "estimator": {"name": "TBPTT", "k1": 64, "k2": 64},
        "optimizer": {"lr": 4e-3},
        "schedule": {"name": "cosine", "warmup": 50},
        "guards": {"clip_norm": 1.0},
        "run": {"passes": 4},
    }


def array_defaults() -> Tables:
    """A small layer over standardised numbers; to be replaced by what is known of the data."""
    return {
        "data": {"lanes": 16, "held_out": 0.1, "standardize": True},
        "model": {"hidden": 64},
        "estimator": {"name": "TBPTT", "k1": 32, "k2": 32},
        "optimizer": {"lr": 2e-3},
        "guards": {"clip_norm": 1.0},
        "run": {"passes": 10},
    }


def task_defaults() -> Tables:
    """Enough to see a look-back succeed or fail in half a minute."""
    return {
        "data": {"lanes": 32, "held_out": 0.1},
        "model": {"hidden": 64, "embedding": 16},
        "estimator": {"name": "TBPTT", "k1": 16, "k2": 32},
        "optimizer": {"lr": 5e-3},
        "guards": {"clip_norm": 1.0},
        "run": {"updates": 2000, "threads": 1},
    }
