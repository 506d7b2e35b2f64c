"""What an adapter costs, and what in-place protection does.

    python benchmarks/speed/protection.py [--rounds 15] [--threads 1]

One update without the optimizer, forward and backward, of transformers' Mamba2 on 16 steps at a time, where it needs
no protection, so that both ways can be compared: unprotected, protected, and with torch's own
allow_mutation_on_saved_tensors around forward and backward. Of an LSTM 32 x 256 on 64 steps: as it is, and
through `tbptt.stateful`, which copies its state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import in_turn, ratio, save

import tbptt
from tbptt.integrations.transformers import recurrent
from tbptt.tree import detach


def mamba2(hidden: int, layers: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"state_size": 16, "head_dim": hidden // 4, "num_heads": 8, "n_groups": 1, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=256, hidden_size=hidden, num_hidden_layers=layers, **sizes))


def update(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    _, state = model(inputs, None)
    start = detach(state)

    def run() -> None:
        outputs, _ = model(inputs, start)
        outputs.square().mean().backward()
        model.zero_grad()

    return run


def within_torchs(run: Callable[[], None]) -> Callable[[], None]:
    def protected() -> None:
        with allow_mutation_on_saved_tensors():
            run()

    return protected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures: dict[str, float] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for name, hidden, layers, lanes in (
        ("tiny, 32 x 2 layers, 2 lanes", 32, 2, 2),
        ("512 x 4 layers, 4 lanes", 512, 4, 4),
    ):
        module = mamba2(hidden, layers)
        inputs = torch.randint(256, (16, lanes))
        ways = {way: update(recurrent(module, in_place=way), inputs) for way in ("leave", "protect")}
        found = in_turn(ways | {"torch": within_torchs(ways["leave"])}, given.rounds)
        samples[name] = found
        figures[f"Mamba2 {name}: protected / not"] = ratio(found, "protect", "leave")
        figures[f"Mamba2 {name}: torch's own / not"] = ratio(found, "torch", "leave")
    lstm = nn.LSTM(256, 256)
    inputs = torch.randn(64, 32, 256)
    found = in_turn({"plain": update(lstm, inputs), "adapted": update(tbptt.stateful(lstm), inputs)}, given.rounds)
    samples["LSTM"] = found
    figures["LSTM 32 x 256, 64 steps: adapted / plain"] = ratio(found, "adapted", "plain")
    save("speed_protection", figures, samples, command=" ".join(["python", *sys.argv]), rounds=given.rounds)


if __name__ == "__main__":
    main()
