"""The page's first screen: what it says in plain words is what the tests show, for every way a run may end."""

from dataclasses import replace
from typing import Any

import pytest
from support.report_inputs import BASE, NSPO, TWIN, Behaviour, response_rows, write_preference

from nspo.report import compare
from nspo.report.first import first_screen
from nspo.report.plots import Figures
from nspo.report.runs import Run
from nspo.report.sections.preference import preference
from nspo.settings.config import Config


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section on the cost model."""
    folder = tmp_path_factory.mktemp("judge")
    return preference("cost", write_preference(folder, "cost"), Figures(folder))


def screen(judge: dict[str, Any], nspo: Behaviour, twin: Behaviour, seeds: int = 1, **match: Any) -> dict[str, Any]:
    """The first screen of a run whose methods behave so."""
    does = {"base": BASE, "nspo": nspo, "grpo_no_kl": twin}
    columns = compare.measures(Config())
    rows = {name: [response_rows(name, how)] * (1 if name == "base" else seeds) for name, how in does.items()}
    (main,) = compare.comparisons(Config(), rows, columns)
    found = {"main": main, "against_base": [compare.compare(rows, "nspo", "base", columns)]}
    run = Run("nspo", 0, "nspo", "#000", {}, [], match=match or None)
    screen = first_screen(found, [run], judge)
    assert screen is not None
    return screen


def answers(found: dict[str, Any]) -> list[str]:
    """The three answers in short."""
    return [question["answer"] for question in found["questions"]]


def test_a_success_is_told_with_its_price_and_its_limits(judge: dict[str, Any]) -> None:
    """Safer, less drift at equal safety, one run: and the sentence that ends the workflow holds the first two."""
    found = screen(judge, NSPO, TWIN)
    assert answers(found) == [
        "Safer than before",
        "10.0 times less drift than grpo_no_kl, at equal safety",
        "As a first look: one training run",
    ]
    assert found["sentence"] == "nspo: safer than before; 10.0 times less drift than grpo_no_kl, at equal safety."
    said = " ".join(sentence for question in found["questions"] for sentence in question["sentences"])
    assert "8.3% of its answers to the harmful requests of advbench are unsafe, 70% were before" in said
    assert "General tasks solved: 40%, before 40%, grpo_no_kl 35%; unchanged, within 1.5 points." in said
    assert "AUROC 0." in said
    assert any("seeds: [0, 1, 2]" in step.get("command", "") for step in found["next"])


def test_what_is_not_shown_is_not_claimed(judge: dict[str, Any]) -> None:
    """No gain, unequal safety, more drift, a model at the floor, a target that was not met."""
    assert answers(screen(judge, replace(NSPO, unsafe=0.7), TWIN))[0] == "Not shown to be safer than before"
    unequal = screen(judge, replace(NSPO, unsafe=0.3), TWIN)["questions"][1]
    assert unequal["answer"] == "Less drift than grpo_no_kl, at safety not shown to be equal"
    assert "not shown to be equally safe" in unequal["sentences"][0]
    assert answers(screen(judge, TWIN, NSPO))[1].startswith("10.0 times more drift")
    assert answers(screen(judge, NSPO, NSPO))[1].startswith("Drift not clearly different")
    weak = screen(judge, replace(NSPO, correct=0.02), replace(TWIN, correct=0.02))
    assert any("the floor" in step["text"] for step in weak["next"])
    unmatched = screen(judge, NSPO, TWIN, found="not reached")
    assert any("does not meet the safety" in sentence for sentence in unmatched["questions"][2]["sentences"])


def test_several_seeds_need_no_advice_to_take_more(judge: dict[str, Any]) -> None:
    """Two runs of each method are said so."""
    found = screen(judge, NSPO, TWIN, seeds=2)
    assert answers(found)[2] == "Over 2 training runs of each"
    assert not any("seeds" in step.get("command", "") for step in found["next"])


def test_nothing_to_compare_has_no_first_screen(judge: dict[str, Any]) -> None:
    """Without a constrained and an unconstrained method the verdict alone says so."""
    assert first_screen({"main": None}, [], judge) is None
