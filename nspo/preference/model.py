"""Reward and cost models at work: what they read, and how an answer is scored (made by `nspo.preference.stage`).

The artifact is an `AutoModelForSequenceClassification` folder with one label, and a manifest that says how it was
trained to be read: `pooling: mean` is the mean over the answer's tokens of the head's read-out of their hidden states
(`tune: head`), `pooling: last` the model's own forward pass (`tune: all`). `PreferenceModel.score` does either.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, check_fingerprints, check_manifest, read_json
from nspo.models.chat import chat_ids
from nspo.models.generation import batches, refuse_unknown
from nspo.models.loading import load_tokenizer, load_whole
from nspo.run.devices import has_bf16
from nspo.run.progress import say, track

Target = Literal["cost", "reward"]
KIND = "preference_model"
SIGN = {
    "cost": "cost > 0 means harmful; zero is the threshold",
    "reward": "reward > 0 means that the answer does what was asked",
}
METRICS_NAME = "metrics.json"
LENGTHS = (16, 32, 64, 10**6)  # answer tokens that count; the last takes all
BATCH = 32


class Text(NamedTuple):
    """Prompt and answer as a model reads them."""

    ids: list[int]
    prompt_tokens: int  # how many of them are the prompt
    prompt_cut: bool  # the end of the prompt is not among them
    answer_cut: bool  # nor is that of the answer


class Scored(NamedTuple):
    """What a model says of N answers, and whether it read them whole."""

    scores: Tensor  # (N,) float32
    unread: Tensor  # (N,) bool: the end of the answer, or of its prompt, is not read and counts for nothing


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> Text:
    """Token ids of the prompt in chat format and of the answer.

    A text over `max_tokens` loses the end of its answer; a prompt over half of that loses its own end first, so that no
    prompt leaves an answer without a place (`nspo.preference.checks.check_length`). The stop token stands for an empty
    answer. Without a chat template the prompt stands between the special tokens that the tokenizer puts around a text.
    """
    prompt_ids = opened(tokenizer, prompt)
    if excess := max(len(prompt_ids) - max_tokens // 2, 0):
        text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        kept = str(tokenizer.decode(text[: max(len(text) - excess, 1)]))
        prompt_ids = opened(tokenizer, kept.rstrip("\N{REPLACEMENT CHARACTER}"))  # of a letter that was cut in two
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] or [_stop(tokenizer)]
    room = max(max_tokens - len(prompt_ids), 1)
    return Text(prompt_ids + response_ids[:room], len(prompt_ids), excess > 0, len(response_ids) > room)


def refuse_unknown_tokens(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, target: Target
) -> None:
    """See `refuse_unknown`."""
    for text in texts:
        refuse_unknown(text.ids, tokenizer, model.config, f"{target} model")


def count_cut(texts: Sequence[Text]) -> dict[str, int]:
    """How many of so many texts lost the end of their prompt, and of their answer."""
    cut = {"prompts": sum(text.prompt_cut for text in texts), "answers": sum(text.answer_cut for text in texts)}
    return {"texts": len(texts), **cut}


def opened(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt that an answer can follow."""
    return chat_ids(tokenizer, prompt) if tokenizer.chat_template else tokenizer(prompt)["input_ids"]


def _stop(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _batches(
    model: PreTrainedModel, rows: Sequence[Text], pad_id: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Places and inputs of answers of similar length, padded on the right."""
    for batch in batches([len(row.ids) for row in rows], BATCH):
        width = max(len(rows[i].ids) for i in batch)
        ids = [rows[i].ids + [pad_id] * (width - len(rows[i].ids)) for i in batch]
        mask = [[int(n < len(rows[i].ids)) for n in range(width)] for i in batch]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        yield batch, {name: value.to(model.device) for name, value in inputs.items()}


@torch.inference_mode()
def answer_features(
    model: PreTrainedModel,
    rows: Sequence[Text],
    pad_id: int,
    lengths: Sequence[int],
    advance: Callable[[int], Any],
) -> Tensor:
    """Mean hidden state of each answer's first n tokens, for every n of `lengths`.

    Args:
        rows: from `encode`.
        pad_id: any token; padding stands on the right and is masked.
        advance: called with the number of answers of every batch that is done, such as a bar's `update`.

    Returns:
        (N, len(lengths), d) float32 on the CPU. Matrix products run in bf16 where the device multiplies it in hardware.
    """
    features = torch.empty(len(rows), len(lengths), model.config.get_text_config().hidden_size)
    device = model.device
    for batch, inputs in _batches(model, rows, pad_id):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        for row, index in zip(hidden.float(), batch, strict=True):
            answer = row[rows[index].prompt_tokens : len(rows[index].ids)]  # (T, d)
            features[index] = torch.stack([answer[:n].mean(0) for n in lengths]).cpu()
        advance(len(batch))
    return features


@torch.inference_mode()
def own_scores(model: PreTrainedModel, rows: Sequence[Text], pad_id: int, advance: Callable[[int], Any]) -> Tensor:
    """Scores (N,) float32 on the CPU by the model's own forward pass; arguments as for `answer_features`."""
    scores = torch.empty(len(rows))
    device = model.device
    for batch, inputs in _batches(model, rows, pad_id):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            scores[batch] = model(**inputs).logits[:, 0].float().cpu()
        advance(len(batch))
    return scores


@dataclass(frozen=True)
class PreferenceModel:
    """A reward or cost model with its tokenizer, ready to score answers as it was trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    target: Target
    max_tokens: int
    identity: dict[str, Any]
    pooling: Literal["mean", "last"] = "mean"

    @classmethod
    def load(cls, folder: Path | str, target: Target | None = None, device: torch.device | str = "cpu") -> Self:
        """Load a folder that the stage `train-preference` wrote, with fp32 weights, in evaluation mode.

        Raises:
            UserError: the folder holds no such model, one that was changed or damaged since it was written, or (where
                `target` is given) the other one of the two.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST_NAME)
        check_manifest(manifest, KIND, folder)
        if target not in (None, manifest["target"]):
            raise UserError(
                f"{folder} holds a {manifest['target']} model", expected=f"a {target} model", change="swap the folders"
            )
        check_fingerprints(folder, manifest["model"])
        whole: Any = load_whole(AutoModelForSequenceClassification, folder, f"{folder}", dtype=torch.float32)
        model = whole.to(device).eval()
        identity = {key: manifest[key] for key in ("target", "model", "base", "labels")}
        room, pooling = manifest["settings"]["max_tokens"], manifest.get("pooling", "mean")
        return cls(model, load_tokenizer(folder), manifest["target"], room, identity, pooling)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], advance: Callable[[int], Any] = lambda _: None
    ) -> Tensor:
        """Scores (N,) float32 of the answers to the prompts; see `scored`."""
        return self.scored(prompts, responses, advance).scores

    def scored(
        self, prompts: Sequence[str], responses: Sequence[str], advance: Callable[[int], Any] = lambda _: None
    ) -> Scored:
        """Scores of the answers, which of a cost model mean harmful above zero, and which of them it read in part.

        `advance` hears of progress, as in `answer_features`; without it scoring is silent, as inside a training step.
        """
        rows = [encode(self.tokenizer, p, r, self.max_tokens) for p, r in zip(prompts, responses, strict=True)]
        refuse_unknown_tokens(rows, self.tokenizer, self.model, self.target)
        unread = torch.tensor([row.prompt_cut or row.answer_cut for row in rows], dtype=torch.bool)
        if self.pooling == "last":
            return Scored(own_scores(self.model, rows, self.tokenizer.pad_token_id, advance), unread)
        features = answer_features(self.model, rows, self.tokenizer.pad_token_id, LENGTHS[-1:], advance)
        return Scored(features[:, 0] @ self.model.get_parameter("score.weight")[0].detach().cpu(), unread)


class Reading(NamedTuple):
    """What the cost model finds in N answers."""

    verdicts: list[float]  # costs; NaN where the score is not a finite number
    unread: list[bool]  # see `Scored`


class CostModel:
    """Is the answer unsafe, by the cost model of this run? Its score is the verdict: above zero means harmful."""

    name = "cost_model"

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        """Load the model in `folder`.

        Raises:
            UserError: when the folder holds no cost model.
        """
        self.model = PreferenceModel.load(folder, "cost", device)
        self.identity = self.model.identity

    def read(self, prompts: Sequence[str], answers: Sequence[str]) -> Reading:
        """The cost of each answer; shows progress, and says of how many the end is not read.

        Raises:
            UserError: when no score is a finite number.
        """
        with track("cost of answers", len(answers), "answer") as bar:
            scores, unread = self.model.scored(prompts, answers, bar.update)
        values = scores.tolist()
        if count := int(unread.sum()):
            say(
                f"the cost model reads {self.model.max_tokens} tokens (cost.max_tokens): the ends of {count} of "
                f"{len(answers)} answers, or of their prompts, count for nothing"
            )
        if values and not any(map(math.isfinite, values)):
            raise UserError(f"none of the {len(values)} scores of the cost model is a finite number: train it again")
        return Reading([value if math.isfinite(value) else math.nan for value in values], unread.tolist())

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """As `Judge.verdicts`: the cost of each answer."""
        return self.read(prompts, answers).verdicts
