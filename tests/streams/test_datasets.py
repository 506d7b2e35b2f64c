"""The shipped recordings: split in time, standardised by the training part, beats where they are."""

from __future__ import annotations

import runpy
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError
from tbptt.streams import ecg, ecg_rows, shakespeare

DATA = Path(str(files("tbptt.data")))
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_ecg_peaks"


@pytest.fixture(scope="module")
def peaks() -> np.ndarray:
    with np.load(DATA / "mitdb208_peaks.npz") as archive:
        return archive["peaks"]


def test_the_heart_beats_about_every_0_6_s(peaks: np.ndarray) -> None:
    intervals = np.diff(peaks) / 360
    assert 480 < len(peaks) < 520
    assert intervals.min() > 0.4
    assert 0.55 < np.median(intervals) < 0.61
    assert (intervals > 1.0).sum() == 3  # stretches where the recording is disturbed


def test_a_beat_ahead_is_what_the_targets_say(peaks: np.ndarray) -> None:
    _, targets, mask = ecg_rows("all")
    steps = set((peaks // 6).tolist())
    expected = [float(any(step + ahead in steps for ahead in range(1, 13))) for step in range(18000)]
    assert targets.tolist() == expected
    assert mask[:-12].all()
    assert not mask[-12:].any()
    assert 0.3 < targets.mean() < 0.35


def test_the_training_part_alone_standardises() -> None:
    train, test, everything = ecg_rows("train")[0], ecg_rows("test")[0], ecg_rows("all")[0]
    assert (len(train), len(test)) == (14400, 3600)
    assert np.array_equal(np.concatenate([train, test]), everything)
    assert np.allclose(train.mean(0, dtype=np.float64), 0, atol=1e-6)
    assert np.allclose(train.std(0, dtype=np.float64), 1, atol=1e-6)
    assert not np.allclose(test.std(0), 1, atol=1e-3)  # else the test part had been looked at
    with np.load(DATA / "mitdb208.npz") as archive:
        mean_of_six = archive["ecg"].astype(float).reshape(-1, 6).mean(1)
    assert np.corrcoef(mean_of_six, everything[:, 0])[0, 1] > 1 - 1e-9
    assert np.corrcoef(np.diff(mean_of_six), everything[1:, 1])[0, 1] > 1 - 1e-9


def test_the_ecg_stream_has_the_agreed_shapes() -> None:
    stream = ecg(lanes=8)
    window = stream.read(10)
    assert tuple(window.inputs.shape) == (10, 8, 2)
    assert tuple(window.targets.shape) == (10, 8)
    assert window.inputs.dtype == window.targets.dtype == torch.float32
    assert stream.steps == 1800
    with pytest.raises(ConfigError, match="'train', 'test' or 'all'"):
        ecg(split="valid")


def test_the_script_finds_the_stored_peaks(peaks: np.ndarray) -> None:
    pytest.importorskip("scipy")
    find_r_peaks = runpy.run_path(str(SCRIPT))["find_r_peaks"]
    with np.load(DATA / "mitdb208.npz") as archive:
        ecg = archive["ecg"]
    found = find_r_peaks(ecg)
    # In exact arithmetic some beats have two samples that are equally steep: there rounding, which differs from
    # processor to processor, chooses.
    steep = np.convolve(np.diff(ecg.astype(np.int64), prepend=int(ecg[0])), np.ones(10, np.int64), mode="same") ** 2
    assert len(found) == len(peaks)
    assert np.array_equal(steep[found], steep[peaks])
    assert np.abs(found - peaks).max() < 0.05 * 360  # of the same beat
    assert np.count_nonzero(found != peaks) < 0.02 * len(peaks)


def test_both_parts_of_shakespeare_share_the_vocabulary_and_nothing_else() -> None:
    text = (DATA / "shakespeare.txt").read_text()
    train, test = shakespeare(lanes=2), shakespeare(lanes=2, split="test")
    assert train.vocabulary == test.vocabulary
    assert train.num_symbols == 65
    assert train.vocabulary is not None
    cut = round(0.9 * len(text))
    assert train.vocabulary.decode(train.read(40).inputs[:, 0]) == text[:40]
    assert train.vocabulary.decode(test.read(40).inputs[:, 0]) == text[cut : cut + 40]
    assert shakespeare(lanes=1, split="all", unit="bytes").steps == 1_115_393


def test_the_licence_is_named_where_the_data_lie() -> None:
    readme = (DATA / "README.md").read_text()
    assert "MIT-BIH Arrhythmia Database, PhysioNet, Moody & Mark 2001" in readme
    assert "ODC-By 1.0" in readme
    for path in DATA.iterdir():
        if path.suffix in {".npz", ".txt"}:
            assert f"`{path.name}`" in readme
