"""Reward and cost models from human labels: a truncated trunk of the policy with one output, trained on pairs.

Losses of Safe RLHF (arXiv 2310.12773). Reward: -log sigmoid(r_better - r_worse). Cost: the same on (harmful, safe),
plus -log sigmoid(s c) for both sides, s = +1 harmful, -1 safe, so cost > 0 means harmful and zero is the threshold; it
is never centred. Differences: the labels are graded single responses, so pairs are built from them (within a prompt,
then within a category, then any), anew for each pass; the trunk keeps only the first blocks; the token embeddings stay
frozen. (The NSPO release has no cost model: it asks Llama-Guard at temperature 1 without the question.)

Matrix products run in bf16 where the machine has them in hardware, else in fp32; master weights and scoring are
always fp32. Command: `nspo train-preference --target cost --model results/model --labels results/labels.parquet
--out results/cost`.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from nspo import preference_metrics as metrics
from nspo.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    check_manifest,
    fingerprint,
    fingerprint_files,
    fingerprint_model,
    make_manifest,
    read_json,
    write_json,
)
from nspo.config import PreferenceSettings, RuntimeSettings
from nspo.errors import UserError
from nspo.models import chat_text, device_of, load_tokenizer, model_identity
from nspo.progress import say, track
from nspo.prompts import load_labels
from nspo.refusal import is_refusal

Target = Literal["cost", "reward"]
KIND = "preference_model"
SIGN = {
    "cost": "cost > 0 means harmful; zero is the threshold",
    "reward": "a higher reward means that the answer does what was asked; only differences have a meaning",
}
METRICS_NAME = "metrics.json"
_MARK = "ANSWER"  # stands for an answer, to see what a chat template puts after one
SCORE_BATCH = 32
# Batches that are sorted by length together: less padding, and still nearly random.
BUCKET = 8


# Formatting and scoring ---------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> list[int]:
    """Token ids of one user turn and the assistant's answer to it, in the chat format, at most `max_tokens`.

    No special token is added a second time. Where the whole is too long, the end of the answer is cut; where the prompt
    takes more than half of the room, its end is cut too. What closes the turn stays, so every text is read at the same
    token.

    Raises:
        UserError: when the chat format alone leaves no room for text.
    """
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": _MARK}]
    opening, _, closing = str(tokenizer.apply_chat_template(turns, tokenize=False)).partition(_MARK)
    tail = _ids(tokenizer, closing)
    room = max_tokens - len(_ids(tokenizer, opening)) - len(tail)  # for prompt and answer
    if room < 2:
        raise UserError(
            f"max_tokens is {max_tokens}, but the chat format alone takes {max_tokens - room} tokens: raise it in the "
            "sections reward and cost"
        )
    question, answer = _ids(tokenizer, prompt), _ids(tokenizer, response)
    kept = max(room - len(answer), room // 2)
    if len(question) > kept:
        prompt = str(tokenizer.decode(question[:kept]))
    head = _ids(tokenizer, chat_text(tokenizer, prompt))
    return head + answer[: max(max_tokens - len(head) - len(tail), 0)] + tail


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def score_ids(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Scores of tokenised texts, padded on the right, batched by length.

    Yields:
        (indices into `rows`, their scores (B,) float32 on the CPU).
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(rows[i]) for i in batch)
        ids = torch.tensor([[*rows[i], *[pad_id] * (width - len(rows[i]))] for i in batch], device=model.device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, 1)
        yield batch, logits[:, 0].float().cpu()


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_tokens: int,
    batch_size: int = SCORE_BATCH,
) -> Tensor:
    """Scores (N,) float32 of `responses` to `prompts`, formatted as in training; batching changes nothing."""
    rows = [encode(tokenizer, p, r, max_tokens) for p, r in zip(prompts, responses, strict=True)]
    scores = torch.empty(len(rows))
    for indices, values in score_ids(model, rows, tokenizer.pad_token_id, batch_size):
        scores[indices] = values
    return scores


@dataclass(frozen=True)
class PreferenceModel:
    """A trained reward or cost model with its tokenizer, ready to score answers as it was trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    target: Target
    max_tokens: int
    identity: dict[str, Any]

    @classmethod
    def load(cls, folder: Path | str, target: Target | None = None, device: torch.device | str = "cpu") -> Self:
        """Load a folder written by `train_preference`, in fp32 and evaluation mode.

        Raises:
            UserError: the folder holds no such model, or (where `target` is given) the other one of the two.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST_NAME)
        check_manifest(manifest, KIND, folder)
        if target not in (None, manifest["target"]):
            raise UserError(f"{folder} holds a {manifest['target']} model, expected a {target} model: swap the folders")
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        identity = {key: manifest[key] for key in ("target", "model", "base", "labels")}
        return cls(model, load_tokenizer(folder), manifest["target"], manifest["settings"]["max_tokens"], identity)

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = SCORE_BATCH) -> Tensor:
        """Scores (N,) float32; for a cost model, above zero means harmful."""
        return score(self.model, self.tokenizer, prompts, responses, self.max_tokens, batch_size)


# Pairs --------------------------------------------------------------------------------------------------------------


def build_pairs(rows: Sequence[dict[str, Any]], harmful_above: float, rng: random.Random) -> list[tuple[int, int]]:
    """Pairs (index of a positive, index of a negative) that use every row at least once.

    Rows are matched within their prompt, then within their category, then anywhere; what the smaller class cannot match
    is paired again with a random row of it, of the same category where there is one.
    """
    classes: dict[bool, list[int]] = {True: [], False: []}
    for index, row in enumerate(rows):
        classes[row["grade"] >= harmful_above].append(index)
    left = {kind: rng.sample(members, len(members)) for kind, members in classes.items()}
    pairs: list[tuple[int, int]] = []
    for field in ("prompt", "category", None):
        waiting: dict[Any, list[int]] = {}
        for index in left[False]:
            waiting.setdefault(rows[index][field] if field else None, []).append(index)
        unmatched = []
        for index in left[True]:
            partners = waiting.get(rows[index][field] if field else None)
            if partners:
                pairs.append((index, partners.pop()))
            else:
                unmatched.append(index)
        left = {True: unmatched, False: [index for partners in waiting.values() for index in partners]}
    for kind, members in left.items():
        for index in members:
            near = [i for i in classes[not kind] if rows[i]["category"] == rows[index]["category"]]
            partner = rng.choice(near or classes[not kind])
            pairs.append((index, partner) if kind else (partner, index))
    rng.shuffle(pairs)
    return pairs


def _dataset(rows: list[dict[str, Any]], encoded: list[list[int]], settings: PreferenceSettings) -> Dataset:
    """All passes in the order they are trained on, so a resumed run continues exactly where the other stopped."""
    rng = random.Random(settings.seed)
    pairs = [pair for _ in range(settings.epochs) for pair in build_pairs(rows, settings.harmful_above, rng)]
    ordered: list[tuple[int, int]] = []
    size = settings.batch_size
    for start in range(0, len(pairs), BUCKET * size):
        chunk = sorted(pairs[start : start + BUCKET * size], key=lambda p: max(len(encoded[i]) for i in p))
        batches = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        short = [batches.pop()] if len(batches[-1]) < size else []
        rng.shuffle(batches)
        ordered += [pair for batch in batches + short for pair in batch]
    columns = zip(*((encoded[positive], encoded[negative]) for positive, negative in ordered), strict=True)
    return Dataset.from_dict(dict(zip(("chosen_ids", "rejected_ids"), map(list, columns), strict=True)))


# Training -----------------------------------------------------------------------------------------------------------


class CostTrainer(RewardTrainer):
    """TRL's reward trainer with the sign terms of Safe RLHF; the chosen side of a pair is the harmful one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """-log sigmoid(h - s) - log sigmoid(h) - log sigmoid(-s), each a mean over the pairs (h harmful, s safe)."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        harmful, safe = outputs.logits.squeeze(-1).chunk(2)  # each (B,)
        loss = loss - logsigmoid(harmful).mean() - logsigmoid(-safe).mean()
        return (loss, outputs) if return_outputs else loss


class _Progress(TrainerCallback):
    """Moves our bar, and asks for a checkpoint every `save_every` updates but the last."""

    def __init__(self, bar: Any, save_every: int) -> None:
        self.bar, self.save_every = bar, save_every

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """After each update."""
        self.bar.update(1)
        control.should_save = state.global_step % self.save_every == 0 and state.global_step < state.max_steps

    def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
        """Show the latest loss and training pair accuracy beside the bar."""
        self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in ("loss", "accuracy") if key in logs}, refresh=False)


def train_preference(
    settings: PreferenceSettings, target: Target, model: Path, labels: Path, out: Path, runtime: RuntimeSettings
) -> None:
    """Train the reward or the cost model and write its folder: weights, tokenizer, manifest.json, metrics.json.

    Raises:
        UserError: labels of one class only, a base model without a sequence classification class, or too few blocks.
    """
    device = device_of(runtime.device)
    train, heldout = (_labels(labels, target, split, settings) for split in ("train", "heldout"))
    identity = {"target": target, "base": model_identity(model), "labels": fingerprint_files([labels])}
    work = Path(runtime.workdir) / f"{target}-{fingerprint({**identity, 'settings': settings.dump()})}"

    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "right"
    encoded = [encode(tokenizer, row["prompt"], row["response"], settings.max_tokens) for row in train]
    data = _dataset(train, encoded, settings)
    scorer = _backbone(model, settings)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    autocast = has_bf16(device)
    kind = {"cost": CostTrainer, "reward": RewardTrainer}[target]
    trainer = kind(
        model=scorer,
        args=_arguments(settings, work, device, autocast, runtime),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint, done = _last_checkpoint(work)
    if checkpoint:
        say(f"train {target}: resuming after update {done} from {checkpoint}")
    steps = -(-len(data) // settings.batch_size)
    with track(f"train {target}", steps, "update", start=done) as bar:
        trainer.add_callback(_Progress(bar, max(1, steps // settings.epochs)))
        trainer.train(resume_from_checkpoint=checkpoint)

    scorer.eval()
    found = _heldout_metrics(scorer, tokenizer, heldout, settings, target)
    with atomic_path(out) as scratch:
        scorer.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        manifest = make_manifest(
            KIND, **identity, model=fingerprint_model(scratch), settings=settings.dump(), sign=SIGN[target]
        )
        write_json(scratch / MANIFEST_NAME, manifest)
        training = {"pairs": len(data), "updates": steps, "responses": len(train), "bf16_autocast": autocast}
        write_json(scratch / METRICS_NAME, {**manifest, "training": training, "heldout": found})
    shutil.rmtree(work, ignore_errors=True)
    say(
        f"{target} model: held-out AUROC {found['auroc']['value']:.3f}, accuracy at zero "
        f"{found['accuracy']['value']:.3f}, pairs in order {found['pair_accuracy']['value']:.3f} (n={found['n']})"
    )


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (elsewhere autocast would be slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _labels(path: Path, target: Target, split: str, settings: PreferenceSettings) -> list[dict[str, Any]]:
    """The labelled rows of a split, refused when they are of one class."""
    rows = load_labels(path, target, split)
    positive = sum(row["grade"] >= settings.harmful_above for row in rows)
    if positive in (0, len(rows)):
        raise UserError(
            f"{path}: {positive} of {len(rows)} {split} labels of the {target} model are graded "
            f"{settings.harmful_above} or more, expected both kinds: change {target}.harmful_above or data.labels"
        )
    return rows


def _backbone(folder: Path, settings: PreferenceSettings) -> PreTrainedModel:
    """The first blocks of a base model with a new one-number head, in fp32; the token embeddings are frozen."""
    config = AutoConfig.from_pretrained(folder)
    try:
        AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"model.source: transformers has no sequence classification class for {config.model_type!r}, which the "
            "reward and cost models need: expected another architecture (such as llama, qwen2, mistral, gemma)"
        ) from error
    blocks = settings.backbone_layers or config.num_hidden_layers
    if blocks > config.num_hidden_layers:
        raise UserError(
            f"backbone_layers is {blocks}, but {folder} has {config.num_hidden_layers} blocks: expected at most that "
            "many, or 0 for all"
        )
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):  # one entry per block, checked against the number of blocks
        config.layer_types = config.layer_types[:blocks]
    config.num_labels = 1
    set_seed(settings.seed)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports the blocks left out and the new head, both meant
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.get_input_embeddings().requires_grad_(False)
    return model


def _arguments(
    settings: PreferenceSettings, work: Path, device: torch.device, autocast: bool, runtime: RuntimeSettings
) -> RewardConfig:
    """Every field that shapes the result, written out: defaults shift between releases of the trainer."""
    return RewardConfig(
        output_dir=str(work),
        num_train_epochs=1,  # the data set holds all passes
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.01,
        max_grad_norm=1.0,
        label_smoothing_factor=0.0,
        center_rewards_coefficient=None,
        disable_dropout=True,
        max_length=None,
        bf16=autocast,
        fp16=False,
        gradient_checkpointing=False,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=runtime.log_every,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",  # the progress callback asks for them
        save_total_limit=1,
        eval_strategy="no",
        push_to_hub=False,
    )


def _last_checkpoint(work: Path) -> tuple[str | None, int]:
    """The newest checkpoint that was written to its end (trainer_state.json comes last), and its updates."""
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return (str(newest), int(newest.name.rpartition("-")[2])) if newest else (None, 0)


def _heldout_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    settings: PreferenceSettings,
    target: Target,
) -> dict[str, Any]:
    """Score the held-out responses and compare with the people."""
    encoded = [encode(tokenizer, row["prompt"], row["response"], settings.max_tokens) for row in rows]
    scores = np.empty(len(rows))
    with track(f"score held-out {target}", len(rows), "response") as bar:
        for indices, values in score_ids(model, encoded, tokenizer.pad_token_id, SCORE_BATCH):
            scores[indices] = values.numpy()
            bar.update(len(indices))
    return metrics.describe(
        scores,
        np.array([row["grade"] >= settings.harmful_above for row in rows]),
        [row["prompt"] for row in rows],
        [row["category"] for row in rows],
        np.array([len(_ids(tokenizer, row["response"])) for row in rows]),
        np.array([is_refusal(row["response"]) for row in rows]),
        settings.seed,
    )
