"""Can people's labels say what is a refusal? Read-outs fitted on them against the phrases, on two sets of answers.

Fitted on PyRIT's answers of the split `train` (`data.labels.refusal`), tested on those of the other splits, whose
prompts are others, and on answers to XSTest's prompts, which nothing here was fitted on. Three ways: the phrases;
"unanswered" (the phrases, off the topic, or degenerate), which knows labels by one threshold only; and a linear
read-out of the base model's frozen states over the first 32 tokens of an answer, as much as a rollout has, or over all.

    python performance/refusals.py --model results/model --second-judge results/second_judge \\
        --labels results/labels.parquet --data FOLDER --out results/benchmarks
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import conclude
from preference import label_sets

from nspo.data.stage import prepare_labels
from nspo.data.tables import LABEL_COLUMNS, load_labels
from nspo.evaluation.agreement import HALF, UNANSWERED, compare, refusal_agreement
from nspo.files.tables import read_table
from nspo.judges.second.judge import SecondJudge
from nspo.models.loading import load_tokenizer
from nspo.preference.model import answer_features, encode
from nspo.preference.objective import Judgements, fit_head
from nspo.preference.stage import load_backbone
from nspo.run.devices import device_of
from nspo.run.progress import track
from nspo.settings.config import Config
from nspo.settings.data import LabelSettings
from nspo.settings.reading import validate

LENGTHS = {"read-out of 32 tokens": 32, "read-out of all tokens": 10**6}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "second-judge", "labels", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=160, help="answers to XSTest's prompts")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    ours = [row for row in read_table(given.labels, LABEL_COLUMNS) if row["set"] == "refusal"]
    rows = ours + xstest(given.data, given.out)[: given.answers]
    tested = [place for place, row in enumerate(rows) if row["set"] != "refusal" or row["split"] != "train"]
    asked = [rows[place] for place in tested]
    second = SecondJudge(given.second_judge, device_of("auto"))
    found = refusal_agreement(asked, second)
    scores = read_outs(given.model, rows)
    refused = [{**row, "grade": float(row["grade"] < HALF)} for row in asked]
    found += compare(refused, {name: [said[place] for place in tested] for name, said in scores.items()}, HALF)
    conclude("refusals", given.out, [shown(row) for row in found if row["set"] != "all"], fitted=len(rows) - len(asked))


def xstest(data: Path, out: Path) -> list[dict[str, Any]]:
    """The answers to XSTest's prompts, the first of the seeded shuffle first."""
    sets = {"xstest": label_sets(data)["xstest_complied"]}
    prepare_labels(validate(LabelSettings, {"wheels": {}, "labels": sets}, "labels"), Path(), out / "xstest.parquet")
    return load_labels(out / "xstest.parquet", "reward", "heldout")


def read_outs(model: Path, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Scores of all rows by the read-outs, above zero for a refusal."""
    settings, tokenizer = Config().cost, load_tokenizer(model)
    trunk = load_backbone(model, settings, "cost", device_of("auto"))
    ids = [encode(tokenizer, row["prompt"], row["response"], settings.max_tokens) for row in rows]
    with track("features", len(ids), "answer") as bar:
        features = answer_features(trunk, ids, tokenizer.pad_token_id, list(LENGTHS.values()), bar.update)
    fitted = [place for place, row in enumerate(rows) if row["set"] == "refusal" and row["split"] == "train"]
    signs = torch.tensor([1 if rows[place]["grade"] < HALF else -1 for place in fitted])
    head = fit_head(features[fitted], Judgements(signs, torch.empty(0, 2, dtype=torch.int64)), settings.l2)
    return {name: (features[:, place].double() @ head).tolist() for place, name in enumerate(LENGTHS)}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the table; sensitivity: of what people call refusals, specificity: of the other answers."""
    accuracy = row["accuracy"]
    return {
        "set": row["set"],
        "judge": {"refusal_phrases": "phrases", UNANSWERED: "unanswered"}.get(row["judge"], row["judge"]),
        "n": row["n"],
        "refusals": row["unsafe"],
        "accuracy": f"{accuracy['value']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})",
        "sensitivity": row["sensitivity"]["value"],
        "specificity": row["specificity"]["value"],
    }


if __name__ == "__main__":
    main()
