"""vllm_rollouts.py: vLLM is refused where it cannot run, and told everything; TRL calls what the installed vLLM has."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.vllm_package import class_of, engine_parameters, field_names, vllm_folder

from nspo.errors import UserError
from nspo.models import vllm_engine
from nspo.policy.rollouts.vllm_rollouts import check_rollout, vllm_arguments
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.reading import check_config
from nspo.settings.runtime import VLLMSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VLLM = TrainingSettings(rollout="vllm", max_prompt_tokens=100, max_new_tokens=28)


def install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm_engine, "vllm_device", lambda: "cuda")


def test_transformers_needs_nothing():
    check_rollout(TrainingSettings(), VLLMSettings(), CPU, processes=1)
    assert vllm_arguments(TrainingSettings(), VLLMSettings())["use_vllm"] is False


def test_refused_without_the_package_or_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package vllm is not installed: pip install -r requirements-vllm\.lock"):
        check_rollout(VLLM, VLLMSettings(), GPU, processes=1)
    with pytest.raises(UserError, match="the stage runs on cpu, expected an NVIDIA GPU"):
        check_rollout(VLLM, VLLMSettings(), CPU, processes=1)
    install(monkeypatch)
    check_rollout(VLLM, VLLMSettings(), GPU, processes=1)


def test_refused_where_processes_cannot_share_it(monkeypatch):
    install(monkeypatch)
    with pytest.raises(UserError, match=r"vllm\.tensor_parallel is 3, expected a divisor of the 4 training processes"):
        check_rollout(VLLM, VLLMSettings(tensor_parallel=3), GPU, processes=4)
    check_rollout(VLLM, VLLMSettings(tensor_parallel=2), GPU, processes=4)
    check_rollout(VLLM, VLLMSettings(tensor_parallel=3, server="http://localhost:8000"), GPU, processes=4)


def test_the_address_is_checked_with_the_configuration():
    with pytest.raises(UserError, match=r"runtime\.vllm\.server: found 'localhost:8000'"):
        check_config({"runtime": {"vllm": {"server": "localhost:8000"}}})
    with pytest.raises(UserError, match=r"policy\.rollout: found 'sglang'"):
        check_config({"policy": {"rollout": "sglang"}})


def test_everything_about_vllm_is_written_out():
    settings = VLLMSettings(gpu_memory=0.45, tensor_parallel=2)
    colocated = vllm_arguments(VLLM, settings)
    assert colocated == {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_server_base_url": None,
        "vllm_gpu_memory_utilization": 0.45,
        "vllm_tensor_parallel_size": 2,
        "vllm_max_model_length": 128,
        "vllm_model_impl": "vllm",
        "vllm_enable_sleep_mode": False,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None,
    }
    served = vllm_arguments(VLLM, settings.model_copy(update={"server": "http://gpu7:8000"}))
    assert (served["vllm_mode"], served["vllm_server_base_url"]) == ("server", "http://gpu7:8000")


# ------------------------------------------------------------------------------- TRL's calls against the real package


def trl_source(name: str) -> ast.Module:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / "generation" / name).read_text())


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_vllm_takes_every_argument_of_the_engine():
    folder = vllm_folder()
    (call,) = (
        c for c in calls(trl_source("vllm_generation.py")) if isinstance(c.func, ast.Name) and c.func.id == "LLM"
    )
    given = {keyword.arg for keyword in call.keywords}
    assert {"model", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "logprobs_mode"} <= given
    assert given - engine_parameters(folder) == set()


def test_vllm_takes_every_sampling_parameter():
    folder = vllm_folder()
    written = [
        node.value
        for node in ast.walk(trl_source("vllm_generation.py"))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and ast.unparse(node.targets[0]) == "generation_kwargs"
    ]
    given = {ast.literal_eval(key) for value in written for key in value.keys if key is not None}
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs"} <= given
    assert given - field_names(class_of(folder / "sampling_params.py", "SamplingParams")) == set()


def test_vllm_has_what_the_engine_is_asked_to_do():
    folder = vllm_folder()
    asked = {
        call.func.attr
        for call in calls(trl_source("vllm_generation.py"))
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self.llm"
    }
    assert {"generate", "reset_prefix_cache"} <= asked
    text = "".join(path.read_text() for path in sorted((folder / "entrypoints").glob("*.py")))
    assert {name for name in asked if f"def {name}(" not in text} == set()


def test_vllm_serves_every_route_that_trl_asks():
    """The server mode: answers, weights, and what the server computes with."""
    folder = vllm_folder()
    text = ast.unparse(trl_source("vllm_client.py"))
    asked = set(re.findall(r"self\.base_url\}(/[\w/]+)", text)) - {"/v1/chat/completions/render"}  # for images only
    assert {"/health", "/server_info", "/init_weight_transfer_engine", "/reset_prefix_cache"} <= asked
    served = set()
    for path in (folder / "entrypoints").rglob("*.py"):
        served |= set(re.findall(r"@router\.(?:get|post)\(\s*\"(/[\w/]+)\"", path.read_text()))
    assert asked - served == set()
