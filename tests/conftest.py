"""What all tests share: one thread each, no waiting for the disk, and no GPU test without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "estimators"))  # `systems`, which several tests use


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # so small models gain nothing from a second, and lose much where the cores are busy


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Let `os.fsync` do no more than look whether there is such a file.

    It guards against a power cut, which no test brings about, and runs that write a checkpoint every few updates spend
    most of their time in it. Tests that end a process do so in a process of its own, where it is what it was.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield
