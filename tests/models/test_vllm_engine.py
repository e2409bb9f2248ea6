"""vllm_engine.py: refused where it cannot run, recorded, started by the first prompt; what it asks for, vLLM has."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.vllm_package import class_of, engine_parameters, field_names, parameters, vllm_folder
from transformers import LlamaConfig, LlamaForCausalLM

from nspo.cli.main import main
from nspo.errors import UserError
from nspo.models import vllm_engine
from nspo.models.chat import chat_ids
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer
from nspo.models.tiny import tiny_tokenizer
from nspo.models.vllm_engine import answering, check_engine, engine_arguments, sampling_arguments, vllm_device
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.runtime import VLLMSettings


def test_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package comes first, then what it was built for; the message names the key; transformers needs neither."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    check_engine("evaluation.engine", "transformers", cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^evaluation\.engine is 'vllm', but the package vllm is not installed: pip"):
        check_engine("evaluation.engine", "vllm", gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for built, device, other in (("cuda", gpu, cpu), ("cpu", cpu, gpu)):
        monkeypatch.setattr(vllm_engine, "vllm_device", lambda built=built: built)
        check_engine("benchmarks.engine", "vllm", device)
        with pytest.raises(UserError, match=rf"runs on {other.type} and the installed vllm on {built}: set benchmarks"):
            check_engine("benchmarks.engine", "vllm", other)


@pytest.mark.parametrize("stage", ["benchmark", "evaluate"])
def test_the_commands_refuse_it_before_any_work(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without its build: one line that names the key, though everything else is missing too."""
    monkeypatch.setattr(vllm_engine, "vllm_device", lambda: "cuda")
    given = {"benchmark": ["--tasks", "advbench", "--model"], "evaluate": ["--name", "base", "--seed", "0"]}[stage]
    nowhere = str(tmp_path / "nowhere")
    files = ["--base", nowhere, "--policy", nowhere, "--cost", nowhere, "--prompts"] if stage != "benchmark" else []
    arguments = [*given, *files, nowhere, "--engine", "vllm", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([stage, *arguments]) == 2
    key = "benchmarks.engine" if stage == "benchmark" else "evaluation.engine"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nspo: error: {key} is 'vllm'")
    assert not (tmp_path / "out").exists()


def test_the_engine_is_recorded() -> None:
    """Answers of the two engines are never taken for each other's: the settings of every evaluation name theirs."""
    assert EvaluationSettings().dump()["engine"] == "transformers"
    assert EvaluationSettings(engine="vllm").dump() != EvaluationSettings().dump()


def test_transformers_answers_with_the_model_itself(tiny_model_dir: Path) -> None:
    """The same answers as `generate` gives."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "A longer question than that")]
    with answering("transformers", tiny_model_dir, model, tokenizer, VLLMSettings()) as ask:
        assert dict(ask(prompts, 4, 2, "answers")) == dict(generate(model, tokenizer, prompts, 4, 2, "answers"))


def test_vllm_starts_with_the_first_prompt(tiny_model_dir: Path) -> None:
    """Where every answer is kept already, or none is needed, nothing is started: here vLLM could not be."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    with answering("vllm", tiny_model_dir, model, tokenizer, VLLMSettings()) as ask:
        assert list(ask([], 4, 2, "answers")) == []


# ------------------------------------------------------------------------------------------ against the real package


def test_vllm_takes_every_argument() -> None:
    """Names, the number type by a name that vLLM knows, and the context length that means: what fits."""
    folder = vllm_folder()
    arguments = engine_arguments(Path("model"), torch.float32, VLLMSettings(gpu_memory=0.5, tensor_parallel=2))
    assert arguments == {
        "model": "model",
        "dtype": "float32",
        "max_model_len": -1,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "seed": 0,
    }
    assert set(arguments) - engine_parameters(folder) == set()
    config = ast.parse((folder / "config/model.py").read_text())
    kinds = next(
        n.value for n in config.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ModelDType"
    )
    known = {part.value for part in ast.walk(kinds) if isinstance(part, ast.Constant)}
    types = [torch.float32, torch.bfloat16, torch.float16]
    assert {engine_arguments(Path(), kind, VLLMSettings())["dtype"] for kind in types} <= known
    field = next(
        part
        for part in class_of(folder / "config/model.py", "ModelConfig").body
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "max_model_len"
    )
    assert "ge=-1" in ast.unparse(field)


def test_vllm_takes_every_sampling_parameter() -> None:
    """Greedy, the stop tokens, no text."""
    arguments = sampling_arguments(28, [2, 7])
    assert (arguments["temperature"], arguments["max_tokens"], arguments["stop_token_ids"]) == (0, 28, [2, 7])
    assert json.dumps(arguments)
    known = field_names(class_of(vllm_folder() / "sampling_params.py", "SamplingParams"))
    assert set(arguments) - known == set()


def test_vllm_has_what_it_is_asked_for() -> None:
    """Every call and every field that the module uses of vLLM is there."""
    folder = vllm_folder()
    exported = ast.parse((folder / "__init__.py").read_text())
    names = {
        part.value for part in ast.walk(exported) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    ours = ast.parse(Path(vllm_engine.__file__).read_text())
    taken = {a.name for n in ast.walk(ours) if isinstance(n, ast.ImportFrom) and n.module == "vllm" for a in n.names}
    assert taken == {"LLM", "SamplingParams", "TokensPrompt"}
    assert taken <= names
    ask = parameters(class_of(folder / "entrypoints/llm.py", "LLM"), "generate")
    assert [a.arg for a in ask.args] == ["self", "prompts", "sampling_params"]
    assert "use_tqdm" in {a.arg for a in ask.kwonlyargs}
    assert "prompt_token_ids" in field_names(class_of(folder / "inputs/llm.py", "TokensPrompt"))
    assert "token_ids" in field_names(class_of(folder / "outputs.py", "CompletionOutput"))
    given = parameters(class_of(folder / "outputs.py", "RequestOutput"), "__init__")
    assert "outputs" in {a.arg for a in given.args}
    llm, engine = (folder / name for name in ("entrypoints/llm.py", "v1/engine/llm_engine.py"))
    assert {"self.llm_engine =", "self.model_config ="} <= {
        f"{ast.unparse(n.targets[0])} =" for n in ast.walk(ast.parse(llm.read_text())) if isinstance(n, ast.Assign)
    }
    assert any(
        isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "self.engine_core"
        for n in ast.walk(ast.parse(engine.read_text()))
    )
    assert parameters(class_of(folder / "v1/engine/core_client.py", "MPClient"), "shutdown")


def test_vllm_answers_as_transformers_do(tmp_path: Path) -> None:
    """The real engine, where the installed vllm runs on this machine: the same greedy answers, and it ends."""
    pytest.importorskip("vllm", reason="vllm is not installed (requirements-vllm.lock)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if vllm_device() != device.type:
        pytest.skip(f"the installed vllm does not run on {device.type}")
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    torch.manual_seed(0)
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), **stops)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "A longer question than that", "Why?")]
    answers = {}
    for engine in ("transformers", "vllm"):
        with answering(engine, tmp_path, model, tokenizer, VLLMSettings()) as ask:
            answers[engine] = dict(ask(prompts, 8, 2, engine))
    assert answers["vllm"] == answers["transformers"]
    assert {len(answer) for answer in answers["vllm"].values()} <= set(range(1, 9))
