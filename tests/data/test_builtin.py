"""The data sets shipped with the package: their shape, their checks, and no credit for silence or an echo."""

import json
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "nspo/data/builtin"
ROWS = 240
NAMES = ("maths", "commonsense", "instructions", "benign")
CATEGORIES = {
    "maths": {"one_step": 80, "two_step": 80, "multi_step": 80},
    "instructions": {
        "write": 32,
        "summarise": 26,
        "rewrite": 28,
        "list": 32,
        "explain": 28,
        "email": 26,
        "plan": 22,
        "translate": 22,
        "classify": 24,
    },
    "benign": {
        "homonym": 18,
        "figurative": 18,
        "safe_target": 18,
        "safe_context": 18,
        "history": 18,
        "fiction": 18,
        "prevention": 18,
        "medical": 18,
        "sensitive_topic": 18,
        "definition": 18,
        "plain_imperative": 60,
    },
}
# The keys a check has beside `type`, and the type of each value.
FIELDS: dict[str, dict[str, type]] = {
    "number": {"answer": int},
    "contains_any": {"answers": list},
    "choice": {"answer": str},
    "max_words": {"n": int},
    "min_words": {"n": int},
    "starts_with": {"text": str},
    "ends_with": {"text": str},
    "includes": {"texts": list},
    "excludes": {"texts": list},
    "bullets": {"n": int},
    "lowercase": {},
    "uppercase": {},
    "json": {},
    "all": {"checks": list},
}


def load(name: str) -> list[dict]:
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


SETS = {name: load(name) for name in NAMES}


def tokens(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", text.casefold()))


def parts(check: dict) -> list[dict]:
    """The simple checks in `check`, which must be well formed."""
    fields = FIELDS[check["type"]]
    assert set(check) == {"type", *fields}, check
    for key, kind in fields.items():
        value = check[key]
        assert type(value) is kind, check
        if kind is int:
            assert value > 0, check
        else:
            assert value, check
        if kind is list and key != "checks":
            assert all(isinstance(text, str) and text.strip() == text and text for text in value), check
            assert len({text.casefold() for text in value}) == len(value), check
    if check["type"] != "all":
        return [check]
    assert len(check["checks"]) > 1, check
    assert all(inner["type"] != "all" for inner in check["checks"]), check
    return [part for inner in check["checks"] for part in parts(inner)]


def mentions(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


@pytest.mark.parametrize("name", NAMES)
def test_rows(name: str) -> None:
    rows = SETS[name]
    assert len(rows) == ROWS
    keys = {"id", "prompt", "category"} | (set() if name == "benign" else {"check"})
    assert all(set(row) == keys for row in rows)
    assert [row["id"] for row in rows] == [f"{name}-{number:04d}" for number in range(1, ROWS + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_text_is_clean(name: str) -> None:
    for row in SETS[name]:
        prompt = row["prompt"]
        assert 8 <= len(prompt) <= 400, row["id"]
        assert prompt == prompt.strip(), row["id"]
        assert "  " not in prompt, row["id"]
        for char in json.dumps(row, ensure_ascii=False):
            # Letters and marks that print; no control characters, invisible characters, or curly look-alikes.
            assert unicodedata.category(char)[0] in "LNPSZ", (row["id"], char)
            assert char.isascii() or char.isalpha(), (row["id"], char)


def test_prompts_are_distinct_across_sets() -> None:
    rows = [row for name in NAMES for row in SETS[name]]
    counts = Counter(" ".join(row["prompt"].casefold().split()) for row in rows)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_near_duplicates() -> None:
    # Word problems from one template differ in their numbers alone, so maths is not compared.
    rows = [(row["id"], tokens(row["prompt"])) for name in NAMES if name != "maths" for row in SETS[name]]
    near = [(a, b) for (a, s), (b, t) in combinations(rows, 2) if len(s & t) >= 0.8 * len(s | t)]
    assert near == []


@pytest.mark.parametrize("name", NAMES)
def test_categories(name: str) -> None:
    rows = SETS[name]
    counts = Counter(row["category"] for row in rows)
    if name in CATEGORIES:
        assert counts == CATEGORIES[name]
    else:
        assert len(counts) >= 10
        assert min(counts.values()) >= 1
    # Shuffled: the first and second halves hold every category that has at least eight rows.
    for half in (rows[: ROWS // 2], rows[ROWS // 2 :]):
        assert {c for c, n in counts.items() if n >= 8} <= {row["category"] for row in half}


def test_maths_checks() -> None:
    for row in SETS["maths"]:
        (check,) = parts(row["check"])
        assert check["type"] == "number"
        # Repeating the question must not score: the last number of an echo would be one of these.
        assert check["answer"] not in [int(digits) for digits in re.findall(r"\d+", row["prompt"])], row["id"]


def test_plain_maths_is_right() -> None:
    """Rows that are bare expressions are worked out here afresh."""
    worked = 0
    for row in SETS["maths"]:
        found = re.fullmatch(r"(?:What is|How much is|Work out) (\(?\d[\d +x()-]*)[?.]", row["prompt"])
        if found:
            expression = found[1].replace("x", "*")
            assert re.fullmatch(r"[\d +*()-]+", expression)
            assert eval(expression) == row["check"]["answer"], row["id"]
            worked += 1
    assert worked >= 10


def test_commonsense_checks() -> None:
    letters: Counter[str] = Counter()
    for row in SETS["commonsense"]:
        (check,) = parts(row["check"])
        options = re.findall(r"^([A-Z])\) (\S.*)$", row["prompt"], re.MULTILINE)
        if check["type"] == "choice":
            assert [letter for letter, _ in options] == list("ABCD"), row["id"]
            assert len({text for _, text in options}) == 4, row["id"]
            assert row["category"].endswith("_choice"), row["id"]
            letters[check["answer"]] += 1
        else:
            assert check["type"] == "contains_any", row["id"]
            assert not options, row["id"]
            assert not any(mentions(row["prompt"], answer) for answer in check["answers"]), row["id"]
    assert letters == {"A": 15, "B": 15, "C": 15, "D": 15}


def test_instruction_checks() -> None:
    for row in SETS["instructions"]:
        prompt, found = row["prompt"], parts(row["check"])
        by_type = {check["type"]: check for check in found}
        assert len(by_type) == len(found), f"{row['id']}: the same check twice"
        # An empty answer must not score, so something has to be present.
        assert set(by_type) - {"max_words", "excludes", "lowercase", "uppercase"}, row["id"]
        assert not {"lowercase", "uppercase"} <= set(by_type), row["id"]
        low, high = by_type.get("min_words"), by_type.get("max_words")
        assert not (low and high) or low["n"] <= high["n"], row["id"]
        texts = [text for kind in ("includes",) for text in by_type.get(kind, {}).get("texts", [])]
        texts += [by_type[kind]["text"] for kind in ("starts_with", "ends_with") if kind in by_type]
        if "lowercase" in by_type:
            assert all(text == text.lower() for text in texts), row["id"]
        if "uppercase" in by_type:
            assert all(text == text.upper() for text in texts), row["id"]
        for banned in by_type.get("excludes", {}).get("texts", []):
            assert not any(mentions(text, banned) for text in texts), row["id"]
            assert not any(mentions(text, banned) for text in by_type.get("contains_any", {}).get("answers", []))
        if high:
            assert len(" ".join(texts).split()) <= high["n"], row["id"]
        if "choice" in by_type:
            assert re.findall(r"\b([A-Z])\) ", prompt) == list("ABCD"), row["id"]
        # A limit that the prompt does not state would be unfair: it must be there, in figures or in words.
        for kind in ("max_words", "starts_with", "ends_with"):
            if kind in by_type:
                wanted = str(by_type[kind].get("n") or by_type[kind]["text"])
                names = {"?": "question", "!": "exclamation mark"}
                assert wanted in prompt or names.get(wanted, wanted) in prompt, row["id"]


def test_every_kind_of_check_is_used() -> None:
    used = Counter(part["type"] for row in SETS["instructions"] for part in parts(row["check"]))
    assert set(used) == set(FIELDS) - {"all", "number"}
    assert all(count >= 3 for count in used.values()), used


def test_benign_has_many_imperatives() -> None:
    asking = {
        "how",
        "what",
        "why",
        "which",
        "when",
        "who",
        "where",
        "is",
        "are",
        "can",
        "do",
        "does",
        "in",
        "my",
        "our",
    }
    asking |= {"the", "i", "a"}
    commands = [row for row in SETS["benign"] if row["prompt"].split()[0].casefold() not in asking]
    assert len(commands) >= 110
    plain = [row for row in SETS["benign"] if row["category"] == "plain_imperative"]
    assert all(row in commands for row in plain)


def test_readme_names_every_file() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"`{name}.jsonl`" in text
    assert "Apache-2.0" in text
    assert sorted(path.name for path in DATA.glob("*.jsonl")) == sorted(f"{name}.jsonl" for name in NAMES)
