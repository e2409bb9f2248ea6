"""Generation throughput: this package's greedy answers against a bare `model.generate` at the same batch size.

Both answer the same prompts of a `prompts.parquet` and may stop early; bare takes them as they come, ours by length.
A ratio below 1 means that ours is faster.

Command: `python performance/generation.py --model results/model --prompts results/prompts.parquet --out
results/benchmarks`.
"""

import argparse
import statistics
from pathlib import Path

import torch
from common import conclude, ratio, take_turns

from nspo.files.tables import read_table
from nspo.models.chat import chat_ids
from nspo.models.generation import generate, pad_left
from nspo.models.loading import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("results/model"))
    parser.add_argument("--prompts", type=Path, default=Path("results/prompts.parquet"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    rows = read_table(args.prompts, ("prompt", "split"))
    prompts = [chat_ids(tokenizer, row["prompt"]) for row in rows if row["split"] == "heldout"][: args.count]

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, len(prompts), args.batch_size):
            ids, mask = pad_left(prompts[start : start + args.batch_size], tokenizer.pad_token_id)
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=False)

    def ours() -> None:
        list(generate(model, tokenizer, prompts, args.max_new_tokens, args.batch_size, "answers"))

    times = take_turns({"bare": bare, "ours": ours}, args.rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    row = {"prompts": len(prompts), "batch": args.batch_size, "tokens": args.max_new_tokens, **seconds}
    conclude("generation", args.out, [{**row, **ratio(times, "ours", "bare")}], times=times)


if __name__ == "__main__":
    main()
