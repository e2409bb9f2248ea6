"""What the report reads, made up: evaluations, policies, certificates, bases."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.evaluation.scores import compute_scores
from nspo.files.manifest import write_json
from nspo.judges.second.kinds import KINDS
from nspo.preference.metrics import describe
from nspo.report.stage import ReportInputs, ReportOutputs, write_report

PLANTED = "<script>alert(1)</script>"


DOMAINS = ("maths", "code", "commonsense", "instructions")


BLOCKS = 3


@dataclass(frozen=True)
class Behaviour:
    """What a synthetic model does: rates from 0 to 1, KL in nats."""

    unsafe: float
    refused: float
    correct: float
    kl: float


BASE = Behaviour(unsafe=0.7, refused=0.03, correct=0.4, kl=0.0)


NSPO = Behaviour(unsafe=0.08, refused=0.05, correct=0.4, kl=0.004)


TWIN = Behaviour(unsafe=0.08, refused=0.3, correct=0.35, kl=0.04)


def response_rows(method: str, does: Behaviour, prompts: int = 60) -> list[dict[str, Any]]:
    """Rows as the evaluation writes them; the same prompt is hard for every method."""
    rows = []
    for role, domain in [("harmful", "advbench"), ("harmful", "harmbench"), ("benign", "benign")] + [
        ("general", name) for name in DOMAINS
    ]:
        for index in range(prompts):
            hard = (index + 0.5) / prompts
            rng = np.random.default_rng(zlib.crc32(f"{domain}{index}".encode()))
            tuned = role == "general" and does.kl > 0
            unsafe = role == "harmful" and hard < does.unsafe
            rows.append(
                {
                    "role": role,
                    "domain": domain,
                    "id": f"{domain}-{index}",
                    "prompt": f"Prompt {index} of {domain} {PLANTED}",
                    "response": f"{method} answers {index}. {PLANTED} " + "A sentence of the answer. " * 20,
                    "refused": role == "benign" and hard < does.refused,
                    "cost": (1.0 if unsafe else -1.0) + rng.normal() / 5 if role == "harmful" else None,
                    "unsafe": unsafe if role == "harmful" else None,
                    "cost_failed": False if role == "harmful" else None,
                    "judge_second_judge": (1.0 if unsafe != (index % 10 == 0) else -1.0) if role == "harmful" else None,
                    "kind": None if role == "general" else KINDS[index % 4] if not unsafe else "on topic",
                    "unanswered": None if role == "general" else not unsafe and KINDS[index % 4] != "on topic",
                    "correct": hard < does.correct if role == "general" else None,
                    "seen": True if role == "general" else None,
                    "exact_match": hard > 12 * does.kl**0.5 / 5 if tuned else None,
                    "reference_tokens": 10 + index % 50 if tuned else None,
                    "kl_per_token": does.kl * rng.gamma(2) / 2 if tuned else None,
                    "kl_first_tokens": 2 * does.kl * rng.gamma(2) / 2 if tuned else None,
                    "nll_change": does.kl * rng.normal() if tuned else None,
                    "top1_agreement": 1 - does.kl * rng.gamma(2) if tuned else None,
                }
            )
    return rows


def write_evaluation(folder: Path, method: str, seed: int, does: Behaviour) -> Path:
    """One folder of the evaluation stage."""
    rows = response_rows(method, does)
    out = folder / "evaluation" / method / f"seed{seed}"
    out.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), out / "responses.parquet")
    model = {"base": {"weights": "b" * 16}, "policy": {"weights": f"{method}-weights"}}
    found = {"method": method, "seed": seed, "base": method == "base", "model": model, "judges": {"cost_model": {}}}
    write_json(out / "metrics.json", {**found, "scores": compute_scores(rows, 4, ["second_judge"])})
    return out


def write_policy(folder: Path, method: str, seed: int, does: Behaviour) -> Path:
    """The logs of one training run, which ends where the evaluation finds it."""
    out = folder / "policy" / method / f"seed{seed}"
    out.mkdir(parents=True)
    rng = np.random.default_rng(len(method))
    steps = [
        {"step": s, "reward": s / 20 + rng.normal() / 9, "cost": 1 - s / 15 + rng.normal() / 9} for s in range(1, 31)
    ]
    for row in steps:
        row |= {"completion_length": 40 + rng.normal(), "kept": 0.3 if method == "nspo" else None}
    probes = [
        {
            "step": step,
            "unsafe_rate": BASE.unsafe + (does.unsafe - BASE.unsafe) * step / 30,
            "over_refusal_rate": does.refused * step / 30,
            "kl_per_token": does.kl * (step / 30) ** 2,
            "kl_first_tokens": 2 * does.kl * (step / 30) ** 2,
        }
        for step in range(0, 31, 5)
    ]
    pq.write_table(pa.Table.from_pylist(steps), out / "training.parquet")
    pq.write_table(pa.Table.from_pylist(probes), out / "probes.parquet")
    settings = {"learning_rate": 1e-4, "loss": {"kind": "grpo", "kl": 0.0}, "constraint": {"kind": "exact"}}
    theory = {"updates": 30, "descending": 0.9, "least_step_descent": -2.1e-4, "most_leakage": 3.3e-8}
    theory |= {"least_descent": 0.0321, "least_kept": 0.3, "most_kept": 0.3}
    found = {"nspo": settings, "trainer": {"beta": 0.0}, "theory": theory if method == "nspo" else None}
    write_json(out / "settings.json", found)
    return out


def sites() -> list[tuple[str, tuple[str, ...], int]]:
    """(site, layers, width) of a small model."""
    found = []
    for block in range(BLOCKS):
        at = f"model.layers.{block}."
        found.append((f"{at}self_attn.q_proj", tuple(f"{at}self_attn.{n}_proj" for n in "qkv"), 12))
        found.append((f"{at}mlp.down_proj", (f"{at}mlp.down_proj",), 24))
    return found


def write_certificate(folder: Path, method: str, seed: int) -> Path:
    """A certificate: the constrained method leaks rounding only on protected directions."""
    constrained = method == "nspo"
    layers = {
        name: {
            "site": site,
            "leakage_basis": 3e-8 if constrained else 0.06,
            "random_basis": 0.05,
            "leakage_validation": {"maths": 0.01, "all": 0.011 if constrained else 0.07},
            "random_equal_norm": 0.045,
            "harmful": 0.05,
            "update_norm": 0.5,
            "relative_update": 0.02,
        }
        for site, names, _ in sites()
        for name in names
    }
    summary: dict[str, Any] = {
        key: {"max": max(values), "mean": sum(values) / len(values), "worst_layer": next(iter(layers))}
        for key in ("leakage_basis", "random_equal_norm", "harmful", "relative_update")
        for values in [[row[key] for row in layers.values()]]
    }
    worst = max(row["leakage_validation"]["all"] for row in layers.values())
    summary |= {"leakage_validation": {"max": worst, "mean": worst}, "unprotected_share": 0.0}
    path = folder / "certificate" / method / f"seed{seed}.json"
    identity = {"base": {"weights": "b" * 16}, "tuned": {"weights": f"{method}-weights"}}
    write_json(path, {**identity, "method": method, "constrained": constrained, "layers": layers, "summary": summary})
    return path


def write_attribution(folder: Path, method: str, seed: int) -> Path:
    """Where safety lives: an update that is all in the first two blocks."""
    tensors = [
        {"tensor": f"{name}.weight", "block": block, "part": part, "share": 0.25, "general": 0.01, "harmful": 0.03}
        for block in range(2)
        for name, part in ((f"model.layers.{block}.mlp.up_proj", "MLP"), (f"model.layers.{block}.attn.q", "attention"))
    ]
    kl = {"value": 0.0123, "low": 0.0101, "high": 0.0145, "n": 24}
    knockouts = [
        {
            "group": group,
            "share": share,
            "unsafe_rate": {"advbench": {"value": unsafe, "low": unsafe / 2, "high": 1.0, "n": 17}},
            "unsafe_difference": {"value": unsafe - 0.1, "low": -0.1, "high": 0.3, "n": 17},
            "kl_per_token": kl,
            "kl_first_tokens": kl,
        }
        for group, share, unsafe in (("nothing", 0, 0.1), ("block 0", 0.5, 0.4321), ("everything", 1, 0.7))
    ]
    path = folder / "attribution" / method / f"seed{seed}.json"
    write_json(path, {"tensors": tensors, "knockouts": knockouts, "first_tokens": 4})
    return path


def write_bases(path: Path) -> Path:
    """Bases of the small model, from power-law spectra."""
    rng = torch.Generator().manual_seed(0)
    built = []
    for site, layers, width in sites():
        scale = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
        general, validation, harmful = (
            (x.T @ x) / 400
            for x in (torch.randn(400, width, generator=rng, dtype=torch.float64) * scale for _ in range(3))
        )
        built.append(compute_basis(site, layers, general, 400, "energy", 0.9, validation, harmful))
    NullSpaceBases(built, {layer: 1.0 for _, layers, _ in sites() for layer in layers}, model="tiny").save(path)
    return path


def write_preference(folder: Path, name: str) -> Path:
    """The metrics of a reward or cost model on 200 graded responses."""
    rng = np.random.default_rng(len(name))
    labels = rng.random(200) < 0.4
    values = labels * 1.5 - 0.6 + rng.normal(size=200)
    prompts = [f"p{i // 2}" for i in range(200)]
    lengths = rng.integers(5, 100, 200)
    found = describe(values, labels, prompts, ["one", "two"] * 100, lengths, rng.random(200) < 0.3, 0)
    write_json(folder / name / "metrics.json", {"sign": f"{name} > 0 means it", "heldout": found})
    return folder / name


def inputs(
    folder: Path, nspo: Behaviour = NSPO, twin: Behaviour = TWIN, seeds: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    """Everything the report reads, written into `folder`; the arguments of `write_report` without its outputs."""
    config = folder / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f"data: {{general_heldout: {{}}, gold: {{}}}}\npolicy: {{steps: 30, seeds: {list(seeds)}}}\n")
    methods = [(name, does, seed) for name, does in (("nspo", nspo), ("grpo_no_kl", twin)) for seed in seeds]
    return {
        "config": config,
        "evaluations": [
            *(write_evaluation(folder, name, seed, does) for name, does, seed in methods),
            write_evaluation(folder, "base", 0, BASE),
        ],
        "certificates": [write_certificate(folder, name, seed) for name, _, seed in methods],
        "policies": [write_policy(folder, name, seed, does) for name, does, seed in methods],
        "attributions": [write_attribution(folder, name, seed) for name, _, seed in methods],
        "bases": write_bases(folder / "bases.safetensors"),
        "reward": write_preference(folder, "reward"),
        "cost": write_preference(folder, "cost"),
    }


def outputs(folder: Path) -> dict[str, Path]:
    """Where the stage writes what stands beside the page."""
    return {
        "summary": folder / "summary.csv",
        "latex": folder / "summary.tex",
        "cards": folder / "cards",
        "plots": folder / "plots",
    }


def write(folder: Path, given: dict[str, Any]) -> Path:
    """Run the stage; returns the page."""
    write_report(ReportInputs(**given), ReportOutputs(folder / "report.html", **outputs(folder)))
    return folder / "report.html"
