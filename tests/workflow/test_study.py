"""A study: what variants agree on is made once and stays where it is; run for real on the tiny model."""

import csv
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.workflow_project import ROOT, copy_project, snakemake

from nspo.plan.plan import MACHINES, stages
from nspo.plan.shapes import SHAPES
from nspo.plan.sharing import shared
from nspo.settings.reading import load_config
from nspo.settings.study import variants as every

pytestmark = pytest.mark.workflow

METHOD = {"objective": "nspo", "learning_rate": 1.0e-3}
VARIANTS = {
    "as configured": None,
    "no constraint": {"policy.methods.main.constraint": {"kind": "none"}},
    "small K": {"activations.samples": 2},
}
GRIDS = {"space": {"bases": [{"rule": "energy", "threshold": 0.8}]}}
POLICY = ("train_policy", "match_safety", "evaluate", "certify")


def study(variants: Mapping[str, Any], grids: Mapping[str, Any], folder: Path, **sections: Any) -> str:
    """A study on the tiny model as a file in `folder`, which it returns."""
    raw = yaml.safe_load((ROOT / "config/smoke.yaml").read_text())
    raw["policy"]["methods"] = {"main": METHOD}
    raw |= {"screen": {"enabled": False}, "attribution": {"enabled": False}, "runtime": {"results": "results/study"}}
    raw |= sections | {"study": {"variants": dict(variants), "grids": dict(grids)}}
    (folder / "study.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(folder / "study.yaml")


def planned(project: Path, config: str) -> list[dict[str, Any]]:
    """The jobs that a plan holds: `rule`, `inputs`, `outputs`."""
    run = snakemake(project, "--dry-run", "--nolock", config=config)
    assert run.returncode == 0, run.stdout[-3000:]
    jobs = []
    for block in run.stdout.split("\n\n"):
        if (rule := re.search(r"^(?:local)?rule (\w+):$", block, re.M)) and rule[1] != "all":
            inputs, outputs = (re.search(rf"^    {name}: (.*)$", block, re.M) for name in ("input", "output"))
            jobs.append(
                {"rule": rule[1], "outputs": outputs[1].split(", "), "inputs": inputs[1].split(", ") if inputs else []}
            )
    return jobs


def counts(jobs: list[dict[str, Any]]) -> dict[str, int]:
    """How many jobs of each rule."""
    rules = [job["rule"] for job in jobs]
    return {rule: rules.count(rule) for rule in dict.fromkeys(rules)}


def behind(jobs: list[dict[str, Any]], variant: str) -> dict[str, str]:
    """What the page of a variant is made of, by the path in its home -> the home."""
    made_by = {output: job for job in jobs for output in job["outputs"]}
    found: dict[str, str] = {}
    ahead = [f"results/study/variants/{variant}/report.html"]
    while ahead:
        path = ahead.pop()
        if home := re.fullmatch(r"results/study/stages/(\w+)/(.*)", path):
            found[home[2]] = home[1]
        if path in made_by:
            ahead += made_by[path]["inputs"]
    return found


TRAINED = {"policy", "training/main", "matched", "walks", "evaluation/main", "certificates"}
OF_K = {"activations", "bases", *TRAINED}
JUDGES = {"reward", "training/reward", "cost", "training/cost"}
AGREE = "judge_agreement.json"
ALL = {"prompts.parquet", "labels.parquet", "second_judge", AGREE, *JUDGES, "evaluation/base", *OF_K}
KEYS = {  # what gets another home where this key has another value
    "model.system_prompt": ("Be brief.", {"model", AGREE, *JUDGES, "evaluation/base", *OF_K}),
    "data.seed": (1, ALL),
    "data.harmful.fraction": (0.9, {"prompts.parquet", "evaluation/base", *OF_K}),
    "activations.samples": (3, OF_K),
    "bases.threshold": (2.0, OF_K - {"activations"}),
    "reward.l2": (0.2, {"reward", "training/reward", *TRAINED}),
    "second_judge.l2": (0.1, {"second_judge", AGREE, "evaluation/base", "evaluation/main"}),
    "cost.l2": (0.2, {"cost", "training/cost", AGREE, "evaluation/base", *TRAINED}),
    "policy.clip": (0.3, TRAINED),
    "policy.methods.main.learning_rate": (2.0e-3, TRAINED),
    "policy.pairs": ("labels", set()),  # of which only the preference objectives learn
    "matching.benign_prompts": (3, TRAINED - {"policy", "training/main"}),
    "evaluation.general_prompts": (5, {"evaluation/base", "evaluation/main"}),
    "attribution.general_prompts": (3, set()),
    "benchmarks.limit": (3, set()),
}


def test_a_key_gives_a_new_home_to_what_it_shapes(tmp_path: Path) -> None:
    """And to what follows from that, the very stages that a run of one configuration would run again."""
    variants = {"base": None} | {key: {key: value} for key, (value, _) in KEYS.items()}
    config = study(variants, {}, tmp_path)
    jobs = planned(ROOT, config)
    base = behind(jobs, "base")
    assert {"model", "certificates/main/seed0.json"} <= set(base)
    for key, (_, expected) in KEYS.items():
        found = behind(jobs, key)
        assert found.keys() == base.keys()
        moved = {path for path in base if found[path] != base[path]}
        assert {re.sub(r"^((?:training|evaluation)/\w+|[^/]+).*", r"\1", path) for path in moved} == expected, key
    planner = [
        (it, stages(it, SHAPES["smollm2-135m"], MACHINES["cpu"])) for it in every(load_config(config), "").values()
    ]
    counted = Counter(cost.stage.partition(" ")[0] for cost in shared(planner))
    assert counted.items() <= counts(jobs).items()  # `nspo plan` shares the same


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the tiny study has run to its end."""
    project = copy_project(tmp_path_factory.mktemp("study"))
    run = snakemake(project, config=study(VARIANTS, GRIDS, project))
    assert run.returncode == 0, run.stdout[-6000:]
    return project


def test_every_variant_is_a_row_beside_its_keys(ran: Path) -> None:
    """With the figures of its own summary; the base model once; the page has no word of a fault."""
    rows = list(csv.DictReader((ran / "results/study/study.csv").open()))
    assert [row["variant"] for row in rows if row["method"] == "main"] == [
        *VARIANTS,
        "space-energy-0.8",
    ]
    assert [row["method"] for row in rows].count("base") == 1
    by_name = {row["variant"]: row for row in rows if row["method"] == "main"}
    assert by_name["small K"]["activations.samples"] == "2"
    assert by_name["no constraint"]["policy.methods.main.constraint.kind"] == "none"
    assert by_name["space-energy-0.8"]["bases.threshold"] == "0.8"
    summary = csv.DictReader((ran / "results/study/variants/small K/summary.csv").open())
    (kl,) = (r for r in summary if (r["method"], r["name"], r["domain"]) == ("main", "kl_per_token", "seen"))
    assert float(by_name["small K"]["kl_per_token_seen"]) == pytest.approx(float(kl["value"]))
    assert float(by_name["as configured"]["leakage_basis"]) < 1e-6 < float(by_name["no constraint"]["leakage_basis"])
    assert 'href="variants/small%20K/report.html"' in (ran / "results/study/study.html").read_text()


def test_a_second_run_does_nothing(ran: Path) -> None:
    """Where the variants stand in another order nothing moves, and the page alone is written anew, in that order."""
    assert planned(ran, study(VARIANTS, GRIDS, ran)) == []
    assert counts(planned(ran, study(dict(reversed(VARIANTS.items())), GRIDS, ran))) == {"study": 1}


def test_variants_come_and_go_and_nothing_moves(ran: Path) -> None:
    """One more plans what only it needs; one less, even the first, plans the page alone; a new name its own page."""
    more = {"slower": {"policy.methods.main.learning_rate": 1.0e-4}, **VARIANTS}
    of_one = dict.fromkeys((*POLICY, "write_config", "report", "study"), 1)
    assert counts(planned(ran, study(more, GRIDS, ran))) == of_one
    less = {name: changes for name, changes in VARIANTS.items() if name != "as configured"}
    assert counts(planned(ran, study(less, GRIDS, ran))) == {"study": 1}
    renamed = {("K of two" if name == "small K" else name): changes for name, changes in VARIANTS.items()}
    assert counts(planned(ran, study(renamed, GRIDS, ran))) == {"write_config": 1, "report": 1, "study": 1}


def test_code_runs_again_where_it_is(ran: Path) -> None:
    """An edit of a stage's code reruns its jobs, and gives none another home."""
    module = ran / "nspo/certify/certificate.py"
    before = module.read_text()
    config = study(VARIANTS, GRIDS, ran)
    try:
        module.write_text(before + "\nEDITED = True\n")
        assert counts(planned(ran, config)) == {"certify": 4, "report": 4, "study": 1}
    finally:
        module.write_text(before)
    assert planned(ran, config) == []


def test_what_is_lost_is_made_again(ran: Path) -> None:
    """Weights in a home, as in a run of one configuration."""
    (weights,) = (ran / "results/study/stages").glob("*/cost/model.safetensors")
    weights.rename(weights.with_name("away"))
    try:
        assert "train_cost" in counts(planned(ran, study(VARIANTS, GRIDS, ran)))
    finally:
        weights.with_name("away").rename(weights)


def test_snakemake_report_carries_the_study(ran: Path) -> None:
    """The page, the table and the plots of the study, with the pages of its variants."""
    run = snakemake(ran, "--report", "report.zip", config=study(VARIANTS, GRIDS, ran))
    assert run.returncode == 0, run.stdout[-3000:]
    assert (ran / "report.zip").stat().st_size > 100_000
