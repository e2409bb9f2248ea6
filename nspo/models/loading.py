"""Load models and tokenizers: one way for every stage.

Weights are loaded in fp32: updates at a learning rate of 1e-6 vanish in bf16. Remote code is never run.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError, first_line
from nspo.files.manifest import MANIFEST_NAME, check_fingerprints, read_json
from nspo.sources import Source

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no pickle, no code


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
