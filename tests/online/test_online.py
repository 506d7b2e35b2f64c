"""`Online` against a plain loop over `estimator.estimate`, bit for bit, and against itself, saved and loaded."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Online, Window
from tbptt.errors import AlarmWarning, CapabilityError, CheckpointError, CheckpointWarning, NonFiniteError, ShapeError

STEPS = 41
X = torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(1))
Y = torch.randn(STEPS, generator=torch.Generator().manual_seed(2))


def build(
    estimator: tbptt.Estimator | None = None, *, dropout: float = 0.0, lr: float = 1e-2, seed: int = 0, **options: Any
) -> Online:
    torch.manual_seed(seed)
    model = tbptt.SequenceModel(2, 1, hidden=6, dropout=dropout)
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    return Online(model, nn.MSELoss(), adam, estimator or TBPTT(3, 7), **options)


def by_hand(estimator: tbptt.Estimator, *, resets: tuple[int, ...] = (), unlabelled: tuple[int, ...] = ()) -> Online:
    """The loop that anyone would write over windows of a recording; returned are the weights and the carry."""
    online = build(estimator)
    model, adam = online.model, online.optimizer
    carry, begin = estimator.init(model, 1), 0
    while begin + (steps := estimator.next_steps(carry)) <= STEPS:
        rows = slice(begin, begin + steps)
        reset = torch.tensor([[step in resets] for step in range(begin, begin + steps)])
        mask = torch.tensor([[step not in unlabelled] for step in range(begin, begin + steps)])
        window = Window(X[rows, None], Y[rows, None], mask, reset, begin)
        estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
        estimate.apply(model)
        adam.step()
        begin += steps
    online.updater.carry = carry
    return online


def weights(online: Online) -> list[Tensor]:
    return [each.detach().clone() for each in online.model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def learn_all(online: Online, resets: tuple[int, ...] = (), unlabelled: tuple[int, ...] = ()) -> None:
    for step in range(STEPS):
        if step in resets:
            online.reset()
        online.predict_one(X[step])  # changes nothing
        online.learn_one(X[step], None if step in unlabelled else Y[step])


ESTIMATORS = [
    TBPTT(1, 1),
    TBPTT(1, 5),
    TBPTT(4, 4),
    TBPTT(3, 7),
    TBPTT(3, 7, replay="retain"),
    TBPTT(5, 2),
    TBPTT(tbptt.Ramp(2, 5, over=6), 6),
    tbptt.ARTBP(mean_length=4),
    *tbptt.Telescope.examples()[:1],
    tbptt.PES(3, 6, 0.1),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_the_same_as_a_loop_over_windows(estimator: tbptt.Estimator) -> None:
    online = build(estimator)
    learn_all(online, resets=(10, 23), unlabelled=(4, 5, 17))
    hand = by_hand(estimator, resets=(10, 23), unlabelled=(4, 5, 17))
    assert same(weights(online), weights(hand))
    assert online.steps == STEPS
    other = by_hand(estimator, resets=(10, 24), unlabelled=(4, 5, 17))
    assert not same(weights(online), weights(other)), "the comparison must see a reset in another place"
    other = by_hand(estimator, resets=(10, 23), unlabelled=(4, 5, 18))
    assert not same(weights(online), weights(other)), "and another label"


@pytest.mark.parametrize("every", [1, 3])
def test_predictions_have_seen_every_step_before_them(every: int) -> None:
    """Against the model run by hand from the carry's state through the steps not learned from yet."""
    online = build(TBPTT(4, 8))
    for step in range(STEPS):
        if step == 18:
            online.reset()
        if step % every:  # a step that nobody asked about
            online.learn_one(X[step], Y[step])
            continue
        prediction = online.predict_one(X[step])
        begin = step // 4 * 4
        first = max(begin, 18) if step >= 18 and begin <= 18 else begin
        state = None if first == 18 else online.carry.state
        with torch.no_grad():
            for each in range(first, step + 1):
                expected, state = online.model.eval()(X[each][None, None], state)
            online.model.train()
        assert torch.equal(prediction, expected[0, 0]), step
        if step % 4 and step != 18:  # blind if the steps since the update did not matter
            state = online.carry.state
            skipped = online.model(X[step][None, None], state)[0]
            assert not torch.equal(prediction, skipped[0, 0])
        online.learn_one(X[step], Y[step])


def test_a_prediction_changes_nothing() -> None:
    online, silent = build(TBPTT(3, 6), dropout=0.5), build(TBPTT(3, 6), dropout=0.5)
    torch.manual_seed(5)
    for step in range(STEPS):
        first = online.predict_one(X[step])
        online.predict_one(X[(step + 7) % STEPS])
        assert torch.equal(first, online.predict_one(X[step]))
        assert online.model.training
        online.learn_one(X[step], Y[step])
    torch.manual_seed(5)
    for step in range(STEPS):
        silent.learn_one(X[step], Y[step])
    assert same(weights(online), weights(silent))
    first.zero_()  # what was given away is the caller's
    assert float(online.predict_one(X[0])) != 0.0


def test_a_sampling_model_predicts_without_drawing() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(1, 1)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, state = self.cell(inputs, state)
            return outputs + torch.randn_like(outputs), state

    model = Noisy()
    online = Online(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), TBPTT(2, 2))
    before = torch.get_rng_state()
    online.predict_one(torch.ones(1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_switches_its_mode_itself_is_asked_to() -> None:
    switched: list[bool] = []

    class Own(nn.RNN):
        def train(self, mode: bool = True) -> Own:
            switched.append(mode)
            return super().train(mode)

    model = Own(1, 1)
    online = Online(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), TBPTT(1, 1))
    switched.clear()
    online.predict_one(torch.ones(1))
    assert switched == [False, True]


@pytest.mark.parametrize("dropped", [False, True])
def test_parts_that_were_set_to_eval_stay_so(dropped: bool) -> None:
    online = build(dropout=0.3)
    online.model.train(not dropped)
    online.model.dropout.eval()
    online.predict_one(X[0])
    assert [part.training for part in (online.model, online.model.dropout)] == [not dropped, False]


@pytest.mark.parametrize("estimator", [TBPTT(4, 4), TBPTT(4, 9), TBPTT(1, 6)], ids=str)
def test_labels_that_come_later_in_any_order(estimator: TBPTT) -> None:
    """All labels of a window at once, newest first: the same windows, the same weights."""
    at_once, later = build(estimator), build(estimator, label_patience=8)
    learn_all(at_once)
    for begin in range(0, STEPS, 4):
        keys = [later.observe(X[step]) for step in range(begin, min(begin + 4, STEPS))]
        for key in reversed(keys):
            later.label(key, Y[key])
    assert later.updates == at_once.updates > 0
    assert same(weights(at_once), weights(later))
    swapped = build(estimator, label_patience=8)
    for begin in range(0, STEPS, 4):
        keys = [swapped.observe(X[step]) for step in range(begin, min(begin + 4, STEPS))]
        for key, other in zip(keys, reversed(keys), strict=True):
            swapped.label(key, Y[other])
    assert not same(weights(at_once), weights(swapped))


def test_labels_that_never_come_are_given_up_and_counted() -> None:
    online, hand = build(TBPTT(2, 4), label_patience=3), build(TBPTT(2, 4))
    for step in range(20):
        key = online.observe(X[step])
        if step % 5:  # steps 0, 5, 10 and 15 never get theirs
            online.label(key, Y[step])
        hand.learn_one(X[step], Y[step] if step % 5 else None)
    assert (online.given_up, hand.given_up) == (4, 0)
    assert len(online._pending) <= 2 + 3
    assert same(weights(online), weights(hand))
    with pytest.raises(ValueError, match=r"step 10 of 20 does not: .*given up 3 steps after"):
        online.label(10, Y[10])
    with pytest.raises(ValueError, match="its label came already"):
        online.label(19, Y[19])
    for key in (20, -1, True, "3"):
        with pytest.raises(ValueError, match="key of a step that was observed"):
            online.label(key, Y[0])


def test_a_window_without_any_label_moves_the_state_and_no_weight() -> None:
    online = build(TBPTT(2, 4))
    before = weights(online)
    online.learn_one(X[0])
    online.learn_one(X[1])
    assert same(before, weights(online))
    assert (online.updates, online.steps, online.refused) == (0, 2, 0)
    assert math.isnan(online.metrics["loss"])
    assert not torch.equal(online.carry.state[0], torch.zeros(1, 1, 6))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_many_at_once_are_the_same_as_one_by_one(estimator: tbptt.Estimator) -> None:
    one, many = build(estimator), build(estimator)
    learn_all(one)
    many.learn_many(X[:17], Y[:17])
    many.learn_many(X[17:].numpy(), Y[17:].numpy(), mask=torch.ones(STEPS - 17, 1, dtype=torch.bool))
    assert same(weights(one), weights(many))
    assert torch.equal(one.predict_one(X[0]), many.predict_one(X[0]))


def test_lanes_with_labels_and_resets_of_their_own() -> None:
    torch.manual_seed(3)
    xs, ys = torch.randn(12, 3, 2), torch.randn(12, 3)
    mask, reset = torch.rand(12, 3) > 0.3, torch.zeros(12, 3, dtype=torch.bool)
    reset[5, 1] = reset[9, 0] = True
    ys[~mask] = math.nan  # a label that does not count may be anything
    online, hand = build(TBPTT(4, 8), lanes=3), build(TBPTT(4, 8), lanes=3)
    carry = hand.estimator.init(hand.model, 3)
    for begin in range(0, 12, 4):
        rows = slice(begin, begin + 4)
        window = Window(xs[rows], ys[rows], mask[rows], reset[rows], begin)
        estimate, carry = hand.estimator.estimate(hand.model, nn.MSELoss(), carry, window)
        estimate.apply(hand.model)
        hand.optimizer.step()
    for step in range(12):
        if reset[step].any():
            online.reset(reset[step])
        assert online.predict_one(xs[step]).shape == (3,)
        online.learn_one(xs[step], ys[step], mask=mask[step])
    assert same(weights(online), weights(hand))
    single = build(TBPTT(4, 8), lanes=3)
    for step in range(12):
        single.learn_one(xs[step], ys[step], mask=mask[step])
    assert not same(weights(online), weights(single)), "without the resets it is another thing"


HALVES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_online as t

online = t.build(eval("t." + sys.argv[3]), dropout=0.2, label_patience=3)
online.load(sys.argv[2])
t.second_half(online, sys.argv[2])
"""


def first_half(online: Online) -> None:
    torch.manual_seed(7)
    online.learn_many(X[:10], Y[:10])
    online.observe(X[10])  # a label is open, and a window half full
    online.observe(X[11])
    online.reset()


def second_half(online: Online, directory: str) -> None:
    predictions = [online.predict_one(X[12])]
    online.label(10, Y[10])
    for step in range(12, STEPS):
        predictions.append(online.predict_one(X[step]))
        online.learn_one(X[step], Y[step])
    torch.save([torch.stack(predictions), *weights(online)], Path(directory) / "second.pt")


@pytest.mark.parametrize("code", ["TBPTT(3, 7)", "TBPTT(3, 7, replay='retain')", "TBPTT(1, 5)"])
def test_a_restart_in_another_process_goes_on_bit_for_bit(code: str, tmp_path: Path) -> None:
    online = build(eval(code), dropout=0.2, label_patience=3)
    first_half(online)
    online.save(tmp_path)
    second_half(online, str(tmp_path))
    expected = torch.load(tmp_path / "second.pt")
    command = [sys.executable, "-c", HALVES, str(Path(__file__).parent), str(tmp_path), code]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    resumed = torch.load(tmp_path / "second.pt")
    assert same(expected, resumed)
    torch.manual_seed(8)  # dropout: a generator that was not restored would be seen
    other = build(eval(code), dropout=0.2, label_patience=3)
    other.load(tmp_path)
    torch.manual_seed(8)
    second_half(other, str(tmp_path))
    assert not same(expected, torch.load(tmp_path / "second.pt"))


def test_the_newest_that_was_saved_is_loaded(tmp_path: Path) -> None:
    online = build()
    for step in range(6):
        online.learn_one(X[step], Y[step])
        path = online.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    expected = online.predict_one(X[6])
    build(seed=1).save(tmp_path / "other")
    fresh = build(seed=1)
    assert not torch.equal(fresh.predict_one(X[6]), expected)
    fresh.load(tmp_path)
    assert torch.equal(fresh.predict_one(X[6]), expected)
    (path / "state.json").write_text("{}")
    with pytest.warns(CheckpointWarning, match="damaged"):
        fresh.load(tmp_path)
    assert fresh.steps == 5
    early = build(seed=2)
    early.save(tmp_path)  # an earlier place, saved later
    fresh.load(tmp_path)
    assert fresh.steps == 0


def test_another_learners_checkpoint_is_refused(tmp_path: Path) -> None:
    build(TBPTT(3, 7)).save(tmp_path)
    for other, word in ((build(TBPTT(3, 8)), "estimator"), (build(TBPTT(3, 7), guards=[]), "guards")):
        with pytest.raises(CheckpointError, match=f"another learner: its {word}"):
            other.load(tmp_path)
    with pytest.raises(CheckpointError, match="there is none"):
        build().load(tmp_path / "nowhere")


def test_memory_stays_as_it_is() -> None:
    """The bytes of all that is saved, and the number of live tensors, after ten times the steps."""
    online = build(TBPTT(4, 8), label_patience=5, drift=Threshold(1e9))

    def steps(count: int) -> tuple[int, int]:
        for step in range(count):
            online.predict_one(X[step % STEPS])
            key = online.observe(X[step % STEPS])
            if step % 3:
                online.label(key, Y[step % STEPS])
        gc.collect()
        alive = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        return tbptt.tree.num_bytes([online.carry.state_dict(), online._pending.state_dict()]), alive

    early = steps(1200)  # whole periods of labels and windows
    assert steps(10_800) == early
    assert early[0] > 0


class Threshold:
    """A detector that anyone can read: the loss is above a limit."""

    def __init__(self, limit: float) -> None:
        self.limit, self.seen, self.drift_detected = limit, [0.0, 0.0], False

    def update(self, value: float) -> None:
        self.seen = [*self.seen[1:], value]
        self.drift_detected = value > self.limit


class Unstorable(Threshold):
    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.lock = iter([1])


def test_a_detector_sees_the_loss_of_each_prediction_before_it_is_learned_from(tmp_path: Path) -> None:
    seen: list[float] = []

    class Recording(Threshold):
        def update(self, value: float) -> None:
            super().update(value)
            seen.append(value)

    online = build(TBPTT(1, 4), drift=Recording(1e9), label_patience=2)
    expected: list[float] = []
    for step in range(12):
        expected.append(float((online.predict_one(X[step]) - Y[step]) ** 2))
        online.label(online.observe(X[step]), None if step == 7 else Y[step])
    del expected[7]
    assert seen == pytest.approx(expected, rel=1e-6)
    quiet = build(TBPTT(1, 4))
    quiet.learn_many(X[:12], Y[:12], mask=(torch.arange(12) != 7)[:, None])
    assert same(weights(online), weights(quiet)), "watching changes nothing"

    drifting = build(TBPTT(1, 4), drift=Threshold(25.0))
    drifting.learn_one(X[0], 0.1)
    with pytest.warns(AlarmWarning, match="drift at step 1: Threshold"):
        drifting.learn_one(X[1], 99.0)
    assert drifting.drifts == [1]
    drifting.save(tmp_path)
    loaded = build(TBPTT(1, 4), drift=Threshold(1.0))
    loaded.load(tmp_path)
    assert (loaded.drifts, loaded._watch.detector.limit) == ([1], 25.0)
    odd = build(TBPTT(1, 4), drift=Unstorable(1.0))
    with pytest.warns(CheckpointWarning, match="cannot be saved"):
        odd.save(tmp_path)
    odd.save(tmp_path)  # said once


def test_numbers_arrays_and_trees_go_in() -> None:
    one, other = build(), build()
    one.learn_one(X[0], float(Y[0]))
    other.learn_one(X[0].numpy().astype(np.float64), Y[0])
    assert torch.equal(one.predict_one(X[1]), other.predict_one(X[1].double().numpy()))

    symbols = tbptt.SequenceModel(5, 5, hidden=4, embedding=3)
    online = Online(symbols, nn.CrossEntropyLoss(), torch.optim.SGD(symbols.parameters(), lr=0.1), TBPTT(2, 2))
    for x in (1, np.int64(4), torch.tensor(2)):
        assert online.predict_one(x).shape == (5,)
        online.learn_one(x, 3)
    assert online.updates == 1

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(3, 2)

        def forward(self, inputs: dict[str, Tensor], state: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
            outputs, state = self.cell(torch.cat([inputs["a"], inputs["b"].unsqueeze(-1)], -1), state)
            return {"mean": outputs[..., 0], "rest": outputs}, state

    two = Two()
    loss: Callable[[Any, Any], Tensor] = lambda outputs, targets: (outputs["mean"] - targets) ** 2  # noqa: E731
    trees = Online(two, loss, torch.optim.SGD(two.parameters(), lr=0.1), TBPTT(2, 2))
    prediction = trees.predict_one({"a": np.ones(2), "b": 0.5})
    assert {name: tuple(each.shape) for name, each in prediction.items()} == {"mean": (), "rest": (2,)}
    trees.learn_many({"a": np.ones((4, 2)), "b": np.ones(4)}, np.zeros(4))
    assert trees.updates == 2
    buffer = np.ones(2, dtype=np.float32)
    used = build(TBPTT(2, 2))
    used.learn_one(buffer, 1.0)
    buffer[:] = 99.0  # the caller's buffer is the caller's
    used.learn_one(np.ones(2), 1.0)
    plain = build(TBPTT(2, 2))
    plain.learn_many(np.ones((2, 2)), np.ones(2))
    assert same(weights(used), weights(plain))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda o: o.learn_one(torch.tensor([1.0, math.nan]), 1.0), NonFiniteError, r"x holds nan at .*\(0, 1\)"),
        (lambda o: o.predict_one(torch.tensor([math.inf, 0.0])), NonFiniteError, "x holds inf"),
        (lambda o: o.learn_one(X[0], math.nan), NonFiniteError, "y holds nan"),
        (lambda o: o.learn_one(torch.zeros(3), 1.0), ShapeError, r"x of shape \(B, ...\) = \(1, 2\)"),
        (lambda o: o.learn_one("word", 1.0), ShapeError, "a str came"),
        (lambda o: o.learn_one(X[0], None, mask=torch.ones(1, dtype=torch.bool)), ValueError, "no mask was expected"),
        (lambda o: o.learn_one(X[0], 1.0, mask=[1]), ShapeError, "mask was expected to be bool"),
        (lambda o: o.reset([True, False]), ShapeError, "lanes was expected to be bool"),
        (lambda o: o.learn_many(X, Y[:3]), ShapeError, "ys of 41 steps"),
        (lambda o: o.learn_many(1.0), ShapeError, "one row for each step"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    call: Callable[[Online], Any], error: type[Exception], words: str
) -> None:
    online = build(TBPTT(1, 4))
    online.learn_one(X[0], Y[0])
    before = weights(online), online.steps, online.predict_one(X[1])
    with pytest.raises(error, match=words):
        call(online)
    assert online.steps == before[1]
    assert same(before[0], weights(online))
    assert torch.equal(online.predict_one(X[1]), before[2])


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for options in ({"lanes": 0}, {"lanes": 1.5}, {"label_patience": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)
    with pytest.raises(ValueError, match="SpikeRollback goes back: the steps in between are gone"):
        build(guards=[tbptt.SpikeRollback(every=10)])
    for estimator in tbptt.SyntheticGradients.examples()[:1]:
        with pytest.raises((CapabilityError, ValueError), match="with a predictor was expected"):
            build(estimator)
    with pytest.raises(CapabilityError, match="a live stream has no end"):
        build(tbptt.FullBPTT())
    with pytest.raises(CapabilityError, match="drift detector"):
        build(drift=object())
    with pytest.raises(ValueError, match="unbiased"):
        build(tbptt.ARTBP(mean_length=4), guards=[tbptt.ClipNorm(1.0)])
    with pytest.raises(ShapeError, match=r"\(B, ...\) = \(2, ...\)"):
        build(lanes=2).learn_one(X[0], 1.0)


def exploding(online: Online) -> None:
    """Make the next gradients infinite, but not the state."""
    online.updater.loss = tbptt.loss.StepLoss(lambda outputs, targets: (outputs - targets) ** 2 * math.inf)


def test_gradients_that_are_no_numbers_stop_it_unless_they_are_skipped() -> None:
    online = build(TBPTT(2, 2))
    before = weights(online)
    exploding(online)
    online.learn_one(X[0], Y[0])
    for _ in range(2):  # it stays so, and nothing piles up
        with pytest.raises(NonFiniteError, match="finite gradients"):
            online.learn_one(X[1], Y[1])
        assert (online.steps, len(online._pending)) == (2, 2)
    assert same(before, weights(online))

    skipping = build(TBPTT(2, 2), guards=[tbptt.NonFinite("skip")])
    exploding(skipping)
    skipping.learn_many(X[:2], Y[:2])
    assert (skipping.refused, skipping.updates) == (1, 0)
    assert same(before, weights(skipping))
    assert skipping.carry.state is not None  # the state was sound, and goes on


def test_a_reset_in_a_window_that_broke_the_state_is_made_good() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(1, 2)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, state = self.cell(inputs, state)
            return outputs[..., 0], state / (inputs[-1] != 7.0)  # a 7 breaks the state

    torch.manual_seed(0)
    model = Fragile()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    online = Online(model, nn.MSELoss(), sgd, TBPTT(1, 1), guards=[tbptt.NonFinite("skip")])
    online.learn_one(torch.ones(1), 0.5)
    old = online.carry.state
    online.reset()
    broken = tbptt.loss.StepLoss(lambda outputs, targets: (outputs - targets) * math.nan)
    sound, online.updater.loss = online.loss, broken
    online.learn_one(torch.tensor([7.0]), 0.5)
    online.updater.loss = sound
    assert online.refused == 1
    assert online.carry.state is old
    with torch.no_grad():
        fresh = model(torch.full((1, 1, 1), 2.0))[0]
        kept = model(torch.full((1, 1, 1), 2.0), old)[0]
    assert not torch.equal(fresh, kept)
    assert torch.equal(online.predict_one(torch.tensor([2.0])), fresh[0, 0])


def test_it_can_be_checked_on_the_first_steps() -> None:
    assert bool(build(TBPTT(2, 4)).check(X[:12]))
    report = build(TBPTT(2, 4)).check(X[:12])
    assert "reach" in [item.name for item in report.items]
