"""Lightning with two ranks: one process with all lanes does the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow


def run(directory: Path, ranks: int, case: str, *checkpoint: Path) -> list[dict[str, Any]]:
    directory.mkdir()
    script = Path(__file__).with_name("lightning_ranks.py")
    command = [sys.executable, str(script), str(directory), str(ranks), case, *map(str, checkpoint)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=dict(os.environ))
    (directory / "stderr").write_text(done.stderr, encoding="utf-8")
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(value, right["weights"][name]) for name, value in left["weights"].items())


@pytest.mark.parametrize("case", ["equal", "masked"])
def test_two_ranks_do_what_one_does_with_the_lanes_of_both(tmp_path: Path, case: str) -> None:
    (one,) = run(tmp_path / "one", 1, case)
    two = run(tmp_path / "two", 2, case)
    assert same(*two)
    assert two[0]["losses"] == two[1]["losses"]
    for name, value in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value, rtol=1e-4, atol=1e-5)
    assert [epoch for epoch, _ in two[0]["losses"]] == [epoch for epoch, _ in one["losses"]]
    assert [loss for _, loss in two[0]["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=1e-4)
    if case == "masked":
        (other,) = run(tmp_path / "other", 1, "equal")
        assert not same(one, other)


def test_two_ranks_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 2, "masked")
    rest = run(tmp_path / "rest", 2, "masked", tmp_path / "whole" / "at-step=20.ckpt")
    assert all(same(*pair) for pair in zip(whole, rest, strict=True))
    assert rest[1]["losses"] == whole[1]["losses"][20:]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(tmp_path / "one", 1, "masked", tmp_path / "whole" / "at-step=20.ckpt")
    assert "its ranks was expected to be 1, but is 2" in caught.value.stderr


def test_a_pass_ends_for_both_when_it_ends_for_one(tmp_path: Path) -> None:
    left, right = run(tmp_path / "short", 2, "short")
    assert same(left, right)
    windows = [epoch for epoch, _ in right["losses"]].count(0)
    assert windows == 30  # 235 steps, where the other has 250, or 32 windows
    assert "rank 0 was expected to end its pass with the others" in (tmp_path / "short" / "stderr").read_text()
    assert left["place"]["position"] == right["place"]["position"]


def test_one_stream_for_both_is_refused(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(tmp_path / "shared", 2, "shared")
    assert "every rank would train on the same data" in caught.value.stderr
