"""Load models and tokenizers: one way for every stage.

Weights are loaded in fp32: updates at a learning rate of 1e-6 vanish in bf16. Remote code is never run.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.wheels import resolve
from nspo.errors import UserError, first_line
from nspo.files.manifest import MANIFEST_NAME, check_fingerprints, read_json
from nspo.files.sources import Source
from nspo.models.chat import read_plain_text
from nspo.models.folders.classes import model_class
from nspo.models.folders.files import FLOATS, check_model_files, stored_dtypes
from nspo.models.folders.template import frozen
from nspo.models.generation import plain_generation

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no pickle, no code
GENERATION = "generation_config.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
Spared = Callable[[PreTrainedModel, str], bool]
HUB_COPIES = ["*/*", "consolidated*"]  # the same weights in forms that transformers does not read


def model_folder(key: str, text: str) -> Path:
    """The folder of the model that the setting `key` names: on disk, or in the hub's cache after a download.

    Raises:
        UserError: when there is no such model.
    """
    source = Source.parse(text)
    if source.kind == "path":
        if not Path(source.location, "config.json").is_file():
            raise UserError(
                f"{key}: {source.location} holds no model", expected="a Hugging Face model folder with config.json"
            )
        return Path(source.location)
    return hub_folder(key, source)


def source_folder(key: str, source: Source, wheels_dir: Path) -> Path:
    """The folder (or GGUF file) of the model that the setting `key` names, wherever it comes from.

    Raises:
        UserError: when there is none, or the hub cannot be reached.
    """
    return hub_folder(key, source) if source.kind == "hub" else resolve(source, wheels_dir)


def hub_folder(key: str, source: Source) -> Path:
    """The folder of a hub repository in the hub's cache, downloaded where it is not there yet.

    A folder ORG/NAME below the working directory is never taken for it, as transformers would.

    Raises:
        UserError: when there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.location, revision=source.revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{key} cannot be loaded: {first_line(error)}") from error


def load_config(folder: Path | str, named: str) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        UserError: when there is none, or one that transformers cannot make a model of; called `named`.
    """
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{named} holds no model", expected="a Hugging Face model folder with config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # besides its own, whatever a configuration's class makes of values it cannot use
        raise UserError(f"{named}: config.json is no model that transformers knows: {first_line(error)}") from error
    return config


def read_tokenizer(folder: Path | str, named: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder with its chat template `frozen`; `options` are of `from_pretrained`.

    Raises:
        UserError: when it cannot be loaded, or its chat template changes by chance; called `named`.
    """
    if Path(folder).is_dir() and "gguf_file" not in options:
        check_model_files(folder, named)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises just that
        raise UserError(f"{named}: its tokenizer cannot be loaded: {first_line(error)}") from error
    for how in ("is_local", "local_files_only"):  # how it was loaded, which transformers would save with it
        tokenizer.init_kwargs.pop(how, None)
    tokenizer.chat_template = frozen(tokenizer.chat_template, named)
    return tokenizer


def load_tokenizer(folder: Path | str, named: str = "", side: str = "left") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder with a pad token, padding on the left (for generation) or the right `side`.

    Raises:
        UserError: when it cannot be loaded.
    """
    tokenizer = read_tokenizer(folder, named or f"{folder}", padding_side=side)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"{named or folder}: its tokenizer has neither a pad nor an eos token",
            expected="one",
            change="name it in tokenizer_config.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    read_plain_text(tokenizer)
    return tokenizer


def load_whole(
    auto: Any, source: Path | str, named: str, spared: Spared | None = None, **options: Any
) -> PreTrainedModel:
    """The model that transformers' class `auto` makes of `source`, every weight read from its files and finite.

    transformers fills a weight that the files lack with random numbers and passes over one that it does not know; both
    are refused here. Excepted are tied heads, and what the model's class says may be missing or left over.

    Args:
        source: a model folder, or what else `from_pretrained` takes.
        named: what errors call it: the setting and its value.
        spared: whether the weight of this name may be missing from the model, left over or of another shape, such as a
            head that is still to be fitted.
        options: of `from_pretrained`.

    Raises:
        UserError: a model that cannot be loaded, or not with exactly its own weights.
    """
    plain = Path(source).is_dir() and "gguf_file" not in options
    if plain:
        check_model_files(source, named)
    try:
        model, report = auto.from_pretrained(
            source, **options, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise  # of the machine, which the command line tells
        raise UserError(f"{named} cannot be loaded: {first_line(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{named} is an adapter", expected="a model", change="merge it into its base and give that folder"
        )
    _check_report(model, report, named, spared)
    if plain and '"quantization_config"' not in Path(source, "config.json").read_text(encoding="utf-8"):
        _refuse_codes(model, Path(source), named)
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and weight.element_size() > 1 and not weight.isfinite().all():
            raise UserError(
                f"{named}: the weight {name} holds NaN or Inf",
                expected="finite numbers",
                change="copy or train it again",
            )
    return model


def _refuse_codes(model: PreTrainedModel, folder: Path, named: str) -> None:
    """Refuse whole numbers, or floats of a byte, in place of a float weight: without their scales they mean nothing."""
    floats = {name for name, weight in model.state_dict().items() if weight.is_floating_point()}
    for name, dtype in stored_dtypes(folder, named).items():
        if dtype not in FLOATS and name in floats:
            raise UserError(
                f"{named}: the weight {name} is stored as {dtype}, and config.json has no quantization_config",
                expected="float weights, or the configuration that says how they are quantised",
                change="copy the whole model",
            )


def _check_report(model: PreTrainedModel, report: dict[str, Any], named: str, spared: Spared | None) -> None:
    """Refuse weights that are not where transformers looks for them, by its own report of the loading."""

    def counts(name: str) -> bool:
        return spared is None or not spared(model, name)

    missing, unknown = (sorted(filter(counts, report[f"{kind}_keys"])) for kind in ("missing", "unexpected"))
    unknown = _without_further_heads(unknown)
    reshaped = sorted(entry for entry in report["mismatched_keys"] if counts(entry[0]))
    found = []
    if missing:
        found.append(f"its files lack {len(missing)} of {len(model.state_dict())} weights, such as {missing[0]}")
    if unknown:
        found.append(f"they hold {len(unknown)} that {type(model).__name__} does not have, such as {unknown[0]}")
    if reshaped:
        name, stored, expected = reshaped[0]
        found.append(f"{name} has the shape {list(stored)}, by config.json {list(expected)}")
    if found:
        raise UserError(
            f"{named}: {', and '.join(found)}",
            expected="a whole model under transformers' own names",
            change="merge adapters, take off a wrapper's prefix, or check config.json",
        )


def _without_further_heads(names: list[str]) -> list[str]:
    """Stored weights but for the heads or blocks of multi-token prediction, which no class here has.

    A block more than config.json counts is such a one by what joins it to the last: any other is a block that is lost.
    """
    joined = (re.match(r"(.*\blayers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\.", name) for name in names)
    blocks = tuple({block[1] for block in joined if block})
    return [name for name in names if not name.startswith(blocks) and not re.search(r"(^|\.)mtp\.", name)]


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
) -> PreTrainedModel:
    """The causal language model of a folder in evaluation mode, in fp32 (`auto`: in the type that it is stored in).

    Raises:
        UserError: when the folder is missing or holds no such model, or not all of it (see `load_whole`).
    """
    config = load_config(folder, f"{folder}")
    model: Any = load_whole(model_class(config), folder, f"{folder}", dtype=dtype)
    model.generation_config = plain_generation(model)
    return model.to(device).eval()


def save_model(model: PreTrainedModel, folder: Path, given: Path, **options: Any) -> None:
    """Write a model, with what the folder `given` says of sampling, and of images and sounds, as it is there.

    Args:
        options: of `save_pretrained`.
    """
    model.generation_config = plain_generation(model)
    model.save_pretrained(folder, **options)
    for name in (GENERATION, *PROCESSOR):
        if (given / name).is_file():
            shutil.copyfile(given / name, folder / name)


def model_identity(folder: Path | str) -> dict[str, Any]:
    """The class that a model folder is loaded as, its fingerprints, and its origin where `prepare_model` wrote it down.

    Raises:
        UserError: when the manifest of the folder, where it has one, recorded other weights or another tokenizer.
    """
    config = load_config(folder, f"{folder}")
    named = next(iter(config.architectures or ()), "")
    scores = named.endswith("ForSequenceClassification")  # a judge or a backbone, which writes no text
    manifest = Path(folder, MANIFEST_NAME)
    written = read_json(manifest) if manifest.is_file() else {}
    origin = written.get("tuned") or written.get("model") or {}  # of a policy, or of a base model
    known = {key: origin[key] for key in ("source", "revision", "system_prompt") if origin.get(key)}
    architecture = named if scores else model_class(config).__name__
    return {"architecture": architecture, **known, **check_fingerprints(folder, origin)}
