"""What the page shows of the screen."""

from nspo.files.manifest import write_json
from nspo.report.plots import Figures
from nspo.report.sections.bases import screened


def row(space: str, mode: str, answers: int, cost: float | None) -> dict[str, object]:
    return {"space": space, "mode": mode, "answers": answers, "cost": cost}


def test_a_line_for_every_space_in_the_first_mode(tmp_path):
    """And for no constraint; a candidate without a gain has a row and no point."""
    rows = [row("none", "sign", n, 9.0) for n in (16, 64)] + [row("none", "plain", 16, 8.0)]
    rows += [row("energy 0.9", mode, n, 2.0) for mode in ("anchor", "both") for n in (16, 64)]
    rows += [row("random", "anchor", 16, None)]
    write_json(tmp_path / "screen.json", {"rows": rows})
    found = screened(tmp_path / "screen.json", Figures(tmp_path))
    assert found["rows"] == rows
    (figure,) = found["figures"]
    text = (tmp_path / "screen.svg").read_text()
    assert figure["title"] == "What a first step costs for its gain"
    assert ("none, sign" in text, "energy 0.9, anchor" in text) == (True, True)
    assert ("plain" in text, "both" in text, "random" in text) == (False, False, False)
