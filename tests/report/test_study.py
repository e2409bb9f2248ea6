"""The page of a study: every variant a row beside its keys, the same figures as CSV, nothing loaded, nothing run."""

import csv
import re
from pathlib import Path

import pytest
from support.study_inputs import write

from nspo.errors import UserError
from nspo.report.study.keys import short, shown, varied
from nspo.report.study.plots import series
from nspo.report.study.rows import Row
from nspo.report.study.stage import write_study
from nspo.settings.reading import check_config
from nspo.settings.study import variants


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four variants with two seeds and what pools them."""
    return write(tmp_path_factory.mktemp("study"), seeds=("pooled", "0", "1"))


def test_a_row_for_every_variant_and_seed(page: Path) -> None:
    """With its keys, and every figure with interval and n; one row for the base model, which all share."""
    rows = list(csv.DictReader(page.with_name("study.csv").open()))
    assert [(row["variant"], row["method"], row["seed"]) for row in rows] == [
        ("plain", "base", "0"),
        *(
            (name, "main", seed)
            for name in ("plain", 'R&D "free"', "rule-energy-0.9", "rule-energy-0.95")
            for seed in ("pooled", "0", "1")
        ),
    ]
    assert list(rows[0])[3:6] == ["bases.rule", "bases.threshold", "policy.methods.main.constraint.kind"]
    found = {(row["variant"], row["seed"]): row for row in rows}
    one = found["rule-energy-0.9", "1"]
    assert (one["bases.rule"], one["bases.threshold"]) == ("energy", "0.9")
    figures = (
        "unsafe_rate_advbench",
        "unsafe_rate_advbench_low",
        "unsafe_rate_advbench_high",
        "unsafe_rate_advbench_n",
    )
    assert [float(one[key]) for key in figures] == pytest.approx([0.31, 0.155, 0.465, 80])
    assert float(one["kl_per_token_maths"]) == pytest.approx(0.031)
    assert float(found["rule-energy-0.9", "pooled"]["leakage_basis"]) == pytest.approx(0.01)  # the largest of the seeds
    assert float(found["rule-energy-0.9", "pooled"]["scale"]) == pytest.approx(0.9)
    text = page.read_text()
    assert "4 variants that differ in 3 keys" in text
    heads = re.findall(r"<th>([^<]*)</th>", text)
    assert heads[:4] == ["Unsafe rate, advbench", "Over-refusal", "Ability", "KL per token"]  # seen without scrolling
    assert "<b>31.0%</b><small>15.5% to 46.5%</small>" in text


def test_names_are_text_and_nothing_is_loaded(page: Path) -> None:
    """Signs of HTML in a name are shown as they stand; links lead to the variants' own pages, figures are embedded."""
    text = page.read_text()
    assert 'R&D "free"' not in text
    assert 'href="variants/R%26D%20%22free%22/report.html">R&amp;D &#34;free&#34;</a>' in text
    assert "default-src 'none'" in text
    assert text.count("<script") == 1
    assert text.count("data:image/svg+xml;base64,") == len(list(page.with_name("plots").glob("*.svg"))) == 3 * 4
    assert not {"http://", "https://"} & set(text.split('"'))


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """Page and table of the same study are the same."""
    study = {"variants": {"a": None, "b": {"policy.clip": 0.3}}}
    first, again = (write(tmp_path / name, study=study) for name in ("first", "again"))
    assert again.read_bytes() == first.read_bytes()
    assert again.with_name("study.csv").read_bytes() == first.with_name("study.csv").read_bytes()


def test_only_what_differs_is_a_key() -> None:
    """Entries that come and go are told by their names; what only one kind has is no key; defaults count as written."""
    found = varied(
        variants(
            check_config(
                {
                    "study": {
                        "variants": {
                            "a": {"bases.threshold": 3.0, "bases.weights": {"maths": 0.0}},
                            "b": {"data.general.code": None},
                            "c": {"policy.methods.nspo.constraint": {"kind": "none"}},
                        }
                    }
                }
            ),
            "study",
        )
    )
    assert {key: [shown(value) for value in of.values()] for key, of in found.items()} == {
        "data.general": [
            "maths, code, commonsense, instructions",
            "maths, commonsense, instructions",
            "maths, code, commonsense, instructions",
        ],
        "bases.weights": ["maths: 0", "none", "none"],
        "policy.methods.nspo.constraint.kind": ["exact", "exact", "none"],
    }
    assert list(short(["policy.methods.a.loss.kl", "policy.methods.b.loss.kl", "bases.rule"]).values()) == [
        "a.loss.kl",
        "b.loss.kl",
        "bases.rule",
    ]


def test_a_figure_shows_what_differs_in_its_key_alone() -> None:
    """A series for each choice of the others; a key that never changes alone may take one other with it."""
    values = {
        "rule": {"a": "energy", "b": "energy", "c": "contrast", "d": "contrast"},
        "threshold": {"a": 0.9, "b": 0.95, "c": 2.0, "d": 2.0},
        "steps": {"a": 1, "b": 1, "c": 1, "d": 2},
    }
    rows = [Row(name, method, "0", {}) for name in "abcd" for method in ("base", "main")]
    names = {key: f"x.{key}" for key in values}

    def found(key: str) -> dict[str, list[str]]:
        return {label: [row.variant for _, row in points] for label, points in series(key, values, rows, names).items()}

    assert found("threshold") == {"": ["a", "b"]}
    assert found("steps") == {"": ["c", "d"]}
    assert found("rule") == {"": ["a", "b", "c"]}


def test_what_is_missing_is_told_in_a_line(tmp_path: Path) -> None:
    """A variant twice, or without its summary."""
    (tmp_path / "a").mkdir()
    places = (tmp_path / "out.html", tmp_path / "out.csv", tmp_path / "plots")
    with pytest.raises(UserError, match="a: found two variants of this name, expected each once"):
        write_study([tmp_path / "a", tmp_path / "b" / "a"], *places)
    (tmp_path / "a/config.yaml").write_text("policy: {clip: 0.3}")
    with pytest.raises(UserError, match=r"summary.csv cannot be read .*, expected the summary of a variant"):
        write_study([tmp_path / "a"], *places)
