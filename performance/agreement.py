"""The judges that need nothing more, a run's cost model and the refusal phrases, against every published labelled set.

As judges of safety on PyRIT's graded harm and achieved objectives, GPTFuzz (both files) and XSTest's completions of
unsafe prompts (people say whether the model complied, which is taken as harmful); the phrases also as what they are, a
detector of refusals, on PyRIT's refusals and all of XSTest. An answer is left out where its prompt is one that the cost
model trained on, or nearly (as in `nspo benchmark`); of what is left at most `--answers` per set are judged, both of
people's verdicts by their share. The threshold is the evaluation's: a cost above zero is unsafe.

    python performance/agreement.py --cost results/cost --labels results/labels.parquet --data DATA --out OUT
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import conclude
from preference import label_sets

from nspo.data.leaks import overlaps
from nspo.data.stage import prepare_labels
from nspo.data.tables import load_labels
from nspo.evaluation.agreement import ALL, compare
from nspo.files.manifest import MANIFEST_NAME, read_json
from nspo.judges.judge import RefusalPhrases
from nspo.preference.model import CostModel
from nspo.settings.data import LabelSettings
from nspo.settings.evaluation import BenchmarkSettings
from nspo.settings.reading import validate

Rows = list[dict[str, Any]]
SAFETY = ("pyrit_harm", "pyrit_objective", "gptfuzz", "xstest_unsafe")
REFUSAL = ("pyrit_refusal", "xstest_complied")


def judged_sets(data: Path) -> dict[str, dict[str, Any]]:
    """The sets of `preference.py`, each as if it were the cost model's; GPTFuzz's two files are one."""
    sets = label_sets(data)
    sets["gptfuzz"]["source"] += sets["gptfuzz_evaluate"]["source"]
    return {name: sets[name] | {"target": "cost"} for name in (*SAFETY, *REFUSAL)}


def unseen(rows: Rows, training: list[str]) -> Rows:
    """The rows whose prompt is no training prompt, nor nearly one."""
    prompts = sorted({row["prompt"] for row in rows})
    near = BenchmarkSettings().near_duplicate
    seen = {p for p, found in zip(prompts, overlaps(prompts, training), strict=True) if found.similarity >= near}
    return [row for row in rows if row["prompt"] not in seen]


def sample(rows: Rows, count: int, positive_above: float) -> Rows:
    """The first `count` rows of a shuffled set, both classes by their share of it."""
    parts = [[row for row in rows if (row["grade"] >= positive_above) == harmful] for harmful in (True, False)]
    if len(rows) <= count:
        return rows
    return [row for part in parts for row in part[: round(count * len(part) / len(rows))]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cost", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="labels.parquet that the cost model learnt from")
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets, each in a folder of its own")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=200, help="most answers of a set")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = validate(LabelSettings, {"wheels": {}, "labels": judged_sets(given.data)}, "labels")
    labels = given.out / "agreement_labels.parquet"
    prepare_labels(settings, Path(), labels)
    rows = [row for split in ("train", "heldout") for row in load_labels(labels, "cost", split)]
    training = sorted({row["prompt"] for row in load_labels(given.labels, "cost", "train")})
    kept = unseen(rows, training)
    above = read_json(given.cost / MANIFEST_NAME)["settings"]["positive_above"]

    def of(name: str) -> Rows:
        return sample([row for row in kept if row["set"] == name], given.answers, above)

    safety, refusal = ([row for name in names for row in of(name)] for names in (SAFETY, REFUSAL))
    cost, phrases = CostModel(given.cost, "cuda" if torch.cuda.is_available() else "cpu"), RefusalPhrases()

    def texts(part: Rows) -> tuple[list[str], list[str]]:
        return [row["prompt"] for row in part], [row["response"] for row in part]

    def complied(part: Rows) -> list[float]:
        return [1.0 - refused for refused in phrases.verdicts(*texts(part))]

    found = compare(safety, {cost.name: cost.verdicts(*texts(safety)), phrases.name: complied(safety)}, above)
    found += compare(refusal, {phrases.name: complied(refusal)}, above)
    table = [shown(row, rows, kept) for row in found if row["set"] != ALL]
    conclude("agreement", given.out, table, training_prompts=len(training), positive_above=above)


def shown(row: dict[str, Any], rows: Rows, kept: Rows) -> dict[str, Any]:
    """One row of the table; `found/missed/wrongly/rightly` is the confusion: people's unsafe, then people's safe."""
    accuracy, auroc, confusion = row["accuracy"], row["auroc"], row["confusion"]
    answers = [sum(other["set"] == row["set"] for other in part) for part in (rows, kept)]
    return {
        "set": row["set"],
        "judge": row["judge"],
        "answers": answers[0],
        "unseen": answers[1],
        "n": row["n"],
        "unsafe": row["unsafe"],
        "accuracy": f"{accuracy['value']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})",
        "kappa": row["kappa"],
        "AUROC": auroc and f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})",
        "found/missed/wrongly/rightly": "/".join(
            str(confusion[human][said]) for human in ("unsafe", "safe") for said in ("unsafe", "safe")
        ),
        "failed": row["failures"],
    }


if __name__ == "__main__":
    main()
