"""`--core attentive_lstm`, `attentive_gru` and `transformer`: trained, resumed bit for bit, sampled from, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tbptt import SequenceModel, SparseAttentiveBacktracking
from tbptt.cli.build import build, build_model
from tbptt.cli.config import CORE_KEYS, Config, Model
from tbptt.cli.rundir import Facts
from tbptt.cli.sample import _symbols as sampled
from tbptt.cli.settings import Given, resolve
from tbptt.errors import CapabilityError, ConfigError
from tbptt.models import Attentive, SegmentTransformer
from tbptt.tree import tensors

Program = Callable[..., Any]
Assigned = tuple[str, ...]

CORES = ("attentive_lstm", "attentive_gru", "transformer")
SEGMENTS = ("model.segment=8", "model.memory=8", "model.memory_tokens=2")
COMMON = {"core", "hidden", "embedding", "dropout"}


def assigned(*assignments: str) -> Assigned:
    return tuple(word for each in assignments for word in ("--set", each))


def configured(*assignments: str, source: str = "ecg") -> Config:
    given = Given()
    given.add_source(source)
    given.add_assignments(assignments)
    return resolve(given)


def weights(run: Path, update: int) -> bytes:
    return (run / f"checkpoints/update-{update:010d}/model.safetensors").read_bytes()


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["kind"] == kind]


RUNS = {
    "attentive_lstm": ("--core", "attentive_lstm", "--k2", "12", *assigned("model.memory=6", "model.k_top=2")),
    "attentive_gru": ("--core", "attentive_gru", "--k2", "12"),
    "transformer": ("--core", "transformer", "--hidden", "8", "--k2", "12", *assigned("model.memory=9")),
    "segments": ("--core", "transformer", "--hidden", "8", "--k2", "16", *assigned(*SEGMENTS)),
}


@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS)
def test_a_run_that_goes_on_equals_one_that_never_stopped(train: Program, program: Program, how: Assigned) -> None:
    how = (*how, *assigned("model.dropout=0.1"))
    run, never_stopped = train(*how), train(*how, "--updates", "10")
    assert run.code == 0, run.err
    assert how[1].upper() in run.err
    assert program("resume", run.run, "--updates", "10").code == 0
    assert weights(run.run, 10) == weights(never_stopped.run, 10)
    assert weights(run.run, 10) != weights(run.run, 6)
    assert rows(run.run, "update") == rows(never_stopped.run, "update")


@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS)
def test_every_command_takes_such_a_run(train: Program, program: Program, how: Assigned) -> None:
    run = train(*how).run
    measured = json.loads(program("evaluate", run, "--json").out)
    assert measured["loss"] == rows(run, "validation")[-1]["loss"]
    written = program("sample", run, "--length", "21", "--prompt", "the quick brown fox")
    assert (written.code, len(written.out)) == (0, 40)
    assert program("report", run).code == 0
    if how is not RUNS["segments"]:
        measured = json.loads(program("horizon", run, "--max-lag", "8", "--probes", "3", "--json").out)
        assert measured["max_lag"] == 8
        few = ("--points", "2", "--updates", "2", "--span", "8", "--burn-in", "16")
        compared = program("compare", run, "-e", "TBPTT(k1=8, k2=8)", *few)
        assert compared.code == 0, compared.err


@pytest.mark.parametrize("source", ["ecg", "shakespeare", "copy", "adding"])
@pytest.mark.parametrize("core", CORES)
def test_nothing_but_the_core_need_be_said(core: str, source: str) -> None:
    config = configured(f"model.core={core}", source=source)
    parts = build(config)
    assert set(CORE_KEYS[core]) >= set(config.model.own()) >= {"memory"}  # a run says what its model is
    assert Config.model_validate(config.to_tables()) == config
    if core == "transformer":
        assert config.optimizer.lr == 0.002
        assert configured("model.core=transformer", "optimizer.lr=0.1", source=source).optimizer.lr == 0.1
        assert isinstance(parts.model, SegmentTransformer)
        assert (parts.model.segment, parts.model.memory, len(parts.model.blocks)) == (None, 64, 2)
    else:
        assert isinstance(parts.model, SequenceModel)
        assert isinstance(parts.model.core, Attentive)


def test_memory_tokens_are_asked_for_instead_of_the_usual_memory_or_beside_one() -> None:
    instead = configured("model.core=transformer", "model.segment=8", "model.memory_tokens=2")
    beside = configured("model.core=transformer", *SEGMENTS)
    assert instead.model.own() == {"layers": 2, "heads": 4, "memory_tokens": 2, "segment": 8}
    assert beside.model.own() == instead.model.own() | {"memory": 8}


# Every key of a core with another value than its default, and where in the model it is seen.
SEEN: list[tuple[str, Assigned, str, object]] = [
    ("attentive_lstm", ("model.k_att=3",), "core.k_att", 3),
    ("attentive_gru", ("model.k_att=3",), "core.k_att", 3),
    ("attentive_lstm", ("model.k_top=2",), "core.k_top", 2),
    ("attentive_gru", ("model.k_top=2",), "core.k_top", 2),
    ("attentive_lstm", ("model.memory=7",), "core.memory", 7),
    ("attentive_gru", ("model.memory=7",), "core.memory", 7),
    ("attentive_lstm", ("model.hidden=6",), "head.in_features", 12),
    ("attentive_gru", ("model.dropout=0.3",), "dropout.p", 0.3),
    ("transformer", ("model.hidden=16",), "width", 16),
    ("transformer", ("model.dropout=0.3",), "dropout.p", 0.3),
    ("transformer", ("model.layers=3",), "blocks.2.heads", 4),
    ("transformer", ("model.heads=2",), "blocks.0.heads", 2),
    ("transformer", ("model.memory=7",), "memory", 7),
    ("transformer", SEGMENTS, "memory_tokens", 2),
    ("transformer", SEGMENTS, "segment", 8),
    ("transformer", (*SEGMENTS, "model.memory_gradient=false"), "memory_gradient", False),
]


@pytest.mark.parametrize(("core", "assignments", "place", "value"), SEEN)
def test_what_is_set_is_in_the_model(core: str, assignments: Assigned, place: str, value: object) -> None:
    facts = Facts(inputs=2, outputs=1, symbols=False, loss="bce", metrics={})
    model: Any = build_model(configured(f"model.core={core}", *assignments), facts)
    for name in place.split("."):
        model = getattr(model, name)
    assert model == value


def test_every_key_is_somebodys_and_every_core_is_in_the_table() -> None:
    assert {*CORE_KEYS} == {*get_args(Model.model_fields["core"].annotation)}
    assert {key for keys in CORE_KEYS.values() for key in keys} == {*Model.model_fields} - COMMON


def test_tied_weights_of_an_attentive_core_are_as_wide_as_what_is_read() -> None:
    facts = Facts(inputs=9, outputs=9, symbols=True, loss="cross_entropy", metrics={})
    tied = ("model.core=attentive_lstm", "model.hidden=6", "model.tie_weights=true")
    model = build_model(configured(*tied, "model.embedding=12", source="copy"), facts)
    assert isinstance(model, SequenceModel)
    assert model.embedding is not None
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ConfigError, match=r"2 hidden .* embedding=6, hidden=6"):
        build_model(configured(*tied, "model.embedding=6", source="copy"), facts)


@pytest.mark.parametrize(
    ("core", "assignments", "words", "hint"),
    [
        (
            "lstm",
            ["memory=6"],
            "model.memory (given by --set) is not for core lstm, which has layers",
            "attentive_lstm",
        ),
        ("elstm", ["k_att=2"], "model.k_att (given by --set) is not for core elstm", "--core attentive_lstm"),
        ("gru", ["segment=8"], "model.segment (given by --set) is not for core gru", "--core transformer"),
        ("attentive_lstm", ["heads=2"], "model.heads (given by --set) is not for", "--core transformer"),
        ("attentive_gru", ["memory_gradient=true"], "model.memory_gradient (given by --set) is not for", "leave it"),
        ("attentive_gru", ["layers=2"], "model.layers (given by --set) is not for core attentive_gru", "leave it out"),
        ("attentive_lstm", ["memory=3"], "in [model], at least as many slots as are looked up", "k_top=3"),
        ("attentive_lstm", ["memory=0"], "memory was expected to be a whole number, at least 1", "memory=1"),
        ("transformer", ["tie_weights=true"], "model.tie_weights (given by --set) is not for core", "--core lstm"),
        ("transformer", ["k_top=2"], "model.k_top (given by --set) is not for core transformer", "leave it out"),
        ("transformer", ["hidden=6"], "hidden=6 and heads=4 came", "hint: hidden=8"),
        ("transformer", ["memory=0"], "memory or memory_tokens was expected, but both are 0", "memory=64"),
        ("transformer", ["memory_tokens=2"], "segment was expected together with memory_tokens=2", "segment=64"),
        ("transformer", ["segment=16"], "estimator.k1 (given by --k1) = 8, estimator.k2 (given by --k2) = 8", "k2=16"),
        ("transformer", ["segment=8", "memory_gradient=false"], "memory tokens were expected", "leave it out"),
        ("transformer", ["memory_gradient=false"], "memory and segment were expected", "memory=64, segment=64"),
        ("transformer", ["heads=none"], "model.heads (given by --set) was expected to be a whole number", ""),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    train: Program, core: str, assignments: list[str], words: str, hint: str
) -> None:
    ended = train("--core", core, "--hidden", "8", *assigned(*(f"model.{each}" for each in assignments)))
    assert ended.code == 2
    assert words in ended.err
    assert hint in ended.err.splitlines()[-1]
    assert ended.err.startswith("error: ")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("assignments", "wrong", "fix"),
    [
        (("estimator.k1=8", "estimator.k2=12"), "estimator.k2", "estimator.k2=16"),
        (("estimator.name=ARTBP", "estimator.mean_length=32"), "estimator.block", "estimator.block=8"),
        (
            ("estimator.name=FullBPTT", "estimator.k1=pass", "estimator.segment=20"),
            "estimator.segment",
            "estimator.segment=24",
        ),
    ],
)
def test_every_length_that_cuts_a_segment_is_named(assignments: Assigned, wrong: str, fix: str) -> None:
    model = ("model.core=transformer", *SEGMENTS)
    with pytest.raises(ConfigError, match=rf"multiples of model.segment = 8 .* {wrong}") as caught:
        configured(*model, *assignments)
    assert fix in caught.value.fix
    key, _, steps = fix.partition("=")
    kept = [each for each in assignments if not each.startswith(f"{key}=")]
    assert configured(*model, *kept, fix).estimator[key.split(".")[1]] == int(steps)  # the fix is one


SHORT = ("--lanes", "2", "--hidden", "8", "--k1", "8", "--threads", "1", "--updates", "3")


def test_synthetic_gradients_are_made_ready_by_a_whole_segment(program: Program, text: Path) -> None:
    how = ("--core", "transformer", *assigned(*SEGMENTS, "estimator.name=SyntheticGradients"))
    ended = program("train", text, *SHORT, *how)
    assert ended.code == 0, ended.err
    assert len(rows(ended.run, "update")) == 3


class Scores(nn.Module):
    """What the whole text so far says comes next; `forgets` everything before the segment that is being read."""

    def __init__(self, model: nn.Module, forgets: int | None) -> None:
        super().__init__()
        self.model, self.forgets = model, forgets

    def forward(self, symbols: list[int]) -> torch.Tensor:
        begin = (len(symbols) - 1) // self.forgets * self.forgets if self.forgets else 0
        return self.model(torch.tensor(symbols[begin:])[:, None])[0][-1, 0]


def written(scores: nn.Module, start: list[int], length: int) -> list[int]:
    """Write a text by reading all of it anew for each symbol."""
    text, generator = list(start), torch.Generator().manual_seed(3)
    for _ in range(length):
        chances = torch.softmax(scores(text).double() / 0.7, 0)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return text[len(start) :]


@pytest.mark.parametrize("segment", [8, None])
@pytest.mark.parametrize("prompt", [1, 8, 19])
@torch.no_grad()
def test_a_text_is_written_as_if_all_of_it_were_read_anew(segment: int | None, prompt: int) -> None:
    torch.manual_seed(0)
    tokens = 0 if segment is None else 2
    sizes = {"heads": 2, "layers": 2, "memory": 8, "memory_tokens": tokens, "segment": segment, "embedding": 8}
    model = SegmentTransformer(11, 11, 16, **sizes).double().eval()
    for parameter in model.parameters():
        parameter.mul_(3.0)  # far from even chances, and with much of them from the memory
    start = torch.randint(11, (prompt,)).tolist()
    generator = torch.Generator().manual_seed(3)
    found = list(sampled(model, start, 0.7, generator, 30, segment or 1))
    assert found == written(Scores(model, None), start, 30)
    assert found != written(Scores(model, 8), start, 30)


def test_sparse_attentive_backtracking_has_models_of_its_own(program: Program, text: Path) -> None:
    sparse = assigned("estimator.name=SparseAttentiveBacktracking", "estimator.k_trunc=4")
    ended = program("train", text, *SHORT, *sparse, "--core", "attentive_gru")
    assert ended.code == 0, ended.err
    cut = program("train", text, *SHORT, "--core", "attentive_gru", "--k2", "4", "--losses", "all")
    assert weights(ended.run, 3) != weights(cut.run, 3)  # what it would be with nothing to jump along
    for other in ("lstm", "transformer"):
        refused = program("train", text, *SHORT, *sparse, "--core", other, "--out", "other")
        assert refused.code == 1
        assert "names its memories was expected" in refused.err
        assert "core='attentive_lstm'" in refused.err.splitlines()[-1]
        assert not Path("other").exists()


def test_memories_are_named_by_attentive_cores_alone() -> None:
    for core in ("attentive_lstm", "attentive_gru"):
        model = SequenceModel(3, 2, hidden=4, core=core, memory=6)
        _, state = model(torch.randn(5, 7, 3))
        (place,) = model.memories()
        assert tuple(tensors(state)[place].shape) == (7, 6, 4)
        assert SparseAttentiveBacktracking(4, 2).init(model, 7).lanes == 7
    for core in ("lstm", "elstm"):
        model = SequenceModel(3, 2, hidden=4, core=core)
        assert model.memories() == ()
        with pytest.raises(CapabilityError, match="names its memories was expected, but SequenceModel names none"):
            SparseAttentiveBacktracking(4, 2).init(model, 7)


def test_settings_of_attentive_cores_are_refused_by_the_model_itself() -> None:
    with pytest.raises(ConfigError, match=r"k_att, memory came, but core='gru' has none"):
        SequenceModel(3, 2, hidden=4, core="gru", k_att=2, memory=6)
    with pytest.raises(ConfigError, match=r"one layer was expected with core='attentive_gru', but layers=2"):
        SequenceModel(3, 2, hidden=4, core="attentive_gru", layers=2)
