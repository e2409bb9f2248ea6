"""Collecting activations against a bare forward pass over the same batches, and how it grows with the tokens.

`python performance/collection.py --model results/model --prompts results/prompts.parquet --out results/benchmarks`

The rivals take turns over the same padded batches: the whole language model with its head (the bare forward pass that
ratios are to), the base model without it (what collection runs), and collection of second moments and of raw rows,
files included. The arithmetic sets a bound on moments:
their products against those of the base model, printed as `least_moments_ratio` for equal speed per operation.
Memory is the peak of a fresh process per row of the second table, which collects a multiple of the same prompts.
"""

import argparse
import multiprocessing
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import conclude, ratio, take_turns
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.activations.chunks import Answered, kept_positions, make_chunks, padded_batches
from nspo.activations.stage import BATCH_TOKENS, forward
from nspo.activations.store import PartWriter
from nspo.models.loading import load_model, load_tokenizer
from nspo.models.structure.sites import Site, find_sites
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.run.tables import table
from nspo.settings.bases import ActivationSettings

FORMS = ("moments", "raw")
MULTIPLES = (1, 2, 4)  # of the prompts, for the growth


def main() -> None:
    """Measure, print and write `collection.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for collection.json")
    parser.add_argument("--samples", type=int, default=20, help="prompts of every domain")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer, sequences = setting(options.model, options.prompts, options.samples)
    sites = find_sites(model)
    tokens = sum(int(sequence.kept.sum()) for sequence in sequences)
    say(f"{tokens} tokens, {len(sites)} sites")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        folders = {form: Path(work) / form for form in FORMS}
        rivals: dict[str, Any] = {
            "base model": lambda: bare(model.base_model, tokenizer, sequences),
            "with head": lambda: bare(model, tokenizer, sequences),
        }
        for form, folder in folders.items():
            rivals[form] = lambda form=form, folder=folder: gather(model, tokenizer, sequences, sites, form, folder)
        times = take_turns(rivals, options.rounds)
        stored = {
            form: sum(path.stat().st_size for path in folder.rglob("*.parquet")) for form, folder in folders.items()
        }
    rows = [
        {
            "what": name,
            **ratio(times, name, "with head"),
            "to_base_model": ratio(times, name, "base model")["ratio"],
            "tokens_per_second": tokens / min(times[name]),
            "stored_bytes_per_token": stored[name] / tokens if name in stored else 0,
        }
        for name in rivals
    ]
    growth = [in_fresh_process(options, form, multiple) for form in FORMS for multiple in MULTIPLES]
    say(table(growth))
    conclude(
        "collection",
        options.out,
        rows,
        growth=growth,
        tokens=tokens,
        least_moments_ratio=1 + moment_products(sites) / forward_products(model, sites),
        raw_bytes_per_token=sum(4 * site.width for site in sites),
        device=str(model.device),
    )


def setting(
    folder: Path, prompts: Path, samples: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Answered]]:
    """The model, its tokenizer, and the prompts of all domains as one list of sequences, as collection has them."""
    settings = ActivationSettings(samples=samples, harmful_samples=samples, benign_samples=samples, max_new_tokens=0)
    tokenizer = load_tokenizer(folder)
    ids = [ids for chunk in make_chunks(settings, prompts, tokenizer) for ids in chunk.prompts]
    kept = kept_positions([len(row) for row in ids], settings.drop_first, None)
    sequences = [Answered(i, row, len(row), mask) for i, (row, mask) in enumerate(zip(ids, kept, strict=True))]
    return load_model(folder, device_of("auto")), tokenizer, sequences


@torch.inference_mode()
def bare(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: list[Answered]) -> None:
    """One pass over the batches of `forward`, without hooks."""
    device = next(model.parameters()).device
    for batch in padded_batches(sequences, BATCH_TOKENS, int(tokenizer.pad_token_id or 0)):
        model(**{name: values.to(device) for name, values in batch.inputs.items()}, use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def gather(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[Answered],
    sites: list[Site],
    form: str,
    folder: Path,
) -> None:
    """Collect all sites in one form, as one chunk."""
    shutil.rmtree(folder, ignore_errors=True)
    storage = {site.name: form for site in sites}
    with PartWriter(folder, 0, "all", "basis", sites, storage, model.device) as writer:
        forward(model, padded_batches(sequences, BATCH_TOKENS, int(tokenizer.pad_token_id or 0)), sites, writer.add)


def in_fresh_process(options: argparse.Namespace, form: str, multiple: int) -> dict[str, Any]:
    """`grow` in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(grow, (options.model, options.prompts, options.samples, options.out, form, multiple))


def grow(folder: Path, prompts: Path, samples: int, out: Path, form: str, multiple: int) -> dict[str, Any]:
    """Collect the same prompts `multiple` times over: seconds per token, and peak memory of this process."""
    model, tokenizer, sequences = setting(folder, prompts, samples)
    several = [replace(sequence, sample=i) for i, sequence in enumerate(sequences * multiple)]
    tokens = sum(int(sequence.kept.sum()) for sequence in several)
    with tempfile.TemporaryDirectory(dir=out) as work:
        start = time.perf_counter()
        gather(model, tokenizer, several, find_sites(model), form, Path(work))
        seconds = time.perf_counter() - start
    # Not ru_maxrss, which a process takes over from the one that started it.
    host = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1024
    device = torch.cuda.max_memory_allocated() / 2**20 if model.device.type == "cuda" else 0.0
    return {
        "form": form,
        "tokens": tokens,
        "ms_per_token": 1e3 * seconds / tokens,
        "host_mb": host,
        "device_mb": device,
    }


def moment_products(sites: list[Site]) -> float:
    """Multiply-adds per token of half of every second moment."""
    return sum(site.width * (site.width + 1) / 2 for site in sites)


def forward_products(model: nn.Module, sites: list[Site]) -> float:
    """Multiply-adds per token of the linear layers that the sites feed."""
    return sum(model.get_parameter(f"{layer}.weight").numel() for site in sites for layer in site.layers)


if __name__ == "__main__":
    main()
