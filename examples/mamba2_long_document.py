"""Mamba2 of transformers, fine-tuned past its window on one document that is longer than memory.

    python examples/mamba2_long_document.py                                    a small model, on Shakespeare's plays
    python examples/mamba2_long_document.py --reset --directory runs/control   without carrying the state
    python examples/mamba2_long_document.py --model NAME_OR_PATH --document FILE --window 2048 --directory runs/mine

Without --model nothing is fetched: a tokenizer is trained on the text, and a small Mamba2 is pretrained in the usual
way, on short windows, each from a state of zeros, so that it has never seen a state older than its window. Then TBPTT
reads the document in order, with the state carried. Ctrl-C stops; the same command goes on in mid-document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import tbptt
from tbptt.cost import held_for_backward
from tbptt.integrations.transformers import recurrent

PIECE = 1 << 20  # characters read at a time
TIMES = 16  # how many windows long a held-out text is


def settings(words: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a checkpoint of a recurrent model with its tokenizer, instead of a small one made here")
    add("--document", type=Path, default=Path(str(files("tbptt.data") / "shakespeare.txt")), help="text in UTF-8")
    add("--directory", type=Path, default=Path("runs/mamba2"), help="where all files go")
    add("--window", type=int, default=32, help="tokens at a time that the model was pretrained on")
    add("--k1", type=int, help="tokens between two updates; left out: the window")
    add("--k2", type=int, help="tokens that a gradient is sent back; left out: two windows")
    add("--lanes", type=int, default=16, help="pieces of the document that are read side by side")
    add("--updates", type=int, default=1500, help="of fine-tuning")
    add("--rate", type=float, default=1e-3, help="learning rate at the beginning; it falls to zero")
    add("--pretraining", type=int, default=800, help="updates, each with as many windows as there are lanes")
    add("--time-steps", type=float, nargs=2, default=[1e-5, 1e-3], help="of a small model, at the start")
    add("--device", default="cpu", help="where to fine-tune: cpu, cuda")
    add("--seed", type=int, default=0)
    add("--texts", type=int, default=128, help=f"held-out texts, of {TIMES} windows each, at the most")
    add("--reset", action="store_true", help="the control: start each window from zeros in fine-tuning, too")
    chosen = parser.parse_args(words)
    chosen.k1 = chosen.window if chosen.k1 is None else chosen.k1
    chosen.k2 = 2 * chosen.window if chosen.k2 is None else chosen.k2
    return chosen


def check_same_run(chosen: argparse.Namespace) -> None:
    """Write the settings into the directory, or refuse others than those that are there."""
    path = chosen.directory / "settings.json"
    mine = {name: str(value) for name, value in vars(chosen).items() if name != "directory"}
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        changed = ", ".join(name for name in mine if theirs.get(name) != mine[name])
        raise SystemExit(f"{chosen.directory} holds a run with another {changed}\nhint: give another --directory")
    chosen.directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1))


def train_tokenizer(document: Path) -> PreTrainedTokenizerBase:
    """Return 512 byte-pair codes of the first megabytes; every text can be written with them."""
    level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, initial_alphabet=level.alphabet(), show_progress=False)
    with document.open(encoding="utf-8", newline="") as file:
        bpe.train_from_iterator([file.read(8 * PIECE)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)


def tokenized(tokenizer: PreTrainedTokenizerBase, chosen: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the first nine tenths of the document's tokens, to learn from, and the held-out rest; on disk."""
    path, partial = chosen.directory / "tokens.bin", chosen.directory / "tokens.partial"
    if not path.exists():
        with chosen.document.open(encoding="utf-8", newline="") as text, partial.open("wb") as file:
            while piece := text.read(PIECE):  # a word that two pieces share may be cut otherwise than usual
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                file.write(np.asarray(ids, dtype=np.int32).tobytes())
        partial.rename(path)
    ids = np.memmap(path, dtype=np.int32, mode="r")
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def pretrain(vocabulary: int, ids: np.ndarray, chosen: argparse.Namespace) -> transformers.PreTrainedModel:
    """Return a small Mamba2, trained on windows from anywhere in the text, each from a state of zeros."""
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 64, "n_groups": 1, "num_hidden_layers": 2}
    steps = dict(zip(("time_step_min", "time_step_max"), chosen.time_steps, strict=True), time_step_floor=1e-6)
    none = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # the tokenizer has no such tokens
    more = {"chunk_size": chosen.window, "initializer_range": 0.02, "tie_word_embeddings": True}
    config = transformers.Mamba2Config(vocab_size=vocabulary, **sizes, **steps, **none, **more)
    torch.manual_seed(chosen.seed)
    net = transformers.Mamba2ForCausalLM(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=chosen.pretraining, pct_start=0.1)
    generator = np.random.default_rng(chosen.seed)
    for _ in range(chosen.pretraining):
        begin = generator.integers(len(ids) - chosen.window, size=(chosen.lanes, 1))
        rows = torch.from_numpy(ids[begin + np.arange(chosen.window + 1)].astype(np.int64))
        loss = F.cross_entropy(net(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return net


def pretrained(chosen: argparse.Namespace) -> str:
    """Return the checkpoint to begin with: the user's, or a small one that is made now if it is not there."""
    if chosen.model is not None:
        return chosen.model
    path, partial = chosen.directory / "pretrained", chosen.directory / "pretrained.partial"
    if not path.exists():
        tokenizer = train_tokenizer(chosen.document)
        net = pretrain(len(tokenizer), tokenized(tokenizer, chosen)[0], chosen)
        net.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(path)  # so that an interrupted pretraining leaves nothing that looks whole
    return str(path)


def document_stream(ids: np.ndarray, chosen: argparse.Namespace) -> tbptt.ArrayStream:
    """Return the document as `lanes` pieces side by side, each read in order; the next token is the target."""
    resets = None
    if chosen.reset:
        lengths = np.diff(np.arange(chosen.lanes + 1) * (len(ids) - 1) // chosen.lanes)  # as ArrayStream cuts
        resets = np.concatenate([np.arange(length) % chosen.k1 == 0 for length in lengths])
    return tbptt.ArrayStream(ids[:-1], ids[1:], lanes=chosen.lanes, reset=resets)


def fine_tune(model: nn.Module, stream: tbptt.Stream, chosen: argparse.Namespace) -> tbptt.Summary:
    """Train on the document in order, the state carried from update to update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate)
    trainer = tbptt.Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        tbptt.TBPTT(chosen.k1, chosen.k2),
        stream,
        guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)],
        monitors=[tbptt.Progress()],
        scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=chosen.updates),
        directory=chosen.directory / "run",
        seed=chosen.seed,
    )
    return trainer.run(updates=chosen.updates)


@torch.no_grad()
def loss_by_position(model: nn.Module, ids: np.ndarray, chosen: argparse.Namespace) -> dict[str, Tensor]:
    """Return the loss in nats at each position of held-out texts, the state carried, or dropped at each window."""
    window, steps = chosen.window, TIMES * chosen.window
    texts = min((len(ids) - 1) // steps, chosen.texts)
    if not texts:
        raise SystemExit(f"a tenth of the document should be {steps + 1} tokens or more, but is {len(ids)}")
    tokens = torch.from_numpy(ids[: texts * steps + 1].astype(np.int64)).to(next(model.parameters()).device)
    inputs, targets = tokens[:-1].view(texts, steps).T, tokens[1:].view(texts, steps).T
    total = {"carried": torch.zeros(steps), "dropped": torch.zeros(steps)}
    for kind, losses in total.items():
        for lane in range(0, texts, chosen.lanes):
            state, lanes = None, slice(lane, lane + chosen.lanes)
            for begin in range(0, steps, window):
                part = slice(begin, begin + window)
                outputs, state = model(inputs[part, lanes], state if kind == "carried" else None)
                each = F.cross_entropy(outputs.transpose(1, 2), targets[part, lanes], reduction="none")
                losses[part] += each.sum(1).cpu() / texts
    return total


def table(before: dict[str, Tensor], after: dict[str, Tensor], window: int) -> list[str]:
    """Return lines of nats a token, and perplexity, by position in windows."""
    columns = {f"{when}, {kind}": each[kind] for when, each in (("before", before), ("after", after)) for kind in each}
    lines = ["position " + "".join(f"{name:>18}" for name in columns)]
    for first, last in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]:
        means = [float(losses[first * window : last * window].mean()) for losses in columns.values()]
        lines.append(f"{first:2d} to {last:2d} " + "".join(f"{mean:10.4f} {math.exp(mean):7.2f}" for mean in means))
    return lines


def held_bytes(model: nn.Module, stream: tbptt.ArrayStream, chosen: argparse.Namespace) -> int:
    """Return the most bytes that autograd holds for an update, its look-back being whole."""
    estimator = tbptt.TBPTT(chosen.k1, chosen.k2)
    carry = estimator.init(model, stream.lanes)
    with held_for_backward(model.parameters()) as held:
        for window in islice(stream.windows(chosen.k1), math.ceil(chosen.k2 / chosen.k1)):
            window = window.to(next(model.parameters()).device)
            _, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
    stream.rewind()
    return held.peak


@torch.no_grad()
def continued(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, window: int) -> str:
    """Return what the model goes on with after `ids`, read window by window with the state carried."""
    device, state, said = next(model.parameters()).device, None, list[Tensor]()
    generator = torch.Generator(device).manual_seed(0)
    for inputs in torch.from_numpy(ids.astype(np.int64)).to(device)[:, None].split(window):
        outputs, state = model(inputs, state)
    for _ in range(40):
        said.append(torch.multinomial(outputs[-1, 0].softmax(-1), 1, generator=generator))
        outputs, state = model(said[-1][None], state)  # one step, one lane
    return tokenizer.decode(torch.cat(said))


def main(words: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Do it all; return the figures, or None if it was stopped."""
    chosen = settings(words)
    check_same_run(chosen)
    checkpoint = pretrained(chosen)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    learned, held_out = tokenized(tokenizer, chosen)
    net = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(chosen.device)
    model, stream = recurrent(net), document_stream(learned, chosen)
    held = held_bytes(model, stream, chosen)
    before = loss_by_position(model.eval(), held_out, chosen)
    summary = fine_tune(model.train(), stream, chosen)
    if summary.stopped_by:
        print(f"stopped by {summary.stopped_by} after {summary.updates} updates; the same command goes on there")
        return None
    net.save_pretrained(chosen.directory / "fine-tuned")
    tokenizer.save_pretrained(chosen.directory / "fine-tuned")
    after = loss_by_position(model.eval(), held_out, chosen)
    print("nats a token, and perplexity, on held-out texts, by position in windows of", chosen.window)
    print(*table(before, after, chosen.window), sep="\n")
    whole = held * stream.steps / chosen.k2
    print(f"autograd holds {held / 1e6:.1f} MB for an update, {chosen.k2} steps of {chosen.lanes} lanes;")
    print(f"for all {len(learned)} tokens of the document, never unrolled at once, it would hold {whole / 1e9:.1f} GB")
    text = continued(model, tokenizer, held_out[: TIMES * chosen.window], chosen.window)
    print(f"after {TIMES * chosen.window} held-out tokens it goes on: {text!r}")
    return {"before": before, "after": after, "held_bytes": held, "whole_bytes": whole, "text": text}


if __name__ == "__main__":
    main()
