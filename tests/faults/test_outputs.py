"""Reports of outputs that could not be written."""

from pathlib import Path

import pytest

from nspo.cli.main import main
from nspo.files.atomic import atomic_path


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_points(there: bool, tmp_path: Path) -> None:
    """`--out` as a link to a folder on another disk was a traceback of rmtree; it stays a link, old content goes."""
    real, link = tmp_path / "disk" / "model", tmp_path / "out"
    real.parent.mkdir()
    if there:
        real.mkdir()
        (real / "old").touch()
    link.symlink_to(real)
    with atomic_path(link) as scratch:
        scratch.mkdir()
        (scratch / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in real.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("file/model", "what is there is no folder"),
        ("r" * 300, "the name is too long for the disk"),
        ("r" * 250, "the name is too long for the disk"),  # of the scratch folder beside it
        ("round/model", "what is there is no folder"),
    ],
)
def test_a_place_at_which_nothing_can_be_written_is_told(
    out: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, not a traceback: the path, what is wrong with it, what to change."""
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to("round")
    given = ["--source", "tiny:llama", "--wheels-dir", str(tmp_path / "wheels")]
    assert main(["prepare-model", *given, "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert f"{said}: choose another path" in error
    assert "Traceback" not in error
