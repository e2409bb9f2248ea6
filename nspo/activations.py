"""Collect the inputs K of a model's linear layers over prompts and the model's own greedy answers.

Per site (see `nspo.sites`) the store keeps either every kept token's input (`raw`) or the exact second moment
S = sum_n k_n k_n^T (`moments`), apart for every domain and for the two splits `basis` (chooses what to protect) and
`heldout` (certifies it). Prompts that an evaluation calls held-out never enter the basis. Padding, positions after the
end of an answer and the first `drop_first` positions are never kept. (The authors' release feeds bare text without the
chat template and without answers, counts padding as tokens, and accumulates in bf16.)

Products are summed in float32 within one batch, across batches in float64, and stored as float32 (see
`nspo.activation_store`). An interrupted run resumes with the first (domain, split) that is not finished.
Command: `nspo collect-activations --model results/model --prompts results/prompts.parquet --out results/activations`.
"""

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.activation_store import BENIGN, HARMFUL, ActivationStore, PartWriter
from nspo.artifacts import MANIFEST_NAME, atomic_path, fingerprint, make_manifest, read_json, write_json
from nspo.config import ActivationSettings, RuntimeSettings
from nspo.errors import UserError
from nspo.linears import layer_norms
from nspo.models import chat_ids, device_of, generate, load_model, load_tokenizer, model_identity
from nspo.progress import say, track
from nspo.prompts import domains, load_prompts
from nspo.sites import Site, find_sites, watch

__all__ = ["ActivationStore", "collect"]

GENERATION_BATCH = 32  # prompts
BATCH_TOKENS = 2048  # tokens of one forward pass, padding included; also how many products float32 sums up
ACCUMULATOR_BYTES = 4 * 2**30  # float64 moments held at once; sites beyond it take a further pass over the same tokens


@dataclass(frozen=True)
class Part:
    """The unit of work and of resuming: the prompts of one domain and split, tokenised in the chat format."""

    domain: str
    split: str
    prompts: tuple[tuple[int, ...], ...]
    left_out: int
    data: str  # fingerprint of prompt ids and texts

    @property
    def name(self) -> str:
        """How progress and errors call it."""
        return f"{self.domain} ({self.split})"


@dataclass(frozen=True)
class Answered:
    """A prompt with its answer: token ids, and how many of them are the prompt."""

    ids: tuple[int, ...]
    prompt_length: int


def collect(settings: ActivationSettings, model: Path, prompts: Path, out: Path, runtime: RuntimeSettings) -> None:
    """Write the activation store of `model` on the prompts of `prompts.parquet` to the folder `out`.

    Basis inputs are the first `samples` prompts of split `train` of every general domain, `harmful_samples` and
    `benign_samples` of the harmful and benign training prompts; held-out inputs are half as many from the split
    `validation`, so that the prompts of the final evaluation are never seen here.

    Raises:
        UserError: a layer pattern that matches nothing, no prompts that fit, NaN or Inf in an input, or a full disk.
    """
    tokenizer = load_tokenizer(model)
    parts = _parts(settings, prompts, tokenizer)
    network = load_model(model, device_of(runtime.device))
    sites = find_sites(network, settings.layers)
    storage = choose_storage(settings, sites, parts)
    identity = {
        "model": model_identity(model),
        "data": fingerprint([part.data for part in parts]),
        "settings": settings.dump(),
        "dtype": "float32",
        "sites": {
            site.name: {"layers": site.layers, "width": site.width, "storage": storage[site.name], "place": place}
            for place, site in enumerate(sites)
        },
    }
    work = Path(runtime.workdir) / f"activations-{fingerprint(make_manifest('activations', **identity))}"
    store, state = work / "store", work / "progress.json"
    done: list[dict[str, Any]] = read_json(state) if state.is_file() and store.is_dir() else []
    if done:
        names = ", ".join(f"{part['domain']} ({part['split']})" for part in done)
        say(f"activations: resuming in {work}: {len(done)} of {len(parts)} parts are there already ({names})")
    try:
        for index in range(len(done), len(parts)):
            tokens = _collect_part(parts[index], index, settings, network, tokenizer, sites, storage, store)
            counts = {"prompts": len(parts[index].prompts), "left_out": parts[index].left_out, "tokens": tokens}
            done.append({"domain": parts[index].domain, "split": parts[index].split, **counts})
            write_json(state, done)
        norms = layer_norms(network, [layer for site in sites for layer in site.layers])
        write_json(store / MANIFEST_NAME, make_manifest("activations", **identity, parts=done, layer_norms=norms))
        with atomic_path(out) as scratch:
            shutil.move(store, scratch)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{work}: no space left on the disk; free some or lower activations.disk_budget_gb") from error
    shutil.rmtree(work)


def choose_storage(settings: ActivationSettings, sites: Sequence[Site], parts: Sequence[Part]) -> dict[str, str]:
    """`raw` or `moments` for every site name.

    With `auto`, the widest sites turn to moments first, where that is smaller, until the total fits the budget. Answers
    are taken at their longest, so the choice is known before any is generated, and a rerun makes the same one.
    """
    if settings.storage != "auto":
        return {site.name: settings.storage for site in sites}
    tokens = sum(len(ids) + settings.max_new_tokens for part in parts for ids in part.prompts)
    chosen = {site.name: "raw" for site in sites}
    total = sum(4 * tokens * site.width for site in sites)
    for site in sorted(sites, key=lambda site: -site.width):
        saving = 4 * tokens * site.width - 2 * len(parts) * site.width * (site.width + 1)
        if total > settings.disk_budget_gb * 1e9 and saving > 0:
            chosen[site.name] = "moments"
            total -= saving
    if total > settings.disk_budget_gb * 1e9:
        say(f"activations: about {total / 1e9:.1f} GB, more than disk_budget_gb {settings.disk_budget_gb:g}")
    return chosen


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `lengths`, shortest first, in batches of at most `budget` tokens, padding included (or of one)."""
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not result or (len(result[-1]) + 1) * lengths[index] > budget:
            result.append([])
        result[-1].append(index)
    return result


# ------------------------------------------------------------------------------------------- prompts and one part


def _parts(settings: ActivationSettings, prompts: Path, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    general = domains(prompts, "general", "train")
    if reserved := {HARMFUL, BENIGN} & set(general):
        raise UserError(f"data.general: the domain name {min(reserved)!r} is reserved: rename the domain")
    wanted: list[tuple[str, str, str | None, int]]
    wanted = [(domain, "general", domain, settings.samples) for domain in general]
    wanted += [(HARMFUL, "harmful", None, settings.harmful_samples), (BENIGN, "benign", None, settings.benign_samples)]
    parts = []
    for name, role, domain, samples in wanted:
        for split, source, count in (("basis", "train", samples), ("heldout", "validation", samples // 2)):
            if count:
                parts.append(
                    _part(name, split, load_prompts(prompts, role, source, domain), count, settings, tokenizer)
                )
    return parts


def _part(
    domain: str,
    split: str,
    rows: list[dict[str, Any]],
    count: int,
    settings: ActivationSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> Part:
    """The first `count` prompts that are short enough."""
    kept: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    left_out = 0
    for row in rows:
        ids = tuple(chat_ids(tokenizer, row["prompt"]))
        if len(ids) > settings.max_prompt_tokens:
            left_out += 1
        else:
            kept.append((row, ids))
        if len(kept) == count:
            break
    limit = f"activations.max_prompt_tokens ({settings.max_prompt_tokens})"
    if not kept:
        raise UserError(f"{domain} ({split}): all {left_out} prompts are longer than {limit}: raise it")
    if left_out:
        say(f"activations: {domain} ({split}): {left_out} prompts longer than {limit} left out, {len(kept)} used")
    data = fingerprint([domain, split, [[row["id"], row["prompt"]] for row, _ in kept]])
    return Part(domain, split, tuple(ids for _, ids in kept), left_out, data)


def _collect_part(
    part: Part,
    index: int,
    settings: ActivationSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[Site],
    storage: Mapping[str, str],
    store: Path,
) -> int:
    """Write one part's file of every site; returns its number of tokens."""
    sequences = [Answered(ids, len(ids)) for ids in part.prompts]
    if settings.max_new_tokens:
        answers = generate(
            model, tokenizer, part.prompts, settings.max_new_tokens, GENERATION_BATCH, f"answers {part.name}"
        )
        for i, answer in answers:
            sequences[i] = Answered(part.prompts[i] + tuple(answer), len(part.prompts[i]))
    tokens = sum(max(0, len(sequence.ids) - settings.drop_first) for sequence in sequences)
    if tokens == 0:
        raise UserError(f"activations.drop_first ({settings.drop_first}) leaves no token of {part.name}: lower it")
    groups = list(_groups(sites, storage, ACCUMULATOR_BYTES))
    with track(f"inputs {part.name}", len(groups) * len(sequences), "sequence") as bar:
        for group in groups:
            with PartWriter(store, index, part.domain, part.split, group, storage, model.device) as writer:
                _forward(model, tokenizer, sequences, settings.drop_first, group, writer.add, bar.update)
    return tokens


def _groups(sites: Sequence[Site], storage: Mapping[str, str], budget: int) -> Iterator[list[Site]]:
    """Sites in model order, in groups whose float64 moments fit `budget` bytes (or of one site)."""
    group: list[Site] = []
    used = 0
    for site in sites:
        need = 8 * site.width**2 if storage[site.name] == "moments" else 0
        if group and used + need > budget:
            yield group
            group, used = [], 0
        group.append(site)
        used += need
    yield group


@torch.inference_mode()
def _forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Answered],
    drop_first: int,
    sites: Sequence[Site],
    receive: Callable[[Site, Tensor, dict[str, Tensor]], None],
    advance: Callable[[int], Any],
) -> None:
    """Run the model over all sequences; `receive` gets each site's kept rows (n, d) float32 and what they stand for."""
    for batch in batches([len(sequence.ids) for sequence in sequences], BATCH_TOKENS):
        width = len(sequences[batch[-1]].ids)
        # Padded on the right: in a causal model no real token sees it, and positions count from 0 by themselves.
        ids = torch.full((len(batch), width), int(tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for place, i in enumerate(batch):
            ids[place, : len(sequences[i].ids)] = torch.tensor(sequences[i].ids)
            mask[place, : len(sequences[i].ids)] = 1
        real = mask.clone()
        real[:, :drop_first] = 0
        row, position = real.nonzero(as_tuple=True)
        about = {
            "sample": torch.tensor(batch)[row],
            "position": position,
            "token": ids[row, position],
            "is_answer": position >= torch.tensor([sequences[i].prompt_length for i in batch])[row],
        }
        select = (row * width + position).to(model.device)

        def keep(site: Site, tensor: Tensor, select: Tensor = select, about: dict[str, Tensor] = about) -> None:
            rows = tensor.reshape(-1, site.width).index_select(0, select).float()
            if not torch.isfinite(
                rows.sum()
            ):  # a sum holds any NaN or Inf of its terms, and is 20 times cheaper to test
                raise UserError(
                    f"layer {site.name} reads NaN or Inf, expected finite inputs: check the weights of model.source"
                )
            receive(site, rows, about)

        with watch(model, sites, keep):
            model.base_model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        advance(len(batch))
