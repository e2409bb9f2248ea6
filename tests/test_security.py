"""What must never happen: code run from a file that was given as data, and a secret that ends up in an artifact.

Wheels (hash, path escape, links) are tested in test_sources.py, text on the page in test_report.py.
"""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nspo.cli import main as cli
from nspo.errors import UserError
from nspo.models.stage import prepare_model
from nspo.settings.model import ModelSettings
from nspo.settings.reading import StrictLoader

PACKAGE = Path(__file__).parents[1] / "nspo"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of these kinds in a source file."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call: the name as written (`torch.load`) and its keyword arguments as source."""
    for node in nodes(path, ast.Call):
        assert isinstance(node, ast.Call)
        yield ast.unparse(node.func), {str(k.arg): ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    """Only safetensors, Parquet, JSON and safe YAML are read; no text is evaluated, no shell is called."""
    modules = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes(path, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in modules} & RUNS_CODE
    for name, keywords in calls(path):
        assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}, name
        assert name not in {"torch.load", "torch.save", "pd.read_pickle"}, f"{name}: safetensors only"
        assert keywords.get("allow_pickle", "False") == "False", name
        assert keywords.get("shell", "False") == "False", name
        assert keywords.get("trust_remote_code", "False") == "False", name
        if name.startswith("yaml.") and "load" in name and name != "yaml.safe_load":
            assert (name, keywords.get("Loader")) == ("yaml.load", "StrictLoader"), name
            assert issubclass(StrictLoader, yaml.SafeLoader)


def test_every_loader_refuses_remote_code() -> None:
    """transformers asks on the terminal where nothing is said, so every call says no."""
    for path in SOURCES:
        for name, keywords in calls(path):
            if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
                assert keywords.get("trust_remote_code") == "False", f"{path.name}: {name}"


def planted(model: Path, folder: Path, model_type: str) -> Path:
    """A copy of `model` whose configuration and tokenizer ask for a Python file beside them, which leaves a trace."""
    shutil.copytree(model, folder)
    for name, classes in (
        ("config.json", {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["planted.Tokenizer", None]}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": classes}))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
    trace = f"from pathlib import Path\nPath({str(folder / 'trace')!r}).touch()\nConfig = Model = Tokenizer = None\n"
    (folder / "planted.py").write_text(trace)
    return folder


def test_a_known_model_is_loaded_without_its_own_code(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A Llama that brings code of its own is loaded as a Llama; the code neither runs nor is copied."""
    folder = planted(tiny_model_dir, tmp_path / "model", "llama")
    prepare_model(ModelSettings(source=str(folder)), tmp_path, tmp_path / "out")
    assert not (folder / "trace").exists()
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_model_of_its_own_code_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that only its own code can load is refused in one line, even where someone would answer yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = planted(tiny_model_dir, tmp_path / "model", "planted")
    with pytest.raises(UserError) as error:
        prepare_model(ModelSettings(source=str(folder)), tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model.source: ")
    assert not (folder / "trace").exists()
    assert not (tmp_path / "out").exists()


def test_secrets_stay_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A token in the environment is in no file and no line that a stage writes."""
    secret = "hf_planted0secret0token"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NSPO_API_KEY"):
        monkeypatch.setenv(name, secret)
    assert cli.main(["prepare-model", "--source", "tiny:llama", "--wheels-dir", "w", "--out", str(tmp_path / "m")]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "text",
    [
        "policy: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [TRACE]]",
        "policy: !!python/object/new:pathlib.PosixPath [TRACE]",
        "policy: !!python/module:antigravity",
        "!!python/name:os.system policy: 1",
    ],
)
def test_yaml_tags_run_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that asks for Python objects is refused in one line."""
    file = tmp_path / "my.yaml"
    file.write_text(text.replace("TRACE", str(tmp_path / "trace")))
    assert cli.main(["config", "check", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"nspo: error: {file} is not valid YAML: line 1")
    assert not (tmp_path / "trace").exists()
