"""Mamba2 of transformers, fine-tuned past its window on one document that is longer than memory.

    python examples/mamba2_long_document.py                        a small model of its own, on Shakespeare's plays
    python examples/mamba2_long_document.py --short                the same in seconds: too little to learn from
    python examples/mamba2_long_document.py --reset                the control: fine-tuned without carrying the state
    python examples/mamba2_long_document.py --model NAME_OR_PATH --document FILE --window 2048

Nothing is fetched unless --model names a checkpoint of the hub. Without --model a tokenizer is trained on the text, and
a small Mamba2 is pretrained in the usual way: short windows, each from a state of zeros. It has never seen a state that is
older than its window. Then TBPTT reads the document from its beginning to its end, with the state carried.
Ctrl-C stops; the same command goes on in mid-document. What is printed at the end, on stdout: the loss on held-out text by
position, before and after, with the state carried and dropped; the memory that autograd holds; a continued text.

Letters: N tokens of a text, T time, B lanes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import tbptt
from tbptt.cost import held_for_backward
from tbptt.integrations.transformers import recurrent

PIECE = 1 << 20  # characters read at a time
TIMES = 16  # how many windows long the held-out texts are
SHORT = {"pretraining": 20, "updates": 12, "lanes": 4, "vocabulary": 300, "window": 16}


def settings(words: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint of a recurrent model with its tokenizer, instead of a small one")
    parser.add_argument("--document", type=Path, default=Path(str(files("tbptt.data") / "shakespeare.txt")))
    parser.add_argument("--directory", type=Path, help="where all files go; left out: runs/mamba2 or runs/mamba2-reset")
    parser.add_argument("--window", type=int, default=32, help="tokens that the model was pretrained on at a time")
    parser.add_argument("--k1", type=int, help="tokens between two updates; left out: the window")
    parser.add_argument("--k2", type=int, help="tokens that a gradient is sent back; left out: two windows")
    parser.add_argument("--lanes", type=int, default=16, help="pieces of the document that are read side by side")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at the beginning; it falls to zero")
    parser.add_argument("--pretraining", type=int, default=800, help="updates, of as many windows as there are lanes")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--reset", action="store_true", help="start each window from zeros in fine-tuning, too")
    parser.add_argument("--short", action="store_true", help=f"sizes for a trial: {SHORT}")
    if parser.parse_args(words).short:
        parser.set_defaults(**SHORT)
    chosen = parser.parse_args(words)
    chosen.k1, chosen.k2 = chosen.k1 or chosen.window, chosen.k2 or 2 * chosen.window
    chosen.directory = chosen.directory or Path("runs/mamba2-reset" if chosen.reset else "runs/mamba2")
    return chosen


def check_same_run(chosen: argparse.Namespace) -> None:
    """Write the settings into the directory, or refuse others than those that are there."""
    path = chosen.directory / "settings.json"
    mine = {name: str(value) for name, value in vars(chosen).items() if name != "directory"}
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        changed = ", ".join(name for name in mine if theirs.get(name) != mine[name])
        raise SystemExit(f"{chosen.directory} holds a run with another {changed}\nhint: --directory, another one")
    chosen.directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1))


def pieces(document: Path) -> Iterator[str]:
    """Yield the text piece by piece: it need not fit into memory."""
    with document.open(encoding="utf-8", newline="") as file:
        while piece := file.read(PIECE):
            yield piece


def train_tokenizer(document: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return byte-pair codes of the first megabytes; every text can be written with them, as bytes at the least."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(islice(pieces(document), 8), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def tokenized(tokenizer: PreTrainedTokenizerBase, document: Path, path: Path) -> np.memmap:
    """Return the document's tokens, (N,), from a file that stays on disk; it is written once.

    Where two pieces meet a word may be cut into other tokens than usual: once in a megabyte.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            for piece in pieces(document):
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                file.write(np.asarray(ids, dtype=np.int32).tobytes())
        partial.rename(path)
    return np.memmap(path, dtype=np.int32, mode="r")


def small_model(tokenizer: PreTrainedTokenizerBase, window: int) -> Mamba2ForCausalLM:
    """Return a Mamba2 of 0.1 million parameters, whose state at the start decays slower than a window is long."""
    config = Mamba2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        state_size=64,
        head_dim=16,
        num_heads=8,
        n_groups=1,
        num_hidden_layers=2,
        chunk_size=window,
        initializer_range=0.02,
        tie_word_embeddings=True,
        time_step_min=1e-5,  # a hundredth of the usual: a state that lasts 100 to 100 000 tokens, untrained
        time_step_max=1e-3,
        time_step_floor=1e-6,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Mamba2ForCausalLM(config)


def pretrain(net: Mamba2ForCausalLM, ids: np.ndarray, window: int, batch: int, updates: int) -> None:
    """Train in the usual way: windows from anywhere in the text, each from a state of zeros."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates, pct_start=0.1)
    generator = np.random.default_rng(0)
    for _ in range(updates):
        begin = generator.integers(len(ids) - window, size=(batch, 1))
        rows = torch.from_numpy(ids[begin + np.arange(window + 1)].astype(np.int64))
        loss = F.cross_entropy(net(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def pretrained(chosen: argparse.Namespace) -> str:
    """Return the checkpoint to begin with: the user's, or a small one that is made now if it is not there."""
    if chosen.model is not None:
        return chosen.model
    path, partial = chosen.directory / "pretrained", chosen.directory / "pretrained.partial"
    if not path.exists():
        tokenizer = train_tokenizer(chosen.document, chosen.vocabulary)
        ids = tokenized(tokenizer, chosen.document, chosen.directory / "tokens.bin")
        torch.manual_seed(0)
        net = small_model(tokenizer, chosen.window)
        pretrain(net, learned_and_held_out(ids)[0], chosen.window, chosen.lanes, chosen.pretraining)
        net.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(path)  # an interrupted pretraining leaves nothing behind
    return str(path)


def learned_and_held_out(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first nine tenths of the document, and the last."""
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def document_stream(ids: np.ndarray, chosen: argparse.Namespace) -> tbptt.ArrayStream:
    """Return the document as `lanes` pieces side by side, each read in order; token after token is the target."""
    resets = None
    if chosen.reset:
        resets = np.zeros(len(ids) - 1, dtype=bool)
        bounds = np.arange(chosen.lanes + 1) * len(resets) // chosen.lanes  # as ArrayStream cuts
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            resets[begin : end : chosen.k1] = True
    return tbptt.ArrayStream(ids[:-1], ids[1:], lanes=chosen.lanes, reset=resets)


def fine_tune(model: nn.Module, ids: np.ndarray, chosen: argparse.Namespace) -> tbptt.Summary:
    """Train on the document in order, the state carried from update to update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate)
    trainer = tbptt.Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        tbptt.TBPTT(chosen.k1, chosen.k2),
        document_stream(ids, chosen),
        guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)],
        monitors=[tbptt.Progress()],
        scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=chosen.updates),
        directory=chosen.directory / "run",
        saving=tbptt.Saving(every=200),
    )
    return trainer.run(updates=chosen.updates)


@torch.no_grad()
def loss_by_position(model: nn.Module, ids: np.ndarray, window: int, *, carried: bool) -> Tensor:
    """Return the mean loss in nats at each position of texts of 16 windows, from zeros; (16 * window,).

    The held-out text gives as many such texts as it has room for. Not `carried`: each window starts from zeros.
    """
    steps = TIMES * window
    texts = (len(ids) - 1) // steps
    if not texts:
        raise SystemExit(f"{steps + 1} held-out tokens are needed, a tenth of the document, but it has {len(ids)}")
    device = next(model.parameters()).device
    tokens = torch.from_numpy(ids[: texts * steps + 1].astype(np.int64)).to(device)
    inputs, targets = tokens[:-1].view(texts, steps).T, tokens[1:].view(texts, steps).T
    state, losses = None, []
    for begin in range(0, steps, window):
        part = slice(begin, begin + window)
        outputs, state = model(inputs[part], state if carried else None)
        losses.append(F.cross_entropy(outputs.transpose(1, 2), targets[part], reduction="none").mean(1))
    return torch.cat(losses).cpu()


def held_bytes(model: nn.Module, stream: tbptt.ArrayStream, k1: int, k2: int) -> int:
    """Return the most bytes that autograd holds while the windows up to a whole look-back are learned from."""
    estimator = tbptt.TBPTT(k1, k2)
    carry = estimator.init(model, stream.lanes)
    device = next(model.parameters()).device
    with held_for_backward(model.parameters()) as held:
        for window in islice(stream.windows(k1), math.ceil(k2 / k1)):
            _, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window.to(device))
    stream.rewind()
    return held.peak


@torch.no_grad()
def continued(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, window: int, tokens: int) -> str:
    """Return what the model goes on with after `ids`, read window by window with the state carried; seed 0."""
    device, state = next(model.parameters()).device, None
    generator = torch.Generator(device).manual_seed(0)
    for begin in range(0, len(ids), window):
        inputs = torch.from_numpy(ids[begin : begin + window].astype(np.int64)).to(device)[:, None]
        outputs, state = model(inputs, state)
    said: list[int] = []
    for _ in range(tokens):
        token = torch.multinomial(outputs[-1, 0].float().softmax(-1), 1, generator=generator)
        said.append(int(token))
        outputs, state = model(token[None], state)  # (1, 1): one token, one lane
    return tokenizer.decode(said)


def judged(model: nn.Module, ids: np.ndarray, window: int) -> dict[str, Tensor]:
    """Return the loss by position, with the state carried and dropped."""
    model.eval()
    return {kind: loss_by_position(model, ids, window, carried=kind == "carried") for kind in ("carried", "dropped")}


def table(before: dict[str, Tensor], after: dict[str, Tensor], window: int) -> list[str]:
    """Return the lines of the table: nats a token, and the perplexity, by position in windows."""
    cells = [(name, kind, losses[kind]) for name, losses in (("before", before), ("after", after)) for kind in losses]
    lines = ["position " + "".join(f"{f'{name}, {kind}':>18}" for name, kind, _ in cells)]
    for first, last in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]:
        means = [float(losses[first * window : last * window].mean()) for _, _, losses in cells]
        row = "".join(f"{mean:10.4f} {math.exp(mean):7.2f}" for mean in means)
        lines.append(f"{first:2d} to {last:2d} {row}")
    return lines


def main(words: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Do it all; return the figures, or None if it was stopped."""
    chosen = settings(words)
    check_same_run(chosen)
    checkpoint = pretrained(chosen)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    learned, held_out = learned_and_held_out(tokenized(tokenizer, chosen.document, chosen.directory / "tokens.bin"))
    net = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = recurrent(net)

    stream = document_stream(learned, chosen)
    held = held_bytes(model, stream, chosen.k1, chosen.k2)
    before = judged(model, held_out, chosen.window)
    model.train()
    summary = fine_tune(model, learned, chosen)
    if summary.stopped_by:
        print(f"stopped by {summary.stopped_by} after {summary.updates} updates; the same command goes on there")
        return None
    net.save_pretrained(chosen.directory / "fine-tuned")
    tokenizer.save_pretrained(chosen.directory / "fine-tuned")
    after = judged(model, held_out, chosen.window)

    print(f"nats a token and perplexity on {len(held_out)} held-out tokens, by position in windows of {chosen.window}")
    print(*table(before, after, chosen.window), sep="\n")
    whole = held * stream.steps / chosen.k2
    print(f"autograd holds {held / 1e6:.1f} MB for {chosen.k2} steps of {chosen.lanes} lanes", end="; ")
    print(f"for the document's {len(learned)} tokens it would hold {whole / 1e9:.1f} GB")
    text = continued(model, tokenizer, held_out[: TIMES * chosen.window], chosen.window, 40)
    print(f"after {TIMES * chosen.window} held-out tokens it goes on: {text!r}")
    return {"before": before, "after": after, "held_bytes": held, "whole_bytes": whole, "text": text}


if __name__ == "__main__":
    main()
