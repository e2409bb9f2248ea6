"""Reward and cost models from human labels: a head on the frozen leading blocks of the policy's own base model.

The score of an answer is the mean over its tokens of one linear read-out of their hidden states. The head is fitted to
the objectives of Safe RLHF (arXiv 2310.12773, eq. 5 and 6) over all pairs of a positive and a negative answer:
Bradley-Terry -log sigmoid(p - n), and for both models the sign terms -log sigmoid(p) and -log sigmoid(-n), so that zero
is the threshold: cost > 0 means harmful. It is convex, so the result depends on no seed. Every answer counts at several
lengths (its first 16, 32, 64 tokens and all of it), and pairs compare equal lengths: people grade long answers as more
harmful and more helpful, and a model that may see the length learns little else.

Differences from Safe RLHF: the trunk is frozen. With the 576 and 341 training labels of the embedded data, fine-tuning
16 blocks on pairs reached a held-out AUROC of 0.83 (cost) and 0.83 (reward), the head on frozen features 0.86 and 0.92
in a fifth of the time. (The NSPO release has no cost model: it asks Llama-Guard at temperature 1 without the question.)

The artifact is a plain `AutoModelForSequenceClassification` folder with one label; transformers' own forward pass reads
the last token only, `PreferenceModel.score` averages over the answer. Command: `nspo train-preference --target cost
--model results/model --labels results/labels.parquet --out results/cost`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from nspo import preference_metrics as metrics
from nspo.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    check_manifest,
    fingerprint_files,
    fingerprint_model,
    make_manifest,
    read_json,
    write_json,
)
from nspo.config import PreferenceSettings, RuntimeSettings
from nspo.errors import UserError
from nspo.models import chat_ids, device_of, has_bf16, load_tokenizer, model_identity
from nspo.progress import say, track
from nspo.prompts import load_labels
from nspo.refusal import is_refusal

Target = Literal["cost", "reward"]
KIND = "preference_model"
SIGN = {
    "cost": "cost > 0 means harmful; zero is the threshold",
    "reward": "reward > 0 means that the answer does what was asked",
}
METRICS_NAME = "metrics.json"
LENGTHS = (16, 32, 64, 10**6)  # answer tokens that count; the last takes all
BATCH = 32


# Scoring


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> tuple[list[int], int]:
    """Token ids of the prompt in chat format and of the answer, and how many of them are the prompt.

    A text over `max_tokens` loses the end of its answer; a prompt over half of that loses its own end first. At least
    one token of the answer is kept (the stop token stands for an empty one).
    """
    prompt_ids = chat_ids(tokenizer, prompt)
    if excess := max(len(prompt_ids) - max_tokens // 2, 0):
        text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt_ids = chat_ids(tokenizer, str(tokenizer.decode(text[: max(len(text) - excess, 1)])))
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return prompt_ids + response_ids[: max(max_tokens - len(prompt_ids), 1)], len(prompt_ids)


@torch.inference_mode()
def answer_features(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], int]],
    pad_id: int,
    lengths: Sequence[int],
    advance: Callable[[int], Any],
) -> Tensor:
    """Mean hidden state of each answer's first n tokens, for every n of `lengths`.

    Args:
        rows: (ids, number of prompt tokens) from `encode`.
        pad_id: any token; padding stands on the right and is masked.
        advance: called with the number of answers of every batch that is done, such as a bar's `update`.

    Returns:
        (N, len(lengths), d) float32 on the CPU. Matrix products run in bf16 where the device multiplies it in hardware.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), i))
    features = torch.empty(len(rows), len(lengths), model.config.hidden_size)
    device = model.device
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        width = max(len(rows[i][0]) for i in batch)
        ids = torch.tensor([rows[i][0] + [pad_id] * (width - len(rows[i][0])) for i in batch], device=device)
        mask = torch.tensor([[n < len(rows[i][0]) for n in range(width)] for i in batch], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        for row, index in zip(hidden.float(), batch, strict=True):
            answer = row[rows[index][1] : len(rows[index][0])]  # (T, d)
            features[index] = torch.stack([answer[:n].mean(0) for n in lengths]).cpu()
        advance(len(batch))
    return features


@dataclass(frozen=True)
class PreferenceModel:
    """A reward or cost model with its tokenizer, ready to score answers as it was fitted."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    target: Target
    max_tokens: int
    identity: dict[str, Any]

    @classmethod
    def load(cls, folder: Path | str, target: Target | None = None, device: torch.device | str = "cpu") -> Self:
        """Load a folder written by `train_preference`, with fp32 weights, in evaluation mode.

        Raises:
            UserError: the folder holds no such model, or (where `target` is given) the other one of the two.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST_NAME)
        check_manifest(manifest, KIND, folder)
        if target not in (None, manifest["target"]):
            raise UserError(f"{folder} holds a {manifest['target']} model, expected a {target} model: swap the folders")
        model = (
            AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            .to(device)
            .eval()
        )
        identity = {key: manifest[key] for key in ("target", "model", "base", "labels")}
        return cls(model, load_tokenizer(folder), manifest["target"], manifest["settings"]["max_tokens"], identity)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], advance: Callable[[int], Any] = lambda _: None
    ) -> Tensor:
        """Scores (N,) float32 of the answers to the prompts; for a cost model, above zero means harmful.

        `advance` hears of progress, as in `answer_features`; without it scoring is silent, as inside a training step.
        """
        rows = [encode(self.tokenizer, p, r, self.max_tokens) for p, r in zip(prompts, responses, strict=True)]
        features = answer_features(self.model, rows, self.tokenizer.pad_token_id, LENGTHS[-1:], advance)
        return features[:, 0] @ self.model.get_parameter("score.weight")[0].detach().cpu()


# Fitting


def preference_loss(scores: Tensor, positive: Tensor) -> Tensor:
    """Bradley-Terry over all pairs of a positive and a negative answer, plus the sign terms; eq. 5 and 6 of Safe RLHF.

    Args:
        scores: (N, L), one column per answer length; only scores of one column are compared with each other.
        positive: (N,) bool, harmful for a cost model and helpful for a reward model.

    Returns:
        Scalar: mean over pairs of -log sigmoid(p - n), plus mean over answers of -log sigmoid(s), s = p or -n.
    """
    pairs = scores[positive][:, None] - scores[~positive][None]  # (P, M, L)
    signed = torch.where(positive[:, None], scores, -scores)
    return -logsigmoid(pairs).mean() - logsigmoid(signed).mean()


def fit_head(features: Tensor, positive: Tensor, l2: float) -> Tensor:
    """The read-out w (d,) float64 that minimises `preference_loss` + l2 ||w sigma||^2, sigma the features' mean spread.

    There is no intercept: hidden states have a large common part, which serves as one.

    Args:
        features: (N, L, d), mean hidden states at L answer lengths.
    """
    scaled = features.double()
    sigma = scaled.flatten(0, 1).std(0).mean()
    scaled = scaled / sigma
    weight = torch.zeros(scaled.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = preference_loss(scaled @ weight, positive) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach() / sigma


def train_preference(
    settings: PreferenceSettings, target: Target, model: Path, labels: Path, out: Path, runtime: RuntimeSettings
) -> None:
    """Fit the reward or the cost model and write its folder: weights, tokenizer, manifest.json, metrics.json.

    Raises:
        UserError: labels of one class only, a base model without a sequence classification class, or too few blocks.
    """
    train, heldout = (_labels(labels, target, split, settings) for split in ("train", "heldout"))
    tokenizer = load_tokenizer(model)
    scorer = _backbone(model, settings, device_of(runtime.device))
    scorer.config.pad_token_id = tokenizer.pad_token_id
    features, positive = {}, {}
    for split, rows in (("train", train), ("heldout", heldout)):
        encoded = [encode(tokenizer, row["prompt"], row["response"], settings.max_tokens) for row in rows]
        with track(f"{target} features ({split})", len(encoded), "answer") as bar:
            features[split] = answer_features(scorer, encoded, tokenizer.pad_token_id, LENGTHS, bar.update)
        positive[split] = torch.tensor([row["grade"] >= settings.positive_above for row in rows])
    head = fit_head(features["train"], positive["train"], settings.l2)
    with torch.no_grad():
        scorer.get_parameter("score.weight").copy_(head[None])
    scores = features["heldout"].double() @ head  # (N, L)
    found = metrics.describe(
        scores[:, -1].numpy(),
        positive["heldout"].numpy(),
        [row["prompt"] for row in heldout],
        [row["category"] for row in heldout],
        np.array([len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) for row in heldout]),
        np.array([is_refusal(row["response"]) for row in heldout]),
        seed=0,
    )
    found["first_tokens_auroc"] = {
        str(n): metrics.auroc(scores[:, i].numpy(), positive["heldout"].numpy()) for i, n in enumerate(LENGTHS[:-1])
    }
    with atomic_path(out) as scratch:
        scorer.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        manifest = make_manifest(
            KIND,
            target=target,
            base=model_identity(model),
            labels=fingerprint_files([labels]),
            model=fingerprint_model(scratch),
            settings=settings.dump(),
            sign=SIGN[target],
        )
        write_json(scratch / MANIFEST_NAME, manifest)
        training = {"responses": len(train), "positives": int(positive["train"].sum())}
        write_json(scratch / METRICS_NAME, {**manifest, "training": training, "heldout": found})
    say(
        f"{target} model: held-out AUROC {found['auroc']['value']:.3f}, accuracy at zero "
        f"{found['accuracy']['value']:.3f}, pairs in order {found['pair_accuracy']['value']:.3f} (n={found['n']})"
    )


def _labels(path: Path, target: Target, split: str, settings: PreferenceSettings) -> list[dict[str, Any]]:
    """The labelled rows of a split, refused when they are of one class."""
    rows = [row for row in load_labels(path, target, split) if row["grade"] is not None]
    positive = sum(row["grade"] >= settings.positive_above for row in rows)
    if positive in (0, len(rows)):
        raise UserError(
            f"{path}: {positive} of {len(rows)} {split} labels of the {target} model are graded "
            f"{settings.positive_above} or more, expected some of both kinds: change {target}.positive_above or "
            "data.labels"
        )
    return rows


def _backbone(folder: Path, settings: PreferenceSettings, device: torch.device) -> PreTrainedModel:
    """The first blocks of a base model with a one-number head that is still to be fitted, in fp32."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    blocks = settings.backbone_layers or config.num_hidden_layers
    if blocks > config.num_hidden_layers:
        raise UserError(
            f"backbone_layers is {blocks}, but {folder} has {config.num_hidden_layers} blocks: expected at most that "
            "many, or 0"
        )
    config.num_hidden_layers = blocks
    if len(getattr(config, "layer_types", None) or ()) > blocks:  # one entry per block; some derive it, some store it
        config.layer_types = config.layer_types[:blocks]
    config.num_labels = 1
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(
            f"model.source: transformers has no sequence classification class for {config.model_type!r}, which the "
            "reward and cost models need: expected another architecture (such as llama, qwen2, qwen3, mistral, gemma)"
        ) from error
    return model.to(device).eval()
