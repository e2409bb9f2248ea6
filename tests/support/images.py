"""Tiny random models that read images, with their processors, and folders of images drawn at random."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from nspo.models.folders.classes import model_class
from nspo.models.tiny import tiny_tokenizer
from tests.support.families import DENSE, VISION
from tests.support.rows import write

MARKS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
SHOWN = {"llava": MARKS["image_token"], "gemma3": MARKS["boi_token"]}  # what a chat template writes for an image
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}MARK{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 16  # pixels: four patches of the towers


def multimodal_folder(family: str, folder: Path, **sizes: int) -> Path:
    """A published folder of a tiny random model of `family` (llava or gemma3): weights, tokenizer and processor."""
    plain = tiny_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **{name: getattr(plain, name) for name in ("bos_token", "eos_token", "pad_token")},
        extra_special_tokens=MARKS,
        chat_template=TEMPLATE.replace("MARK", SHOWN[family]),
    )
    text = {**DENSE, "vocab_size": len(tokenizer), **sizes}
    image, opening, end = (tokenizer.convert_tokens_to_ids(mark) for mark in MARKS.values())
    if family == "llava":
        vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
        config = LlavaConfig(text_config={**text, "model_type": "llama"}, vision_config=vision, image_token_index=image)
        pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        told = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(pixels, tokenizer, **told)
    else:
        tokens = {"image_token_index": image, "boi_token_index": opening, "eoi_token_index": end}
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
        pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        processor = Gemma3Processor(pixels, tokenizer, image_seq_length=4)
    torch.manual_seed(0)
    model = model_class(config)(config).float()
    for name, weight in model.named_parameters():
        if not weight.any() and "projector" in name:  # Gemma 3's begins at zero: all its images would look alike
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def image_folder(folder: Path, prompts: list[str]) -> Path:
    """A folder of one PNG for each of `prompts`, and its metadata."""
    rows = [{"file_name": f"{number}.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    write(folder / "metadata.jsonl", rows)
    for number, row in enumerate(rows):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / row["file_name"])
    return folder
