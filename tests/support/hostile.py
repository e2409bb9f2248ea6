"""Model folders as users bring them by mistake, for the tests of `tests/faults`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from support.model_copy import copy_model

# Fields by which a folder's generation_config.json could change what is sampled.
HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 3,
    "min_p": 0.99,
    "top_p": 0.1,
    "top_k": 2,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.02,
    "temperature": 0.3,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "length_penalty": -2.0,
    "bad_words_ids": [[11], [12]],
    "suppress_tokens": [10, 20, 30],
    "begin_suppress_tokens": [40, 50],
    "sequence_bias": [[[60], 10.0]],
    "forced_bos_token_id": 70,
    "forced_eos_token_id": 80,
    "exponential_decay_length_penalty": [1, 2.0],
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "watermarking_config": {"greenlist_ratio": 0.2, "bias": 5.0},
    "stop_strings": ["a", "e"],
    "max_length": 3,
    "min_length": 40,
    "min_new_tokens": 40,
    "max_time": 0.001,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "num_return_sequences": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 2,
}


def with_json(model: Path, folder: Path, name: str, **values: Any) -> Path:
    """A copy of a model with these values in one of its JSON files; None takes a value out."""
    copy_model(model, folder)
    found = json.loads((folder / name).read_text(encoding="utf-8"))
    kept = {key: value for key, value in (found | values).items() if value is not None}
    (folder / name).write_text(json.dumps(kept), encoding="utf-8")
    return folder


def with_weights(model: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a model with other tensors in its file."""
    copy_model(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
