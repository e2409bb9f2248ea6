"""Reward and cost models from real pairs, fine-tuned ones, and other backbones: loss by hand, folder, resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from nspo.errors import UserError
from nspo.models.loading import load_tokenizer
from nspo.preference import metrics as metrics
from nspo.preference.model import PreferenceModel, encode
from nspo.preference.objective import CENTRE, Judgements, preference_loss
from nspo.preference.stage import train_preference
from nspo.preference.tuning import SignedRewardTrainer, sign_loss, training_pairs
from nspo.run.devices import has_bf16
from nspo.settings.model import PreferenceSettings
from nspo.settings.reading import validate
from nspo.settings.runtime import RuntimeSettings

TOLERANCE = 2**-7 if has_bf16(torch.device("cpu")) else 1e-5
TUNED = {"tune": "all", "backbone_layers": 0, "epochs": 6, "learning_rate": 3e-3}
TUNED |= {"batch_size": 8, "micro_batch_size": 4}


def paired(count: int, split: str, target: str, signed: bool, flip: bool = False) -> list[dict]:
    """Pairs that one letter tells apart: answers of s are the safer and better, answers of b the others."""
    rows = []
    for i in range(count):
        for role, letter in (("chosen", "s"), ("rejected", "b")):
            row = {"id": f"{split}-{i}-{role}", "set": "toy", "target": target, "split": split, "category": "toy"}
            row |= {"prompt": f"{split} {i}", "response": ("sb"["sb".index(letter) ^ flip]) * (3 + i % 5)}
            row |= {"grade": float(role == "rejected") if signed else None, "pair": f"{split}-{i}", "role": role}
            rows.append(row)
    return rows


def train(model: Path, folder: Path, rows: list[dict], name: str = "out", **changes) -> dict:
    """Train on toy labels and return metrics.json."""
    labels = folder / "labels.parquet"
    pq.write_table(pa.Table.from_pylist(rows), labels)
    settings = validate(PreferenceSettings, {"backbone_layers": 1, "max_tokens": 64} | changes, "settings")
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
    train_preference(settings, rows[0]["target"], model, labels, folder / name, runtime)
    return json.loads((folder / name / "metrics.json").read_text())


def softplus(*gaps: float) -> float:
    """Mean of -log sigmoid(gap)."""
    return sum(math.log(1 + math.exp(-gap)) for gap in gaps) / len(gaps)


def test_loss_on_pairs_equals_numbers_worked_out_by_hand():
    """Two pairs with gaps 1 and -2, compared with nothing else; signs add their terms, no signs a centring one."""
    scores, pairs = torch.tensor([[2.0], [1.0], [-1.0], [1.0]]), torch.tensor([[0, 1], [2, 3]])
    plain = preference_loss(scores, Judgements(torch.zeros(4, dtype=torch.int64), pairs))
    assert plain.item() == pytest.approx(softplus(1, -2) + CENTRE * (3**2 + 0**2) / 2, abs=1e-6)
    signed = preference_loss(scores, Judgements(torch.tensor([1, -1, 1, 1]), pairs))
    assert signed.item() == pytest.approx(softplus(1, -2) + softplus(2, -1, -1, 1), abs=1e-6)
    # Answers in no pair are compared with each other only; both kinds count by their number of answers.
    more = torch.cat([scores, torch.tensor([[0.5], [0.0]])])
    mixed = preference_loss(more, Judgements(torch.tensor([1, -1, 1, 1, 1, -1]), pairs))
    expected = (4 * softplus(1, -2) + 2 * softplus(0.5)) / 6 + softplus(2, -1, -1, 1, 0.5, 0)
    assert mixed.item() == pytest.approx(expected, abs=1e-6)


def test_sign_loss_equals_numbers_worked_out_by_hand():
    """Both answers of the first pair have signs, of the second only one: summed in a pair, mean over pairs."""
    scores, signs = torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.tensor([1.0, 0.0, -1.0, 1.0])
    assert sign_loss(scores, signs).item() == pytest.approx((softplus(1) + softplus(3) + softplus(4)) / 2, abs=1e-6)


@pytest.mark.parametrize(("target", "higher"), [("cost", "rejected"), ("reward", "chosen")])
def test_what_scores_higher(target, higher):
    """The cost model scores the rejected answer higher, the reward model the chosen one; others are matched."""
    rows = paired(3, "train", target, signed=True)
    judged = Judgements.of(rows, target, 0.5)
    assert [rows[high]["role"] for high, _ in judged.pairs] == [higher] * 3
    assert training_pairs(judged) == [tuple(pair) for pair in judged.pairs.tolist()]
    free = Judgements(torch.tensor([1, 1, 1, -1, -1]), torch.empty(0, 2, dtype=torch.int64))
    matched = training_pairs(free)
    assert sorted(high for high, _ in matched) == [0, 1, 2]
    assert {low for _, low in matched} == {3, 4}


def test_pairs_by_hand():
    """Of gaps 2, -1, 0 one and a half are in order; parts by which answer is longer, and the baselines."""
    found = metrics.describe_pairs(
        np.array([2.0, -1.0, 0.0]), np.array([5.0, -2.0, 1.0]), np.zeros(3), ["p", "q", "r"], ["a", "b", "b"], 0
    )
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    assert found["by_length"] == {"longer": {"n": 2, "accuracy": 0.75}, "shorter": {"n": 1, "accuracy": 0.0}}
    assert found["by_category"] == {"a": {"n": 1, "accuracy": 1.0}, "b": {"n": 2, "accuracy": 0.25}}
    assert found["baselines"]["answer_length"]["value"] == pytest.approx(2 / 3)
    assert found["baselines"]["refusal_phrases"]["value"] == pytest.approx(0.5)


@pytest.mark.parametrize("changes", [{}, TUNED], ids=["head", "all"])
@pytest.mark.parametrize("signed", [True, False])
def test_pairs_are_learnt_in_either_mode(tiny_model_dir, tmp_path, signed, changes):
    """Held-out pairs are ordered as people did; where answers have signs, zero tells them apart; flipped is refused."""
    target = "cost" if signed else "reward"
    rows = [*paired(32, "train", target, signed), *paired(24, "heldout", target, signed)]
    found = train(tiny_model_dir, tmp_path, rows, **changes)
    heldout = found["heldout"]
    assert (found["training"]["pairs"], heldout["n"]) == (32, 48)
    assert heldout["pairs"]["n"] == heldout["by_set"]["toy"]["pairs"]["n"] == 24
    assert heldout["pairs"]["accuracy"]["value"] > 0.9
    assert ("auroc" in heldout) is signed
    if signed:
        assert heldout["accuracy"]["value"] > 0.9
    flipped = [*paired(32, "train", target, signed, flip=True), *paired(24, "heldout", target, signed)]
    with pytest.raises(UserError, match=rf"^data\.labels\.toy: the {target} model orders .*worse than chance"):
        train(tiny_model_dir, tmp_path, flipped, "flipped", **changes)


def test_a_tuned_folder_is_a_plain_classifier_and_resumes_to_the_same_bytes(tiny_model_dir, tmp_path, monkeypatch):
    """Its own forward pass is the score, which no padding changes; an interrupted run ends as one that is not."""
    rows = [*paired(32, "train", "cost", True), *paired(24, "heldout", "cost", True)]
    train(tiny_model_dir, tmp_path, rows, "whole", **TUNED)
    step, steps = SignedRewardTrainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 31:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SignedRewardTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model_dir, tmp_path, rows, "resumed", **TUNED)
    assert not (tmp_path / "resumed").exists()
    assert list((tmp_path / "work").glob("*/checkpoint-*"))
    with monkeypatch.context() as patch:
        steps = [None] * 100
        patch.setattr(SignedRewardTrainer, "training_step", killed)
        train(tiny_model_dir, tmp_path, rows, "resumed", **TUNED)
    assert min(steps[100:]) > 0  # it went on, and did not start again
    for name in ("model.safetensors", "metrics.json", "manifest.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "work").iterdir())

    judge = PreferenceModel.load(tmp_path / "whole", "cost")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    tokenizer = load_tokenizer(tmp_path / "whole")
    answers = ["s" * 3, "b" * 30, "sbs"]
    ids = [encode(tokenizer, "hello", answer, 64)[0] for answer in answers]
    with torch.no_grad():
        own = torch.tensor([plain(torch.tensor([row])).logits.item() for row in ids])
    scores = judge.score(["hello"] * 3, answers)
    torch.testing.assert_close(scores, own, atol=TOLERANCE * float(own.std()), rtol=0)


def test_another_model_is_the_backbone(tiny_model_dir, tmp_path):
    """An encoder without a chat template can be tuned, not read by a head; a reward model's own head is kept."""
    rows = [*paired(32, "train", "reward", False), *paired(24, "heldout", "reward", False)]
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = None
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    backbone = {"backbone": str(tmp_path / "bert")}
    found = train(tiny_model_dir, tmp_path, rows, "tuned", **TUNED | backbone)
    assert found["base"]["architecture"] == "BertForSequenceClassification"
    assert found["heldout"]["pairs"]["accuracy"]["value"] > 0.9
    with pytest.raises(UserError, match=r"reward\.tune is 'head', but the head of BertForSequenceClassification"):
        train(tiny_model_dir, tmp_path, rows, **backbone, **{"backbone_layers": 0})
    with pytest.raises(UserError, match=r"reward\.backbone: .*nothing holds no model"):
        train(tiny_model_dir, tmp_path, rows, backbone=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="must be divisible by micro_batch_size"):
        train(tiny_model_dir, tmp_path, rows, batch_size=6, micro_batch_size=4)
