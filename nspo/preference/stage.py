"""Train the reward or the cost model: by default a head on the frozen leading blocks of the policy's own base model.

`tune: head`: the score of an answer is the mean over its tokens of one linear read-out of their hidden states. The fit
is convex, so it depends on no seed. Every answer counts at several lengths (its first 16, 32, 64 tokens and all of it),
and pairs compare equal lengths: people grade long answers as more harmful and more helpful, and a model that may see
the length learns little else. `tune: all` trains every weight (`nspo/preference/tuning.py`), for large label sets.

Differences from Safe RLHF: the trunk is frozen by default. With the 576 and 341 training labels of the embedded data,
fine-tuning 16 blocks on pairs reached a held-out AUROC of 0.83 (cost) and 0.83 (reward), the head on frozen features
0.86 and 0.92 in a fifth of the time. (The NSPO release has no cost model: it asks Llama-Guard at temperature 1 without
the question.)
Command: `nspo train-preference --target cost --model results/model --labels results/labels.parquet --out results/cost`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from nspo.data.tables import load_labels
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import (
    MANIFEST_NAME,
    fingerprint,
    fingerprint_files,
    fingerprint_model,
    make_manifest,
    write_json,
)
from nspo.models.loading import load_config, load_tokenizer, load_whole, model_folder, model_identity
from nspo.preference.checks import (
    check_length,
    heldout_metrics,
    refuse_one_class,
    refuse_upside_down,
    refuse_worse_refusals,
    tell_cut,
)
from nspo.preference.model import (
    KIND,
    LENGTHS,
    METRICS_NAME,
    SIGN,
    Target,
    Text,
    answer_features,
    encode,
    own_scores,
    refuse_unknown_tokens,
)
from nspo.preference.objective import Judgements, fit_head
from nspo.preference.tuning import SEED, fine_tune
from nspo.run.devices import device_of
from nspo.run.progress import say, track
from nspo.settings.model import PreferenceSettings
from nspo.settings.runtime import RuntimeSettings


def train_preference(
    settings: PreferenceSettings,
    target: Target,
    model: Path,
    labels: Path,
    out: Path,
    runtime: RuntimeSettings,
    logs: Path | None = None,
) -> None:
    """Train the reward or the cost model and write its folder: weights, tokenizer, manifest.json; and metrics.json.

    Args:
        logs: folder of metrics.json; by default it lies in `out`, with the model.

    Raises:
        UserError: labels of one class only or upside down, a backbone without a sequence classification class, or with
            too few blocks.
    """
    rows = {split: load_labels(labels, target, split) for split in ("train", "heldout")}
    judged = {split: Judgements.of(found, target, settings.positive_above) for split, found in rows.items()}
    for split in rows:
        refuse_one_class(labels, target, split, judged[split], settings)
    refuse_worse_refusals([*rows["train"], *rows["heldout"]], target, settings)
    folder = model_folder(f"{target}.backbone", settings.backbone) if settings.backbone else model
    set_seed(SEED)
    tokenizer = load_tokenizer(folder)
    scorer = load_backbone(folder, settings, target, device_of(runtime.device))
    check_length(tokenizer, scorer.config, settings.max_tokens, target)
    scorer.config.pad_token_id = scorer.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    manifest = make_manifest(
        KIND,
        target=target,
        base=model_identity(folder),
        labels=fingerprint_files([labels]),
        settings=settings.dump(),
        pooling="mean" if settings.tune == "head" else "last",
        sign=SIGN[target],
    )
    encoded = {s: [encode(tokenizer, r["prompt"], r["response"], settings.max_tokens) for r in rows[s]] for s in rows}
    for texts in encoded.values():
        refuse_unknown_tokens(texts, tokenizer, scorer, target)
    cut = tell_cut(encoded, settings.max_tokens, target)
    if settings.tune == "head":
        scores = _fit(scorer, encoded, judged["train"], settings.l2, target)
    else:
        work = Path(runtime.workdir) / f"preference-{target}-{fingerprint(manifest)}"
        fine_tune(scorer, tokenizer, encoded["train"], judged["train"], settings, work, runtime.recompute_activations)
        with track(f"{target} scores (heldout)", len(encoded["heldout"]), "answer") as bar:
            scores = own_scores(scorer, encoded["heldout"], tokenizer.pad_token_id, bar.update)[:, None].double()
        if not scores.isfinite().all():
            raise UserError(
                f"{target} model: training diverged, its scores are NaN or Inf: lower {target}.learning_rate"
            )
    lengths = np.array(
        [len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) for row in rows["heldout"]]
    )
    found = heldout_metrics(scores.numpy(), rows["heldout"], judged["heldout"], lengths)
    refuse_upside_down(found, target)
    with atomic_path(out) as scratch:
        scorer.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        manifest["model"] = fingerprint_model(scratch)
        write_json(scratch / MANIFEST_NAME, manifest)
        training = {
            "responses": len(rows["train"]),
            "positives": int((judged["train"].signs > 0).sum()),
            "pairs": len(judged["train"].pairs),
        }
        write_json((logs or scratch) / METRICS_NAME, {**manifest, "training": training, "cut": cut, "heldout": found})
    say(f"{target} model: {_summary(found)} (n={found['n']})")


def _fit(
    scorer: PreTrainedModel,
    encoded: dict[str, list[Text]],
    judged: Judgements,
    l2: float,
    target: Target,
) -> torch.Tensor:
    """Fit the head of `scorer` in place on the training answers; scores (N, L) float64 of the held-out ones.

    Raises:
        UserError: when the base model's hidden states are not finite.
    """
    features = {}
    for split, ids in encoded.items():
        with track(f"{target} features ({split})", len(ids), "answer") as bar:
            features[split] = answer_features(scorer, ids, scorer.config.pad_token_id, LENGTHS, bar.update)
        if not torch.isfinite(features[split]).all():
            raise UserError(
                f"{target} model: the base model gives NaN or Inf for an answer",
                expected="finite hidden states",
                change="check the weights of model.source",
            )
    head = fit_head(features["train"], judged, l2)
    with torch.no_grad():
        scorer.get_parameter("score.weight").copy_(head[None])
    return features["heldout"].double() @ head


def _summary(found: dict[str, Any]) -> str:
    said = []
    if "auroc" in found:
        said.append(f"AUROC {found['auroc']['value']:.3f}, accuracy at zero {found['accuracy']['value']:.3f}")
    if "pairs" in found:
        said.append(f"pairs in order {found['pairs']['accuracy']['value']:.3f}")
    return "held-out " + ", ".join(said)


def load_backbone(folder: Path, settings: PreferenceSettings, target: Target, device: torch.device) -> PreTrainedModel:
    """The first blocks of a model with a one-number head that is still to be fitted, in fp32."""
    config = load_config(folder, f"{target}.backbone: {folder}")
    decoder: Any = config.get_text_config()  # a part of the configuration of a multimodal model
    blocks = settings.backbone_layers or decoder.num_hidden_layers
    if blocks > decoder.num_hidden_layers:
        raise UserError(
            f"backbone_layers is {blocks}, but {folder} has {decoder.num_hidden_layers} blocks",
            expected="at most that many, or 0",
        )
    decoder.num_hidden_layers = blocks
    if len(getattr(decoder, "layer_types", None) or ()) > blocks:  # one entry per block; some derive it, some store it
        decoder.layer_types = decoder.layer_types[:blocks]
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{target}.backbone: transformers has no sequence classification class for {config.model_type!r}",
            expected="another architecture (such as llama, qwen2, qwen3, mistral, gemma)",
        )

    def spared(model: PreTrainedModel, name: str) -> bool:
        """The head, which is fitted here (a classifier's own is kept where it gives one number), and blocks cut off."""
        return not name.startswith(f"{model.base_model_prefix}.") or any(
            block.isdecimal() and int(block) >= blocks for block in name.split(".")
        )

    model: Any = load_whole(
        AutoModelForSequenceClassification,
        folder,
        f"{target}.backbone: {folder}",
        spared,
        config=config,
        dtype=torch.float32,
    )
    head = getattr(model, "score", None)
    if settings.tune == "head" and not (isinstance(head, torch.nn.Linear) and head.bias is None):
        raise UserError(
            f"{target}.tune is 'head', but the head of {type(model).__name__} is no linear layer `score`: set it to "
            "'all', or choose a decoder (such as llama, qwen2, mistral)"
        )
    return model.to(device).eval()
