"""Prompts with an image: read by the model's own processor, answered and passed through one at a time.

`activations.images` is a folder of images with a `metadata.jsonl`, which the datasets library calls an image folder:

    {"file_name": "harbour.png", "prompt": "What is on this picture?"}

Its inputs form the domain `image`: those of all positions, where an image stands, where text stands, and of the answer.
Of every three different images in the order of the file two are of the split `basis`, the third of `validation`,
whatever is asked about it, so no image is in both. What is read of a folder is read and checked before the model is
loaded. Needs Pillow, which the extra `images` brings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from nspo.activations.chunks import Answered, Batch, Chunk, divide, prompt_limit
from nspo.activations.store import IMAGE
from nspo.data.readers import read_file
from nspo.errors import UserError, first_line
from nspo.files.manifest import fingerprint, fingerprint_files
from nspo.models.chat import PROBE, chat_text
from nspo.models.folders.classes import model_class, other_inputs
from nspo.models.generation import answers
from nspo.models.loading import PROCESSOR
from nspo.run.progress import track
from nspo.settings.bases import ActivationSettings

METADATA = "metadata.jsonl"
KEY = "activations.images"


class ImageReader:
    """Makes inputs of prompts with an image, as the model's own processor and chat template do."""

    def __init__(self, model: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the processor.

        Raises:
            UserError: a model that reads no images, has no processor, or whose chat template shows none; no Pillow.
        """
        if IMAGE not in other_inputs(config):
            raise UserError(
                f"{KEY}: {model} is a {model_class(config).__name__}, which reads no images",
                expected="a multimodal model",
                change=f"leave {KEY} out",
            )
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise UserError(f"{KEY} needs the package Pillow: pip install 'nspo[images]'") from error
        files = [model / name for name in PROCESSOR if (model / name).is_file()]
        if not files:
            raise UserError(
                f"{KEY}: {model} has no processor",
                expected=f"{' or '.join(PROCESSOR[:2])}",
                change="copy the whole model to model.source",
            )
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        except Exception as error:  # of every processor's own code
            raise UserError(f"{KEY}: the processor of {model} cannot be loaded: {first_line(error)}") from error
        if not hasattr(self._processor, "image_processor"):
            raise UserError(f"{KEY}: the processor of {model} is a {type(self._processor).__name__}, without images")
        self._tokenizer, self.identity = tokenizer, fingerprint_files(files)
        parts = [{"type": "text", "text": PROBE}]
        if chat_text(tokenizer, [{"type": "image"}, *parts]) == chat_text(tokenizer, parts):
            raise UserError(f"{KEY}: the chat template of {model} shows no images: set model.chat_template")

    def inputs(self, file: Path, prompt: str) -> dict[str, Tensor]:
        """What the model reads of one prompt: `input_ids` (1, T) and so on.

        Raises:
            UserError: a file that is no image, or nothing for the processor.
        """
        from PIL import Image

        text = chat_text(self._tokenizer, [{"type": "image"}, {"type": "text", "text": prompt}])
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{KEY}: {file} cannot be opened as an image: {first_line(error)}") from error
        try:
            made = self._processor(text=[text], images=[picture], add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # of every processor's own code
            raise UserError(f"{KEY}: the model's processor refuses {file}: {first_line(error)}") from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    @torch.inference_mode()
    def try_out(self, model: PreTrainedModel, chunk: Chunk) -> None:
        """One pass over the first prompt of a chunk, so that a model that cannot read it says so before all work.

        Raises:
            UserError: with what it says.
        """
        inputs = self._on(model, *chunk.images[0])
        try:
            states = model.base_model(**inputs, use_cache=False).last_hidden_state
        except Exception as error:  # whatever the model makes of what its processor gives it
            raise UserError(f"{KEY}: the model cannot read {chunk.images[0][0]}: {first_line(error)}") from error
        if states.shape[1] != inputs["input_ids"].shape[1]:
            raise UserError(
                f"{KEY}: the model makes {states.shape[1]} positions of {inputs['input_ids'].shape[1]} tokens",
                expected="one of each, with an image's already among them",
                change="use a processor as of transformers 5",
            )

    def answers(
        self, model: PreTrainedModel, chunk: Chunk, max_new_tokens: int, description: str
    ) -> Iterator[tuple[int, list[int]]]:
        """The model's greedy answer to every prompt of a chunk, with its place; shows progress."""
        with track(description, len(chunk.images), "prompt") as bar:
            for place, image in enumerate(chunk.images):
                (answer,) = answers(model, self._tokenizer, self._on(model, *image), max_new_tokens)
                yield place, answer
                bar.update(1)

    def batches(self, chunk: Chunk, sequences: Sequence[Answered]) -> Iterator[Batch]:
        """The sequences of a chunk, one at a time: those with images are long."""
        for sequence in sequences:
            inputs = self.inputs(*chunk.images[sequence.sample - chunk.first])
            shape, answer = inputs["input_ids"].shape, sequence.ids[sequence.prompt_length :]
            follow = {
                "input_ids": torch.tensor([answer], dtype=torch.int64),
                "attention_mask": torch.ones(1, len(answer)),
            }
            for name, values in inputs.items():
                if values.shape == shape:  # of every token; other marks of an answer are those of text, 0
                    more = follow.get(name, torch.zeros(1, len(answer)))
                    inputs[name] = torch.cat([values, more.to(values.dtype)], 1)
            yield Batch((sequence,), inputs, sequence.kept[None])

    def _on(self, model: PreTrainedModel, file: Path, prompt: str) -> dict[str, Tensor]:
        return {name: value.to(model.device) for name, value in self.inputs(file, prompt).items()}


def image_chunks(settings: ActivationSettings, reader: ImageReader, index: int, room: float) -> list[Chunk]:
    """The chunks of the domain `image`, from place `index` on; see the module.

    Args:
        room: the most tokens of a prompt that the model can read and answer.

    Raises:
        UserError: a folder or file that is not as expected, or no prompt that fits.
    """
    seen: dict[str, int] = {}  # different images, by their order
    wanted = {"basis": settings.samples, "validation": settings.samples // 2}
    fitting: dict[str, list[tuple[dict[str, str], tuple[int, ...]]]] = {split: [] for split in wanted}
    left_out = dict.fromkeys(wanted, 0)
    limit, reason = prompt_limit(settings, room, images=True)
    for file, prompt in _rows(Path(str(settings.images))):
        if all(len(fitting[split]) == count for split, count in wanted.items()):
            break
        digest = sha256(file.read_bytes()).hexdigest()
        split = "validation" if seen.setdefault(digest, len(seen)) % 3 == 2 else "basis"
        if len(fitting[split]) == wanted[split]:
            continue
        ids = tuple(reader.inputs(file, prompt)["input_ids"][0].tolist())
        if len(ids) > limit:
            left_out[split] += 1
            continue
        fitting[split].append(({"id": digest, "prompt": prompt, "file": str(file)}, ids))
    chunks: list[Chunk] = []
    for split, count in wanted.items():
        if count and not fitting[split]:
            if left_out[split]:
                raise UserError(f"{IMAGE} ({split}): all {left_out[split]} prompts are longer than {reason}")
            raise UserError(f"{KEY}: {settings.images} has {len(seen)} different images", expected="at least three")
        if count:
            place, rest = index + len(chunks), left_out[split]
            chunks += divide(place, IMAGE, split, fitting[split], rest, settings.tokens_per_domain)
    return [replace(chunk, **_pictures(chunk, fitting[chunk.split], reader)) for chunk in chunks]


def _pictures(chunk: Chunk, rows: Sequence[tuple[dict[str, str], Any]], reader: ImageReader) -> dict[str, Any]:
    """What a chunk of the split's `rows` says beside what one of text says."""
    own = rows[chunk.first : chunk.first + len(chunk.prompts)]
    images = tuple((Path(row["file"]), row["prompt"]) for row, _ in own)
    return {"images": images, "data": fingerprint([chunk.data, reader.identity])}


def _rows(folder: Path) -> Iterator[tuple[Path, str]]:
    """The image file and the text of every prompt."""
    if not (folder / METADATA).is_file():
        raise UserError(f"{KEY}: {folder} holds no {METADATA}", expected="rows with `file_name` and `prompt`")
    for number, row in enumerate(read_file(folder / METADATA), 1):
        named, prompt = (row.get(key) if isinstance(row, dict) else None for key in ("file_name", "prompt"))
        if not isinstance(named, str) or not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{KEY}: row {number} of {folder / METADATA} lacks its `file_name` or `prompt`")
        if not (folder / named).is_file():
            raise UserError(f"{KEY}: {folder / named} is no file, row {number} of {METADATA} names it")
        yield folder / named, prompt
