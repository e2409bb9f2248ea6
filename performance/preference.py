"""Cost and reward heads across public label sets: trained on one, tested on held-out prompts of every other.

Data, in a folder that is given: PyRIT's scorer evaluations (harm for cost, objective and refusal for reward), GPTFuzz
(train, and its evaluate file of other questions), XSTest's completions (complying with its unsafe prompts is harmful,
complying at all is what was asked), and CoCoNot's pairs. Each set gives at most `--answers` answers for training and as
many for testing, the first of the seeded shuffle of labels.parquet; answers are read once, with the default settings of
the two models. Three baselines stand beside them. The test answers of a column are the same in every row.

    python performance/preference.py --model results/model --data DATA --out results/benchmarks [--answers 200]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude

from nspo.data.stage import prepare_labels
from nspo.data.tables import load_labels
from nspo.judges.refusal import is_refusal
from nspo.models.loading import load_tokenizer
from nspo.preference import metrics as metrics
from nspo.preference.model import LENGTHS, Target, answer_features, encode
from nspo.preference.objective import Judgements, fit_head
from nspo.preference.stage import load_backbone
from nspo.run.devices import device_of
from nspo.run.progress import track
from nspo.settings.config import Config
from nspo.settings.data import LabelSettings
from nspo.settings.model import PreferenceSettings
from nspo.settings.reading import validate

Rows = list[dict[str, Any]]
COMPLIED = {"1_full_compliance": 1.0, "2_full_refusal": 0.0, "3_partial_refusal": 0.0}
TEST_ONLY = {"gptfuzz": "gptfuzz_evaluate"}  # a set with a file of its own for testing


def label_sets(data: Path) -> dict[str, dict[str, Any]]:
    """The sets as the configuration describes them, with the files below `data`."""

    def files(pattern: str) -> list[str]:
        return sorted(map(str, data.glob(pattern)))

    pyrit = {"kind": "graded", "category": ""}
    fuzz = {"kind": "graded", "target": "cost", "prompt": "question", "response": "Response", "score": "label"}
    fuzz["questions"] = {"source": str(data / "gptfuzz/question_list.csv")}
    xstest = {"kind": "graded", "source": files("xstest/xstest_v2_completions_*.csv"), "prompt": "prompt"}
    xstest |= {"response": "completion", "score": "final_label", "grades": COMPLIED}
    return {
        "pyrit_harm": pyrit | {"source": files("pyrit_scorer_evals/harm/*.csv"), "target": "cost"},
        "gptfuzz": fuzz | {"source": files("gptfuzz/responses_labeled_train.csv")},
        "gptfuzz_evaluate": fuzz | {"source": files("gptfuzz/responses_labeled_evaluate.csv")},
        "xstest_unsafe": xstest | {"target": "cost", "only": {"type": "^contrast_"}},
        "pyrit_objective": pyrit | {"source": files("pyrit_scorer_evals/objective/*.csv"), "target": "reward"},
        "pyrit_refusal": pyrit
        | {"source": files("pyrit_scorer_evals/refusal_scorer/*.csv"), "target": "reward", "inverted": True},
        "xstest_complied": xstest | {"target": "reward"},
        "coconot_pairs": {"kind": "pairs", "source": files("coconot_pref/*.json"), "target": "reward"}
        | {"prompt": "prompt", "category": "category"},
    }


def first(rows: Rows, count: int) -> Rows:
    """The first rows, pairs whole."""
    whole = [row for row in rows if not row["pair"]][:count]
    names = list(dict.fromkeys(row["pair"] for row in rows if row["pair"]))[: count // 2]
    return whole + [row for row in rows if row["pair"] in set(names)]


def chosen_rows(labels: Path, target: Target, answers: int) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Training and test rows by set; no test prompt is trained on in any set."""
    train, test = ({s["set"]: [] for s in load_labels(labels, target, "train")} for _ in range(2))
    for name in train:
        rows = {s: [r for r in load_labels(labels, target, s) if r["set"] == name] for s in ("train", "heldout")}
        only_test = name in TEST_ONLY.values()
        train[name] = [] if only_test else first(rows["train"], answers)
        test[name] = first([*rows["heldout"], *(rows["train"] if only_test else [])], answers)
    for name, own in TEST_ONLY.items():
        if name in train:  # its own file of other questions stands for its held-out prompts
            test[name] = test.pop(own)
            del train[own]
    trained = {row["prompt"] for rows in train.values() for row in rows}
    if shared := trained & {row["prompt"] for rows in test.values() for row in rows}:
        raise ValueError(f"{len(shared)} prompts are in training and test")
    return train, test


def features_of(model: Path, settings: PreferenceSettings, target: Target, rows: Rows, threads: int) -> torch.Tensor:
    """(N, L, d) features of every row."""
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(model)
    trunk = load_backbone(model, settings, target, device_of("auto"))
    encoded = [encode(tokenizer, row["prompt"], row["response"], settings.max_tokens) for row in rows]
    with track(f"{target} features", len(rows), "answer") as bar:
        return answer_features(trunk, encoded, tokenizer.pad_token_id, LENGTHS, bar.update)


def measured(scores: metrics.Floats, rows: Rows, judged: Judgements, has_zero: bool = True) -> dict[str, Any]:
    """n, accuracy at zero, and AUROC, or for pairs the share in order, with its interval."""
    prompts = [row["prompt"] for row in rows]
    if len(judged.pairs):
        pairs = judged.pairs.numpy()
        gaps = scores[pairs[:, 0]] - scores[pairs[:, 1]]
        found = metrics.interval(metrics.in_order, gaps, gaps > 0, [prompts[i] for i in pairs[:, 0]], seed=0)
        accuracy, kind = None, "pairs in order"
    else:
        positive = judged.signs.numpy() > 0
        found = metrics.interval(metrics.auroc, scores, positive, prompts, seed=0)
        accuracy, kind = (metrics.sign_accuracy(scores, positive) if has_zero else None), "AUROC"
    shown = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return {
        "n": found["n"],
        "accuracy": None if accuracy is None else f"{accuracy:.1%}",
        "measure": kind,
        "value": shown,
    }


def transfer(target: Target, model: Path, labels: Path, answers: int, threads: int) -> Rows:
    """One row per training set (and all together, and the baselines) and test set."""
    settings: PreferenceSettings = getattr(Config(), target)
    train, test = chosen_rows(labels, target, answers)
    every = [row for part in (*train.values(), *test.values()) for row in part]
    features = dict(
        zip((row["id"] for row in every), features_of(model, settings, target, every, threads), strict=True)
    )

    def stacked(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        return torch.stack([features[row["id"]] for row in rows])

    judged = {name: Judgements.of(rows, target, settings.positive_above) for name, rows in test.items()}
    table = []
    for name, rows in [*train.items(), ("all", [row for part in train.values() for row in part])]:
        labelled = Judgements.of(rows, target, settings.positive_above)
        head = fit_head(stacked(rows), labelled, settings.l2)
        for other, tested in test.items():
            scores = (stacked(tested)[:, -1].double() @ head).numpy()
            found = measured(scores, tested, judged[other], bool(labelled.signs.any()))
            table.append({"target": target, "trained on": name, "n train": len(rows), "tested on": other, **found})
    tokenizer = load_tokenizer(model)
    for other, tested in test.items():
        texts = [row["response"] for row in tested]
        lengths = np.array([len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], dtype=float)
        share = float((judged[other].signs > 0).double().mean())
        majority = np.where(share > 0.5, 1.0, -1.0) * np.ones(len(tested))
        complied = np.array([-1.0 if is_refusal(text) else 1.0 for text in texts])
        for name, scores, zero in (
            ("majority", majority, True),
            ("refusal phrases", complied, True),
            ("answer length", lengths, False),
        ):
            found = measured(scores, tested, judged[other], zero)
            table.append({"target": target, "trained on": name, "n train": 0, "tested on": other, **found})
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets, each in a folder of its own")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=200, help="most answers of a set for training, and for testing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    settings = validate(LabelSettings, {"wheels": {}, "labels": label_sets(given.data)}, "labels")
    given.out.mkdir(parents=True, exist_ok=True)
    labels = given.out / "preference_labels.parquet"
    prepare_labels(settings, Path(), labels)
    targets: tuple[Target, ...] = ("cost", "reward")
    rows = [row for target in targets for row in transfer(target, given.model, labels, given.answers, given.threads)]
    conclude("preference", given.out, rows, answers=given.answers)


if __name__ == "__main__":
    main()
