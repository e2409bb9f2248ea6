"""Train the second judge: a logistic regression on frozen sentence embeddings, fitted on labels of its own.

The labels are people's grades of answers in the split `judge` of `labels.parquet`: neither the cost nor the reward
model learns from it, and no prompt of it, nor one like it, is in another split. The fit is convex and depends on no
seed. Held-out labels are for `nspo judge-agreement` alone.

The threshold of the topic comes from the same answers: the cosine that best tells an answer (no refusal) to its own
prompt from the same answer beside the prompt of another. By cross-validation over the 53 prompts of the default's
labels, the read-out of MiniLM is best after 1 or 2 of its 6 blocks (AUROC 0.78) and worst after the last (0.64).

Command: `nspo train-second-judge --encoder DIR --labels results/labels.parquet --wheels-dir results/wheels --out DIR`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from nspo.data.tables import load_labels
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint_files, fingerprint_model, make_manifest, write_json
from nspo.files.sources import Source
from nspo.files.tensors import save_tensors
from nspo.judges.refusal import is_refusal
from nspo.judges.second.encoder import Encoder
from nspo.judges.second.judge import HEAD, KIND
from nspo.models.loading import source_folder
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.settings.judges import SecondJudgeSettings
from nspo.settings.runtime import RuntimeSettings

SHUFFLES = 3  # times that every answer is put beside the prompt of another
Floats = NDArray[np.float64]


def train_second_judge(
    settings: SecondJudgeSettings, labels: Path, wheels_dir: Path, out: Path, runtime: RuntimeSettings
) -> None:
    """Write the folder `out`: the encoder as it is, head.safetensors, and manifest.json.

    Args:
        labels: labels.parquet.
        wheels_dir: folder of the unpacked wheels, one of which may hold the encoder.

    Raises:
        UserError: no encoder, or labels of one class, or of one prompt, in the split `judge`.
    """
    rows = [row for row in load_labels(labels, "cost", "judge") if row["grade"] is not None]
    harmful = np.array([row["grade"] >= settings.positive_above for row in rows])
    if len({row["prompt"] for row in rows}) < 2 or len(set(harmful.tolist())) < 2:
        raise UserError(
            f"{labels}: {int(harmful.sum())} of {len(rows)} labels of the second judge are graded "
            f"{settings.positive_above} or more",
            expected="some of both kinds",
            change="raise data.judge_fraction",
        )
    encoder = load_encoder(settings, wheels_dir, device_of(runtime.device))
    asked = encoder.embed([row["prompt"] for row in rows], "prompts of the labels")
    said = encoder.embed([row["response"] for row in rows], "answers of the labels")
    weight = fit(said.words.numpy(), harmful, settings.l2)
    answered = [place for place, row in enumerate(rows) if not is_refusal(row["response"])]
    pairs = cosines(asked.meaning[answered], said.meaning[answered], [rows[i]["prompt"] for i in answered])
    topic = topic_threshold(*pairs)
    with atomic_path(out) as scratch:
        encoder.model.save_pretrained(scratch)
        encoder.tokenizer.save_pretrained(scratch)
        encoder_name = Source.parse(settings.encoder or "").published
        facts = {"labels": fingerprint_files([labels]), "encoder": encoder_name, "topic": topic}
        facts["settings"] = {**settings.identity(), "encoder": encoder_name}
        head = {"weight": torch.from_numpy(weight[:-1].copy()), "bias": torch.from_numpy(weight[-1:].copy())}
        save_tensors(scratch / HEAD, head, make_manifest(KIND, **facts))
        training = {
            "responses": len(rows),
            "positives": int(harmful.sum()),
            "prompts": len({r["prompt"] for r in rows}),
        }
        written = make_manifest(KIND, **facts, training=training, model=fingerprint_model(scratch))
        write_json(scratch / MANIFEST_NAME, written)
    say(
        f"second judge: {len(rows)} labels, {int(harmful.sum())} harmful; on topic from a cosine of "
        f"{topic['threshold']:.2f} ({topic['own']:.0%} of answers to their own prompt, {topic['other']:.0%} to another)"
    )


def load_encoder(settings: SecondJudgeSettings, wheels_dir: Path, device: torch.device) -> Encoder:
    """The encoder that the settings name.

    Raises:
        UserError: when there is none.
    """
    source = Source.parse(settings.encoder or "")
    if source.kind == "tiny":
        from nspo.models.tiny import tiny_model, tiny_tokenizer

        return Encoder(tiny_model().model.to(device).eval(), tiny_tokenizer(), settings.max_tokens, settings.layer)
    named = f"second_judge.encoder: {settings.encoder}"
    folder = source_folder("second_judge.encoder", source, wheels_dir)
    return Encoder.load(folder, named, settings.max_tokens, settings.layer, device)


def fit(features: Floats, positive: NDArray[np.bool_], l2: float) -> Floats:
    """Weights w and intercept b, as (d + 1,), at the least of mean -log sigmoid(sign * (w x + b)) + l2 ||w||^2."""
    signs = np.where(positive, 1.0, -1.0)

    def objective(w: Floats) -> tuple[float, Floats]:
        margins = signs * (features @ w[:-1] + w[-1])
        slopes = -signs * expit(-margins) / len(signs)
        value = np.logaddexp(0, -margins).mean() + l2 * (w[:-1] ** 2).sum()
        return float(value), np.append(slopes @ features + 2 * l2 * w[:-1], slopes.sum())

    found: Floats = minimize(objective, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found


def cosines(asked: Tensor, said: Tensor, prompts: Sequence[str]) -> tuple[Floats, Floats]:
    """Closeness of answers to their own prompts, and to those of others among them, by shuffling.

    Args:
        asked, said: (N, d), embeddings of the prompts and of the answers.
    """
    questions, answers = asked.numpy(), said.numpy()
    names, rng = np.array(prompts), np.random.default_rng(0)
    partners = np.concatenate([rng.permutation(len(names)) for _ in range(SHUFFLES)])
    theirs = np.tile(np.arange(len(names)), SHUFFLES)
    apart = names[partners] != names[theirs]
    return (questions * answers).sum(-1), (questions[partners] * answers[theirs]).sum(-1)[apart]


def topic_threshold(own: Floats, other: Floats) -> dict[str, Any]:
    """The `threshold` with the best balanced accuracy, and the shares of both that it calls on topic.

    Raises:
        UserError: without pairs of both kinds.
    """
    if not len(own) or not len(other):
        raise UserError(
            "the labels of the second judge hold no answers to two prompts that are no refusals",
            expected="some",
            change="raise data.judge_fraction",
        )
    tried = np.unique(np.concatenate([own, other]))
    hit, passed = ((values[None] >= tried[:, None]).mean(1) for values in (own, other))
    best = int(np.argmax(hit - passed))
    return {
        "threshold": float(tried[best]),
        "own": float(hit[best]),
        "other": float(passed[best]),
        "answers": len(own),
    }
