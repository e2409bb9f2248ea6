"""Reports of outputs that could not be written."""

from pathlib import Path

import pytest

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
