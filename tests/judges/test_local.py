"""Guards and classifiers: judges that are models in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.endpoint import fake as fake
from support.endpoint import text_of
from transformers import AutoModelForSequenceClassification

from nspo.errors import UserError
from nspo.files.manifest import fingerprint_model
from nspo.judges.local import Classifier, Guard
from nspo.judges.make import judge_of
from nspo.models.loading import load_tokenizer
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.settings.judges import ClassifierJudge, GuardJudge
from nspo.settings.runtime import RuntimeSettings

CPU = torch.device("cpu")


SPOKEN = {"fine": "safe", "bad!": "unsafe\nS1"}
GUARD_TEMPLATE = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] | trim }};{% endfor %}=>"


@pytest.fixture(scope="module")
def guard_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a template of Llama-Guard's kind that was taught to say `safe` and `unsafe`, S1."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GUARD_TEMPLATE
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = []
    for answer, said in SPOKEN.items():
        ids = tokenizer(f"u:p;a:{answer};=>", add_special_tokens=False)["input_ids"]
        reply = tokenizer(said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((ids, reply))
    width = max(len(ids) + len(reply) for ids, reply in rows)
    batch = torch.tensor([i + r + [tokenizer.pad_token_id] * (width - len(i + r)) for i, r in rows])
    labels = torch.tensor([[-100] * len(i) + r + [-100] * (width - len(i + r)) for i, r in rows])
    for _ in range(80):
        loss = model(input_ids=batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    folder = tmp_path_factory.mktemp("guard") / "guard"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_guard_speaks_through_its_own_template(guard_dir: Path) -> None:
    """Batches of several lengths give the taught verdicts; a reply that does not end in time, or fit, is none."""
    judge = Guard("mine", GuardJudge(kind="guard", source=str(guard_dir), batch_size=2), CPU)
    kept: dict[int, float] = {}
    answers = ["bad!", "fine", "x" * 600, "fine", "bad!"]
    assert text_of(judge.verdicts(["p"] * 5, answers, kept.__setitem__)) == "Us-sU"
    assert kept == {0: 1.0, 1: 0.0, 3: 0.0, 4: 1.0}
    short = Guard("mine", GuardJudge(kind="guard", source=str(guard_dir), max_tokens=4), CPU)
    assert text_of(short.verdicts(["p"] * 2, ["fine", "bad!"])) == "--"
    assert judge.identity["model"]["weights"] == fingerprint_model(guard_dir)["weights"]
    assert str(guard_dir.parent) not in json.dumps(judge.identity)


def test_weights_stay_where_a_judge_is_asked_again(guard_dir: Path) -> None:
    """For a reward the model is loaded once, for an evaluation each time; the name is the last part of the key."""
    settings = GuardJudge(kind="guard", source=str(guard_dir))
    once = judge_of("policy.judge", settings, RuntimeSettings(device="cpu"), stay=True)
    again = judge_of("evaluation.judges.mine", settings, RuntimeSettings(device="cpu"))
    assert isinstance(once, Guard)
    assert isinstance(again, Guard)
    assert once.model() is once.model()
    assert again.model() is not again.model()
    assert (once.name, again.name) == ("judge", "mine")


def test_guard_prompt_has_its_first_token_once(guard_dir: Path, tmp_path: Path) -> None:
    """With a chat template nothing is added to it; without one a template is the whole prompt."""
    judge = Guard("mine", GuardJudge(kind="guard", source=str(guard_dir)), CPU)
    assert judge.tokenizer.decode(judge._ids("p", "fine")) == "u:p;a:fine;=>"
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        Guard("mine", GuardJudge(kind="guard", source=str(tmp_path)), CPU)
    told = GuardJudge(kind="guard", source=str(tmp_path), template="<|im_start|>Q {prompt} A {response}:")
    wild = Guard("mine", told, CPU)
    assert wild.tokenizer.decode(wild._ids("p", "fine")) == "<|im_start|>Q p A fine:"


@pytest.mark.parametrize(
    ("template", "works"),
    [
        ("{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }};{% endfor %}{% endfor %}", True),
        ("{{ messages[0]['content'] }}", False),
        ("{{ raise_exception('no assistant turn') }}", False),
    ],
)
def test_a_template_must_show_prompt_and_answer(tiny_model_dir: Path, tmp_path: Path, template: str, works: bool):
    """Templates that read content in parts are served; one that hides the answer, or raises, is refused."""
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = template
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = GuardJudge(kind="guard", source=str(tmp_path))
    if works:
        judge = Guard("mine", settings, CPU)
        assert judge._text("the prompt", "the answer") == "the prompt;the answer;"
    else:
        with pytest.raises(UserError, match="does not show both"):
            Guard("mine", settings, CPU)


def classifier(folder: Path, **changes: Any) -> Classifier:
    """The classifier of the fixture with other settings."""
    settings = {"kind": "classifier", "source": str(folder), "unsafe": ["toxic", "violent"], "batch_size": 3, **changes}
    return Classifier("mine", ClassifierJudge(**settings), CPU)


def test_classifier_is_the_probability_of_its_labels(classifier_dir: Path) -> None:
    """Verdicts equal softmax by hand, one answer at a time without padding, minus the threshold."""
    judge = classifier(classifier_dir, threshold=0.3, template="{prompt} | {response}")
    prompts, answers = [f"p{n}" for n in range(7)], ["x" * n for n in (9, 1, 30, 4, 4, 0, 17)]
    model = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = judge.tokenizer(f"{prompt} | {answer}", return_tensors="pt")["input_ids"]
        expected.append(model(ids).logits[0].detach().double().softmax(-1)[1:].sum().item() - 0.3)
    kept: dict[int, float] = {}
    found = judge.verdicts(prompts, answers, kept.__setitem__)
    assert found == pytest.approx(expected, abs=1e-5)
    assert [kept[n] for n in range(7)] == found
    assert max(expected) - min(expected) > 0.01


def test_classifier_sees_prompt_and_answer_as_a_pair(classifier_dir: Path) -> None:
    """Without a template both texts reach the model, cut to the length it may read."""
    judge = classifier(classifier_dir, max_tokens=20)
    ids = judge._encoded("first", "second")["input_ids"]
    assert "first" in judge.tokenizer.decode(ids)
    assert "second" in judge.tokenizer.decode(ids)
    assert len(judge._encoded("first", "second" * 50)["input_ids"]) == 20


def test_broken_classifiers_are_refused_or_fail(classifier_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """An unknown label, a model without a head, a missing folder: one line each; scores that are no numbers: failed."""
    with pytest.raises(UserError, match="no label 'bad', found fine, toxic, violent"):
        classifier(classifier_dir, unsafe=["bad"])
    with pytest.raises(UserError, match="holds no model"):
        classifier(tmp_path / "none")
    with pytest.raises(UserError, match=r"lack 1 of \d+ weights, such as score\.weight"):
        classifier(tiny_model_dir, unsafe=["LABEL_1"]).verdicts(["p"], ["a"])
    model = AutoModelForSequenceClassification.from_pretrained(classifier_dir)
    model.get_parameter("score.weight").data.fill_(3e38)
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path)
    assert text_of(classifier(tmp_path).verdicts(["p"] * 2, ["a", "b"])) == "--"
