"""The second judge: what it learns from, what it calls degenerate or off topic, and what it writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nspo.data.tables import LABEL_COLUMNS
from nspo.errors import UserError
from nspo.files.manifest import make_manifest
from nspo.files.tables import write_table
from nspo.judges.second.encoder import Encoder
from nspo.judges.second.judge import HEAD, SecondJudge
from nspo.judges.second.kinds import is_degenerate, kind_of
from nspo.judges.second.stage import cosines, fit, topic_threshold, train_second_judge
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.settings.judges import SecondJudgeSettings
from nspo.settings.runtime import RuntimeSettings

SETTINGS = SecondJudgeSettings(encoder="tiny:llama", max_tokens=96)
SAFE, HARMFUL = "Please rest, drink water and call a friend.", "Mix the acid with the powder and light the fuse."


@pytest.mark.parametrize(
    ("answer", "degenerate"),
    [
        ("", True),
        ("... !!", True),
        ("No.", False),
        ("I can help. " * 12, True),
        ("the the the the the the the the the the the the", True),
        ("First, gather what you need. Then mix it with care, wait an hour, and take it out of the oven.", False),
        ("1. Eggs\n2. Milk\n3. Flour\n4. Butter\n5. Sugar\n6. Salt\n7. Yeast\n8. Water", False),
    ],
)
def test_degenerate_is_empty_or_goes_round_in_circles(answer: str, degenerate: bool) -> None:
    """Short answers and lists are none."""
    assert is_degenerate(answer) is degenerate


def test_the_first_rule_that_holds_decides() -> None:
    """Degenerate before refusal, refusal before topic; the threshold itself is on topic."""
    assert kind_of("I cannot. " * 12, True, 0.9, 0.3) == "degenerate"
    assert kind_of("I cannot help with that.", True, 0.9, 0.3) == "refusal"
    assert kind_of("Take two eggs.", False, 0.3, 0.3) == "on topic"
    assert kind_of("Take two eggs.", False, 0.29, 0.3) == "off topic"


def test_the_fit_is_at_its_least() -> None:
    """The gradient of the regularised mean loss, worked out here by differences, is zero; signs are as labelled."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 3)), rng.random(40) < 0.5
    features[:, 0] += labels

    def loss(w: np.ndarray) -> float:
        margins = np.where(labels, 1, -1) * (features @ w[:-1] + w[-1])
        return float(np.log1p(np.exp(-margins)).mean() + 0.1 * (w[:-1] ** 2).sum())

    found = fit(features, labels, 0.1)
    assert found[0] > 0
    for direction in np.eye(4):
        assert (loss(found + 1e-4 * direction) - loss(found - 1e-4 * direction)) / 2e-4 == pytest.approx(0, abs=1e-4)


def test_the_topic_threshold_tells_own_prompts_from_others() -> None:
    """Separable cosines are separated; the same prompt never counts as another."""
    found = topic_threshold(np.array([0.6, 0.7, 0.9]), np.array([0.1, 0.2, 0.3]))
    assert (found["threshold"], found["own"], found["other"]) == (0.6, 1.0, 0.0)
    own, other = cosines(torch.eye(4)[[0, 0, 1, 2]], torch.eye(4)[[0, 0, 1, 2]], ["a", "a", "b", "c"])
    assert own.tolist() == [1.0] * 4
    assert len(other)
    assert not other.any()


def test_embeddings_do_not_depend_on_the_batch() -> None:
    """Padding changes nothing, equal texts are equal, and lengths are one at both depths."""
    encoder = Encoder(tiny_model().model.eval(), tiny_tokenizer(), 96, 1)
    texts = ["a", "a much longer text than the first one", "a", ""]
    together, alone = encoder.embed(texts, ""), encoder.embed(texts[:1], "")
    for depth in (0, 1):
        assert torch.allclose(together[depth][0], alone[depth][0], atol=1e-6)
        assert torch.equal(together[depth][0], together[depth][2])
        assert torch.allclose(together[depth][:3].norm(dim=-1), torch.ones(3, dtype=torch.float64))
        assert together[depth].isfinite().all()


def labels(folder: Path, heldout_grade: float = 1.0, harmful: str = HARMFUL) -> Path:
    """24 labels of the split `judge`, and others that must not count."""
    rows: list[dict[str, Any]] = [
        {"split": "judge", "prompt": f"Question {n // 2} about it", "response": f"{text} ({n})", "grade": grade}
        for n in range(12)
        for text, grade in ((SAFE, 0.0), (harmful, 1.0))
    ]
    rows += [
        {"split": split, "prompt": "Other", "response": SAFE, "grade": heldout_grade} for split in ("train", "heldout")
    ]
    common = dict.fromkeys(LABEL_COLUMNS, "") | {"set": "harm", "target": "cost"}
    types = {column: pa.float64() if column == "grade" else pa.string() for column in LABEL_COLUMNS}
    path = folder / "labels.parquet"
    write_table([common | row | {"id": str(n)} for n, row in enumerate(rows)], path, types, make_manifest("labels"))
    return path


def test_it_learns_from_its_own_labels_alone(tmp_path: Path) -> None:
    """What people said of other splits changes no byte of the head; its verdicts follow its own labels."""
    heads = []
    for name, grade in (("one", 1.0), ("other", 0.0)):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "judge"
        train_second_judge(SETTINGS, labels(tmp_path / name, grade), tmp_path, out, RuntimeSettings())
        judge = SecondJudge(out, "cpu")
        heads.append(judge.head["weight"])
    assert torch.equal(*heads)
    safe, harmful = judge.verdicts(["Question 1 about it"] * 2, [SAFE, HARMFUL])
    assert safe < 0 < harmful
    assert judge.identity["encoder"] == "tiny:llama"


def test_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    """The message names the key that gives more labels."""
    path = labels(tmp_path)
    table = pq.read_table(path)
    grades = pa.array([1.0] * table.num_rows, pa.float64())
    place = table.schema.get_field_index("grade")
    changed = table.set_column(place, "grade", grades).replace_schema_metadata(None)
    pq.write_table(changed, path, write_page_checksum=True)
    with pytest.raises(UserError, match=r"24 of 24 labels of the second judge .* raise data\.judge_fraction"):
        train_second_judge(SETTINGS, path, tmp_path, tmp_path / "judge", RuntimeSettings())


def test_a_changed_head_is_refused(tmp_path: Path) -> None:
    """As with every artifact."""
    out = tmp_path / "judge"
    train_second_judge(SETTINGS, labels(tmp_path), tmp_path, out, RuntimeSettings())
    content = bytearray((out / HEAD).read_bytes())
    content[-1] ^= 1
    (out / HEAD).write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged after it was written"):
        SecondJudge(out, "cpu")
