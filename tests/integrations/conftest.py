"""The tests of other libraries share their tiny models, and the measure of what a model carries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `zoo`, `carry`


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small are slower in two threads, many times so when something else is running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
