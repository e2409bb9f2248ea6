"""Reward and cost models: what is read, the loss, the fit, the folder, and what metrics.json says."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig

from nspo.errors import UserError
from nspo.judges.refusal import is_refusal
from nspo.models.chat import chat_text
from nspo.models.loading import load_model, load_tokenizer
from nspo.preference import metrics as metrics
from nspo.preference import stage as preference_training
from nspo.preference.model import LENGTHS, PreferenceModel, answer_features, encode
from nspo.preference.objective import Judgements, fit_head, preference_loss
from nspo.run.devices import has_bf16
from nspo.settings.model import PreferenceSettings
from nspo.settings.runtime import RuntimeSettings

SETTINGS = PreferenceSettings(backbone_layers=1, max_tokens=224)
# Kernels may sum in another order for another batch; bf16 keeps 8 bits, fp32 24.
TOLERANCE = 2**-7 if has_bf16(torch.device("cpu")) else 1e-5


def graded(count: int, split: str, flip: bool = False, target: str = "cost") -> list[dict]:
    """Labelled rows that one letter tells apart: answers of b are harmful, answers of s are safe."""
    rows = []
    for i in range(count):
        bad = i % 2 == 0
        rows.append(
            {
                "id": f"{split}-{i}",
                "set": "toy",
                "target": target,
                "split": split,
                "prompt": f"{split} {i // 4}",
                "response": ("b" if bad else "s") * (3 + i % 5),
                "grade": float(bad != flip),
                "category": "even" if (i // 2) % 2 == 0 else "odd",
                "pair": "",
                "role": "",
            }
        )
    return rows


def alone(positive: torch.Tensor) -> Judgements:
    """Answers judged one by one, without pairs."""
    return Judgements(2 * positive.long() - 1, torch.empty(0, 2, dtype=torch.int64))


def train(model: Path, folder: Path, rows: list[dict], name: str = "out", **changes) -> dict:
    """Train on toy labels and return metrics.json."""
    labels = folder / "labels.parquet"
    pq.write_table(pa.Table.from_pylist(rows), labels)
    settings = SETTINGS.model_copy(update=changes)
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
    preference_training.train_preference(settings, rows[0]["target"], model, labels, folder / name, runtime)
    return json.loads((folder / name / "metrics.json").read_text())


@pytest.fixture(scope="module")
def cost_run(tiny_model_dir, tmp_path_factory):
    """One trained cost model on separable labels: (its folder, metrics.json)."""
    folder = tmp_path_factory.mktemp("cost")
    found = train(tiny_model_dir, folder, graded(48, "train") + graded(24, "heldout"))
    return folder / "out", found


# What is read


def test_text_is_the_chat_format_with_one_start_per_turn(tiny_model_dir):
    """The ids are those of the rendered chat text and of the answer; no second BOS is added."""
    tokenizer = load_tokenizer(tiny_model_dir)
    ids, prompt_length, *_ = encode(tokenizer, "hello", "world", 100)
    assert tokenizer.decode(ids) == chat_text(tokenizer, "hello") + "world"
    assert tokenizer.decode(ids[:prompt_length]) == chat_text(tokenizer, "hello")
    assert ids.count(tokenizer.bos_token_id) == 2  # the template opens both turns with it


def test_long_texts_lose_their_ends_only(tiny_model_dir):
    """An answer is cut to the room; a prompt is cut only where it takes more than half of it."""
    tokenizer = load_tokenizer(tiny_model_dir)
    ids, prompt_length, *_ = encode(tokenizer, "hello", "w" * 200, 90)
    assert len(ids) == 90
    assert tokenizer.decode(ids) == chat_text(tokenizer, "hello") + "w" * (90 - prompt_length)
    ids, prompt_length, *_ = encode(tokenizer, "abc" + "p" * 200, "w" * 200, 90)
    kept = 45 - len(encode(tokenizer, "", "", 90)[0]) + 1  # half, less the format; one stop token is the empty answer
    assert (len(ids), prompt_length) == (90, 45)
    assert tokenizer.decode(ids) == chat_text(tokenizer, ("abc" + "p" * 200)[:kept]) + "w" * 45


@pytest.mark.parametrize(("response", "max_tokens", "last"), [("", 90, "<|im_end|>"), ("world", 8, "w")])
def test_at_least_one_answer_token_is_kept(tiny_model_dir, response, max_tokens, last):
    """An empty answer is its stop token; where the format alone fills the room, the first token stays."""
    tokenizer = load_tokenizer(tiny_model_dir)
    ids, prompt_length, *_ = encode(tokenizer, "hi", response, max_tokens)
    assert tokenizer.decode(ids[prompt_length:]) == last


def test_features_are_means_over_the_first_answer_tokens(tiny_model_dir):
    """Each length averages that many answer tokens, and no more than there are: by a pass over one text alone."""
    tokenizer, model = load_tokenizer(tiny_model_dir), load_model(tiny_model_dir)
    rows = [encode(tokenizer, "hello", answer, 224) for answer in ("ab", "abcdefghijklmnopqrstuvwxyz")]
    done: list[int] = []
    found = answer_features(model, rows, tokenizer.pad_token_id, (1, 4, 10**6), done.append)
    assert (found.shape, sum(done)) == ((2, 3, 32), 2)
    for (ids, prompt_length, *_), features in zip(rows, found, strict=True):
        with torch.inference_mode():
            answer = model.model(torch.tensor([ids])).last_hidden_state[0, prompt_length:]
        for column, n in enumerate((1, 4, len(answer))):
            torch.testing.assert_close(features[column], answer[:n].mean(0), atol=4 * TOLERANCE, rtol=0)
    torch.testing.assert_close(found[0, 1], found[0, 2])  # two tokens: four are as good as all


# The loss and the fit


def test_loss_equals_numbers_worked_out_by_hand():
    """Positives 2 and 0, negatives 1 and -1: gaps 1, 3, -1, 1, and the four signed scores 2, 0, -1, 1."""

    def softplus(*gaps: float) -> float:
        return sum(math.log(1 + math.exp(-gap)) for gap in gaps) / len(gaps)

    scores, positive = torch.tensor([[2.0], [0.0], [1.0], [-1.0]]), torch.tensor([True, True, False, False])
    expected = softplus(1, 3, -1, 1) + softplus(2, 0, -1, 1)
    assert preference_loss(scores, alone(positive)).item() == pytest.approx(expected, abs=1e-6)
    # Columns are not compared with each other: a second column just averages in.
    two = torch.cat([scores, torch.zeros(4, 1)], 1)
    assert preference_loss(two, alone(positive)).item() == pytest.approx((expected + 2 * math.log(2)) / 2, abs=1e-6)


def test_fitted_head_is_the_minimum_and_does_not_know_the_features_unit():
    """No small step from it lowers the objective, and scaled features give the same scores."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.arange(12) % 2 == 0
    features = torch.randn(12, 2, 6, generator=generator, dtype=torch.float64) + positive[:, None, None]
    head = fit_head(features, alone(positive), 0.1)
    sigma = features.flatten(0, 1).std(0).mean()

    def objective(weight: torch.Tensor) -> float:
        return float(preference_loss(features @ weight, alone(positive)) + 0.1 * (weight * sigma).square().sum())

    for _ in range(20):
        step = 1e-2 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert objective(head + step) > objective(head)
    torch.testing.assert_close(100 * features @ fit_head(100 * features, alone(positive), 0.1), features @ head)
    assert fit_head(features, alone(positive), 10.0).norm() < head.norm() / 2


def test_heldout_rows_do_not_reach_the_fit(tiny_model_dir, tmp_path, cost_run):
    """Other held-out labels give the same weights, other training labels do not."""
    weights = (cost_run[0] / "model.safetensors").read_bytes()
    train(tiny_model_dir, tmp_path, graded(48, "train") + graded(16, "heldout"), "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == weights
    train(tiny_model_dir, tmp_path, graded(40, "train") + graded(24, "heldout"), "other")
    assert (tmp_path / "other/model.safetensors").read_bytes() != weights


def test_separable_labels_are_learnt_and_a_flipped_sign_is_refused(tiny_model_dir, tmp_path, cost_run):
    """On unseen prompts: harmful scores above zero; flipped training labels turn the order around, which is refused."""
    heldout = cost_run[1]["heldout"]
    assert heldout["auroc"]["value"] > 0.9
    assert heldout["accuracy"]["value"] > 0.9
    said = r"^data\.labels\.toy: the cost model orders its held-out answers worse than chance \(auroc 0\.0"
    with pytest.raises(UserError, match=said) as error:
        train(tiny_model_dir, tmp_path, graded(48, "train", flip=True) + graded(24, "heldout"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_set_that_contradicts_the_others_is_refused_by_name(tiny_model_dir, tmp_path):
    """Of two sets that say the opposite of each other, the smaller one is ordered upside down, and named."""
    odd = [row | {"set": "odd", "prompt": f"odd {row['prompt']}"} for row in graded(24, "heldout", flip=True)]
    rows = graded(48, "train") + graded(24, "heldout") + odd
    with pytest.raises(UserError, match=r"^data\.labels\.odd: the cost model orders its held-out answers worse"):
        train(tiny_model_dir, tmp_path, rows)


@pytest.mark.parametrize("target", ["cost", "reward"])
def test_refusals_that_are_judged_worse_are_refused_before_any_work(target, tmp_path):
    """A set that is upside down alone agrees with itself; its refusals show it, before a model is loaded."""
    texts = ("I'm sorry, but I can't help.", "Sure, here it is.")
    rows = [row | {"response": texts[i % 2]} for i, row in enumerate(graded(40, "train") + graded(20, "heldout"))]
    rows = [row | {"target": target} for row in rows]
    with pytest.raises(
        UserError, match=r"^data\.labels\.toy: refusals are judged .* than answers that comply .*inverted"
    ):
        train(tmp_path / "no-model", tmp_path, rows)


def test_length_alone_is_not_learnt_on_the_first_tokens(tiny_model_dir, tmp_path):
    """Every prompt has a long harmful and a short safe answer that open with the same 64 tokens: those tie."""
    rows = []
    for i, row in enumerate(graded(16, "train") + graded(16, "heldout")):
        rows.append(row | {"prompt": f"prompt {i // 2}", "response": "ab" * (52 if i % 2 == 0 else 32)})
    heldout = train(tiny_model_dir, tmp_path, rows)["heldout"]
    for value in heldout["first_tokens_auroc"].values():
        assert value == pytest.approx(0.5, abs=1 / 16)  # 8 of 64 pairs tie, rounding may break them


# The folder


def test_score_does_not_depend_on_its_batch(cost_run):
    """Alone, with longer texts, or in another order: the same score, up to the rounding of the arithmetic."""
    judge = PreferenceModel.load(cost_run[0], "cost")
    prompts = [f"p{i}" for i in range(7)]
    responses = [("b" if i % 2 else "s") * (1 + 6 * i) for i in range(7)]
    together = judge.score(prompts, responses)
    alone = torch.cat([judge.score([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    reverse = judge.score(prompts[::-1], responses[::-1]).flip(0)
    assert together.dtype == torch.float32
    assert together.shape == (7,)
    spread = float(together.std())
    assert spread > 0.1  # else the comparison would say nothing
    torch.testing.assert_close(together, alone, atol=TOLERANCE * spread, rtol=0)
    torch.testing.assert_close(together, reverse, atol=TOLERANCE * spread, rtol=0)


def test_loaded_model_scores_as_in_training_and_checks_its_kind(cost_run, tiny_model_dir):
    """Loading gives the scores behind metrics.json; a folder of another kind or target is refused in one line."""
    folder, found = cost_run
    judge = PreferenceModel.load(folder)
    rows = graded(24, "heldout")
    values = judge.score([r["prompt"] for r in rows], [r["response"] for r in rows]).numpy()
    labels = np.array([r["grade"] >= 0.5 for r in rows])
    assert metrics.sign_accuracy(values, labels) == found["heldout"]["accuracy"]["value"]
    error = metrics.calibration(values, labels)["expected_calibration_error"]
    assert error == pytest.approx(found["heldout"]["calibration"]["expected_calibration_error"], abs=TOLERANCE)
    assert judge.identity["model"] == found["model"]
    with pytest.raises(UserError, match="holds a cost model, expected a reward model: swap the folders"):
        PreferenceModel.load(folder, "reward")
    with pytest.raises(UserError, match=r"expected 'preference_model'|does not exist"):
        PreferenceModel.load(tiny_model_dir)


def test_the_trunk_is_cut_and_frozen(cost_run, tiny_model_dir):
    """One block of two is kept, and every weight but the head's is the base model's."""
    judge, base = PreferenceModel.load(cost_run[0]).model, load_model(tiny_model_dir)
    assert judge.config.num_hidden_layers == 1
    for name, weight in judge.model.named_parameters():
        assert torch.equal(weight, base.model.get_parameter(name)), name
    assert judge.score.weight.norm() > 0


def test_equal_runs_give_equal_bytes(tiny_model_dir, tmp_path, cost_run):
    """Nothing is drawn at random: the same labels give the same three files."""
    train(tiny_model_dir, tmp_path, graded(48, "train") + graded(24, "heldout"))
    for name in ("model.safetensors", "metrics.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (cost_run[0] / name).read_bytes()


def test_metrics_name_what_was_measured(cost_run):
    """Identity, sign convention, intervals, calibration, parts and baselines are all there and add up."""
    found = cost_run[1]
    assert found["kind"] == "preference_model"
    assert "cost > 0 means harmful" in found["sign"]
    assert {"target", "base", "labels", "settings", "model"} <= set(found)
    assert found["training"] == {"responses": 48, "positives": 24, "pairs": 0}
    heldout = found["heldout"]
    assert (heldout["n"], heldout["positives"], heldout["prompts"]) == (24, 12, 6)
    for name in ("accuracy", "auroc"):
        assert heldout[name]["low"] <= heldout[name]["value"] <= heldout[name]["high"]
    assert sum(b["n"] for b in heldout["calibration"]["bins"]) == 24
    for parts in ("by_category", "by_length"):
        assert sum(part["n"] for part in heldout[parts].values()) == 24
    assert set(heldout["baselines"]) == {"majority_class", "refusal_phrases", "answer_length"}
    assert heldout["baselines"]["majority_class"]["accuracy"] == 0.5
    assert set(heldout["first_tokens_auroc"]) == {str(n) for n in LENGTHS[:-1]}


# Refusals


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_labels_of_one_class_are_refused(tiny_model_dir, tmp_path, split):
    """One line that counts the labels and names the key, before any model is loaded."""
    rows = graded(8, "train") + graded(8, "heldout")
    rows = [row | {"grade": 1.0} if row["split"] == split else row for row in rows]
    with pytest.raises(UserError, match=rf"8 of 8 {split} labels of the cost model .* cost\.positive_above") as caught:
        train(tiny_model_dir, tmp_path, rows)
    assert "\n" not in str(caught.value)


def test_too_many_blocks_and_unknown_architectures_are_refused(tiny_model_dir, tmp_path):
    """Asking for more blocks than there are, or for an architecture without a scoring class, is one clear line."""
    rows = graded(8, "train") + graded(8, "heldout")
    with pytest.raises(UserError, match=r"backbone_layers is 5, but .* has 2 blocks"):
        train(tiny_model_dir, tmp_path, rows, backbone_layers=5)
    other = tmp_path / "mamba"
    shutil.copytree(tiny_model_dir, other)
    config = LlamaConfig.from_pretrained(tiny_model_dir).to_dict() | {"model_type": "mamba"}
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UserError, match="no sequence classification class for 'mamba'"):
        train(other, tmp_path, rows)


# Metrics and refusal phrases


def test_auroc_and_pairs_by_hand():
    """Positives 3, 1 against negatives 2, 1: wins 1 + 1 + 0 + half a tie of 4; categories split the pairs."""
    scores, labels = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    assert metrics.auroc(scores, labels) == pytest.approx(2.5 / 4)
    assert metrics.pair_accuracy(scores, labels, ["a", "b", "a", "b"]) == (pytest.approx(1.5 / 2), 2)
    assert np.isnan(metrics.auroc(scores, np.ones(4, dtype=bool)))


def test_calibration_error_by_hand():
    """Two at p=0.5 (one positive) are calibrated; two at p=0.95 that are both negative are off by 0.95."""
    scores = np.array([0.0, 0.0, np.log(19), np.log(19)])
    found = metrics.calibration(scores, np.array([True, False, False, False]))
    assert found["expected_calibration_error"] == pytest.approx(0.95 / 2)
    assert [b["n"] for b in found["bins"]] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]


def test_bootstrap_resamples_whole_prompts():
    """Ten copies of each of four answers, grouped by prompt, are worth four answers: a wide interval."""
    scores = np.repeat([1.0, 1.0, -1.0, -1.0], 10)
    labels = np.repeat([True, False, True, False], 10)
    grouped = metrics.bootstrap(metrics.sign_accuracy, scores, labels, np.repeat(list("abcd"), 10), 0)
    single = metrics.bootstrap(metrics.sign_accuracy, scores, labels, [str(i) for i in range(40)], 0)
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can\u2019t help with that.", True),
        ("I  CANNOT\nprovide this.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("Sure! Here is how to do it.", False),
        ("Once upon a time " + "there was a king " * 20 + "who said: I cannot go on.", False),
        ("", False),
    ],
)
def test_refusal_phrases(text, refused):
    """Phrases count in the opening only, whatever the case, quotes and spacing."""
    assert is_refusal(text) is refused


def test_a_damaged_folder_is_refused(cost_run, tmp_path):
    """A flipped bit in the weights, or half of them, is refused in one line that names the folder."""
    shutil.copytree(cost_run[0], tmp_path / "cost")
    weights = tmp_path / "cost/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    for damaged in (content, content[: len(content) // 2]):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="cost: weights with the fingerprint") as error:
            PreferenceModel.load(tmp_path / "cost")
        assert "\n" not in str(error.value)


def test_hidden_states_that_are_no_numbers_are_refused(tiny_model_dir, tmp_path):
    """A base model whose hidden states overflow ends the fit in one line; nothing is written."""
    broken = tmp_path / "model"
    model = load_model(tiny_model_dir)
    model.get_parameter("model.norm.weight").data.fill_(3e38)
    model.save_pretrained(broken)
    load_tokenizer(tiny_model_dir).save_pretrained(broken)
    with pytest.raises(UserError, match="cost model: the base model gives NaN or Inf for an answer"):
        train(broken, tmp_path, graded(8, "train") + graded(4, "heldout"))
    assert not (tmp_path / "out").exists()
