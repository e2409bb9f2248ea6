"""How much memory and time `nspo verify` takes on a Llama-3-70B pair: one real-sized decoder block, embedding and head.

Everything that the command reads is made in a temporary folder: two sharded bf16 checkpoints that differ inside a
synthetic null space, its bases, and second moments of validation inputs. The command runs in a process of its own. Its
peak is that of the whole pair, since no more than one layer's matrices are ever in memory; the bases alone would be 80
times as many, as a mapped file whose pages the system can drop. Weights and inputs are random: memory and time do not
depend on their values.
Command: `python performance/verify.py --out results/benchmarks`.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import conclude
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from nspo.activations.store import PartWriter
from nspo.bases.file import NullSpaceBases
from nspo.certify.checkpoints import INDEX
from nspo.files.manifest import MANIFEST_NAME, make_manifest, write_json
from nspo.models.loading import model_identity
from nspo.models.structure.sites import Site
from nspo.models.tiny import tiny_tokenizer
from nspo.nullspace.basis import SiteBasis

FREE = 64  # directions of every synthetic null space
TOKENS = 64  # validation inputs of every domain
BLOCKS = 80  # of Llama-3-70B


def main() -> None:
    """Build, verify, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=28672)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--domains", type=int, default=2)
    given = parser.parse_args()
    sizes = given.hidden, given.intermediate, given.vocabulary
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        refuse_full_disk(folder, *sizes, given.domains)
        # A child's peak includes that of the process it was started from, so what builds must not be this one.
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(folder, *sizes, given.domains))
        builder.start()
        builder.join()
        if builder.exitcode:
            sys.exit("building the checkpoints failed")
        read = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        seconds, peak = verify(folder)
        layers = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))["layers"]
    row = {
        "hidden": given.hidden,
        "intermediate": given.intermediate,
        "vocabulary": given.vocabulary,
        "domains": given.domains,
        "gigabytes_read": read,
        "peak_gigabytes": peak,
        "seconds": seconds,
        "seconds_per_gigabyte": seconds / read,
    }
    conclude(
        "verify",
        given.out,
        [row],
        layers=len(layers),
        # Embedding and head are in every one of the 80, so the whole pair takes a little less.
        computed_hours_for_80_blocks_at_most=BLOCKS * seconds / 3600,
    )


def verify(folder: Path) -> tuple[float, float]:
    """Seconds and peak resident memory (GB) of `nspo verify`, mapped files included."""
    paths = {"base": "base", "tuned": "tuned", "bases": "bases.safetensors", "activations": "activations"}
    flags = [part for name, path in paths.items() for part in (f"--{name}", folder / path)]
    start = time.perf_counter()
    command = [sys.executable, "-m", "nspo", "verify", *flags, "--out", folder / "certificate.json"]
    process = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("nspo verify failed")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# What the command reads


def layers_of_block(hidden: int, intermediate: int) -> dict[Site, dict[str, int]]:
    """The sites of the one block and the output width of each layer, with 8 key and value heads in 64."""
    groups = [
        ("self_attn", hidden, {"q_proj": hidden, "k_proj": hidden // 8, "v_proj": hidden // 8}),
        ("self_attn", hidden, {"o_proj": hidden}),
        ("mlp", hidden, {"gate_proj": intermediate, "up_proj": intermediate}),
        ("mlp", intermediate, {"down_proj": hidden}),
    ]
    sites = {}
    for module, width, outputs in groups:
        layers = {f"model.layers.0.{module}.{name}": output for name, output in outputs.items()}
        sites[Site(next(iter(layers)), tuple(layers), width)] = layers
    return sites


def refuse_full_disk(folder: Path, hidden: int, intermediate: int, vocabulary: int, domains: int) -> None:
    """Stop before any work when the temporary folder has too little room."""
    sites = layers_of_block(hidden, intermediate)
    weights = 2 * vocabulary * hidden + sum(site.width * sum(widths.values()) for site, widths in sites.items())
    moments = domains * sum(site.width * (site.width + 1) // 2 for site in sites)
    needed, free = (2 * 2 * weights + 4 * moments) * 1.05 / 1e9, shutil.disk_usage(folder).free / 1e9
    if needed > free:
        sys.exit(f"{folder} has {free:.1f} GB free, expected {needed:.1f}: set TMPDIR to a folder on another disk")


def build(folder: Path, hidden: int, intermediate: int, vocabulary: int, domains: int) -> None:
    """Write `base`, `tuned`, `bases.safetensors` and `activations` into `folder`, a tensor at a time."""
    torch.manual_seed(0)
    sites = layers_of_block(hidden, intermediate)
    free = {site: torch.linalg.qr(torch.randn(site.width, FREE))[0] for site in sites}
    base, tuned = _Checkpoint(folder / "base"), _Checkpoint(folder / "tuned")
    norms = {}
    for name in ("model.embed_tokens", "lm_head"):
        weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16)
        base.write(name, weight)
        tuned.write(name, weight)
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        base.write(name, torch.ones(hidden, dtype=torch.bfloat16))
        tuned.write(name, torch.ones(hidden, dtype=torch.bfloat16))
    for site, widths in sites.items():
        for layer, width in widths.items():
            weight = torch.randn(width, site.width, dtype=torch.bfloat16)
            norms[layer] = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
            base.write(layer, weight)
            update = torch.randn(width, FREE, dtype=torch.bfloat16) @ free[site].T.bfloat16()
            tuned.write(layer, weight.add_(update, alpha=0.1))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    for checkpoint in (base, tuned):
        checkpoint.finish(config)
    model = model_identity(folder / "base")
    NullSpaceBases([_basis(site, free[site]) for site in sites], norms, model=model).save(folder / "bases.safetensors")
    _write_activations(folder / "activations", list(sites), [f"domain{i}" for i in range(domains)], norms, model)


class _Checkpoint:
    """A model folder with one shard per tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, str] = {}
        folder.mkdir()

    def write(self, module: str, weight: Tensor) -> None:
        """Add the weight of a module."""
        shard = f"model-{len(self.shards) + 1:05d}.safetensors"
        save_file({f"{module}.weight": weight}, self.folder / shard, metadata={"format": "pt"})
        self.shards[f"{module}.weight"] = shard

    def finish(self, config: LlamaConfig) -> None:
        """Add what makes the shards a model."""
        write_json(self.folder / INDEX, {"metadata": {}, "weight_map": self.shards})
        config.save_pretrained(self.folder)
        tiny_tokenizer().save_pretrained(self.folder)


def _basis(site: Site, free: Tensor) -> SiteBasis:
    return SiteBasis(
        site=site.name,
        layers=site.layers,
        width=site.width,
        kind="null",
        basis=free,
        eigenvalues=torch.empty(0),
        rank=site.width - FREE,
        rule="rank",
        threshold=float(site.width - FREE),
        tokens=TOKENS,
    )


def _write_activations(
    folder: Path, sites: list[Site], domains: list[str], norms: dict[str, float], model: dict[str, str]
) -> None:
    """A store of second moments of random validation inputs, one site in memory at a time."""
    storage = {site.name: "moments" for site in sites}
    for index, domain in enumerate(domains):
        for site in sites:
            with PartWriter(folder, index, domain, "validation", [site], storage, torch.device("cpu")) as writer:
                writer.add(site, torch.randn(TOKENS, site.width), {})
    manifest = make_manifest(
        "activations",
        model=model,
        sites={
            site.name: {"layers": site.layers, "width": site.width, "storage": "moments", "place": place}
            for place, site in enumerate(sites)
        },
        parts=[{"domain": domain, "split": "validation", "tokens": TOKENS} for domain in domains],
        layer_norms=norms,
    )
    write_json(folder / MANIFEST_NAME, manifest)


if __name__ == "__main__":
    main()
