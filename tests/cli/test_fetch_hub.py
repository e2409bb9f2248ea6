"""`nspo fetch-hub`: every kind of source is fetched as the stage that reads it asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from nspo.cli.main import main
from nspo.data import readers
from nspo.evaluation.benchmarks import loading
from nspo.files.sources import Source
from nspo.models import loading as models


@pytest.mark.parametrize(
    ("of", "asked", "found"),
    [
        ("model", ("lab/it", "v1"), {"commit": "c0ffee", "files": ["config.json"]}),
        ("data", ("lab/it", "v1", None, "train"), {"rows": 2}),
        ("mbpp", ("lab/it", "v1", "full", "test"), {"rows": 2}),
    ],
)
def test_each_kind_is_asked_for_as_its_reader_does(
    of: str, asked: tuple[Any, ...], found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def rows(source: Source, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
        seen.append((source.location, source.revision, subset, split))
        return [{"a": 1}, {"a": 2}]

    def folder(key: str, source: Source) -> Path:
        seen.append((source.location, source.revision))
        (tmp_path / "c0ffee").mkdir()
        (tmp_path / "c0ffee/config.json").touch()
        return tmp_path / "c0ffee"

    monkeypatch.setattr(readers, "hub_rows", rows)
    monkeypatch.setattr(loading, "hub_rows", rows)
    monkeypatch.setattr(models, "hub_folder", folder)
    out = tmp_path / "out.json"
    assert main(["fetch-hub", "--source", "hub:lab/it@v1", "--of", of, "--out", str(out)]) == 0
    assert seen == [asked]
    said = json.loads(out.read_text())
    assert {"of": of, "source": "hub:lab/it", "revision": "v1"}.items() <= said.items()
    assert found.items() <= said.items()


def test_an_unknown_benchmark_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch-hub", "--source", "hub:lab/it@v1", "--of", "mbbp", "--out", str(tmp_path / "out.json")]) == 2
    assert "mbbp" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
