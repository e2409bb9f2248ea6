"""hub.py: bases go to a hub and come back over real HTTP (a small server stands for the hub), and errors are a line."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from nspo.bases.card import card, push_to_hub
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.cli import main as cli
from nspo.cli.main import parser_for
from nspo.errors import UserError

MODEL = {"architecture": "LlamaForCausalLM", "weights": "a" * 16, "tokenizer": "b" * 16}
DOMAINS = {"maths": {"basis": 8101, "validation": 4041}, "harmful": {"basis": 5381}}


def bases(**identity: object) -> NullSpaceBases:
    sites = [
        compute_basis(f"model.layers.{i}.mlp.down_proj", [f"model.layers.{i}.mlp.down_proj"], gram, 99, "rank", 1)
        for i, gram in enumerate([torch.diag(torch.tensor([3.0, 2, 1])), torch.eye(3)])
    ]
    return NullSpaceBases(sites, {site.site: 1.0 for site in sites}, **identity)


class FakeHub(BaseHTTPRequestHandler):
    """The few endpoints of the hub that sharing needs, as its client calls them."""

    repositories: dict[str, dict[str, object]]
    commits: list[list[str]]

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            repo = "/".join(path[2:4])
            if repo in self.repositories:
                self._json({"id": repo, "private": self.repositories[repo]["private"]})
            else:
                self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        repo, revision, name = "/".join(path[:2]), path[3], path[4]
        if repo == "lab/gated":
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repo not in self.repositories:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "c" * 40):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif name not in self.repositories[repo]:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40})
        else:
            content = self.repositories[repo][name]
            assert isinstance(content, bytes)
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            known = "license: apache-2.0\n" in json.loads(body)["content"]
            errors = [] if known else [{"message": '"license" must be one of a list'}]
            self._json({"errors": errors, "warnings": []}, 200 if known else 400)
        elif self.headers.get("Authorization") != "Bearer hf_secret":
            self._json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            taken = repo in self.repositories
            if not taken:
                self.repositories[repo] = {"private": "private" in (asked.get("visibility"), asked.get("private"))}
            self._json({"url": f"http://{self.headers['Host']}/{repo}", "id": repo}, 409 if taken else 200)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": name, **plain} for name in names]})
        else:
            repo = "/".join(self.path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.repositories[repo].update({name: base64.b64decode(text) for name, text in files.items()})
            self.commits.append(sorted(files))
            self._json({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40})

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[tuple[type[FakeHub], str]]:
    """An empty hub and its address."""
    handler = type("Hub", (FakeHub,), {"repositories": {}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def nspo(commands: list[str], folder: Path, endpoint: str, token: str = "hf_secret") -> list[str]:
    """Run the commands one after another in a process that knows this hub only; returns its lines on standard error."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.update({"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"})
    code = "import sys; from nspo.cli.main import main; [main(command.split()) for command in sys.argv[1:]]"
    process = subprocess.run(
        [sys.executable, "-c", code, *commands], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return process.stderr.splitlines()


@pytest.mark.parametrize("half", [False, True])
def test_pushed_bases_come_back(hub: tuple[type[FakeHub], str], tmp_path: Path, half: bool) -> None:
    """A push is one commit of file and card; a fetch gives the same bytes, by branch and by commit, halved or not."""
    handler, endpoint = hub
    bases(model=MODEL, domains=DOMAINS).save(tmp_path / "bases.safetensors", half=half)
    lines = nspo(
        [
            "bases push bases.safetensors --repo lab/bases --licence apache-2.0 --private true",
            "bases fetch --source hub:lab/bases --out fetched.safetensors",
            f"bases fetch --source hub:lab/bases@{'c' * 40} --out pinned.safetensors",
        ],
        tmp_path,
        endpoint,
    )
    assert lines == [f"bases: {endpoint}/lab/bases/commit/{'c' * 40}"]
    assert handler.commits == [["README.md", "bases.safetensors"]]
    assert handler.repositories["lab/bases"]["private"] is True
    for name in ("fetched", "pinned"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (tmp_path / "bases.safetensors").read_bytes()
    published = handler.repositories["lab/bases"]["README.md"]
    assert isinstance(published, bytes)
    assert published.decode() == card(bases(model=MODEL, domains=DOMAINS), "lab/bases", "apache-2.0")


def test_errors_of_the_hub_are_one_line(hub: tuple[type[FakeHub], str], tmp_path: Path) -> None:
    """Every way to miss names the repository and says what to do, in one line; nothing is written."""
    handler, endpoint = hub
    handler.repositories.update({"lab/public": {"private": False}, "lab/broken": {"bases.safetensors": b"no tensors"}})
    bases().save(tmp_path / "bases.safetensors")
    push = "bases push bases.safetensors --licence"
    expected = {
        "bases fetch --source hub:lab/none --out o": "hub repository lab/none was not found, or is private",
        "bases fetch --source hub:lab/gated --out o": "hub repository lab/gated is gated: ask for access",
        "bases fetch --source hub:lab/public@v9 --out o": "hub repository lab/public has no such revision",
        "bases fetch --source hub:lab/public --out o": "hub repository lab/public holds no bases.safetensors",
        "bases fetch --source hub:lab/two..dots --out o": "hub repository lab/two..dots is not the name of a",
        "bases fetch --source results/x --out o": "source 'results/x', expected hub:ORG/NAME@REVISION",
        f"{push} apache-2.0 --repo lab/public --private true": "hub repository lab/public is public, expected",
        f"{push} my-own --repo lab/new": 'hub repository lab/new: Invalid metadata in README.md. - "license" must be',
    }
    lines = nspo([*expected, "bases fetch --source hub:lab/broken --out o"], tmp_path, endpoint)
    assert len(lines) == len(expected) + 1
    for line, start in zip(lines, expected.values(), strict=False):
        assert line.startswith(f"nspo: error: {start}")
    assert lines[-1].endswith("delete it and rerun the stage that makes it")
    assert handler.commits == []
    assert not (tmp_path / "o").exists()


def test_a_push_needs_a_login_and_a_hub(hub: tuple[type[FakeHub], str], tmp_path: Path) -> None:
    """Without a right to write, and without a hub that answers, a push ends in one line that says so."""
    bases().save(tmp_path / "bases.safetensors")
    push = "bases push bases.safetensors --licence apache-2.0 --repo lab/new"
    (refused,) = nspo([push], tmp_path, hub[1], token="hf_wrong")
    assert refused == (
        "nspo: error: hub repository lab/new: the hub answers 401 (Invalid username or password.): "
        "log in (`hf auth login`, or HF_TOKEN) with a token that may write there"
    )
    (silent,) = nspo([push], tmp_path, "http://127.0.0.1:9")
    assert silent.startswith("nspo: error: hub repository lab/new cannot be reached (")


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, as this suite runs, neither direction tries the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="lab/nothing cannot be reached, and the cache has no copy"):
        NullSpaceBases.from_hub("lab/nothing")
    with pytest.raises(UserError, match="lab/nothing cannot be reached: unset HF_HUB_OFFLINE"):
        push_to_hub(bases(), "lab/nothing", licence="mit")


# ------------------------------------------------------------------------------------------- the card


def test_card_names_model_data_and_worth() -> None:
    """The card is valid for the hub, and says which model, data, rule and licence, the worth by kind, and the use."""
    model = {**MODEL, "source": "hub:org/model", "revision": "v1"}
    text = card(bases(model=model, domains=DOMAINS), "lab/bases", "apache-2.0")
    about = ModelCard(text).data
    assert (about.license, about.library_name, about.base_model) == ("apache-2.0", "nspo", "org/model")
    for line in (
        "# Null-space bases of hub:org/model@v1",
        'bases = NullSpaceBases.from_hub("lab/bases")',
        f"| fingerprint of the weights | `{'a' * 16}` |",
        "| maths | 8101 | 4041 |",
        "| harmful | 5381 | 0 |",
        "Rule: rank, threshold 1. Means over the sites of each kind:",
        "| mlp.down_proj | 2 | 3 | 1 | 2 (66.7%) | 41.7% | - | - | - |",
    ):
        assert line in text.splitlines()


def test_what_the_card_tells_to_type_is_what_the_commands_take() -> None:
    """At a glance the share that is left to train in; every command stands as the command line takes it."""
    text = card(bases(model=MODEL, domains=DOMAINS), "lab/bases", "apache-2.0")
    assert re.search(r"\| left to train in \| \d+\.\d% of the directions", text)
    typed = [line.split()[1:] for line in text.splitlines() if line.startswith("nspo ")]
    assert [words[0] for words in typed] == ["bases", "verify"]
    for words in typed:
        parser, rest, _ = parser_for(words)
        parser.parse_args(rest)


def test_card_without_data_says_so(tmp_path: Path) -> None:
    """Bases that record neither domains nor source have a whole card too, and the command writes it."""
    bases(model=MODEL).save(tmp_path / "bases.safetensors")
    command = f"bases card {tmp_path}/bases.safetensors --repo lab/b --licence mit --out {tmp_path}/README.md"
    assert cli.main(command.split()) == 0
    text = (tmp_path / "README.md").read_text()
    assert "# Null-space bases of LlamaForCausalLM" in text
    assert "The file does not record its domains." in text
    assert "| source |" not in text
    assert ModelCard(text).data.base_model is None
