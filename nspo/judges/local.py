"""Judges that transformers loads: a sequence classifier, or a guard model that writes its verdict.

Both see prompt and answer, run no code of the model's repository, and work in batches of similar length. A guard
model's prompt is its own chat template, which takes the judged turns (Llama-Guard), or a `template` of the settings
(WildGuard), and it decodes greedily; config/README.md shows one of each kind.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from nspo.errors import UserError
from nspo.files.sources import Source
from nspo.judges.judge import Failures, Keep
from nspo.judges.replies import described, expected, fill, turns, unreadable, verdict
from nspo.models.generation import batches, generate, stop_ids
from nspo.models.loading import load_config, load_model, load_tokenizer, load_whole, model_folder, model_identity
from nspo.models.structure.positions import positions_of
from nspo.run.progress import say, track
from nspo.settings.judges import ClassifierJudge, GuardJudge

PROBE = "nspo-probe-prompt", "nspo-probe-answer"


class Guard:
    """Is the answer unsafe, by what a guard model writes?"""

    def __init__(self, key: str, settings: GuardJudge, device: torch.device, stay: bool = False) -> None:
        """Read the tokenizer and try the chat template; the weights are loaded when it judges, and may `stay`.

        Raises:
            UserError: when there is no such model, or its chat template does not show prompt and answer.
        """
        self.key, self.name = key, key.rpartition(".")[2]
        self.failures = Failures()
        self.model = cache(self._load) if stay else self._load
        self.settings = settings
        self.device = device
        self.folder = model_folder(f"{key}.source", settings.source)
        self.tokenizer = load_tokenizer(self.folder, f"{key}.source")
        self.in_parts = False
        if self.tokenizer.chat_template is None and not settings.template:
            raise UserError(
                f"{key}: the model has no chat template", expected="a `template` with the text from its card"
            )
        self.in_parts = not self._shows_both()
        if not self._shows_both():
            raise UserError(
                f"{key}: the model's chat template does not show both the prompt and the answer",
                expected="a guard model, or a `template`",
            )
        self.identity = _identity(settings, self.folder)

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], keep: Keep = lambda *_: None) -> list[float]:
        """1 for unsafe, 0 for safe, NaN for a reply that is no verdict, is cut off, or does not fit the model."""
        model = self.model()
        ids = [self._ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        room = (positions_of(model.config) or math.inf) - self.settings.max_tokens
        fits = [place for place, row in enumerate(ids) if len(row) <= room]
        if len(fits) < len(ids):
            say(f"{self.name}: {len(ids) - len(fits)} answers are longer than the model can read, and fail")
        found, odd, cut, stops = [math.nan] * len(ids), [], 0, stop_ids(model, self.tokenizer)
        description = f"verdicts of {self.name}"
        replies = generate(
            model,
            self.tokenizer,
            [ids[place] for place in fits],
            self.settings.max_tokens,
            self.settings.batch_size,
            description,
        )
        for index, reply in replies:
            text = str(self.tokenizer.decode(reply, skip_special_tokens=True))
            value = verdict(self.settings, text) if reply[-1] in stops else math.nan
            cut += reply[-1] not in stops
            found[fits[index]] = value
            if math.isnan(value):
                odd.append(described(text, reply[-1] not in stops))
            else:
                keep(fits[index], value)
        said = unreadable(self.name, expected(self.settings), odd, cut, self.settings.max_tokens)
        self.failures = Failures(replies=said or "all are longer than the model can read")
        return found

    def _load(self) -> PreTrainedModel:
        return load_model(self.folder, self.device, "auto")

    def _text(self, prompt: str, answer: str) -> str:
        """What the model is shown, as text."""
        if self.tokenizer.chat_template is None:
            return fill(self.settings.template, prompt=prompt, response=answer)
        shown: list[Any] = turns(self.settings.template, prompt, answer)
        if self.in_parts:  # the form that templates of multimodal guard models read
            shown = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in shown]
        return str(self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True))

    def _ids(self, prompt: str, answer: str) -> list[int]:
        """Token ids of `_text`, with the first special token once."""
        text = self._text(prompt, answer)
        begins = self.tokenizer.chat_template is not None or text.startswith(self.tokenizer.bos_token or "\0")
        return self.tokenizer(text, add_special_tokens=not begins)["input_ids"]

    def _shows_both(self) -> bool:
        try:
            return all(part in self._text(*PROBE) for part in PROBE)
        except Exception:  # a chat template is a program of its own and may raise anything
            return False


class Classifier:
    """Is the answer unsafe, by the probability that a sequence classifier gives its labels?

    With one label per answer the probabilities of the labels that mean unsafe add up; with several at once (a model for
    many labels, or for one alone) the largest counts.
    """

    def __init__(self, key: str, settings: ClassifierJudge, device: torch.device, stay: bool = False) -> None:
        """Read the model's labels and its tokenizer; the weights are loaded when it judges, and may `stay`.

        Raises:
            UserError: when there is no such model or label.
        """
        self.key, self.name = key, key.rpartition(".")[2]
        self.failures = Failures()
        self.model = cache(self._load) if stay else self._load
        self.settings = settings
        self.device = device
        self.folder = model_folder(f"{key}.source", settings.source)
        config = load_config(self.folder, f"{key}.source")
        self.tokenizer = load_tokenizer(self.folder, f"{key}.source", side="right")
        labels = {label: index for index, label in (config.id2label or {}).items()}
        if unknown := [label for label in settings.unsafe if label not in labels]:
            raise UserError(f"{key}.unsafe: the model has no label {unknown[0]!r}, found {', '.join(labels)}")
        self.columns = [labels[label] for label in settings.unsafe]
        self.several = config.problem_type == "multi_label_classification" or len(labels) == 1
        self.room = min(settings.max_tokens, self.tokenizer.model_max_length, positions_of(config) or math.inf)
        self.identity = _identity(settings, self.folder)

    @torch.inference_mode()
    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], keep: Keep = lambda *_: None) -> list[float]:
        """P(unsafe) - threshold for each answer, NaN where the model gives no number; shows progress."""
        model = self.model()
        rows = [self._encoded(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found = [math.nan] * len(rows)
        with track(f"verdicts of {self.name}", len(rows), "answer") as bar:
            for batch in batches([len(row["input_ids"]) for row in rows], self.settings.batch_size):
                padded = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt").to(self.device)
                logits = model(**padded).logits.double().cpu()  # (B, labels)
                chances = logits.sigmoid() if self.several else logits.softmax(-1)
                named = chances[:, self.columns]
                unsafe = named.amax(-1) if self.several else named.sum(-1)
                for place, value in zip(batch, (unsafe - self.settings.threshold).tolist(), strict=True):
                    found[place] = value
                    if math.isfinite(value):
                        keep(place, value)
                bar.update(len(batch))
        self.failures = Failures(replies="its scores are no finite numbers")
        return found

    def _encoded(self, prompt: str, answer: str) -> dict[str, Any]:
        if self.settings.template:
            text = fill(self.settings.template, prompt=prompt, response=answer)
            return dict(self.tokenizer(text, truncation=True, max_length=self.room))
        return dict(self.tokenizer(prompt, answer, truncation="longest_first", max_length=self.room))

    def _load(self) -> PreTrainedModel:
        model: Any = load_whole(AutoModelForSequenceClassification, self.folder, f"{self.key}.source", dtype="auto")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.device).eval()


def _identity(settings: GuardJudge | ClassifierJudge, folder: Path) -> dict[str, Any]:
    """What shapes the verdicts."""
    source = Source.parse(settings.source)
    place = {"revision": source.revision} if source.kind == "hub" else {}
    model = {**model_identity(folder), **place}
    return {**settings.model_dump(mode="json"), "source": source.published, "model": model}
