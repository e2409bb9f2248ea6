"""`nspo.plot`: every figure of a finished run by a call, and a line where there is nothing to draw."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from support.report_inputs import inputs

import nspo
from nspo.errors import UserError
from nspo.files.manifest import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results as the workflow lays it out."""
    folder = tmp_path_factory.mktemp("run")
    inputs(folder)
    (folder / "certificate").rename(folder / "certificates")
    (folder / "policy").rename(folder / "training")
    (folder / "bases").mkdir()
    shutil.move(folder / "bases.safetensors", folder / "bases")
    return folder


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("trade", {}),
        ("trade", {"against": "accuracy", "harmful": "harmbench"}),
        ("curve", {"of": "unsafe"}),
        ("certificate", {}),
        ("certificate", {"on": "leakage_basis"}),
    ],
)
def test_a_run_is_drawn(name: str, given: dict[str, Any], run: Path, tmp_path: Path) -> None:
    """From its folder, and from what was loaded once, to the same bytes."""
    draw = getattr(nspo.plot, name)
    files = tmp_path / "a.svg", tmp_path / "b.svg"
    for results, file in zip((run, nspo.plot.load(run)), files, strict=True):
        figure = draw(results, **given)
        assert isinstance(figure, Figure)
        nspo.plot.save(figure, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_certificates_and_bases_need_no_run(run: Path) -> None:
    """Certificates by name, as files or as what `verify` returned, and a file of bases."""
    file = run / "certificates/nspo/seed0.json"
    assert nspo.plot.certificate({"ours": file, "again": read_json(file)})
    assert nspo.plot.spectra(run / "bases/bases.safetensors")


def test_what_is_not_there_is_told(run: Path) -> None:
    """Another set, another curve, a run without walks, certificates without the figure."""
    with pytest.raises(UserError, match="harmful='none', expected one of advbench, harmbench"):
        nspo.plot.trade(run, harmful="none")
    with pytest.raises(UserError, match="of='none', expected one of reward"):
        nspo.plot.curve(run, "none")
    with pytest.raises(UserError, match="walks was not measured"):
        nspo.plot.walk(run)
    with pytest.raises(UserError, match="leakage_basis was not measured"):
        nspo.plot.certificate({"empty": {"layers": {}}}, on="leakage_basis")
