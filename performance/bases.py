"""Bases against the authors' release: time, bytes and memory on a collected model, and how one site grows with width.

The release, written plainly from its description: one second moment per linear layer (q, k and v each their own, though
they share an input), rounded to bf16 as its sums are, a full SVD in float32, the dense d x d projector of all
directions below a share of the largest singular value, every projector kept. It writes no file; its bytes are those of
what it keeps. Ours reads general, validation and harmful second moments, solves in float64, and saves. Both start from
the same store.

Peak memory is that of a fresh process above what its imports take. Widths beyond the measured ones are extrapolated, by
the fitted power and by the cube, and say so.

    python performance/bases.py --activations results/activations --out results/timings [--blocks 2] [--widths 576
    ..]
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude, ratio, take_turns
from torch import Tensor

from nspo.activations.store import HARMFUL, ActivationStore
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.bases.table import block_of
from nspo.report import plots
from nspo.settings.bases import BasesSettings

DEFAULT = BasesSettings()
RELEASE_THRESHOLD = 5e-5
UNMEASURED = (18944, 28672)  # the widest inputs of a 7B and of a 70B model
RANKS = (16, 64, 256, 768)
RANK_WIDTH = 1536


def ours(store: ActivationStore, sites: Sequence[str], out: Path) -> int:
    """Read, choose and save, one site after another; returns the bytes of the file."""
    made = []
    for name in sites:
        general, tokens = store.gram(name, "basis")
        validation, harmful = store.gram(name, "validation")[0], store.gram(name, "basis", [HARMFUL])[0]
        layers = store.sites[name].layers
        made.append(compute_basis(name, layers, general, tokens, DEFAULT.rule, DEFAULT.threshold, validation, harmful))
    NullSpaceBases(made, store.manifest["layer_norms"]).save(out)
    return out.stat().st_size


def release(store: ActivationStore, sites: Sequence[str]) -> int:
    """A dense projector for every layer of every site; returns their bytes."""
    layers = [(name, layer) for name in sites for layer in store.sites[name].layers]
    projectors = {layer: release_projector(store.gram(name, "basis")[0]) for name, layer in layers}
    return sum(projector.nbytes for projector in projectors.values())


def release_projector(gram: Tensor) -> Tensor:
    """U U^T (d, d) float32 of the directions with a singular value below 5e-5 of the largest."""
    vectors, values, _ = torch.linalg.svd(gram.bfloat16().float())
    small = vectors[:, values < RELEASE_THRESHOLD * values[0]]
    return small @ small.T


def synthetic(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """General, validation and harmful second moments (d, d) float64 with eigenvalues near 1/i in common random axes.

    Harmful eigenvalues are the general ones times log-normal factors, so that `contrast` frees a tenth of the axes.
    """
    generator = torch.Generator().manual_seed(width)
    mirrors = torch.nn.functional.normalize(torch.randn(24, width, generator=generator, dtype=torch.float64))
    general = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    moments = []
    for spread in (0.0, 0.1, 1.0):
        noise = torch.randn(width, generator=generator, dtype=torch.float64)
        moments.append(torch.diag(general * (spread * noise).exp()))
        for mirror in mirrors:  # A <- M A M with the reflection M = I - 2 v v^T, in place
            moments[-1].addr_(mirror, mirror @ moments[-1], alpha=-2)
            moments[-1].addr_(moments[-1] @ mirror, mirror, alpha=-2)
    return moments[0], moments[1], moments[2]


def ours_of(general: Tensor, validation: Tensor, harmful: Tensor) -> None:
    compute_basis("s", ["s"], general, 4 * len(general), DEFAULT.rule, DEFAULT.threshold, validation, harmful)


def ours_at(width: int) -> None:
    ours_of(*synthetic(width))


def release_at(width: int) -> None:
    release_projector(synthetic(width)[0])


def peak_memory(work: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that a fresh process holds at its peak while it runs `work`, beyond what it held before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), work, arguments).result()


def _peak(threads: int, work: Callable[..., Any], arguments: Sequence[Any]) -> int:
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="utf-8"
    )  # the peak starts again from what is held now (Linux)
    before = _held()
    work(*arguments)
    return _held() - before


def _held() -> int:
    """The largest number of bytes that this process has held (`getrusage` would count its parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def whole_model(store: ActivationStore, blocks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Time, bytes and peak memory of both on the first `blocks` blocks (0: all)."""
    sites = [name for name in store.sites if not blocks or block_of(name) < blocks]
    file = folder / "bases.safetensors"
    times = take_turns({"nspo": lambda: ours(store, sites, file), "release": lambda: release(store, sites)}, rounds)
    size = {"nspo": ours(store, sites, file), "release": release(store, sites)}
    memory = {"nspo": peak_memory(ours, store, sites, file), "release": peak_memory(release, store, sites)}
    return {
        "sites": len(sites),
        "layers": sum(len(store.sites[name].layers) for name in sites),
        "seconds": {name: statistics.median(turns) for name, turns in times.items()},
        "release_over_nspo": ratio(times, "release", to="nspo"),
        "bytes": size,
        "bytes_ratio": size["nspo"] / size["release"],
        "peak_bytes": memory,
    }


def by_width(width: int, rounds: int) -> dict[str, Any]:
    """Time and peak memory of one site of this width, for ours and for one layer of the release."""
    moments = synthetic(width)
    rivals = {"nspo": lambda: ours_of(*moments), "release": lambda: release_projector(moments[0])}
    times = take_turns(rivals, rounds)
    peak = peak_memory(ours_at, width)
    return {
        "width": width,
        "nspo_seconds": statistics.median(times["nspo"]),
        "release_seconds_per_layer": statistics.median(times["release"]),
        "nspo_peak_gb": peak / 1e9,
        "nspo_peak_matrices": peak / (8 * width**2),  # the three second moments among them
        "release_peak_gb": peak_memory(release_at, width) / 1e9,
    }


def extrapolate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hours and GB of one site of the widths nobody measured here, from the three largest that were."""
    widths, seconds = (np.array([row[key] for row in rows[-3:]]) for key in ("width", "nspo_seconds"))
    power, offset = np.polyfit(np.log(widths), np.log(seconds), 1)
    return [
        {
            "extrapolated_width": width,
            "fitted_power": float(power),
            "hours_by_fit": math.exp(offset + power * math.log(width)) / 3600,
            "hours_by_cube": float(seconds[-1]) * (width / float(widths[-1])) ** 3 / 3600,
            "peak_gb": rows[-1]["nspo_peak_matrices"] * 8 * width**2 / 1e9,
        }
        for width in UNMEASURED
    ]


def by_rank(rank: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Bytes, and seconds to save and to load, of one site that protects `rank` of 1536 directions."""
    general = synthetic(RANK_WIDTH)[0]
    bases = NullSpaceBases([compute_basis("s", ["s"], general, 4 * RANK_WIDTH, "rank", rank)], {"s": 1.0})
    file = folder / f"rank{rank}.safetensors"
    times = take_turns({"save": lambda: bases.save(file), "load": lambda: NullSpaceBases.load(file)}, rounds)
    return {"rank": rank, "bytes": file.stat().st_size} | {k: statistics.median(v) for k, v in times.items()}


def draw(rows: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]], out: Path) -> None:
    """Seconds per site (the release: per layer) against width, and to save and load against rank."""

    def points(table: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
        return [(row[x], row[y]) for row in table]

    ours_colour, other = plots.KNOWN["nspo"], plots.KNOWN["grpo_no_kl"]
    lines = [("ours", ours_colour, points(rows, "width", "nspo_seconds"))]
    lines += [("release", other, points(rows, "width", "release_seconds_per_layer"))]
    plots.save(plots.curves(lines, "width of the input", "seconds per site", log=True), out, "bases_width")
    lines = [("save", ours_colour, points(ranks, "rank", "save")), ("load", other, points(ranks, "rank", "load"))]
    plots.save(plots.curves(lines, f"rank at width {RANK_WIDTH}", "seconds", log=True), out, "bases_rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, required=True, help="store of a model, with harmful inputs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--blocks", type=int, default=0, help="only the first blocks of the model; 0: all")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every rival")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1152, 1536, 2304, 3072, 4608])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*tokens for width")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = whole_model(ActivationStore(options.activations), options.blocks, options.rounds, folder)
        rows = [by_width(width, options.rounds) for width in sorted(options.widths)]
        ranks = [by_rank(rank, 5 * options.rounds, folder) for rank in RANKS]
    conclude("bases", options.out, rows, model=model, ranks=ranks, extrapolated=extrapolate(rows))
    draw(rows, ranks, options.out)


if __name__ == "__main__":
    main()
