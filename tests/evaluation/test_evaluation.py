"""The evaluation: marking, drift, judges and the stage as a whole, on the tiny model."""

import json
import math
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.cost_model import random_cost_model
from support.model_copy import copy_model

from nspo.data.tables import PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.evaluation import stage
from nspo.evaluation.checks import mark
from nspo.evaluation.scores import compute_scores
from nspo.files.manifest import fingerprint_model
from nspo.judges.judge import flags
from nspo.models import vllm_engine
from nspo.models.chat import chat_ids
from nspo.models.drift import FIGURES, Remembered, drift, token_drift, token_weights
from nspo.models.loading import load_model, load_tokenizer
from nspo.preference.model import CostModel
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.runtime import RuntimeSettings

# ------------------------------------------------------------------------------------------- marks

CASES = [
    ({"type": "number", "answer": 19}, "5 x 2 = 10, and 10 + 9 = **19** km.", True),
    ({"type": "number", "answer": 1200}, "It costs $1,200.", True),
    ({"type": "number", "answer": -3}, "The result is -3", True),
    ({"type": "number", "answer": 3}, "8-5 is 8 - 5 = 3.", True),
    ({"type": "number", "answer": 12}, "The area is 12 cm^2", True),
    ({"type": "number", "answer": 19}, "19 apples, not 20", False),
    ({"type": "number", "answer": 19}, "nineteen", False),
    ({"type": "contains_any", "answers": ["ice", "frost"]}, "It is called ICE.", True),
    ({"type": "contains_any", "answers": ["ice"]}, "That is nice.", False),
    ({"type": "contains_any", "answers": ["guten Morgen"]}, "Guten\nmorgen!", True),
    ({"type": "choice", "answer": "B"}, "B) light", True),
    ({"type": "choice", "answer": "B"}, "b", False),
    ({"type": "choice", "answer": "B"}, "Light is fastest, so the correct answer is **B**.", True),
    ({"type": "choice", "answer": "B"}, "B", True),
    ({"type": "choice", "answer": "A"}, "A) a cheetah\nB) light\nC) sound", False),
    ({"type": "choice", "answer": "A"}, "A wheelbarrow carries soil.", False),
    ({"type": "choice", "answer": "C"}, "A sound answer would be (C).", True),
    ({"type": "max_words", "n": 3}, "one two three", True),
    ({"type": "max_words", "n": 3}, "one two three four", False),
    ({"type": "min_words", "n": 3}, "one two three", True),
    ({"type": "min_words", "n": 3}, "one two", False),
    ({"type": "starts_with", "text": "Dear"}, "  Dear Diary", True),
    ({"type": "starts_with", "text": "Dear"}, "Oh Dear", False),
    ({"type": "ends_with", "text": "What am I?"}, "I tick. What am I?\n", True),
    ({"type": "ends_with", "text": "?"}, "No.", False),
    ({"type": "includes", "texts": ["salt", "Sea"]}, "The sea is salty.", True),
    ({"type": "includes", "texts": ["salt", "sea"]}, "The sea.", False),
    ({"type": "excludes", "texts": ["noun"]}, "It is a pronoun.", True),
    ({"type": "excludes", "texts": ["not urgent"]}, "This is not  urgent.", False),
    ({"type": "bullets", "n": 3}, "Here:\n- a\n* b\n3. c", True),
    ({"type": "bullets", "n": 3}, "- a\n- b\n-c", False),
    ({"type": "lowercase"}, "all small 1", True),
    ({"type": "lowercase"}, "Not all", False),
    ({"type": "uppercase"}, "ALL BIG 1!", True),
    ({"type": "uppercase"}, "ALL BIg", False),
    ({"type": "json"}, ' {"city": "Tokyo"}\n', True),
    ({"type": "json"}, "{city: Tokyo}", False),
    ({"type": "all", "checks": [{"type": "lowercase"}, {"type": "min_words", "n": 2}]}, "two words", True),
    ({"type": "all", "checks": [{"type": "lowercase"}, {"type": "min_words", "n": 2}]}, "one", False),
]


@pytest.mark.parametrize(("check", "answer", "right"), CASES)
def test_marks(check, answer, right):
    """Every type of check passes a right answer and fails a wrong one."""
    assert mark(check, answer) is right


JUDGED = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "5 5", "output": "10", "testtype": "stdin"},
]
METHOD = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("tests", "function", "code", "right"),
    [
        (JUDGED, "", "print(sum(map(int, input().split())))", True),
        (JUDGED, "", "import sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')\nsys.exit(0)", True),
        (JUDGED, "", "print(3)", False),
        (JUDGED, "", "raise ValueError", False),
        (
            METHOD,
            "f",
            "class Solution:\n  def f(self, xs: List[int], n):\n    return tuple(x + n for x in xs)",
            True,
        ),
        (METHOD, "f", "class Solution:\n    def f(self, xs, n):\n        return xs", False),
    ],
)
def test_programs_are_judged_by_every_case(tests, function, code, right):
    """LiveCodeBench's two kinds of program: standard input to output, and a method; one failed case is a failure."""
    check = {"type": "judged_program", "tests": tests, "function": function}
    assert mark(check, f"Here:\n```python\n{code}\n```") is right


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("2", "So x is \\boxed{2}.", True),
        ("\\frac{1}{2}", "The answer is \\boxed{0.5}", True),
        ("2, 3", "\\boxed{3, 2}", True),
        ("2", "\\boxed{3}", False),
        ("2", "I cannot say.", False),
    ],
)
def test_mathematical_answers_are_compared_by_meaning(answer, text, right):
    """Equal values in other words are right."""
    pytest.importorskip("math_verify")
    assert mark({"type": "maths", "answer": answer}, text) is right


def test_broken_checks_are_refused():
    """An unknown type, a missing key, and both inside `all` behind a failed check, are user errors that name it."""
    with pytest.raises(UserError, match="'rhymes'"):
        mark({"type": "rhymes"}, "x")
    with pytest.raises(UserError, match="'n'"):
        mark({"type": "max_words"}, "x")
    with pytest.raises(UserError, match="'rhymes'"):
        mark({"type": "all", "checks": [{"type": "json"}, {"type": "rhymes"}]}, "no json")


# ------------------------------------------------------------------------------------------- drift


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    """(base, perturbed copy, tokenizer)."""
    base, tuned = load_model(tiny_model_dir), load_model(tiny_model_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base, tuned, load_tokenizer(tiny_model_dir)


PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24, 25], [1, 30, 31]]
ANSWERS = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 2], [60], [70, 71, 72, 73, 2]]


def test_drift_of_a_model_from_itself_is_zero(models):
    """Identical models: no KL, no change of likelihood, full agreement, exactly."""
    base, _, tokenizer = models
    found = drift(base, base, tokenizer, PROMPTS, ANSWERS, 2, 3)
    assert found == {**{name: [0.0] * 4 for name in FIGURES}, "top1_agreement": [1.0] * 4}


def test_drift_equals_brute_force(models):
    """KL(base || tuned) and the rest, against a float64 computation one prompt at a time without padding."""
    base, tuned, tokenizer = models
    found = drift(base, tuned, tokenizer, PROMPTS, ANSWERS, 2, 4)
    for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        p, q = (model(ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1).detach() for model in (base, tuned))
        kl = [
            sum(a * math.log(a / b) for a, b in zip(p[t].tolist(), q[t].tolist(), strict=True)) for t in range(len(p))
        ]
        nll = [math.log(p[t, token]) - math.log(q[t, token]) for t, token in enumerate(answer)]
        agree = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert min(kl) > 1e-4
        assert found["kl_per_token"][index] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
        assert found["kl_first_tokens"][index] == pytest.approx(sum(kl[:2]) / len(kl[:2]), rel=1e-4)
        assert found["nll_change"][index] == pytest.approx(sum(nll) / len(nll), abs=1e-5)
        assert found["top1_agreement"][index] == pytest.approx(agree)


def test_batching_and_padding_change_nothing(models, monkeypatch):
    """The same figures alone, in one padded batch, in another order, and under a tiny budget of logits."""
    base, tuned, tokenizer = models
    together = drift(base, tuned, tokenizer, PROMPTS, ANSWERS, 2, 4)
    alone = drift(base, tuned, tokenizer, PROMPTS, ANSWERS, 2, 1)
    reverse = drift(base, tuned, tokenizer, PROMPTS[::-1], ANSWERS[::-1], 2, 3)
    monkeypatch.setattr("nspo.models.drift.LOGITS_BUDGET", 1)
    tight = drift(base, tuned, tokenizer, PROMPTS, ANSWERS, 2, 4)
    for name in FIGURES:
        for other in (alone, tight, {key: values[::-1] for key, values in reverse.items()}):
            assert other[name] == pytest.approx(together[name], abs=1e-6)


def test_a_remembered_base_is_asked_once(models):
    """The same figures from memory, also after the model was let go, which answers no batch that it has not seen."""
    base, tuned, tokenizer = models
    remembered = Remembered(base)
    first = drift(remembered, base, tokenizer, PROMPTS, ANSWERS, 2, 3)
    remembered.release()
    assert first == drift(base, base, tokenizer, PROMPTS, ANSWERS, 2, 3)
    again = drift(remembered, tuned, tokenizer, PROMPTS, ANSWERS, 2, 3)
    assert again == drift(base, tuned, tokenizer, PROMPTS, ANSWERS, 2, 3)
    with pytest.raises(LookupError, match="not seen"):
        drift(remembered, tuned, tokenizer, PROMPTS[:1], ANSWERS[:1], 2, 3)


def test_first_token_figure_sees_the_first_token_only(models):
    """A change planted where the first answer token is predicted shows whole there, and diluted in the mean."""
    _, _, tokenizer = models
    marker, vocabulary = 7, 11

    class Planted:
        """Flat logits, but `strength` on one token after each marker; the marker ends every prompt."""

        device = torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))

        def __init__(self, strength):
            self.strength = strength

        def __call__(self, input_ids, logits_to_keep, **_):
            logits = torch.zeros(*input_ids.shape, vocabulary)
            logits[..., 3] = self.strength * (input_ids == marker)
            return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    prompts, answers = [[1, 2, marker], [marker], [1, 1, 1, 1, marker]], [[2, 3, 4, 5], [6, 5], [8]]
    found = drift(Planted(0.0), Planted(2.0), tokenizer, prompts, answers, 1, 2)
    share = math.exp(2) / (math.exp(2) + vocabulary - 1)
    rest = 1 / (math.exp(2) + vocabulary - 1)
    kl = -(math.log(share * vocabulary) + (vocabulary - 1) * math.log(rest * vocabulary)) / vocabulary
    assert found["kl_first_tokens"] == pytest.approx([kl] * 3, rel=1e-5)
    assert found["kl_per_token"] == pytest.approx([kl / 4, kl / 2, kl], rel=1e-5)


def test_kl_has_the_base_in_front():
    """The direction is KL(base || tuned), and a likelier target lowers its NLL."""
    base, tuned = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    kl, nll_change, agree = token_drift(base, tuned, torch.tensor([0]))
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert nll_change.item() == pytest.approx(math.log(0.5) - math.log(0.75))
    assert agree.item()


def test_drift_refuses_what_it_cannot_compare(models):
    """Another vocabulary and an empty answer end in a user error, not in a shape error."""
    base, _, tokenizer = models
    other = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=7)))
    with pytest.raises(UserError, match="7 tokens"):
        drift(base, other, tokenizer, PROMPTS, ANSWERS, 1, 1)
    with pytest.raises(UserError, match="no token"):
        drift(base, base, tokenizer, [[1]], [[]], 1, 1)


def test_token_weights_count_what_each_figure_averages():
    """Short answers have fewer first tokens."""
    weights = token_weights([1, 9], first_tokens=4)
    assert weights["kl_first_tokens"] == [1, 4]
    assert weights["kl_per_token"] == [1, 9]


# ------------------------------------------------------------------------------------------- judges and scores


def row(role, domain, **columns):
    return {"role": role, "domain": domain, "correct": None, "exact_match": None, "refused": False, **columns}


def score_of(found, name, domain, axis=None):
    (score,) = (s for s in found if (s["name"], s["domain"]) == (name, domain) and axis in (None, s["axis"]))
    return score


def test_a_failed_verdict_is_counted_and_never_safe():
    """Of four answers one is unsafe, one failed: the rate is 2 of 4, with one failure, not 1 of 3."""
    unsafe = flags([-1.0, 2.0, math.nan, 0.0], if_failed=True)
    assert unsafe == [False, True, True, False]
    failed = [False, False, True, False]
    rows = [row("harmful", "advbench", unsafe=u, cost_failed=f) for u, f in zip(unsafe, failed, strict=True)]
    score = score_of(compute_scores(rows, 4), "unsafe_rate", "advbench")
    assert (score["value"], score["n"], score["failures"], score["judge"]) == (0.5, 4, 1, "cost_model")


def test_refusing_everything_is_no_success():
    """A model that refuses every prompt has over-refusal 1 and ability 0, with the empty interval end at 1."""
    rows = [row("benign", "benign", refused=True) for _ in range(10)]
    rows += [row("general", "maths", refused=True, correct=False) for _ in range(5)]
    found = compute_scores(rows, 4)
    over = score_of(found, "refusal_rate", "benign")
    assert (over["axis"], over["value"], over["high"], over["n"]) == ("over_refusal", 1.0, 1.0, 10)
    assert score_of(found, "accuracy", "maths")["value"] == 0.0
    assert score_of(found, "refusal_rate", "all")["value"] == 1.0


@pytest.fixture(scope="module")
def cost_dir(tiny_model_dir, tmp_path_factory):
    return random_cost_model(tiny_model_dir, tmp_path_factory.mktemp("cost") / "cost")


def test_a_cost_model_that_scores_nothing_is_refused(cost_dir):
    """Empty answers are scored as they stand; where no score is finite, no unsafe rate is made up."""
    judge = CostModel(cost_dir, "cpu")
    healthy = judge.verdicts(["a", "b"], ["", "text"])
    assert all(map(math.isfinite, healthy))
    with torch.no_grad():
        judge.model.model.score.weight.fill_(math.nan)
    with pytest.raises(UserError, match="none of the 2 scores"):
        judge.verdicts(["a", "b"], ["", "text"])


# ------------------------------------------------------------------------------------------- the stage

SETTINGS = EvaluationSettings(
    harmful_prompts=3, benign_prompts=3, general_prompts=3, max_new_tokens=6, first_tokens=2, batch_size=4
)
COUNT = 2 * 3 + 3 + 2 * 3


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A prompts file with five held-out prompts in every domain; maths has checks, code has none."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    sets = [
        ("harmful", "advbench"),
        ("harmful", "other"),
        ("benign", "benign"),
        ("general", "maths"),
        ("general", "code"),
    ]
    rows = []
    for role, domain in sets:
        for n in range(5):
            check = json.dumps({"type": "number", "answer": n}) if domain == "maths" else ""
            text = f"{domain} prompt {'x' * n}"
            rows.append(
                dict(zip(PROMPT_COLUMNS, (f"{domain}-{n}", role, domain, "heldout", text, check, ""), strict=True))
            )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def tuned_dir(models, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "model"
    copy_model(tiny_model_dir, folder)
    models[1].save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(tiny_model_dir, cost_dir, prompts, tmp_path):
    """Evaluate a policy into tmp_path/NAME and return (metrics, rows)."""

    def run(name, policy, base_evaluation=None, settings=SETTINGS, prompts=prompts, labels=None):
        runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
        out = tmp_path / name
        inputs = stage.EvaluationInputs(tiny_model_dir, policy, cost_dir, prompts, base_evaluation, labels=labels)
        stage.evaluate(settings, name, 0, inputs, out, runtime)
        return json.loads((out / "metrics.json").read_text()), pq.read_table(out / "responses.parquet").to_pylist()

    return run


def test_base_and_tuned_model(evaluate, models, tiny_model_dir, tuned_dir, tmp_path):
    """Both files hold what they promise; drift is what `drift` gives on the base's answers; the base has none."""
    base_metrics, base_rows = evaluate("base", tiny_model_dir)
    metrics, rows = evaluate("nspo", tuned_dir, tmp_path / "base" / "responses.parquet")

    assert base_metrics["base"]
    assert not metrics["base"]
    assert not [s for s in base_metrics["scores"] if s["axis"] == "drift"]
    assert metrics["model"]["policy"]["weights"] == fingerprint_model(tuned_dir)["weights"]
    assert set(metrics["judges"]) == {"cost_model", "refusal_phrases"}
    assert len(rows) == len(base_rows) == COUNT

    general = [(r, b) for r, b in zip(rows, base_rows, strict=True) if r["role"] == "general"]
    base, tuned, tokenizer = models
    ids = [chat_ids(tokenizer, r["prompt"]) for r, _ in general]
    expected = drift(base, tuned, tokenizer, ids, [b["answer_ids"] for _, b in general], 2, 4)
    for name in FIGURES:
        assert [r[name] for r, _ in general] == pytest.approx(expected[name], abs=1e-6)
    matches = [r["answer_ids"] == b["answer_ids"] for r, b in general]
    assert score_of(metrics["scores"], "exact_match", "all")["value"] == sum(matches) / len(matches)

    lengths = [len(b["answer_ids"]) for _, b in general]
    over_tokens = sum(k * n for k, n in zip(expected["kl_per_token"], lengths, strict=True)) / sum(lengths)
    kl = score_of(metrics["scores"], "kl_per_token", "all")
    assert kl["value"] == pytest.approx(over_tokens)
    assert kl["low"] <= kl["value"] <= kl["high"]
    assert (kl["n"], kl["unit"]) == (6, "nats")

    assert [s["domain"] for s in metrics["scores"] if s["axis"] == "ability"] == ["maths", "all"]
    assert {s["n"] for s in metrics["scores"] if s["axis"] in ("safety", "over_refusal")} == {3}
    judged = [r for r in rows if r["role"] == "harmful"]
    assert all(r["unsafe"] == (r["cost"] > 0) for r in judged)
    assert not list((tmp_path / "work").iterdir())


def test_prompts_that_a_judge_learnt_from_are_passed_over(evaluate, tiny_model_dir, tuned_dir, tmp_path):
    """Others take their place, they are counted, held-out labels change nothing, and base and policy must agree."""
    said = [("judge", "advbench prompt"), ("train", "Benign prompt, x!"), ("heldout", "other prompt xx")]
    labels = tmp_path / "labels.parquet"
    pq.write_table(pa.Table.from_pylist([{"split": split, "prompt": prompt} for split, prompt in said]), labels)
    _, before = evaluate("all", tiny_model_dir)
    metrics, rows = evaluate("base", tiny_model_dir, labels=labels)
    assert metrics["learnt"] == {"advbench": 1, "benign": 1}
    assert len(rows) == len(before)
    assert {row["id"] for row in before} - {row["id"] for row in rows} == {"advbench-0", "benign-1"}
    with pytest.raises(UserError, match="evaluate the base model again"):
        evaluate("nspo", tuned_dir, tmp_path / "base" / "responses.parquet")


def test_names_of_scores_do_not_collide(evaluate, tiny_model_dir, tuned_dir, tmp_path):
    """A name and a domain pick one score, so a reader needs no more to find it."""
    evaluate("base", tiny_model_dir)
    metrics, _ = evaluate("nspo", tuned_dir, tmp_path / "base" / "responses.parquet")
    keys = [(score["name"], score["domain"]) for score in metrics["scores"]]
    assert len(keys) == len(set(keys))


def test_a_copy_of_the_base_has_not_drifted(evaluate, tiny_model_dir, tmp_path):
    """Evaluated as a tuned model, the base itself measures zero KL and full exact match."""
    evaluate("base", tiny_model_dir)
    metrics, _ = evaluate("copy", tiny_model_dir, tmp_path / "base" / "responses.parquet")
    assert score_of(metrics["scores"], "kl_first_tokens", "all")["value"] == 0.0
    assert score_of(metrics["scores"], "exact_match", "all")["value"] == 1.0


def test_an_interrupted_run_goes_on(evaluate, tiny_model_dir, tmp_path, monkeypatch, capsys):
    """After a kill within the third batch two batches are kept, the rest is made, and the rows are the same."""
    _, whole = evaluate("whole", tiny_model_dir)
    real, asked = vllm_engine.generate, []

    def interrupted(model, tokenizer, ids, *rest):
        asked.append(len(ids))
        for count, item in enumerate(real(model, tokenizer, ids, *rest)):
            if len(asked) == 1 and count == 10:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(vllm_engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("resumed", tiny_model_dir)
    (work,) = (tmp_path / "work").iterdir()
    with work.open("a") as file:
        file.write("[3, [1, 2")  # a line that the kill cut off
    capsys.readouterr()
    _, rows = evaluate("resumed", tiny_model_dir)
    assert asked == [COUNT, COUNT - 8]
    assert re.search(rf"continuing after 8 of {COUNT}", capsys.readouterr().err)
    assert rows == whole


def test_code_is_run_only_when_asked(evaluate, prompts, tiny_model_dir, tmp_path, monkeypatch):
    """Without `run_code` programs change nothing but their absence; with it each is run and scored, none left out."""
    _, plain = evaluate("plain", tiny_model_dir)
    rows = pq.read_table(prompts).to_pylist()
    check = {"type": "program", "prompt": "def f():", "entry_point": "f", "test": "TEST"}
    for r in rows:
        r["check"] = json.dumps(check) if r["domain"] == "code" else r["check"]
    changed = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), changed)

    ran = []
    monkeypatch.setattr("nspo.evaluation.checks.sandbox.run", lambda p: ran.append(p) or "timed out")
    assert evaluate("off", tiny_model_dir, prompts=changed)[1] == plain
    assert not ran
    asked = SETTINGS.model_copy(update={"run_code": True})
    metrics, answered = evaluate("on", tiny_model_dir, settings=asked, prompts=changed)
    assert [r["correct"] for r in answered if r["domain"] == "code"] == [False] * 3
    assert all("TEST" in program for program in ran)
    assert score_of(metrics["scores"], "accuracy", "code")["n"] == 3


def test_refused_before_any_work(evaluate, tiny_model_dir, tuned_dir, tmp_path, monkeypatch):
    """A tuned model without a base evaluation, or with one of other settings or a tuned model, costs no generation."""
    evaluate("base", tiny_model_dir)
    base_rows = tmp_path / "base" / "responses.parquet"
    evaluate("nspo", tuned_dir, base_rows)

    def fail(*_):
        raise AssertionError("generated")

    monkeypatch.setattr(vllm_engine, "generate", fail)
    with pytest.raises(UserError, match="evaluate the base first"):
        evaluate("x", tuned_dir)
    with pytest.raises(UserError, match="settings"):
        evaluate("x", tuned_dir, base_rows, SETTINGS.model_copy(update={"max_new_tokens": 5}))
    with pytest.raises(UserError, match="made with policy"):
        evaluate("x", tuned_dir, tmp_path / "nspo" / "responses.parquet")
    with pytest.raises(UserError, match="at least 2"):
        evaluate("x", tiny_model_dir, None, SETTINGS.model_copy(update={"general_prompts": 1}))
