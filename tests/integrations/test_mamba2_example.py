"""The example with Mamba2 and a tokenizer: its figures and its weights are those of plain transformers and torch.

Letters: N texts, T steps of a text, V tokens of the vocabulary.
"""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

import tbptt
from tbptt.integrations.transformers import recurrent
from tbptt.monitors import Monitor, Update

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[2] / "examples" / "mamba2_long_document.py"
WINDOW, LANES, UPDATES, TEXTS = 16, 4, 12, 16
SHORT = f"--window {WINDOW} --lanes {LANES} --updates {UPDATES} --texts {TEXTS} --pretraining 20".split()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("mamba2_long_document", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run from the command line, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "short"
    command = [sys.executable, str(EXAMPLE), *SHORT, "--directory", str(directory)]
    return directory, subprocess.run(command, capture_output=True, text=True, check=True).stdout


def begun(run: tuple[Path, str], directory: Path) -> list[str]:
    """The words of a command that finds its tokens and its pretrained model in `directory`."""
    directory.mkdir()
    shutil.copytree(run[0] / "pretrained", directory / "pretrained")
    shutil.copy(run[0] / "tokens.bin", directory)
    return [*SHORT, "--directory", str(directory)]


def loaded(directory: Path, name: str) -> nn.Module:
    return transformers.Mamba2ForCausalLM.from_pretrained(directory / name, dtype=torch.float32)


def tokens_of(directory: Path) -> tuple[Tensor, Tensor]:
    """What is learned from, and what is held out."""
    ids = torch.from_numpy(np.fromfile(directory / "tokens.bin", dtype=np.int32).astype(np.int64))
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


# Loss by position.


@torch.no_grad()
def losses_by_hand(net: nn.Module, held_out: Tensor, times: int) -> Tensor:
    """The mean loss at each position, by one call for each stretch of `times` windows: no cache, no state."""
    steps = times * WINDOW
    count = TEXTS * 16 * WINDOW
    inputs, targets = held_out[:count].view(-1, steps), held_out[1 : count + 1].view(-1, steps)
    losses = F.cross_entropy(net(inputs, use_cache=False).logits.transpose(1, 2), targets, reduction="none")
    return losses.view(TEXTS, 16 * WINDOW).mean(0)


def printed(said: str) -> Tensor:
    """The nats of the printed table: rows by position, columns before and after, each carried and dropped."""
    rows = re.findall(r"^ *\d+ to +\d+ (.*)$", said, re.MULTILINE)
    return torch.tensor([[float(nats) for nats in row.split()[::2]] for row in rows])


def test_the_losses_by_position_are_those_of_whole_passes(run: tuple[Path, str]) -> None:
    directory, said = run
    columns: list[list[Tensor]] = []
    for name in ("pretrained", "fine-tuned"):
        net = loaded(directory, name).eval()
        for times in (16, 1):
            losses = losses_by_hand(net, tokens_of(directory)[1], times)
            bands = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
            columns.append([losses[first * WINDOW : last * WINDOW].mean() for first, last in bands])
    expected = torch.tensor(columns).T
    torch.testing.assert_close(printed(said), expected, rtol=0, atol=1e-4)  # four digits are printed
    before_carried, before_dropped, after_carried, after_dropped = expected[1:].T
    assert ((before_carried - before_dropped).abs() > 1e-3).any()  # so the columns could not be mixed up
    assert ((after_carried - after_dropped).abs() > 1e-3).any()
    assert (after_carried < before_carried - 0.05).all()


def test_the_perplexity_is_that_of_the_nats(run: tuple[Path, str]) -> None:
    rows = re.findall(r"^ *\d+ to +\d+ (.*)$", run[1], re.MULTILINE)
    cells = torch.tensor([[float(cell) for cell in row.split()] for row in rows])
    torch.testing.assert_close(cells[:, 1::2], cells[:, ::2].exp(), rtol=2e-4, atol=0.01)


# Fine-tuning.


def state_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of transformers' cache, copied and cut from their graph."""
    return [(each.conv_states[0].detach().clone(), each.recurrent_states[0].detach().clone()) for each in cache.layers]


def cache_of(net: nn.Module, state: list[tuple[Tensor, Tensor]]) -> Any:
    cache = transformers.DynamicCache(config=net.config)
    for layer, (conv, ssm) in zip(cache.layers, state, strict=True):
        layer.lazy_initialization(conv_states=conv, recurrent_states=ssm)
        layer.conv_states[0].copy_(conv)
        layer.recurrent_states[0].copy_(ssm)
        layer.has_previous_state[0] = True
    return cache


def fine_tuned_by_hand(net: nn.Module, learned: Tensor, *, carried: bool) -> nn.Module:
    """TBPTT(k1=window, k2=2 windows) in plain torch: the window before is run again with the weights of today."""
    length = (len(learned) - 1) // LANES
    assert length * LANES == len(learned) - 1  # else the lanes begin elsewhere
    inputs, targets = learned[:-1].view(LANES, length), learned[1:].view(LANES, length)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    state = None  # before the window before
    for update in range(UPDATES):
        begin = update * WINDOW
        if update and carried:
            given = {} if state is None else {"cache_params": cache_of(net, state)}
            past = net(inputs[:, begin - WINDOW : begin], use_cache=True, **given).cache_params
            state = state_of(past)
            logits = net(inputs[:, begin : begin + WINDOW], use_cache=True, cache_params=past).logits
        else:
            logits = net(inputs[:, begin : begin + WINDOW], use_cache=True).logits
        loss = F.cross_entropy(logits.transpose(1, 2), targets[:, begin : begin + WINDOW])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - update / UPDATES)
        optimizer.step()
    return net


def change(net: nn.Module, before: nn.Module) -> Tensor:
    return torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), before.parameters(), strict=True)]).detach()


@pytest.mark.parametrize("reset", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_weights_are_those_of_a_loop_by_hand(
    reset: bool, run: tuple[Path, str], example: ModuleType, tmp_path: Path
) -> None:
    words = begun(run, tmp_path / "run")
    tokens = np.fromfile(tmp_path / "run" / "tokens.bin", dtype=np.int32)
    even = tokens[: len(tokens) // 40 * 40 + 2]  # a tenth is held out, the rest is one more than a multiple of lanes
    assert (len(even) * 9 // 10 - 1) % LANES == 0
    even.tofile(tmp_path / "run" / "tokens.bin")
    example.main([*words, *(["--reset"] if reset else [])])
    pretrained = loaded(tmp_path / "run", "pretrained")
    got = change(loaded(tmp_path / "run", "fine-tuned"), pretrained)
    learned = tokens_of(tmp_path / "run")[0]
    same, other = (
        change(fine_tuned_by_hand(loaded(tmp_path / "run", "pretrained"), learned, carried=carried), pretrained)
        for carried in (not reset, reset)
    )
    assert (got - same).norm() < 1e-4 * same.norm()
    assert (got - other).norm() > 0.1 * other.norm()


@pytest.mark.parametrize("reset", [False, True])
def test_the_control_starts_each_window_from_zeros(reset: bool, example: ModuleType) -> None:
    chosen = example.settings([*SHORT, *(["--reset"] if reset else [])])
    stream = example.document_stream(np.arange(1003), chosen)  # lanes of 250 and 251 steps
    for number, window in enumerate(stream.windows(WINDOW)):
        expected = torch.zeros(window.steps, LANES, dtype=torch.bool)
        expected[0] = reset or number == 0
        assert torch.equal(window.reset, expected)


# Stopping and going on.


class Interrupt(Monitor):
    """Presses Ctrl-C after some update."""

    def __init__(self, number: int) -> None:
        self.number = number

    def update(self, update: Update) -> None:
        if update.number == self.number:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def stopped(run: tuple[Path, str], example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was stopped after 5 updates."""
    directory = tmp_path_factory.mktemp("runs") / "stopped"
    words, make, said = begun(run, directory), tbptt.Trainer, io.StringIO()

    def trainer(*args: Any, monitors: list[Monitor], **more: Any) -> tbptt.Trainer:
        return make(*args, monitors=[*monitors, Interrupt(5)], **more)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(tbptt, "Trainer", trainer)
        assert example.main(words) is None
    assert said.getvalue().startswith("stopped by SIGINT after 5 updates")
    assert not (directory / "fine-tuned").exists()
    return directory


@pytest.fixture
def interrupted(stopped: Path, tmp_path: Path) -> list[str]:
    """The words of the command that was stopped, for a copy of its directory."""
    shutil.copytree(stopped, tmp_path / "run")
    return [*SHORT, "--directory", str(tmp_path / "run")]


def test_after_ctrl_c_the_same_command_goes_on(
    interrupted: list[str],
    run: tuple[Path, str],
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example.main(interrupted)
    assert capsys.readouterr().out == run[1]
    assert not change(loaded(tmp_path / "run", "fine-tuned"), loaded(run[0], "fine-tuned")).any()


@pytest.mark.parametrize("lost", ["carry", pytest.param("stream", marks=pytest.mark.slow)])
def test_without_its_place_the_weights_are_others(
    lost: str,
    interrupted: list[str],
    run: tuple[Path, str],
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = tbptt.ArrayStream if lost == "stream" else type(tbptt.TBPTT(1, 1).init(nn.RNN(1, 1), 1))
    monkeypatch.setattr(kind, "load_state_dict", lambda self, state: None)
    example.main(interrupted)
    assert change(loaded(tmp_path / "run", "fine-tuned"), loaded(run[0], "fine-tuned")).any()


def test_other_settings_in_the_same_directory_are_refused(interrupted: list[str], example: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"another rate\nhint"):
        example.main([*interrupted, "--rate", "0.1"])


# A model and a document of one's own.


@pytest.mark.slow
def test_a_model_and_a_document_of_ones_own(
    run: tuple[Path, str], example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Viel Lärm\r\num nichts — 空騒ぎ,\n\n  Much ado.\t" * 400
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(example, "PIECE", 1000)
    model, directory = str(run[0] / "pretrained"), tmp_path / "run"
    words = [*SHORT, "--model", model, "--document", str(tmp_path / "text.txt"), "--directory", str(directory)]
    figures = example.main(words)
    assert figures is not None
    assert not (directory / "pretrained").exists()
    assert torch.cat(tokens_of(directory)).numel() > 5000
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "fine-tuned")
    assert tokenizer.decode(torch.cat(tokens_of(directory))) == text
    assert change(loaded(directory, "fine-tuned"), loaded(run[0], "pretrained")).any()
    assert figures["after"]["carried"].mean() < figures["before"]["carried"].mean()


def test_a_document_too_short_to_be_judged_on_is_refused(
    run: tuple[Path, str], example: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Words, words, words.\n" * 50, encoding="utf-8")
    words = [*SHORT, "--model", str(run[0] / "pretrained"), "--document", str(tmp_path / "text.txt")]
    with pytest.raises(SystemExit, match="should be 257 tokens or more"):
        example.main([*words, "--directory", str(tmp_path / "run")])


# Memory.


def bytes_by_hand(net: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """The bytes of all storages that the graph of two windows and its loss refer to, the weights' aside."""
    kept: list[Tensor] = []
    weights = {each.untyped_storage().data_ptr() for each in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        past = net(inputs[:, :WINDOW], use_cache=True).cache_params
        logits = net(inputs[:, WINDOW:], use_cache=True, cache_params=past).logits
        F.cross_entropy(logits.transpose(1, 2), targets[:, WINDOW:], reduction="sum")
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(size for place, size in sizes.items() if place not in weights)


def test_the_memory_is_that_of_the_graph_and_grows_with_the_look_back(
    run: tuple[Path, str], example: ModuleType
) -> None:
    net, ids = loaded(run[0], "pretrained"), np.arange(2001) % 500

    def held(times: int) -> int:
        chosen = example.settings([*SHORT, "--k2", str(times * WINDOW)])
        model = recurrent(net)
        return example.held_bytes(model, example.document_stream(ids, chosen), chosen)

    window = next(islice(tbptt.ArrayStream(ids[:-1], ids[1:], lanes=LANES).windows(2 * WINDOW), 1))
    expected = bytes_by_hand(net, window.inputs.T, window.targets.T)
    assert 0.9 * expected < held(2) < 1.1 * expected
    assert 0.85 < held(8) / (4 * held(2)) < 1.05  # what it says of the whole document is in proportion


def test_the_memory_of_the_document_is_in_proportion(run: tuple[Path, str]) -> None:
    window, document = (float(run[1].split(before)[1].split()[0]) for before in ("autograd holds ", "would hold "))
    tokens = len(tokens_of(run[0])[0])
    assert document * 1e9 == pytest.approx(window * 1e6 * tokens / (2 * WINDOW * LANES), rel=0.02)  # as printed


# What the page says of hybrid models.


@pytest.mark.parametrize(("kind", "grows"), [("Mamba2", False), ("FalconH1", True)])
def test_the_cache_of_attention_grows_until_all_lanes_begin_anew(kind: str, grows: bool) -> None:
    model = recurrent(zoo.transformer(kind))
    ids = np.arange(8 * 8 + 1) % zoo.VOCABULARY
    stream = tbptt.ArrayStream(ids[:-1], ids[1:], lanes=2, reset=np.arange(64) % 32 == 24)
    estimator, sizes = tbptt.TBPTT(k1=8, k2=16), list[int]()
    carry = estimator.init(model, stream.lanes)
    for window in stream.windows(8):
        _, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
        sizes.append(tbptt.tree.num_bytes(carry.state))
    fixed = 2 * sizes[0] - sizes[1]  # what does not grow
    assert [size - fixed for size in sizes] == [times * (sizes[1] - sizes[0]) for times in (1, 2, 3, 1)]
    assert (sizes[1] > sizes[0]) == grows


def test_no_lane_of_a_hybrid_begins_anew_alone() -> None:
    ids = np.arange(101)
    stream = tbptt.ArrayStream(ids[:-1], ids[1:], lanes=2, reset=np.arange(100) == 12)
    estimator, model = tbptt.TBPTT(k1=8, k2=16), recurrent(zoo.transformer("FalconH1"))
    _, carry = estimator.estimate(model, nn.CrossEntropyLoss(), estimator.init(model, 2), stream.read(8))
    with pytest.raises(tbptt.TbpttError, match="reset all lanes at the same step"):
        estimator.estimate(model, nn.CrossEntropyLoss(), carry, stream.read(8))


@pytest.mark.slow
def test_the_example_takes_a_hybrid(run: tuple[Path, str], example: ModuleType, tmp_path: Path) -> None:
    config = transformers.FalconH1Config(**{**zoo.SIZES, **zoo.CONFIGURATIONS["FalconH1"], "vocab_size": 512})
    transformers.FalconH1ForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    transformers.AutoTokenizer.from_pretrained(run[0] / "pretrained").save_pretrained(tmp_path / "hybrid")
    figures = example.main([*SHORT, "--model", str(tmp_path / "hybrid"), "--directory", str(tmp_path / "run")])
    assert figures is not None
    assert figures["after"]["carried"].mean() < figures["before"]["carried"].mean()


# With sizes that learn.


@pytest.mark.slow
def test_a_state_older_than_the_window_harms_before_and_helps_after(example: ModuleType, tmp_path: Path) -> None:
    figures = example.main(["--updates", "600", "--directory", str(tmp_path / "run")])
    assert figures is not None
    before, after = (
        {kind: each[8 * 32 :].mean() for kind, each in figures[when].items()} for when in ("before", "after")
    )
    assert before["carried"] > before["dropped"] + 0.03
    assert after["carried"] < after["dropped"] - 0.03
    assert after["carried"] < before["carried"] - 0.1
