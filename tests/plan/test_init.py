"""`nspo init`: what it writes is valid, says what was asked for, and needs no network."""

import json
from pathlib import Path

import pytest

from nspo.cli.main import main
from nspo.settings.reading import load_config


@pytest.fixture(autouse=True)
def _nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that never met the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


def test_the_papers_model_and_data(tmp_path: Path) -> None:
    """Known names get the revisions of the paper's runs, judged pairs teach both models, GPUs share out the work."""
    out = tmp_path / "mine.yaml"
    flags = ["--model", "Qwen/Qwen2.5-7B-Instruct", "--data", "PKU-Alignment/PKU-SafeRLHF", "--gpus", "8"]
    assert main(["init", *flags, "--out", str(out)]) == 0
    config = load_config(out)
    assert config.model.source.startswith("hub:Qwen/Qwen2.5-7B-Instruct@a09a")
    assert {labels.kind for labels in config.data.labels.values()} == {"safe_rlhf"}
    assert (config.policy.processes, config.policy.sharding, config.runtime.device) == (8, "fsdp2", "cuda")
    assert "# sum " in out.read_text(), "the plan stands beneath"


@pytest.mark.parametrize("gpus", [0, 1, 3, 6, 8, 64])
def test_sizes_divide_for_any_number_of_gpus(gpus: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Answers, updates and GPUs fit together, and an unknown model is said to have no plan yet."""
    assert main(["init", "--model", "some/model", "--gpus", str(gpus)]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    assert load_config(file).policy.processes == max(gpus, 1)
    assert "Add @REVISION" in text
    assert "the model's size" in text


def test_own_prompts_are_read_for_their_column(tmp_path: Path) -> None:
    """The column of prompts is found in the file."""
    data, out = tmp_path / "My prompts.v2.jsonl", tmp_path / "mine.yaml"
    data.write_text(json.dumps({"id": 1, "goal": "Do harm"}) + "\n")
    assert main(["init", "--model", "some/model@main", "--data", str(data), "--out", str(out)]) == 0
    harmful = load_config(out).data.harmful
    assert (harmful.source, harmful.prompt, harmful.name) == (str(data), "goal", "my-prompts.v2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "./none"], "--model ./none: nothing is there"),
        (["--model", "a/b", "--data", "data/none.jsonl"], "--data data/none.jsonl: nothing is there"),
        (["--model", "a/b", "--data", __file__], "unknown suffix"),
        (["--model", "a/b", "--gpus", "-1"], "--gpus -1, expected 0"),
        (["--model", str(Path(__file__).parent)], "no config.json there"),
        (["--model", "a/b", "--out", __file__], "is there: choose another --out"),
    ],
)
def test_faults_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be is told in one line."""
    assert main(["init", *flags]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_file_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns that are there and those that would do are named."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"a": 1}\n')
    assert main(["init", "--model", "a/b", "--data", str(data)]) == 2
    assert "found the columns a, expected one of prompt, " in capsys.readouterr().err
