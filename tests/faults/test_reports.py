"""Reports of verdicts, texts, paths, permissions, groups, copies and idle steps: one row each.

What was wrong there, and a check of what is right: the next report is one row more.
"""

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from support.endpoint import FakeEndpoint, fake, settings_of, text_of

from nspo.cli.main import to_flags
from nspo.errors import UserError, unreadable
from nspo.files.atomic import atomic_path
from nspo.judges.endpoint import SafetyEndpoint
from nspo.models.structure.positions import fitting
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.policy.log import LogCallback
from nspo.run.launch import forget_foreign_group
from nspo.settings.model import ModelSettings
from nspo.settings.reading import check_config
from nspo.settings.runtime import RequestSettings
from nspo.workflow.copied import warn_if_copied

__all__ = ["fake"]


class Given(NamedTuple):
    """What a check may use."""

    folder: Path
    fake: FakeEndpoint
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def verdicts(self, answers: list[str]) -> str:
        """What a judge at the endpoint says of these answers."""
        judge = SafetyEndpoint("evaluation.judges.guard", settings_of(self.fake), RequestSettings(retries=0))
        return text_of(judge.verdicts(["?"] * len(answers), answers))


def failed_requests(given: Given) -> None:
    """One that fails is no verdict; a round of them ends in a line that names the cause, with status 2."""
    assert given.verdicts(["fine", "status:400", "bad"]) == "s-U"
    with pytest.raises(UserError, match="in a row, the last with status 400"):
        given.verdicts(["status:400"] * 12)


def no_verdicts(given: Given) -> None:
    """A reply without a verdict is a failed one, told with its text; markdown or another case is none."""
    assert given.verdicts(["say:maybe", "say:**unsafe**", "say:Unsafe", "say: unsafe\n", "fine"]) == "---Us"
    assert "3 replies are no verdict, the first is '" in given.capsys.readouterr().err


def no_completion(given: Given) -> None:
    """A page of HTML with status 200 is a request that failed, which is asked again, and no failed verdict."""
    page = "raw:<html>Maintenance</html>"
    assert given.verdicts(["fine", page, "bad"]) == "s-U"
    assert "1 requests failed with status 200 but no chat completion" in given.capsys.readouterr().err
    with pytest.raises(UserError, match="failed 10 requests in a row, the last with status 200 but no chat"):
        given.verdicts([page] * 12)


def too_long(given: Given) -> None:
    """Left out and counted, with the answer's length in mind."""
    config = tiny_model().config
    rows = [{"prompt": "x" * n, "role": "benign"} for n in (1, 2000)]
    assert fitting(rows, tiny_tokenizer(), config, 8, "evaluation").left_out == {"benign": 1}
    assert "evaluation: 1 prompts are too long to be answered in 8 tokens" in given.capsys.readouterr().err


def other_locale(given: Given) -> None:
    """A configuration that is written in a locale of bytes alone is read in any other."""
    path, prompt = given.folder / "config.yaml", "Sé bueno."
    code = "import sys; from nspo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    model = json.dumps({"source": "tiny:llama", "system_prompt": prompt})
    command = [sys.executable, "-c", code, "config", "write", "--model", model, "--out", str(path)]
    bytes_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, env={**os.environ, **bytes_alone}, check=True)
    assert yaml.safe_load(path.read_bytes())["model"]["system_prompt"] == prompt


def odd_paths(given: Given) -> None:
    """What a shell takes apart is quoted; what Snakemake takes for its own is refused before any work."""
    odd = "a b/'c' \"d\" $HOME; `e`"
    assert shlex.split(to_flags(ModelSettings(chat_template=odd), ["chat_template"])) == ["--chat-template", odd]
    with pytest.raises(UserError, match=r"runtime\.results: .* in the path"):
        check_config({"runtime": {"results": "a{b}"}}, "my.yaml")


def for_the_owner_alone(given: Given) -> None:
    """Whatever a library wrote it with, an artifact has the umask's permissions; a permission is told as one."""
    before = os.umask(0o027)
    try:
        with atomic_path(given.folder / "a") as scratch:
            os.close(os.open(scratch, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((given.folder / "a").stat().st_mode) == 0o640

    def refused(*_: Any) -> None:
        raise PermissionError

    given.monkeypatch.setattr(Path, "open", refused)
    assert "no permission to read it" in str(unreadable("x", "a whole file", OSError("Not a Parquet file")))


def foreign_group(given: Given) -> None:
    """A process that no launcher started runs alone; one that is not the first of a group is refused."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "somewhere"}.items():
        given.monkeypatch.setenv(name, value)
    given.monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    forget_foreign_group()
    assert "ignored, it runs alone" in given.capsys.readouterr().err
    assert not {"WORLD_SIZE", "RANK", "MASTER_ADDR"} & set(os.environ)
    given.monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="start the stage once"):
        forget_foreign_group()


def copied(given: Given) -> None:
    """Before anything is removed a line says so, and names what keeps it."""
    (given.folder / "results" / "model").mkdir(parents=True)
    warn_if_copied(given.folder / "results", given.folder / ".snakemake")
    assert "--touch --forceall" in given.capsys.readouterr().err


def nothing_learnt(given: Given) -> None:
    """Told at the first step whose groups have no variance, and at the end where none had."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=2)
    log = LogCallback(given.folder, lambda _: [], [], 100)
    log.on_train_begin(None, state, None)
    for state.global_step in (1, 2):
        logs = {"loss": 0.0, "frac_reward_zero_std": 1.0, "completions/mean_length": 3.0, "step_time": 1.0}
        log.on_log(None, state, None, logs=logs)
    log.steps.append([])
    given.monkeypatch.setattr("nspo.policy.log.shares", lambda _: "")
    log.on_train_end(None, state, None)
    said = given.capsys.readouterr().err
    assert said.count("nothing is learnt: the answers of every group earn the same") == 1
    assert "nothing was learnt in any of 2 updates" in said


class Report(NamedTuple):
    """A replayed report: whose it is, what was wrong there, and what is right."""

    reported: str
    wrong_there: str
    right: Callable[[Given], None]


REPORTS = [
    Report("AISecurityLab/hackagent#345", "requests that failed became verdicts", failed_requests),
    Report("wandb/rai-toolkit#66", "three endpoint failures were 100% resistance", failed_requests),
    Report("promptfoo/promptfoo#7040", "replies that were no JSON became a success rate of 100%", no_verdicts),
    Report("project-arbr/arbr-control-plane#106", "a judge that cannot be asked left no verdicts", no_completion),
    Report("Mosi-AI/LiveClawBench#112", "requests that failed scored 0 without a word", no_completion),
    Report("hiyouga/LlamaFactory#5351", "an IndexError of GPT-2 at its last position", too_long),
    Report("EleutherAI/lm-evaluation-harness#3115", "the beginning of the prompt is cut off", too_long),
    Report("NVIDIA-NeMo/Automodel#3782", "the configuration has other values in another locale", other_locale),
    Report("microsoft/PyRIT#2047", "UnicodeDecodeError of a configuration", other_locale),
    Report("snakemake/snakemake#2981", "a quote or a space in a path ends a rule in the shell", odd_paths),
    Report("ylab-hi/ScanNeo2#80", "paths with spaces reach a tool in parts", odd_paths),
    Report("safetensors/safetensors#782", "weights that nobody but the owner can read", for_the_owner_alone),
    Report("NatLibFi/Annif#829", "the umask ignored by an atomic save", for_the_owner_alone),
    Report("pytorch/examples#458", "WORLD_SIZE in the environment hangs", foreign_group),
    Report("aomlomics/tourmaline#152", "rules run again although their outputs are there", copied),
    Report("modelscope/ms-swift#4570", "loss and gradient 0 all the time, without a word", nothing_learnt),
]


@pytest.mark.parametrize("report", REPORTS, ids=[report.reported for report in REPORTS])
def test_what_was_wrong_there_is_right_here(
    report: Report,
    fake: FakeEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """See the check of each report."""
    report.right(Given(tmp_path, fake, monkeypatch, capsys))
