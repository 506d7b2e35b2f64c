"""Synthetic streams: targets that follow from the inputs, data that follow from the position."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError, EndOfStream, StreamError
from tbptt.streams import Adding, CopyTask, DelayedRecall, InfluenceBalancing, SyntheticStream
from tbptt.window import Window

MAKERS: dict[str, Callable[..., SyntheticStream]] = {
    "copy": lambda lanes=3, **kw: CopyTask(lanes, 10, delay=3, **kw),
    "recall": lambda lanes=3, **kw: DelayedRecall(7, lanes, **kw),
    "long recall": lambda lanes=3, **kw: DelayedRecall(2500, lanes, **kw),
    "adding": lambda lanes=3, **kw: Adding(lanes, 30, **kw),
}
every_task = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def read_all(stream: SyntheticStream, sizes: list[int]) -> Window:
    windows: list[Window] = []
    while True:
        try:
            windows.append(stream.read(sizes[len(windows) % len(sizes)]))
        except EndOfStream:
            return Window.join(windows)


def same(one: Window, other: Window) -> bool:
    pairs = [(one.inputs, other.inputs), (one.targets, other.targets)]
    return all(a.equal(b) for a, b in [*pairs, (one.mask, other.mask), (one.reset, other.reset)])


@every_task
def test_the_data_do_not_depend_on_the_sizes_of_windows(make: Callable[..., SyntheticStream]) -> None:
    whole = make(steps=5000).read(5000)
    assert whole.steps == 5000
    assert same(whole, read_all(make(steps=5000), [1, 17, 300, 1024, 2]))
    assert whole.reset[0].all()


@every_task
def test_a_lane_does_not_depend_on_the_other_lanes(make: Callable[..., SyntheticStream]) -> None:
    few, many = make(lanes=2).read(3000), make(lanes=5).read(3000)
    assert few.inputs.equal(many.inputs[:, :2])
    assert few.targets.equal(many.targets[:, :2])
    assert not many.inputs[:, 0].equal(many.inputs[:, 1])


@every_task
def test_a_state_resumes_exactly_also_in_a_later_pass(make: Callable[..., SyntheticStream]) -> None:
    first, second = make(steps=4000), make(steps=4000)
    list(first.windows(1000))
    first.read(2345)
    second.load_state_dict(first.state_dict())
    ours, theirs = second.read(900), first.read(900)
    assert ours.start == 2345
    assert same(ours, theirs)


@every_task
def test_another_pass_and_another_seed_have_other_data(make: Callable[..., SyntheticStream]) -> None:
    stream = make(steps=500)
    stream.rewind()  # nothing was read: still the first pass
    first = stream.read(500)
    assert same(first, make(steps=500).read(500))
    with pytest.raises(EndOfStream):
        stream.read(1)
    stream.rewind()
    assert not stream.read(500).inputs.equal(first.inputs)
    assert not make(steps=500, seed=1).read(500).inputs.equal(first.inputs)
    with pytest.raises(StreamError, match="seed=0 was expected, but the state has seed=1"):
        stream.load_state_dict(make(steps=500, seed=1).state_dict())


def test_copy_repeats_what_stood_before_the_blanks() -> None:
    length, delay, letters = 6, 4, 3
    task = CopyTask(2, length, delay=delay, letters=letters)
    window = task.read(16 * 20)
    mark, blank = letters, letters + 1
    for lane in range(2):
        periods = window.inputs[:, lane].reshape(-1, 16).tolist()
        targets = window.targets[:, lane].reshape(-1, 16).tolist()
        for read, said in zip(periods, targets, strict=True):
            assert read[0] == mark
            assert all(0 <= symbol < letters for symbol in read[1:length])
            assert read[length:] == [blank] * (length + delay)
            assert said == [blank] * (length + delay) + read[:length]
    assert window.mask.all()
    assert window.reset.sum() == 2
    assert task.horizon == length + delay + 1
    assert task.num_symbols == 5


def test_knowing_all_but_the_letters_of_copy_has_the_published_perplexity() -> None:
    window = CopyTask(4, 10).read(20 * 200)
    guessed = window.targets < 4  # the letters, at ln 4 each; all else is known
    perplexity = math.exp(guessed.double().mean().item() * math.log(4))
    assert perplexity == pytest.approx(math.exp(0.5 * 0.9 * math.log(4)), rel=1e-12)
    assert perplexity == pytest.approx(1.866, abs=5e-4)
    counts = torch.bincount(window.targets[guessed], minlength=4).double()
    assert (counts / counts.sum() - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / counts.sum())


@pytest.mark.parametrize("lag", [0, 1, 5, 1500])
def test_recall_says_the_input_of_lag_steps_ago(lag: int) -> None:
    task = DelayedRecall(lag, 2, symbols=5)
    window = read_all(task, [64, 3])
    assert window.targets[lag:].equal(window.inputs[: 10_000 - lag])
    assert window.mask[lag:].all()
    assert not window.mask[:lag].any()
    assert task.horizon == lag + 1
    shares = torch.bincount(window.inputs.reshape(-1), minlength=5).double() / window.inputs.numel()
    assert (shares - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / window.inputs.numel())


def test_adding_asks_for_the_sum_of_one_mark_in_each_half() -> None:
    length = 7
    task = Adding(3, length, steps=700 + 4, dtype=torch.float64)
    window = read_all(task, [50])
    number, mark = window.inputs[:700].reshape(100, length, 3, 2).unbind(-1)
    assert (mark[:, :3].sum(1) == 1).all()
    assert (mark[:, 3:].sum(1) == 1).all()
    assert window.targets[:700].reshape(100, length, 3)[:, -1].allclose((number * mark).sum(1))
    place = torch.arange(704) % length
    assert window.mask.equal((place == length - 1)[:, None].expand(-1, 3))
    assert window.reset.equal((place == 0)[:, None].expand(-1, 3))
    assert not window.mask[700:].any()  # cut short by the end of the pass
    assert task.horizon == length
    assert 0 <= number.min() <= number.max() < 1
    squares = (window.targets[window.mask] - 1).square()
    assert squares.mean().item() == pytest.approx(1 / 6, abs=5 * squares.std().item() / math.sqrt(300))


def test_influence_balancing_feeds_nothing_and_asks_for_one() -> None:
    window = InfluenceBalancing(2, dtype=torch.float64).read(5)
    assert window.inputs.equal(torch.zeros(5, 2, 1, dtype=torch.float64))
    assert window.targets.equal(torch.ones(5, 2, dtype=torch.float64))
    assert window.reset.sum() == 2
    assert InfluenceBalancing().horizon == 41


def test_one_hot_inputs_are_the_ids() -> None:
    for make in (lambda **kw: CopyTask(2, **kw), lambda **kw: DelayedRecall(3, 2, **kw)):
        ids, hot = make().read(40), make(one_hot=True).read(40)
        assert hot.inputs.argmax(-1).equal(ids.inputs)
        assert (hot.inputs.sum(-1) == 1).all()
        assert hot.inputs.dtype == torch.float32


def test_memory_does_not_grow_with_the_pass() -> None:
    task = DelayedRecall(10, 2, steps=100_000)
    held: list[int] = []
    for _ in task.windows(500):
        held.append(len(task._drawn))
    assert max(held) <= 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: CopyTask(0),
        lambda: CopyTask(1, 1),
        lambda: CopyTask(1, delay=-1),
        lambda: DelayedRecall(-1, 1),
        lambda: DelayedRecall(1, 1, symbols=1),
        lambda: Adding(1, 1),
        lambda: Adding(1, 10, dtype=torch.int64),
        lambda: CopyTask(1, steps=0),
        lambda: CopyTask(1, seed=-1),
        lambda: InfluenceBalancing(1.5),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], SyntheticStream]) -> None:
    with pytest.raises(ConfigError, match=r"expected.* came"):
        make()


def test_the_data_are_those_of_every_other_machine() -> None:
    window = DelayedRecall(1, 2, symbols=10, seed=3).read(1030)
    expected = np.random.default_rng((3, 0, 1, 1)).integers(10, size=1024)[:6]
    assert window.inputs[1024:, 1].tolist() == expected.tolist()
