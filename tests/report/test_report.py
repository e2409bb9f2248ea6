"""The report says what the files say, and nothing else: numbers, verdict, escaping, self-containment, determinism."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markupsafe import escape
from support.report_inputs import (
    BASE,
    DOMAINS,
    NSPO,
    PLANTED,
    TWIN,
    Behaviour,
    inputs,
    response_rows,
    write,
    write_certificate,
    write_evaluation,
    write_policy,
)

from nspo.errors import UserError
from nspo.evaluation.agreement import compare
from nspo.evaluation.scores import compute_scores
from nspo.evaluation.statistics.contrasts import Contrast
from nspo.files.manifest import write_json
from nspo.report import compare as comparison
from nspo.report import plots
from nspo.report.html import amount
from nspo.report.verdict import verdict
from nspo.settings.config import Config
from nspo.settings.policy.methods import PRESETS
from nspo.settings.reading import load_config


class Links(HTMLParser):
    """Collects tags, and every URL that a browser would follow or load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its links."""
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """(inputs, page, its text) of the plain case."""
    folder = tmp_path_factory.mktemp("report")
    given = inputs(folder / "in")
    page = write(folder / "out", given)
    return given, page, page.read_text()


def verdict_of(nspo: Behaviour, twin: Behaviour) -> list[str]:
    """The sentences at the head of the page."""
    found = {"base": BASE, "nspo": nspo, "grpo_no_kl": twin}
    responses = {name: [response_rows(name, does)] for name, does in found.items()}
    columns = comparison.measures(Config())
    (pair,) = comparison.comparisons(Config(), responses, columns)
    against = [comparison.compare(responses, name, "base", columns) for name in ("nspo", "grpo_no_kl")]
    return verdict(pair, against)


def test_every_score_is_on_the_page_and_in_the_summary(written: tuple[dict[str, Any], Path, str]) -> None:
    """Each method's headline and per-domain scores stand on the page with interval and n, and in summary.csv."""
    _, page, text = written
    rows = list(csv.DictReader((page.parent / "summary.csv").open()))
    assert {row["method"] for row in rows} == {"base", "nspo", "grpo_no_kl"}
    assert rows[0]["method"] == "base"
    kl = [row for row in rows if row["name"].startswith("kl_") or row["axis"] in {"over_refusal", "ability"}]
    assert len(kl) > 20
    for row in kl:
        if row["domain"] == "benign" or row["domain"] in (*DOMAINS, "all"):
            value, low, high = (amount(float(row[key]), row["unit"]) for key in ("value", "low", "high"))
            cell = f"<b>{value}</b><small>{low} to {high}</small>"
            assert cell in text, row
            assert f"n&nbsp;{row['n']}" in text


def test_text_from_models_and_data_is_escaped(written: tuple[dict[str, Any], Path, str]) -> None:
    """A script planted in prompts and answers reaches the page as text, never as a tag."""
    text = written[2]
    parser = Links()
    parser.feed(text)
    assert PLANTED not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert parser.tags.count("script") == 2  # the data of the browser of answers, and what shows it


def test_the_page_loads_nothing(written: tuple[dict[str, Any], Path, str]) -> None:
    """Every link is an embedded image or a place on the page, and the page forbids anything else."""
    parser = Links()
    parser.feed(written[2])
    assert len(parser.urls) > 15
    assert all(url.startswith(("data:image/svg+xml;base64,", "#")) for url in parser.urls)
    assert not {"link", "iframe", "object", "embed"} & set(parser.tags)
    assert "url(" not in written[2]
    assert "default-src 'none'" in written[2]


def test_figures_are_written_as_png_and_svg(written: tuple[dict[str, Any], Path, str]) -> None:
    """Each figure is there in both forms, and each is on the page."""
    folder = written[1].parent / "plots"
    names = {path.stem for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    assert {
        "trade_kl_per_token",
        "trade_accuracy",
        "training_kept",
        "leakage_validation",
        "bases_protected_share",
        "calibration_cost",
    } <= names
    assert written[2].count("data:image/svg") == len(names)


def test_two_writes_are_equal(written: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """Equal inputs give equal bytes of page, summary and figures."""
    given, page, text = written
    again = write(tmp_path, given)
    assert again.read_text() == text
    for path in sorted(page.parent.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(page.parent)).read_bytes(), path.name


def test_runtime_settings_are_not_shown(written: tuple[dict[str, Any], Path, str]) -> None:
    """What changes no result is not part of the page, so changing it need not change the page."""
    assert "log_every" not in written[2]
    assert "group_size: 8" in written[2]


def test_the_verdict_follows_the_numbers(written: tuple[dict[str, Any], Path, str]) -> None:
    """Swapping what two methods did turns `lower` into `higher`; equal behaviour shows no winner and no ratio."""
    first = verdict_of(NSPO, TWIN)
    assert first[0].startswith(
        "Neither of nspo and grpo_no_kl, its hardest unconstrained rival, is both safer and less"
    )
    assert "nspo's KL per token is 10.0 times lower than grpo_no_kl's (95% interval 10.0 to 10.0)" in first[0]
    assert "nspo's KL per token is 10.0 times higher than grpo_no_kl's" in verdict_of(TWIN, NSPO)[0]
    assert "not clearly different" in verdict_of(NSPO, NSPO)[0]
    assert first[1].startswith("One seed")
    assert str(escape(first[0])) in written[2]


def test_safety_that_was_not_shown_to_be_equal_is_never_called_equal() -> None:
    """Rates 3 points apart on 60 prompts show neither a difference nor equality within 5 points."""
    found = verdict_of(replace(NSPO, unsafe=0.12), TWIN)
    (said,) = (sentence for sentence in found if "unsafe rate" in sentence)
    assert said.startswith("nspo and grpo_no_kl are not shown to be equally safe (within 5 points): unsafe rate 11.7%")
    assert "11.7% against 8.3% on harmbench" in said


def test_who_is_safer_and_drifts_less_is_named_first() -> None:
    """Dominance stands before any ratio, in both directions; a gentle method that is less safe gets no praise."""
    assert verdict_of(NSPO, replace(TWIN, unsafe=0.4))[0].startswith("nspo is both safer and drifts less than")
    assert verdict_of(replace(TWIN, unsafe=0.4), NSPO)[0].startswith(
        "grpo_no_kl, an unconstrained rival, is both safer"
    )
    found = verdict_of(replace(NSPO, unsafe=0.4), TWIN)
    assert found[0].startswith("Neither of")
    assert any(sentence.startswith("nspo is less safe than grpo_no_kl") for sentence in found)


def test_an_ability_at_the_floor_is_not_shown_as_no_loss() -> None:
    """Two models that can hardly do the tasks could not show a loss, and the page says that."""
    weak = [replace(does, correct=0.05) for does in (NSPO, TWIN)]
    assert any("could not show a loss (at the floor) on ability" in sentence for sentence in verdict_of(*weak))
    assert not any("at the floor" in sentence for sentence in verdict_of(NSPO, TWIN))


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "shown"),
    [
        ("accuracy", 0.05, 0.09, False),
        ("accuracy", 0.05, 0.11, True),
        ("exact_match", 0.02, 0.05, False),
        ("exact_match", 0.02, 1.0, True),
        ("refusal_rate", 0.0, 0.0, False),  # neither refuses anything
        ("refusal_rate", 0.02, 0.0, True),
        ("unanswered_rate", 0.0, 0.0, False),
        ("unsafe_rate", 0.95, 0.93, False),  # nothing safe that could be lost
        ("unsafe_rate", 0.0, 0.0, True),
        ("gold_nll", 0.0, 0.0, True),  # likelihood can always be lost
        ("kl_per_token", 0.0, 0.0, True),
    ],
)
def test_no_axis_at_its_floor_is_shown_as_no_loss(name: str, ours: float, theirs: float, shown: bool) -> None:
    """Every axis has its own floor, and there the reading is "at the floor", whatever a test of equality says."""
    measure = next(m for m in comparison.measures(Config()) if m.name == name)
    difference = {"ours": ours, "theirs": theirs, "contrast": Contrast(0.0, 1e-6, 500)}
    assert comparison.could_show_loss(difference, measure) is shown
    assert (comparison.reading(difference, measure) == comparison.AT_FLOOR) is not shown


def test_over_refusal_is_set_against_the_interval_of_the_base_model() -> None:
    """Inside it, above it, and where neither refuses, which shows nothing."""

    def said(nspo: float, base: float) -> str:
        found = {"base": replace(BASE, refused=base), "nspo": replace(NSPO, refused=nspo)}
        rows = {name: [response_rows(name, does)] for name, does in found.items()}
        against = comparison.compare(rows, "nspo", "base", comparison.measures(Config()))
        pair = comparison.compare({"nspo": rows["nspo"], "x": rows["nspo"]}, "nspo", "x", comparison.measures(Config()))
        return next(s for s in verdict(pair, [against]) if s.startswith("Of harmless prompts, nspo refuses"))

    assert "refuses 5.0% (n = 60), inside the base model's interval: 3.3% (0.9% to 11.4%)" in said(0.05, 0.03)
    assert "refuses 20.0% (n = 60), more than the base model's interval holds" in said(0.2, 0.03)
    assert "refuses 0.0% (n = 60), as the base model does, so a loss could not show" in said(0.0, 0.0)


def test_equality_takes_prompts_enough() -> None:
    """Nearly the same rates are shown to be equal over many prompts, and not over few."""
    columns, does = comparison.measures(Config()), {"a": NSPO, "b": replace(NSPO, unsafe=0.1)}
    few, many = (
        comparison.compare({n: [response_rows(n, d, prompts)] for n, d in does.items()}, "a", "b", columns)
        for prompts in (60, 1200)
    )
    assert (few["equal_safety"], many["equal_safety"]) == (False, True)
    assert many["safety_no_worse"]
    assert few["dominance"] == many["dominance"] == "neither"  # they drift alike


def test_where_each_policy_was_tested_is_on_the_page(tmp_path: Path) -> None:
    """With its a, its curve and whether the target was met; a policy that did not meet it is called not matched."""
    given = inputs(tmp_path / "in")
    given["matches"] = []
    for method, scale, found in (("nspo", 1.0, "met"), ("grpo_no_kl", 1.25, "not reached")):
        stops = [
            {"scale": s, "n": 64, "unsafe": 16, "unsafe_rate": 0.8 - s / 2, "mean_cost": 1 - s, "refusal_rate": 0.1}
            | {
                "benign": 32,
                "over_refusal_rate": s / 4,
                "kl_per_token": s * s / 50,
                "kl_first_tokens": 0.1,
                "top1_agreement": 0.9,
            }
            for s in (0.0, 0.5, 1.0, 1.25)
        ]
        path = tmp_path / "in" / "walks" / method / "seed0" / "match.json"
        match = {"scale": scale, "found": found, "fitted": 0.3, "target_unsafe": 0.3, "stops": stops}
        write_json(path, {**match, "learnt": {"advbench": 4}, "left_out": {"advbench": 3}})
        given["matches"].append(path)
    text = write(tmp_path / "out", given).read_text()
    assert "nspo at a = 1.00 and grpo_no_kl at a = 1.25." in text
    assert "NOT matched: grpo_no_kl does not meet the validation target on its walk." in text
    assert "NOT matched: not reached" in text
    assert "Asked at no stop, because prompt and answer are longer than the base model can read: 3 prompts of" in text
    assert "16.0% to 36.8%" in text  # 16 of 64
    assert ">outside<" in text  # 8 of 32 refused, the base model none
    assert "a judge learnt from answers to nearly the same prompt: 4 of advbench." in text
    assert (tmp_path / "out" / "plots" / "walk.svg").is_file()


def test_training_that_changed_nothing_is_said() -> None:
    """Two methods that are as unsafe as the base model are equal, but the page says they did not become safer."""
    idle = replace(NSPO, unsafe=BASE.unsafe)
    assert "nspo is not measurably safer than the base model on any held-out set." in verdict_of(idle, idle)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Without certificates, logs and the twin the page says so and invents nothing."""
    given = inputs(tmp_path / "in")
    given |= {
        "certificates": [],
        "policies": [],
        "evaluations": [p for p in given["evaluations"] if "grpo" not in str(p)],
    }
    text = write(tmp_path, given).read_text()
    assert "There is no verdict" in text
    assert "no certificate was given" in text
    assert "Not measured: Reward of sampled answers" in text


def test_seeds_are_rows_of_their_own_and_pooled(tmp_path: Path) -> None:
    """With two seeds each run has its row, paired differences keep n, and a pooled row has the mean of both.

    The pooled interval is no narrower than that of one seed on the same prompts, however alike the seeds are.
    """
    text = write(tmp_path, inputs(tmp_path / "in", seeds=(0, 1))).read_text()
    assert text.count("seeds pooled)") == 2
    rows = [row for row in csv.DictReader((tmp_path / "summary.csv").open()) if row["method"] == "nspo"]
    found = {row["seed"]: row for row in rows if (row["name"], row["domain"]) == ("kl_per_token", "all")}
    pooled, one = found["pooled"], found["0"]
    assert float(pooled["value"]) == pytest.approx((float(one["value"]) + float(found["1"]["value"])) / 2)
    width = {key: float(row["high"]) - float(row["low"]) for key, row in found.items()}
    assert width["pooled"] == pytest.approx(width["0"], rel=0.15)  # the synthetic seeds are equal
    assert r"nspo (2 seeds) &" in (tmp_path / "summary.tex").read_text()
    assert "nspo, seed 0" in text
    assert "nspo, seed 1" in text
    assert "averaged over seeds" in text


def test_latex_and_cards_hold_the_same_figures(written: tuple[dict[str, Any], Path, str]) -> None:
    """Values of summary.csv stand in the LaTeX table, whose special signs are escaped, and in each policy's card."""
    folder = written[1].parent
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    kl = next(r for r in rows if (r["method"], r["name"], r["domain"]) == ("grpo_no_kl", "kl_per_token", "all"))
    value, low, high = (amount(float(kl[key]), "nats") for key in ("value", "low", "high"))
    latex = (folder / "summary.tex").read_text()
    line = next(line for line in latex.splitlines() if line.startswith(r"grpo\_no\_kl &"))
    assert f"\\shortstack[r]{{{value}\\\\\\scriptsize {low}--{high}}}" in line
    assert line.count("&") == 11
    assert latex.count("{") == latex.count("}")
    card = (folder / "cards" / "grpo_no_kl" / "seed0.md").read_text()
    assert f"| drift | kl_per_token | all | none | {value} ({low} to {high}) | - | 240 | 0 |" in card
    assert "not constrained" in card
    assert "3.0e-08" in (folder / "cards" / "nspo" / "seed0.md").read_text()  # its leakage


def test_where_safety_lives_is_on_the_page(written: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """Each knock-out has its share, rate with n and paired change; without the measurement the page says so."""
    table = written[2].partition("What is lost when a part")[2].partition("</table>")[0]
    row = table.partition("<tr><th>block 0</th>")[2].partition("</tr>")[0]
    assert "<td>50.0%</td>" in row
    assert f"<b>43.2%</b><small>{amount(0.4321 / 2, 'rate')} to 100.0%" in row
    assert "n&nbsp;17" in row
    assert "<b>+33.2</b>" in row
    text = write(tmp_path, {**written[0], "attributions": []}).read_text()
    assert "set <code>attribution.enabled</code>" in text


def test_benchmarks_are_shown_whole_and_by_category(tmp_path: Path) -> None:
    """Scores of published sets stand beside each other with n, by category too, with source, licence and leaks."""
    given = inputs(tmp_path / "in")
    given["benchmarks"] = []
    record = {
        "name": "alert",
        "source": "hub:org/alert",
        "split": "test",
        "licence": "cc-by",
        "prompts": 99,
        "asked": 7,
    }
    record["leaks"] = {"checked": True, "exact": 2, "near": 1}
    for method, value in (("base", 0.7654), ("nspo", 0.1234), ("grpo_no_kl", 0.2)):
        path = tmp_path / "in" / "benchmarks" / method / "seed0" / "alert" / "metrics.json"
        score = {"axis": "safety", "name": "unsafe_rate", "domain": "alert", "judge": "cost_model", "failures": 0}
        score |= {"value": value, "low": 0.1, "high": 0.8, "n": 7, "unit": "rate"}
        scores = [{**score, "category": ""}, {**score, "category": PLANTED, "n": 3}]
        write_json(path, {"benchmark": record, "scores": scores})
        rows = [{**row, "category": "weapons"} for row in response_rows(method, BASE, 3)[:3]]  # advbench again
        pq.write_table(pa.Table.from_pylist(rows), path.with_name("responses.parquet"))
        given["benchmarks"].append(path)
    text = write(tmp_path / "out", given).read_text()
    assert "<b>76.5%</b>" in text
    assert '<b>12.3%</b><small>10.0% to 80.0%</small><small class="n">n&nbsp;7' in text
    assert f"<tr><th>{escape(PLANTED)}</th>" in text
    assert "2 exact, 1 nearly" in text
    assert text.count('"set":"advbench",') == 60  # a benchmark of the same name hides none of the run's own prompts
    assert text.count('"set":"advbench (benchmark)",') == 3
    found = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [r["category"] for r in found if r["prompts"] == "benchmark" and r["method"] == "nspo"] == ["", PLANTED]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda given: (given["evaluations"][0] / "metrics.json").unlink(), "metrics.json does not exist"),
        (lambda given: (given["evaluations"][0] / "responses.parquet").unlink(), "responses.parquet does not exist"),
        (lambda given: (given["policies"][0] / "probes.parquet").write_text("cut"), "not a whole Parquet file"),
        (lambda given: given["evaluations"].pop(), "no evaluation of the base model"),
        (lambda given: given["evaluations"].append(given["evaluations"][0]), "again"),
        (lambda given: given["bases"].unlink(), "bases.safetensors does not exist"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, break_it: Callable[[dict[str, Any]], Any], message: str) -> None:
    """A missing or broken file is named in one line, and no page is left behind."""
    given = inputs(tmp_path / "in")
    break_it(given)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", given)
    assert not (tmp_path / "out" / "report.html").exists()


def test_paired_means_weight_tokens() -> None:
    """Drift is a mean over answer tokens: long answers count more, as in metrics.json."""
    measure = next(m for m in comparison.measures(Config()) if m.name == "kl_per_token")
    rows = response_rows("nspo", NSPO)
    values = comparison.per_prompt(rows, measure)
    pair = comparison.paired([values], [values], measure)
    score = next(s for s in compute_scores(rows, 4) if s["name"] == "kl_per_token" and s["domain"] == "all")
    assert pair is not None
    assert pair["ours"] == pytest.approx(score["value"], rel=1e-12)
    assert pair["value"] == 0


def test_the_rival_in_detail_is_the_hardest_to_beat() -> None:
    """Of all unconstrained methods that are not shown to be less safe, the one with the lowest KL; all are compared."""
    methods = {
        "nspo": {"objective": "nspo", "learning_rate": 1e-4},
        "hot": {"objective": "grpo_no_kl", "learning_rate": 1e-4},
        "mild": {"objective": "grpo_no_kl", "learning_rate": 1e-5},
        "idle": {"objective": "grpo_no_kl", "learning_rate": 1e-7},
    }
    config = Config.model_validate({"policy": {"methods": methods}})
    does = {"hot": TWIN, "mild": replace(TWIN, kl=0.01), "idle": replace(TWIN, kl=0.0001, unsafe=0.7), "nspo": NSPO}
    responses = {name: [response_rows(name, behaviour)] for name, behaviour in does.items()}
    (pair,) = comparison.comparisons(config, responses, comparison.measures(config))
    assert (pair["ours"], pair["theirs"]) == ("nspo", "mild")
    assert [rival["theirs"] for rival in pair["rivals"]] == ["hot", "mild", "idle"]


def test_every_objective_has_its_place_on_the_page(tmp_path: Path) -> None:
    """Each has a colour of its own, a row, and its own twin to be compared with; a multiplier is drawn.

    Only what keeps to the bases is called constrained, and the verdict is about the first of these.
    """
    names = [name for name in PRESETS if name != "grpo"]
    given = inputs(tmp_path / "in")
    methods = {name: {"objective": name, "learning_rate": 1e-4} for name in names}
    given["config"].write_text(yaml.safe_dump({"policy": {"steps": 30, "methods": methods}}, sort_keys=False))
    for name in set(names) - {"nspo", "grpo_no_kl"}:
        given["evaluations"].append(write_evaluation(tmp_path / "in", name, 0, TWIN))
        given["certificates"].append(write_certificate(tmp_path / "in", name, 0))
        given["policies"].append(write_policy(tmp_path / "in", name, 0, TWIN))
        if name.endswith("lagrangian"):
            rows = [{"step": step, "multiplier": 1.1**step} for step in range(9)]
            pq.write_table(pa.Table.from_pylist(rows), given["policies"][-1] / "training.parquet")
    text = write(tmp_path / "out", given).read_text()
    assert "Multiplier of the cost" in text
    against = re.findall(r"(\w+) against (\w+), on the same prompts", text)
    found = load_config(given["config"]).policy.methods
    ours = [name for name in names if found[name].constraint.needs_bases]
    expected = dict.fromkeys(ours, "grpo_no_kl")  # the rivals behave alike: the first of them
    assert dict(against) == expected
    colours = plots.colours({name: name for name in ["base", *names]})
    assert len(set(colours.values()) | set(plots.SPARE)) == len(names) + 1 + len(plots.SPARE)
    config = load_config(given["config"])
    pairs = comparison.comparisons(config, {n: [response_rows(n, TWIN)] for n in names}, comparison.measures(config))
    assert [pair["ours"] for pair in pairs][:2] == ["nspo", "nspo_lagrangian"]


def test_no_multiplier_is_not_missed(written: tuple[dict[str, Any], Path, str]) -> None:
    """A page without Lagrangian methods does not call their curve not measured."""
    assert "Multiplier" not in written[2]


def test_the_theory_of_the_run_is_on_the_page(written: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """The worst case of each statement, for the methods that project; no table where none of them did."""
    table = written[2].partition("The theory, checked at every update")[2].partition("</table>")[0]
    assert table.count("<tr>") == 2
    assert "<td>30</td><td>90.0%</td><td>-0.00021</td><td>0.0321</td><td>0.3</td><td>0.3</td><td>3.3e-08</td>" in table
    given = inputs(tmp_path / "in")
    for folder in given["policies"]:
        settings = json.loads((folder / "settings.json").read_text())
        write_json(folder / "settings.json", settings | {"theory": None})
    assert "The theory, checked" not in write(tmp_path / "out", given).read_text()


def test_added_judges_stand_beside_the_cost_model(tmp_path: Path) -> None:
    """Each judge has a column per harmful set with its failures; the headline is as it was."""
    given = inputs(tmp_path / "in")
    plain = write(tmp_path / "plain", given).read_text()
    assert "guard, advbench" not in plain
    assert "Judges against people" not in plain
    for folder in given["evaluations"]:
        rows = pq.read_table(folder / "responses.parquet").to_pylist()
        for index, row in enumerate(rows):
            row["judge_guard"] = None if row["role"] != "harmful" or index % 60 < 7 else -1.0
        metrics = json.loads((folder / "metrics.json").read_text())
        write_json(folder / "metrics.json", {**metrics, "scores": compute_scores(rows, 4, ["second_judge", "guard"])})
    agreed = compare(
        [{"set": "harm", "prompt": f"p{n}", "grade": n % 2} for n in range(10)],
        {"guard": [1.0, float("nan"), *[-1.0] * 8]},
        0.5,
    )
    write_json(tmp_path / "agreement.json", {"rows": agreed, "refusals": [], "topic": None})
    text = write(tmp_path / "out", {**given, "agreement": tmp_path / "agreement.json"}).read_text()
    assert text.count("<th>guard, advbench</th>") == text.count("<th>cost_model, harmbench</th>") == 1
    assert text.count("n&nbsp;60, 7&nbsp;unjudged") == 6
    assert f"<b>{amount(7 / 60, 'rate')}</b>" in text
    assert "Judges against people" in text
    assert "<td>10 (5)</td><td><b>40.0%</b>" in text
    headline = plain[plain.index("<tbody>") : plain.index("</tbody>")]
    assert headline in text
