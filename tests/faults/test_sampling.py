"""Reports of sampling that was not what the configuration said, and of prompts that changed with the clock."""

import datetime as clock
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hostile import HOSTILE, with_json

from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.models.folders import template
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer
from nspo.models.stage import prepare_model
from nspo.models.vllm_engine import engine_arguments
from nspo.settings.model import ModelSettings
from nspo.settings.runtime import VLLMSettings


def answers(folder: Path, temperature: float = 0.0) -> dict[int, list[int]]:
    """Answers of a model folder to three prompts."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    torch.manual_seed(0)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "Why is that so?", "One two")]
    return dict(generate(model, tokenizer, prompts, 12, 2, "answers", temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("field", [*HOSTILE, "all"])
def test_nothing_leaks_from_generation_config(field: str, temperature: float, tiny_model_dir: Path, tmp_path: Path):
    """huggingface/trl#5887, huggingface/transformers#42762: a model's own settings changed greedy answers and rollouts.

    Right: with any field set, the answers are those of the model without it; what TRL and the harness read is clean.
    """
    given = HOSTILE if field == "all" else {"do_sample": True, field: HOSTILE[field]}
    folder = with_json(tiny_model_dir, tmp_path / "model", "generation_config.json", **given)
    assert answers(folder, temperature) == answers(tiny_model_dir, temperature)
    own = load_model(folder).generation_config.to_diff_dict()
    assert set(own) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def test_settings_of_sampling_in_config_json_leak_neither(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Old models keep them in config.json: the same answers, and no error of transformers."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "config.json", num_beams=3, no_repeat_ngram_size=1)
    assert answers(folder) == answers(tiny_model_dir)


def test_the_original_goes_with_the_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A prepared model keeps the bytes of its generation_config.json, valid or not by transformers' rules."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "generation_config.json", temperature=0.3, min_p=0.9)
    prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    assert answers(tmp_path / "out") == answers(tiny_model_dir)


def test_vllm_does_not_read_the_folders_settings() -> None:
    """vllm-project/vllm takes its defaults from the folder unless it is told `generation_config: vllm`."""
    assert engine_arguments(Path("m"), torch.float32, VLLMSettings())["generation_config"] == "vllm"


DATED = (
    "{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y %H:%M:%S.%f') %}{% endif %}"
    "{{ 'Today is ' + today + '\\n' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


class Later(clock.datetime):
    """A clock that is a year ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """See datetime."""
        return clock.datetime(2031, 1, 2, 3, 4, 5, tzinfo=tz)


def test_a_template_with_todays_date_is_frozen(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sgl-project/sglang#3296 and Llama 3.2's template: the date of the day stood in every prompt.

    Right: prepared or not, now or later, the ids are the same; the date is in the manifest.
    """
    folder = with_json(tiny_model_dir, tmp_path / "model", "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    said = load_tokenizer(tmp_path / "out").decode(chat_ids(load_tokenizer(folder), "Hi"))
    assert said == "Today is 26 Jul 2024 00:00:00.000000\nHi"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["template_date"] == "2024-07-26"
    before = [chat_ids(load_tokenizer(path), "Hi") for path in (folder, tmp_path / "out")]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert before == [chat_ids(load_tokenizer(path), "Hi") for path in (folder, tmp_path / "out")]
    assert before[0] == before[1]


def test_freezing_changes_nothing_else(tiny_model_dir: Path) -> None:
    """A template without a clock is left as it is, a frozen one is not frozen twice, one that rolls dice is refused."""
    plain = load_tokenizer(tiny_model_dir).chat_template
    assert template.frozen(plain, "m") == plain
    assert template.date_of(plain) is None
    once = template.frozen({"default": DATED, "tools": plain}, "m")
    assert template.frozen(once, "m") == once
    assert once["tools"] == plain
    with pytest.raises(UserError, match="m: its chat template draws random numbers"):
        template.frozen("{{ [1, 2] | random }}", "m")
