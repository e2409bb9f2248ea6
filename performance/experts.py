"""What the constraint costs in training a mixture of experts, beside a dense model that computes as much per token.

A mixture keeps many weights for each that a token asks, and the constraint works on all of them once per optimizer
step: the fewer tokens a step has per weight, the larger its share. Random weights and bases; rivals take turns, seconds
are of the processor, peaks of memory are of fresh processes. Command:
`python performance/experts.py --out results/benchmarks`.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import conclude, take_turns
from step import backward, compare, freeze_and_list, random_bases
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nspo import constrain

VOCABULARY = 1024
MODES: dict[str, Any] = {"unconstrained": None, "anchor": "anchor", "both": "both"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--asked", type=int, default=4, help="experts that each token asks")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--free-share", type=float, default=0.3, help="share of each width that may be used")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="tokens of an optimizer step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        peaks = {
            kind: {mode: fresh.submit(peak_bytes, kind, mode, args).result() for mode in MODES}
            for kind in ("mixture", "dense")
        }
    rows, sizes = [], {}
    for kind in ("mixture", "dense"):
        steps, sizes[kind] = rivals(kind, args)
        for tokens in args.tokens:
            batches = torch.randint(0, VOCABULARY, (1, max(1, tokens // 256), min(tokens, 256)))
            turns = {name: partial(step, batches) for name, step in steps.items()}
            times = take_turns(turns, args.rounds, time.process_time)
            rows += compare(f"{kind}, {tokens} tokens", times, {"anchor": "unconstrained", "both": "unconstrained"})
    conclude("experts", args.out, rows, peak_bytes=peaks, **sizes)


def build(kind: str, args: argparse.Namespace) -> Any:
    """A mixture, or the dense model with as many weights per token; random weights."""
    torch.manual_seed(0)
    width = args.hidden // 2  # of one expert
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": args.hidden // 8,
    }
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=width * args.asked))
    experts = {"num_experts": args.experts, "num_experts_per_tok": args.asked, "moe_intermediate_size": width}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))


def rivals(kind: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """One training step of one model under every mode, with an optimizer of its own; and the sizes."""
    model = build(kind, args)
    bases = random_bases(model, args.free_share)
    trainable = freeze_and_list(model, bases)
    optimizers = {name: torch.optim.AdamW(trainable, lr=1e-6) for name in MODES}
    memory = {mode: constrain(model, optimizers[mode], bases, mode=mode).memory() for mode in MODES if MODES[mode]}

    def step(batches: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()

    steps = {name: partial(step, optimizer=optimizer) for name, optimizer in optimizers.items()}
    return steps, {"weights": sum(weight.numel() for weight in trainable), "constraint_bytes": memory["anchor"]}


def peak_bytes(kind: str, mode: str, args: argparse.Namespace) -> int:
    """The most memory that this fresh process ever held through two optimizer steps on the fewest tokens."""
    model = build(kind, args)
    bases = random_bases(model, args.free_share)
    optimizer = torch.optim.AdamW(freeze_and_list(model, bases), lr=1e-6)
    if MODES[mode]:
        constrain(model, optimizer, bases, mode=MODES[mode])
    for _ in range(2):
        backward(model, torch.zeros(1, 1, 64, dtype=torch.long))
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
