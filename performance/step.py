"""What the constraint costs in training, and how that grows: against no constraint and the release's dense projector.

On the default model: one whole training step, the optimizer step alone, the projection of all weights, and the memory.
Then the projection of single matrices of growing width and rank (`step_growth.json`, with figures). With `--block`
instead: one block of the size of Qwen2.5-7B's, with random weights and bases (`step_block.json`). The release projects
with W <- W0 + (W - W0) P, P dense d x d in float32; here that runs on the same layers with one P per site.

Command: `python performance/step.py --model results/model --bases results/bases/bases.safetensors --out
results/benchmarks`, and once more with `--block`.
"""

import argparse
import multiprocessing
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import conclude, ratio, take_turns
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from nspo import NullSpaceBases, constrain
from nspo.constraint.constrain import freeze_uncovered
from nspo.constraint.hooks import Mode
from nspo.models.loading import load_model
from nspo.models.structure.linears import find_weights, layer_norms
from nspo.models.structure.sites import find_sites
from nspo.nullspace.basis import Kind, SiteBasis
from nspo.nullspace.projection import reanchor_
from nspo.report import plots

WIDTHS = (512, 1024, 2048, 4096)
SHARES = (0.05, 0.1, 0.25, 0.5)
STEP_TOKENS = {"4k": 4_096, "32k": 32_768, "the paper's 160 prompts x 5 answers x 600": 480_000}
Times = Mapping[str, Sequence[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("results/model"))
    parser.add_argument("--bases", type=Path, default=Path("results/bases/bases.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a micro batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro batches of an optimizer step")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="widths of the single matrices")
    parser.add_argument("--block", action="store_true", help="measure one block of random weights instead")
    parser.add_argument(
        "--block-shape", type=int, nargs=4, default=(3584, 18944, 28, 4), help="hidden, MLP, heads, k/v"
    )
    parser.add_argument(
        "--block-tokens", type=int, default=512, help="tokens of the measured forward and backward pass"
    )
    parser.add_argument("--free-share", type=float, default=0.1, help="share of each width that the block may use")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.block:
        one_block(args)
    else:
        whole_model(args)
        growth(args)


# The default model


def whole_model(args: argparse.Namespace) -> None:
    """A training step, the optimizer step in it, the projection in that, and the memory."""
    # First, while this process is small: the peak of a child begins with that of its parent.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        peaks = {mode: fresh.submit(peak_bytes, args.model, args.bases, mode).result() for mode in (None, "both")}
    model, bases = load_model(args.model), NullSpaceBases.load(args.bases)
    trainable = freeze_and_list(model, bases)
    optimizers = {name: torch.optim.AdamW(trainable, lr=1e-6) for name in ("unconstrained", "both", "anchor")}
    memory = {mode: constrain(model, optimizers[mode], bases, mode=mode).memory() for mode in ("both", "anchor")}
    shape = (args.micro_batches, args.sequences, args.tokens)
    batches = torch.randint(0, model.config.vocab_size, shape)

    def train(optimizer: torch.optim.Optimizer) -> None:
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()

    against = {"both": "unconstrained", "anchor": "unconstrained"}
    steps = take_turns({name: partial(train, optimizer) for name, optimizer in optimizers.items()}, args.rounds)
    rows = compare("training step", steps, against)
    backward(model, batches[:1, :1])
    steps = take_turns({name: optimizer.step for name, optimizer in optimizers.items()}, args.rounds)
    rows += compare("optimizer step", steps, against)
    thin, dense, dense_bytes = projections(model, bases)
    rows += compare("projection", take_turns({"nspo": thin, "dense": dense}, args.rounds), {"dense": "nspo"})

    conclude(
        "step",
        args.out,
        rows,
        batch={"micro_batches": shape[0], "sequences": shape[1], "tokens": shape[2]},
        trainable_weights=sum(weight.numel() for weight in trainable),
        constraint_bytes=memory["both"],
        peak_bytes={"unconstrained": peaks[None], "both": peaks["both"], "extra": peaks["both"] - peaks[None]},
        projector_bytes={"nspo": memory["both"]["bases"], "dense": dense_bytes},
    )


def freeze_and_list(model: nn.Module, bases: NullSpaceBases) -> list[nn.Parameter]:
    """The weights that every rival trains: those that the bases cover."""
    freeze_uncovered(model, bases)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model: nn.Module, batches: Tensor) -> None:
    """Gradients of the next-token loss, summed over micro batches of token ids (micro batches, sequences, tokens)."""
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def projections(model: nn.Module, bases: NullSpaceBases) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Two ways to project all covered weights, ours and the release's, and the bytes of the latter's projectors."""
    weights = {name: place.rows(place.parameter) for name, place in find_weights(model, bases.layers).items()}
    anchors = {name: weight.clone() for name, weight in weights.items()}
    dense = {site.site: dense_projector(site.basis, site.kind) for site in bases.values()}

    def ours() -> None:
        for name, weight in weights.items():
            site = bases.for_layer(name)
            reanchor_(weight, anchors[name], site.basis, site.kind)

    def theirs() -> None:
        for name, weight in weights.items():
            weight.copy_(anchors[name] + (weight - anchors[name]) @ dense[bases.for_layer(name).site])

    return ours, theirs, sum(projector.nbytes for projector in dense.values())


def dense_projector(basis: Tensor, kind: str) -> Tensor:
    """P as a matrix (d, d)."""
    inside = basis @ basis.T
    return inside if kind == "null" else torch.eye(len(basis)) - inside


def peak_bytes(folder: Path, bases_file: Path, mode: Mode | None) -> int:
    """The most memory that this fresh process ever held through two optimizer steps on a few tokens."""
    model, bases = load_model(folder), NullSpaceBases.load(bases_file)
    optimizer = torch.optim.AdamW(freeze_and_list(model, bases), lr=1e-6)
    if mode is not None:
        constrain(model, optimizer, bases, mode=mode)
    for _ in range(2):
        backward(model, torch.zeros(1, 1, 16, dtype=torch.long))
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(what: str, times: Times, against: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per rival: median seconds and, where `against` names another rival, the ratio to it."""
    nothing = dict.fromkeys(("ratio", "least", "greatest"))
    return [
        {"what": what, "rival": name, "seconds": statistics.median(seconds), "against": against.get(name)}
        | (ratio(times, name, against[name]) if name in against else nothing)
        for name, seconds in times.items()
    ]


# Single matrices


def growth(args: argparse.Namespace) -> None:
    """The projection of one square matrix against its width and the number of columns of its basis."""
    rows = [row for width in args.widths for row in growth_at(width, args.rounds)]
    conclude("step_growth", args.out, rows)
    dense = [(row["width"], row["dense_seconds"]) for row in rows if row["free_share"] == SHARES[0]]
    lines = [("dense", plots.BASE, dense)]
    for share, colour in zip(SHARES, plots.SEQUENCE, strict=False):
        points = [(row["width"], row["seconds"]) for row in rows if row["free_share"] == share]
        lines.append((f"{share:.0%} free", colour, points))
    plots.save(plots.curves(lines, "width of the input", "seconds per projection", log=True), args.out, "step_width")
    by_rank = [
        (f"width {width}", colour, [(row["columns"], row["seconds"]) for row in rows if row["width"] == width])
        for width, colour in zip(args.widths, plots.SEQUENCE, strict=False)
    ]
    plots.save(plots.curves(by_rank, "free directions", "seconds per projection", log=True), args.out, "step_rank")


def growth_at(width: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every free share at one width, all timed in turns with the dense projector."""
    columns = {share: round(share * width) for share in SHARES}
    widest = torch.linalg.qr(torch.randn(width, max(columns.values())))[0]
    bases = {share: widest[:, :count].contiguous() for share, count in columns.items()}
    anchor, projector = torch.randn(width, width), dense_projector(widest, "null")
    weight = anchor.clone()
    rivals: dict[str, Callable[[], Any]] = {
        str(share): partial(reanchor_, weight, anchor, basis, "null") for share, basis in bases.items()
    }
    rivals["dense"] = lambda: weight.copy_(anchor + (weight - anchor) @ projector)
    times = take_turns(rivals, rounds)
    for share, count in columns.items():
        yield {
            "width": width,
            "free_share": share,
            "columns": count,
            "seconds": statistics.median(times[str(share)]),
            "dense_seconds": statistics.median(times["dense"]),
            "dense_to_ours": ratio(times, "dense", str(share))["ratio"],
        }


# One large block


def one_block(args: argparse.Namespace) -> None:
    """One block of a large model: measured parts, and from them the cost of the constraint per optimizer step."""
    hidden, intermediate, heads, groups = args.block_shape
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=1,
        vocab_size=16,
    )
    model = Qwen2Model(config)
    bases = random_bases(model, args.free_share)
    trainable = freeze_and_list(model, bases)
    plain, constrained = (torch.optim.AdamW(trainable, lr=1e-6) for _ in range(2))
    memory = constrain(model, constrained, bases).memory()
    thin, dense, dense_bytes = projections(model, bases)
    inputs = torch.randn(1, args.block_tokens, hidden)

    def forward_backward() -> None:
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.square().mean().backward()

    rivals = {"forward and backward": forward_backward, "AdamW": plain.step, "AdamW, constrained": constrained.step}
    times = take_turns({**rivals, "projection": thin, "dense projection": dense}, args.rounds)
    conclude(
        "step_block",
        args.out,
        compare("block", times, {"AdamW, constrained": "AdamW", "dense projection": "projection"}),
        shape={"hidden": hidden, "intermediate": intermediate, "heads": heads, "key_value_heads": groups},
        free_share=args.free_share,
        constraint_bytes=memory,
        projector_bytes={"nspo": memory["bases"], "dense": dense_bytes},
        step_ratio={
            f"{args.block_tokens} tokens, measured": step_ratio(times, 1.0),
            **{
                f"{name} tokens, computed from the measured parts": step_ratio(times, tokens / args.block_tokens)
                for name, tokens in STEP_TOKENS.items()
            },
        },
    )


def step_ratio(times: Times, passes: float) -> dict[str, float]:
    """Constrained to unconstrained optimizer step after `passes` measured forward and backward passes, by mode.

    Mode "anchor" is the plain step and one projection. Median over rounds of 1 + t_projection / (t_passes + t_AdamW).
    """
    rounds = [dict(zip(times, seconds, strict=True)) for seconds in zip(*times.values(), strict=True)]
    step = [passes * it["forward and backward"] + it["AdamW"] for it in rounds]
    extra = {
        "both": [it["AdamW, constrained"] - it["AdamW"] for it in rounds],
        "anchor": [it["projection"] for it in rounds],
    }
    return {
        mode: 1 + statistics.median(t / whole for t, whole in zip(seconds, step, strict=True))
        for mode, seconds in extra.items()
    }


def random_bases(model: Qwen2Model, free_share: float) -> NullSpaceBases:
    """Orthonormal columns without any data: the cost of a projection does not depend on the directions."""
    made = []
    for site in find_sites(model):
        free = round(free_share * site.width)
        kind: Kind = "null" if 2 * free <= site.width else "range"
        columns = min(free, site.width - free)
        basis = torch.linalg.qr(torch.randn(site.width, columns))[0]
        rank = site.width - free
        made.append(
            SiteBasis(site.name, site.layers, site.width, kind, basis, torch.ones(site.width), rank, "random", free, 0)
        )
    return NullSpaceBases(made, layer_norms(model, [layer for site in made for layer in site.layers]))


if __name__ == "__main__":
    main()
