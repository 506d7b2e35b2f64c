"""ArrayStream: nothing lost, nothing twice, nothing in the wrong lane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError, EndOfStream, NonFiniteError, ShapeError, StreamError
from tbptt.streams import ArrayStream, split_rows
from tbptt.streams import arrays as module
from tbptt.streams.leaves import Mapped
from tbptt.window import Window


def whole(stream: ArrayStream, sizes: int | list[int] = 10**9) -> Window:
    """One pass, in windows of the given sizes, joined."""
    windows: list[Window] = []
    while True:
        try:
            size = sizes if isinstance(sizes, int) else sizes[len(windows) % len(sizes)]
            windows.append(stream.read(size))
        except EndOfStream:
            return Window.join(windows)


@pytest.mark.parametrize(("rows", "lanes"), [(12, 3), (13, 3), (14, 3), (5, 5), (9, 5), (7, 1), (1, 1)])
def test_every_row_comes_once_and_in_its_lane(rows: int, lanes: int) -> None:
    stream = ArrayStream(np.arange(rows), np.arange(rows) * 10, lanes=lanes)
    window = whole(stream)
    assert window.steps == stream.steps == -(-rows // lanes)
    for lane in range(lanes):  # the definition of the cut
        expected = list(range(lane * rows // lanes, (lane + 1) * rows // lanes))
        counts = window.mask[:, lane]
        assert window.inputs[counts, lane].tolist() == expected
        assert window.inputs[-1, lane] == expected[-1]  # padded with the last row, if at all
    assert int(window.mask.sum()) == rows
    assert window.targets.equal(window.inputs * 10)


@pytest.mark.parametrize("seed", range(4))
def test_windows_of_any_sizes_join_to_the_direct_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, lanes = int(rng.integers(40, 90)), int(rng.integers(1, 7))
    data = {"a": rng.normal(size=(rows, 2)), "b": (rng.integers(9, size=rows), rng.normal(size=rows))}
    mask, reset = rng.random(rows) < 0.7, rng.random(rows) < 0.2
    stream = ArrayStream(data, data["a"], lanes=lanes, mask=mask, reset=reset, dtype=torch.float64)
    joined = whole(stream, rng.integers(1, 9, size=5).tolist())

    index = np.full((stream.steps, lanes), -1)
    for lane in range(lanes):
        piece = np.arange(rows)[lane * rows // lanes : (lane + 1) * rows // lanes]
        index[: len(piece), lane] = piece
        index[len(piece) :, lane] = piece[-1]
    padded = np.zeros(index.shape, dtype=bool)
    padded[1:] = index[1:] == index[:-1]
    assert np.array_equal(joined.inputs["a"], data["a"][index])
    assert np.array_equal(joined.inputs["b"][0], data["b"][0][index])
    assert np.array_equal(joined.inputs["b"][1], data["b"][1][index])
    assert np.array_equal(joined.targets, data["a"][index])
    assert np.array_equal(joined.mask, mask[index] & ~padded)
    expected_reset = reset[index] & ~padded
    expected_reset[0] = True
    assert np.array_equal(joined.reset, expected_reset)


def test_each_pass_begins_with_a_reset_and_only_there() -> None:
    stream = ArrayStream(torch.arange(10.0), lanes=2)
    for _ in range(2):
        windows = list(stream.windows(2))
        assert [window.start for window in windows] == [0, 2, 4]
        assert [bool(window.reset.any()) for window in windows] == [True, False, False]
        assert windows[0].reset[0].all()
        assert not windows[0].reset[1].any()
        assert windows[0].targets is None


def test_a_state_resumes_exactly_in_mid_pass() -> None:
    data = np.random.default_rng(0).normal(size=(50, 3))
    first, second = ArrayStream(data, lanes=4), ArrayStream(data, lanes=4)
    first.read(5)
    second.load_state_dict(first.state_dict())
    ours, theirs = second.read(4), first.read(4)
    assert ours.start == theirs.start == 5
    assert ours.inputs.equal(theirs.inputs)
    first.rewind()
    assert not first.read(4).inputs.equal(ours.inputs)


def test_a_state_of_another_recording_is_refused() -> None:
    stream = ArrayStream(np.arange(20), lanes=4)
    for other in (ArrayStream(np.arange(21), lanes=4), ArrayStream(np.arange(20), lanes=5)):
        with pytest.raises(StreamError, match="another row"):
            stream.load_state_dict(other.state_dict())
    with pytest.raises(StreamError, match="from 0 to 5"):
        stream.load_state_dict(stream.state_dict() | {"position": 6})


def test_windows_never_alias_the_recording() -> None:
    for data in (np.ones((8, 1), dtype=np.float32), torch.ones(8, 1), torch.ones(8, 1).bfloat16()):
        stream = ArrayStream(data, lanes=1)
        stream.read(1).inputs.fill_(7.0)
        assert (data == 1).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("u1", torch.int64),
        ("u2", torch.int64),
        (">u4", torch.int64),
        (">i2", torch.int64),
        ("u8", torch.int64),
        ("?", torch.bool),
        (">f4", torch.float32),
        ("f8", torch.float32),
        ("f2", torch.float32),
        ("g", torch.float32),
        ("c16", torch.complex128),
    ],
)
def test_numpy_dtypes_become_torch_dtypes_of_the_same_values(dtype: str, expected: torch.dtype) -> None:
    data = np.array([0, 1, 1, 0], dtype=dtype)
    values = ArrayStream(data, lanes=1).read(4).inputs
    assert values.dtype == expected
    assert values[:, 0].tolist() == [0, 1, 1, 0]


def test_tensors_keep_their_floating_dtype_unless_told() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert ArrayStream(torch.ones(4, dtype=dtype), lanes=1).read(1).inputs.dtype == dtype
        told = ArrayStream(torch.ones(4, dtype=dtype), lanes=1, dtype=torch.float32)
        assert told.read(1).inputs.dtype == torch.float32
    assert ArrayStream(np.ones(4), lanes=1, dtype=torch.float64).read(1).inputs.dtype == torch.float64
    assert ArrayStream(torch.ones(4, dtype=torch.uint8), lanes=1).read(1).inputs.dtype == torch.int64


def test_numbers_beyond_int64_are_refused_rather_than_wrapped() -> None:
    stream = ArrayStream(np.array([1, 2**63], dtype=np.uint64), lanes=1)
    assert stream.read(1).inputs.item() == 1
    with pytest.raises(StreamError, match="9223372036854775808, which is beyond"):
        stream.read(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_input_is_placed_and_the_cursor_stays(bad: float) -> None:
    data = np.ones((20, 3))
    data[13, 2] = bad  # lane 1 begins at row 10
    stream = ArrayStream({"signal": data}, lanes=2)
    stream.read(2)
    before = stream.state_dict()
    for _ in range(2):  # it stays where it is
        with pytest.raises(NonFiniteError) as caught:
            stream.read(4)
        for part in ("inputs['signal']", str(bad), "row 13", "lane 1", "step 3", "column 2", "hint:"):
            assert part in str(caught.value)
        assert stream.state_dict() == before
    assert stream.read(1).start == 2


def test_large_finite_numbers_pass_though_their_sum_overflows() -> None:
    window = ArrayStream(np.full(8, 3e38, dtype=np.float32), lanes=2).read(4)
    assert torch.isfinite(window.inputs).all()


def test_a_target_may_be_missing_where_it_does_not_count() -> None:
    targets = np.arange(9.0)
    targets[[2, 4]] = np.nan
    window = whole(ArrayStream(np.ones(9), targets, lanes=2, mask=np.isfinite(targets)))
    assert torch.isfinite(window.targets[window.mask]).all()
    assert window.num_targets == 7
    with pytest.raises(NonFiniteError, match=r"targets holds nan at row 4 .*lane 1, step 0\)"):
        whole(ArrayStream(np.ones(9), targets, lanes=2))
    only_one = np.isfinite(targets)
    only_one[2] = True
    with pytest.raises(NonFiniteError, match="row 2 "):
        whole(ArrayStream(np.ones(9), targets, lanes=2, mask=only_one))


def test_what_cannot_be_meant_is_refused_with_the_reason() -> None:
    x = np.ones(10)
    with pytest.raises(ShapeError, match="targets of 10 rows was expected, as inputs has, but it has 9"):
        ArrayStream(x, x[:9], lanes=2)
    with pytest.raises(StreamError, match=r"each of the 11 lanes .* has 10"):
        ArrayStream(x, lanes=11)
    with pytest.raises(StreamError, match="it is empty"):
        ArrayStream(np.ones(0), lanes=1)
    for lanes in (0, -1, True, 2.0, "2"):
        with pytest.raises(ConfigError, match="lanes was expected to be a whole number"):
            ArrayStream(x, lanes=lanes)
    with pytest.raises(ShapeError, match=r"mask was expected to be bool of shape \(10,\)"):
        ArrayStream(x, lanes=1, mask=np.ones(10))
    with pytest.raises(ShapeError, match="reset was expected"):
        ArrayStream(x, lanes=1, reset=np.ones(9, dtype=bool))
    with pytest.raises(ShapeError, match="a list or tuple is taken as a tree"):
        ArrayStream([1.0, 2.0], lanes=1)
    with pytest.raises(ShapeError, match="dtype is <U1"):
        ArrayStream(np.array(["a", "b"]), lanes=1)
    with pytest.raises(ShapeError, match="holds none"):
        ArrayStream((), lanes=1)
    with pytest.raises(ConfigError, match="floating dtype"):
        ArrayStream(x, lanes=1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="whole number of steps"):
        ArrayStream(x, lanes=1).read(0)


def test_mapped_rows_pass_through_the_function_only_when_read() -> None:
    seen: list[int] = []

    def double(rows: np.ndarray) -> np.ndarray:
        seen.append(rows.size)
        return rows * 2.0

    stream = ArrayStream(Mapped(np.arange(1000), double), lanes=1)
    seen.clear()
    assert stream.read(3).inputs[:, 0].tolist() == [0.0, 2.0, 4.0]
    assert seen == [3]


def resident_bytes() -> int:
    """The pages of files that this process has mapped in."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssFile", "RssShmem"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_mapped_file_does_not_pile_up_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = tmp_path / "recording.bin", 48 << 20
    with path.open("wb") as file:
        file.truncate(size)
    for releases in (True, False):
        with monkeypatch.context() as patch:
            if not releases:  # the negative control: the measurement sees what is not given back
                patch.setattr(module, "release", lambda mappings: None)
            stream = ArrayStream(np.memmap(path, np.uint8, "r").reshape(-1, 64), lanes=4)
            start = resident_bytes()
            grown = max(resident_bytes() - start for _ in stream.windows(2048))
            assert (grown < size // 3) == releases
            del stream


def test_private_changes_of_a_mapped_file_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELEASE_BYTES", 0)
    path = tmp_path / "recording.bin"
    np.arange(5000, dtype=np.int32).tofile(path)
    for mode, kept in (("c", 7), ("r+", 7)):
        mapped = np.memmap(path, np.int32, mode)
        mapped[4000] = 7
        stream = ArrayStream(mapped[10:], lanes=1)
        values = torch.cat([window.inputs for window in stream.windows(100)])
        assert values[3990].item() == kept == mapped[4000]


def test_split_rows_keeps_the_order_of_time_and_copies_nothing() -> None:
    data = {"x": np.arange(10.0), "y": torch.arange(10)}
    first, rest = split_rows(data, 0.7)
    assert first["x"].tolist() + rest["x"].tolist() == list(range(10))
    assert first["y"].tolist() == list(range(7))
    assert np.shares_memory(first["x"], data["x"])
    for fraction in (0.0, 1.0, 0.01, -0.5, 1.5):
        with pytest.raises(ConfigError, match="both sides"):
            split_rows(data, fraction)
    with pytest.raises(ShapeError, match="paired wrongly"):
        split_rows({"x": np.arange(3), "y": np.arange(4)}, 0.5)
