"""config/qwen2.5-7b.yaml and llama3-8b.yaml: nothing is left to a default, and what is trained is what they describe.

Every stage up to the policy is run from the file itself on a tiny random model of the same architecture, with its
biases or its chat template, and its own sampling defaults; only sizes, places and what needs a GPU are changed.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nspo.activations.stage import collect
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_bases
from nspo.certify.certificate import verify
from nspo.data.stage import prepare_labels, prepare_prompts
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.models.loading import load_tokenizer
from nspo.models.stage import prepare_model
from nspo.models.tiny import tiny_tokenizer
from nspo.policy.methods.inputs import PolicyInputs
from nspo.policy.rollouts.trainer import trainer_arguments
from nspo.policy.stage import train_policy
from nspo.preference.stage import train_preference
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.reading import check_config, load_config, read_over, read_yaml
from nspo.settings.types import Section

CONFIG = Path(__file__).parents[2] / "config"
NAMES = ["qwen2.5-7b", "llama3-8b"]
FILES = {"qwen2.5-7b": [CONFIG / "qwen2.5-7b.yaml"], "llama3-8b": [CONFIG / f"{name}.yaml" for name in NAMES]}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
# What a CPU and a minute ask for. Everything else is the file's.
SMALLER: dict[str, Any] = {
    "steps": 1,
    "prompts_per_step": 4,
    "minibatch_size": 10,
    "micro_batch_size": 5,
    "max_new_tokens": 8,
    "rollout": "transformers",
    "processes": 1,
    "sharding": "none",
    "judge": None,
    "probe_prompts": 4,
}


# ------------------------------------------------------------------------------------------------- the file as it is


def unwritten(section: Section, given: Any, place: str = "") -> list[str]:
    """Fields that shape the result and that the mapping `given` does not hold, by their full key."""
    missing = []
    for name in type(section).model_fields:
        if name == "runtime" or (isinstance(section, MethodSettings) and name == "objective"):
            continue  # how, not what; a name for two keys that are written out
        if name not in given:
            missing.append(place + name)
            continue
        value = getattr(section, name)
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        for key, part in parts:
            if isinstance(part, Section):
                inside = given[name] if key is None else given[name][key]
                missing += unwritten(part, inside, f"{place}{name}." + (f"{key}." if key else ""))
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_a_default(name):
    files = FILES[name]
    assert unwritten(load_config(*files), read_over(*files)) == [], f"new keys: write into {files[0].name} what it does"


def test_the_second_file_needs_the_first():
    """Alone it would train Llama on the default data: it is refused, and it says nothing but what differs."""
    with pytest.raises(UserError, match=r"llama3-8b\.yaml: policy\.methods\.nspo: found no constraint"):
        load_config(FILES["llama3-8b"][1])
    base, both = (load_config(*FILES[name]) for name in NAMES)
    same = both.model_copy(update={"model": base.model, "runtime": base.runtime})
    assert (same, both.runtime.results) == (base, "results/llama3-8b")


@pytest.mark.parametrize("key", ["policy.delta", "bases.weights", "data.harmful.fraction", "policy.judge.template"])
def test_a_key_that_is_left_out_is_noticed(key):
    raw = read_yaml(CONFIG / "qwen2.5-7b.yaml")
    *parents, last = key.split(".")
    holder = raw
    for parent in parents:
        holder = holder[parent]
    del holder[last]
    assert unwritten(check_config(raw), raw) == [key]


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_settings_reach_the_trainer(name, tmp_path):
    """The values of the paper, as TRL knows them."""
    config = load_config(*FILES[name])
    args = trainer_arguments(
        config.policy, config.policy.methods["nspo"], 0, torch.device("cpu"), tmp_path, config.runtime
    )
    expected = {
        "num_generations": 5,
        "generation_batch_size": 1600,
        "max_steps": 68,
        "num_iterations": 1,
        "epsilon": 0.2,
        "epsilon_high": 0.2,
        "delta": 3.0,
        "beta": 0.0,
        "loss_type": "bnpo",
        "scale_rewards": "group",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_completion_length": 512,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 1024,
        "bf16": True,
    }
    assert {key: getattr(args, key) for key in expected} == expected
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps * config.policy.processes
    assert update == 800
    assert (config.bases.rule, config.bases.threshold, config.activations.samples) == ("relative", 5e-4, 1000)
    assert config.policy.judge is not None
    training = 1 - config.data.heldout_fraction - config.data.validation_fraction
    assert config.data.harmful.fraction * training == pytest.approx(0.4)


# -------------------------------------------------------------------------------------- the run, on a model like it


def tokenizer_with(specials: list[str], template: str, **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": specials, **roles})
    tokenizer.chat_template = template
    return tokenizer


def model_like(name: str, folder: Path) -> None:
    """A tiny model of the architecture, with embeddings of low rank: like a real one, it leaves directions unused."""
    torch.manual_seed(0)
    if name == "qwen2.5-7b":
        tokenizer = tokenizer_with([], QWEN_TEMPLATE)
        model: Any = Qwen2ForCausalLM(
            Qwen2Config(**SHAPE, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=False)
        )
        for block in model.model.layers:
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                torch.nn.init.normal_(part.bias, std=0.1)
        sampling = {"top_p": 0.8, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.05}
        ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    else:
        roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        tokenizer = tokenizer_with(SPECIALS, LLAMA_TEMPLATE, **roles)
        model = LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=len(tokenizer), rope_theta=500000.0)
        )
        sampling = {"top_p": 0.9, "temperature": 0.6}
        ends = [tokenizer.convert_tokens_to_ids("<|end_of_text|>"), tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    with torch.no_grad():
        narrow = torch.randn(len(tokenizer), 12) @ torch.randn(12, SHAPE["hidden_size"])
        model.get_input_embeddings().weight.copy_(narrow)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ends, pad_token_id=0, **sampling)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def phrase(number: int) -> str:
    """Six made-up words, others for every number: prompts of one template would be near duplicates of each other."""
    letters = random.Random(number)
    return " ".join("".join(letters.choices("abcdefghijklmnop", k=4)) for _ in range(6))


def like_the_data(folder: Path) -> dict[str, str]:
    """Files with the columns of the hub's data sets, by the start of the source that they stand for."""
    alpaca = [{"instruction": f"Name {phrase(i)}.", "input": "" if i % 4 else "x", "output": "y"} for i in range(200)]
    safe_rlhf = [
        {
            "prompt": f"How does one take {phrase(1000 + i)}?",
            "response_0": f"Ask for them, {i} times.",
            "response_1": f"Take them and run, {i} of them!!!",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": i % 2,
            "safer_response_id": 0,
        }
        for i in range(200)
    ]
    refusals = [
        {"objective": f"Count {phrase(i)}.", "assistant_response": "No." * (i % 2) + f"{i} cups", "human_score": i % 2}
        for i in range(80)
    ]
    others = [
        {"prompt": f"How to take {phrase(2000 + i)}?", "value": f"How to leave {phrase(3000 + i)}?"} for i in range(20)
    ]
    return {
        "hub:tatsu-lab/alpaca": lines(folder / "alpaca.jsonl", alpaca),
        "hub:PKU-Alignment/PKU-SafeRLHF": lines(folder / "safe_rlhf.jsonl", safe_rlhf),
        "wheel:pyrit==1.1.0:pyrit/datasets/scorer_evals": lines(folder / "refusals.jsonl", refusals),
        "wheel:": lines(folder / "others.jsonl", others),
    }


def placed(raw: Any, files: dict[str, str]) -> Any:
    """`raw` with every source that starts as a key of `files` replaced by that file."""
    if isinstance(raw, dict):
        return {key: placed(value, files) for key, value in raw.items()}
    if isinstance(raw, list):
        return [placed(value, files) for value in raw]
    return next((file for start, file in files.items() if isinstance(raw, str) and raw.startswith(start)), raw)


@pytest.mark.parametrize("name", NAMES)
def test_the_run_of_the_file_on_a_tiny_model_like_it(name, tmp_path):
    """Data, activations, bases, scores and one step of the policy; constrained, and stored as the file says."""
    model_like(name, tmp_path / "original")
    raw = read_over(*FILES[name])
    small = placed(copy.deepcopy(raw), like_the_data(tmp_path))
    small["model"]["source"] = str(tmp_path / "original")
    small["activations"] |= {"samples": 20, "max_prompt_tokens": 256, "max_new_tokens": 4}  # a token is a byte here
    small["policy"] |= SMALLER
    small["runtime"] |= {"device": "cpu", "processes": 1}
    config = check_config(small)
    runtime = config.runtime.model_copy(update={"workdir": str(tmp_path / "work")})
    model, prompts, labels, store, bases = (
        tmp_path / part for part in ("model", "prompts.parquet", "labels.parquet", "activations", "bases.safetensors")
    )
    prepare_model(config.model, tmp_path, model)
    prepare_prompts(config.data, tmp_path, prompts)
    prepare_labels(config.data, tmp_path, labels)
    # Of 200 prompts; held out and trained on by their hashes, so about so many.
    assert 60 <= len(Prompts(prompts).of("harmful", "train", "pku-saferlhf")) <= 100
    assert 50 <= len(Prompts(prompts).of("general", "train", "alpaca")) <= 100
    collect(config.activations, model, prompts, store, runtime)
    compute_bases(config.bases, store, bases, runtime)
    for target, settings in (("cost", config.cost), ("reward", config.reward)):
        train_preference(settings, target, model, labels, tmp_path / target, runtime)
    training = TrainingSettings(**{key: getattr(config.policy, key) for key in TrainingSettings.model_fields})
    method, out = config.policy.methods["nspo"], tmp_path / "policy"
    scores = {"reward": tmp_path / "reward", "cost": tmp_path / "cost"}
    inputs = PolicyInputs(model=model, bases=bases, layers=config.activations.layers, prompts=prompts, **scores)
    train_policy(training, method, "nspo", 0, inputs, out, runtime)

    text = load_tokenizer(model).decode(chat_ids(load_tokenizer(model), "Hi"))
    start = "<|im_start|>system\nYou are Qwen" if name == "qwen2.5-7b" else "<|begin_of_text|><|start_header_id|>user"
    assert text.startswith(start)
    assert len(pq.read_table(out / "samples.parquet")) == 20
    stored = json.loads((out / "settings.json").read_text())
    for key in TrainingSettings.model_fields:
        assert stored["nspo"][key] == SMALLER.get(key, raw["policy"][key]), key
    assert {key: stored["nspo"][key] for key in raw["policy"]["methods"]["nspo"]} == raw["policy"]["methods"]["nspo"]
    in_force = {
        "epsilon": 0.2,
        "delta": 3.0,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert {key: stored["trainer"][key] for key in in_force} == in_force

    certificate = verify(model, out, NullSpaceBases.load(bases))
    layers = certificate["layers"].values()
    assert max(layer["leakage_basis"] for layer in layers) <= 1e-6
    assert max(layer["relative_update"] for layer in layers) > 1e-6
    assert not certificate["unconstrained"]  # embeddings, norms and Qwen's biases are what they were
