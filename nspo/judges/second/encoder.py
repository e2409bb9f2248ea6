"""Sentence embeddings by a frozen encoder: mean hidden states over the tokens of a text, at length one.

Of two depths at once: a shallow layer, whose means keep the words of a text and tell best whether it is harmful, and
the last one, which is made for meaning and tells whether an answer is on the topic of its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.models.generation import batches, refuse_unknown
from nspo.models.loading import load_tokenizer, load_whole
from nspo.run.progress import track

BATCH = 32


class Embeddings(NamedTuple):
    """Of N texts, each (N, d) float64 on the CPU."""

    words: Tensor  # after the shallow layer
    meaning: Tensor  # after the last one


@dataclass(frozen=True)
class Encoder:
    """An encoder such as MiniLM with its tokenizer; a text is cut to `max_tokens`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    layer: int  # blocks after which the shallow states are taken

    @classmethod
    def load(cls, folder: Path, named: str, max_tokens: int, layer: int, device: torch.device | str = "cpu") -> Self:
        """The encoder of a model folder, which errors call `named`.

        Raises:
            UserError: when there is no such model, or not all of it, or it has fewer layers.
        """
        model: Any = load_whole(AutoModel, folder, named, dtype=torch.float32)
        if layer > (depth := model.config.get_text_config().num_hidden_layers):
            raise UserError(
                f"second_judge.layer is {layer}, but {named} has {depth} blocks", expected="at most that many"
            )
        return cls(model.to(device).eval(), load_tokenizer(folder, named, side="right"), max_tokens, layer)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], description: str) -> Embeddings:
        """The embeddings of the texts, equal ones read once; shows progress under `description`."""
        different = list(dict.fromkeys(texts))
        nothing = [self.tokenizer.pad_token_id]  # what an empty text is read as, where it has no token of its own
        cut = {"truncation": True, "max_length": self.max_tokens}
        ids = [self.tokenizer(text, **cut)["input_ids"] or nothing for text in different]
        for text in ids:
            refuse_unknown(text, self.tokenizer, self.model.config, description)
        found: dict[str, list[Tensor]] = {}
        with track(description, len(ids), "text") as bar:
            for batch in batches(list(map(len, ids)), BATCH):
                padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
                inputs = {name: values.to(self.model.device) for name, values in padded.items()}
                states = self.model(**inputs, output_hidden_states=True).hidden_states
                mask = inputs["attention_mask"][..., None].double()  # (B, T, 1)
                means = [
                    normalize((hidden.double() * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1).cpu()
                    for hidden in (states[self.layer], states[-1])
                ]
                found |= {different[i]: [mean[row] for mean in means] for row, i in enumerate(batch)}
                bar.update(len(batch))
        return Embeddings(*(torch.stack([found[text][depth] for text in texts]) for depth in (0, 1)))
