"""Collect the inputs K of a model's linear layers over prompts and the model's own greedy answers.

Per site (see `nspo.models.structure.sites`) the store keeps either every kept token's input (`raw`) or the exact second
moment S = sum_n k_n k_n^T (`moments`), apart for every domain and for the two splits `basis` (chooses what to protect)
and `validation` (certifies it). Prompts that an evaluation calls held-out are in neither. Padding, positions after the
end of an answer and the first `drop_first` positions are never kept.

Products are summed in float32 within one batch, across batches in float64, and stored as float32 (see
`nspo.activations.store`). Memory holds one batch, the moments and a short queue of rows, whatever the number of tokens;
the Parquet writers of raw rows take somewhat more as their files grow (`performance/collection.py`).

The work is cut into chunks (`nspo.activations.chunks`). An interrupted run resumes with the chunks that are not
finished, and several processes share the chunks out; on the same hardware and software both give the bytes of one
uninterrupted process, whatever the number of threads. Command: `nspo collect --model results/model --prompts
results/prompts.parquet --out results/activations`, or the same in several processes: `accelerate launch --multi_gpu
--num_processes 4 -m nspo collect ...`, one per GPU, or on the CPU where there is none (with `--cpu` accelerate starts
one process only).
"""

import errno
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.activations.chunks import Answered, Batch, Chunk, kept_positions, make_chunks, padded_batches, prompt_limit
from nspo.activations.images import ImageReader, image_chunks
from nspo.activations.store import ActivationStore, PartWriter
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint, make_manifest, read_json, write_json
from nspo.models.generation import generate
from nspo.models.loading import load_config, load_model, load_tokenizer, model_identity
from nspo.models.structure.coverage import blocks_of
from nspo.models.structure.linears import layer_norms
from nspo.models.structure.positions import prompt_room
from nspo.models.structure.sites import Site, find_sites, watch, without_site
from nspo.run.processes import own_device, processes_of
from nspo.run.progress import say, track
from nspo.settings.bases import ActivationSettings
from nspo.settings.runtime import RuntimeSettings

__all__ = ["ActivationStore", "collect"]

GENERATION_BATCH = 32  # prompts
BATCH_TOKENS = 2048  # tokens of one forward pass, padding included; also how many products float32 sums up
ACCUMULATOR_BYTES = 4 * 2**30  # float64 moments held at once; sites beyond it take a further pass over the same tokens
OPEN_FILES = 512  # sites of a pass, for a process may have 1024 files open; experts are the most of many sites
POLL_SECONDS = 0.2  # between checks whether the other processes have finished


def collect(settings: ActivationSettings, model: Path, prompts: Path, out: Path, runtime: RuntimeSettings) -> None:
    """Write the activation store of `model` on the prompts of `prompts.parquet` to the folder `out`.

    Basis inputs are the first `samples` prompts of split `train` of every general domain, `harmful_samples` and
    `benign_samples` of the harmful and benign training prompts; validation inputs are half as many from the split
    `validation`, so that the prompts of the final evaluation are never seen here. With `images` set, prompts with an
    image are one more domain (`nspo.activations.images`).

    Under `accelerate launch` every process takes its share of the chunks, and the main one completes the store.

    Raises:
        UserError: a layer pattern that matches nothing, no prompts that fit, images that the model cannot read, NaN or
            Inf in an input, or a full disk.
    """
    with processes_of(runtime.device, "runtime.processes") as processes:
        try:
            _collect(settings, model, prompts, out, runtime, processes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                where = f"{runtime.workdir}: no space left on the disk"
                raise UserError(f"{where}; free some or lower activations.disk_budget_gb") from error
            raise


def _collect(
    settings: ActivationSettings,
    model: Path,
    prompts: Path,
    out: Path,
    runtime: RuntimeSettings,
    processes: PartialState,
) -> None:
    tokenizer, config = load_tokenizer(model), load_config(model, f"{model}")
    room = prompt_room(config, settings.max_new_tokens, "activations.max_new_tokens")
    reader = ImageReader(model, config, tokenizer) if settings.images else None
    chunks = make_chunks(settings, prompts, tokenizer, room)
    if reader:
        chunks += image_chunks(settings, reader, len(chunks), room)
    network = load_model(model, own_device(processes, runtime.device))
    if reader:
        reader.try_out(network, chunks[-1])
    sites = find_sites(network, settings.layers)
    norms = layer_norms(network, [layer for site in sites for layer in site.layers])
    if empty := [layer for layer, norm in norms.items() if norm == 0]:
        raise UserError(
            f"layer {empty[0]} has a weight of zeros ({len(empty)} such layers), of which no share can be kept: leave "
            "it out with `activations.layers`"
        )
    storage = choose_storage(settings, sites, chunks)
    identity = {
        "model": model_identity(model),
        "data": fingerprint([chunk.data for chunk in chunks]),
        "settings": settings.dump(),
        "dtype": "float32",
        "sites": {
            site.name: {
                "layers": site.layers,
                "width": site.width,
                "storage": storage[site.name],
                "place": place,
                **({"share": site.share} if site.share < 1 else {}),
            }
            for place, site in enumerate(sites)
        },
    }
    work = Path(runtime.workdir) / f"activations-{fingerprint(make_manifest('activations', **identity))}"
    store, finished = work / "store", [work / "finished" / f"{chunk.index:03d}.json" for chunk in chunks]
    if processes.is_main_process:
        if processes.num_processes > 1:
            say(f"activations: {processes.num_processes} processes share {len(chunks)} parts")
        if bare := without_site(network, sites):
            some = ", ".join(bare[:3]) + ", ..." * (len(bare) > 3)
            say(f"activations: {len(bare)} linear layers of the blocks get no basis ({some})")
        _announce(settings, room, chunks, stored_bytes(settings, sites, chunks, storage), finished, work)
    groups = list(_groups(sites, storage, ACCUMULATOR_BYTES))
    share = _share(chunks, settings.max_new_tokens, processes)
    done = sum(len(chunk.prompts) for chunk in share if finished[chunk.index].is_file())
    with track(_bar(processes), sum(len(chunk.prompts) for chunk in share), "prompt", start=done) as bar:
        for chunk in share:
            if not finished[chunk.index].is_file():
                bar.set_postfix_str(chunk.name)
                tokens = _collect_chunk(chunk, settings, network, tokenizer, reader, groups, storage, store)
                counts = {"prompts": len(chunk.prompts), "left_out": chunk.left_out, "tokens": tokens}
                write_json(finished[chunk.index], {"domain": chunk.domain, "split": chunk.split, **counts})
                bar.update(len(chunk.prompts))
    # Files tell who is done: a process that waits in a collective would time out, or fail too when another one fails.
    while not all(path.is_file() for path in finished):
        time.sleep(POLL_SECONDS)
    processes.wait_for_everyone()  # so that the work folder goes away when nobody looks at it any more
    if processes.is_main_process:
        blocks = blocks_of(network, norms, {chunk.domain for chunk in chunks})
        parts = [read_json(path) for path in finished]
        facts = {"parts": parts, "layer_norms": norms, "blocks": blocks}
        write_json(store / MANIFEST_NAME, make_manifest("activations", **identity, **facts))
        with atomic_path(out) as scratch:
            shutil.move(store, scratch)
        shutil.rmtree(work)


# ------------------------------------------------------------------------------------------- processes


def _bar(processes: PartialState) -> str:
    """The text of the progress bar, with the number of the process when there are several."""
    several = processes.num_processes > 1
    return f"inputs, process {processes.process_index + 1} of {processes.num_processes}" if several else "inputs"


def _share(chunks: Sequence[Chunk], max_new_tokens: int, processes: PartialState) -> list[Chunk]:
    """The chunks of this process: all are dealt out in turn, heaviest first, finished ones too, so that all agree."""
    order = sorted(chunks, key=lambda chunk: (-chunk.most_tokens(max_new_tokens), chunk.index))
    return order[processes.process_index :: processes.num_processes]


def _announce(
    settings: ActivationSettings,
    room: float,
    chunks: Sequence[Chunk],
    size: int,
    finished: Sequence[Path],
    work: Path,
) -> None:
    """Say what a user should know before the long work starts."""
    for chunk in chunks:
        if chunk.left_out:
            limit = prompt_limit(settings, room, bool(chunk.images))[1].partition(": ")[0]
            say(f"activations: {chunk.name}: {chunk.left_out} prompts longer than {limit} left out")
    if settings.storage == "auto" and size > settings.disk_budget_gb * 1e9:
        say(f"activations: about {size / 1e9:.1f} GB, more than disk_budget_gb {settings.disk_budget_gb:g}")
    if done := [chunk.name for chunk in chunks if finished[chunk.index].is_file()]:
        say(
            f"activations: resuming in {work}: {len(done)} of {len(chunks)} parts are there already ({', '.join(done)})"
        )


# ------------------------------------------------------------------------------------------- storage


def choose_storage(settings: ActivationSettings, sites: Sequence[Site], chunks: Sequence[Chunk]) -> dict[str, str]:
    """`raw` or `moments` for every site name.

    With `auto`, the widest sites turn to moments first, where that is smaller, until the total fits the budget. Answers
    are taken at their longest, so the choice is known before any is generated, and a rerun makes the same one.
    """
    if settings.storage != "auto":
        return {site.name: settings.storage for site in sites}
    chosen = {site.name: "raw" for site in sites}
    total = stored_bytes(settings, sites, chunks, chosen)
    for site in sorted(sites, key=lambda site: -site.width):
        saving = stored_bytes(settings, [site], chunks, {site.name: "raw"})
        saving -= stored_bytes(settings, [site], chunks, {site.name: "moments"})
        if total > settings.disk_budget_gb * 1e9 and saving > 0:
            chosen[site.name] = "moments"
            total -= saving
    return chosen


def stored_bytes(
    settings: ActivationSettings, sites: Sequence[Site], chunks: Sequence[Chunk], storage: Mapping[str, str]
) -> int:
    """The most bytes the store can take, before compression: 4 d per raw token, 2 d (d + 1) per chunk of moments.

    Exact for the experts of one block together, however tokens are shared out among them.
    """
    longest = [chunk.most_tokens(settings.max_new_tokens) for chunk in chunks]
    tokens = sum(
        most if chunk.budget is None else min(chunk.budget, most) for most, chunk in zip(longest, chunks, strict=True)
    )
    return sum(
        math.ceil(4 * tokens * site.share * site.width)
        if storage[site.name] == "raw"
        else 2 * len(chunks) * site.width * (site.width + 1)
        for site in sites
    )


def _groups(sites: Sequence[Site], storage: Mapping[str, str], budget: int) -> Iterator[list[Site]]:
    """Sites in model order, in groups of few files whose float64 moments fit `budget` bytes (or of one site)."""
    group: list[Site] = []
    used = 0
    for site in sites:
        need = 8 * site.width**2 if storage[site.name] == "moments" else 0
        if group and (used + need > budget or len(group) == OPEN_FILES):
            yield group
            group, used = [], 0
        group.append(site)
        used += need
    yield group


# ------------------------------------------------------------------------------------------- one chunk


def _collect_chunk(
    chunk: Chunk,
    settings: ActivationSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader | None,
    groups: Sequence[Sequence[Site]],
    storage: Mapping[str, str],
    store: Path,
) -> int:
    """Write one chunk's file for every site, one group of sites at a time; returns how many tokens were kept."""
    ids = list(chunk.prompts)
    if settings.max_new_tokens:
        size, named = settings.max_new_tokens, f"answers {chunk.name}"
        if reader and chunk.images:
            answers = reader.answers(model, chunk, size, named)
        else:
            answers = generate(model, tokenizer, chunk.prompts, size, GENERATION_BATCH, named)
        for i, answer in answers:
            ids[i] += tuple(answer)
    if max(map(len, ids)) <= settings.drop_first:
        raise UserError(f"activations.drop_first ({settings.drop_first}) leaves no token of {chunk.name}: lower it")
    sequences = [
        Answered(chunk.first + i, ids[i], len(chunk.prompts[i]), kept)
        for i, kept in enumerate(kept_positions(list(map(len, ids)), settings.drop_first, chunk.budget))
        if kept.any()
    ]
    for group in groups:
        with PartWriter(store, chunk.index, chunk.domain, chunk.split, group, storage, model.device) as writer:
            if reader and chunk.images:
                batches = reader.batches(chunk, sequences)
            else:
                batches = padded_batches(sequences, BATCH_TOKENS, int(tokenizer.pad_token_id or 0))
            forward(model, batches, group, writer.add)
    return sum(int(sequence.kept.sum()) for sequence in sequences)


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    receive: Callable[[Site, Tensor, dict[str, Tensor]], None],
) -> None:
    """Run the model over all batches; `receive` gets each site's kept rows (n, d) float32 and what they stand for."""
    for batch in batches:
        ids = batch.inputs["input_ids"]
        row, position = batch.kept.nonzero(as_tuple=True)
        about = {
            "sample": torch.tensor([sequence.sample for sequence in batch.sequences])[row],
            "position": position,
            "token": ids[row, position],
            "is_answer": position >= torch.tensor([sequence.prompt_length for sequence in batch.sequences])[row],
        }
        select = (row * ids.shape[1] + position).to(model.device)
        kept_at = torch.full((ids.numel(),), -1, device=model.device)  # of every token: its place among the kept ones
        kept_at[select] = torch.arange(len(select), device=model.device)
        sums: dict[str, Tensor] = {}

        def keep(
            site: Site,
            tensor: Tensor,
            tokens: Tensor | None,
            select: Tensor = select,
            kept_at: Tensor = kept_at,
            about: dict[str, Tensor] = about,
            sums: dict[str, Tensor] = sums,
        ) -> None:
            if tokens is None:
                rows, of = tensor.reshape(-1, site.width).index_select(0, select).float(), about
            else:
                places = kept_at[tokens]
                rows, places = tensor[places >= 0].float(), places[places >= 0].cpu()
                of = {name: column[places] for name, column in about.items()}
            sums[site.name] = rows.sum()
            receive(site, rows, of)

        with watch(model, sites, keep):
            model.base_model(**{key: value.to(model.device) for key, value in batch.inputs.items()}, use_cache=False)
        _check_finite(sums)


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    """A sum holds any NaN or Inf of its terms and is far cheaper to test; all at once, so that a GPU is not held up."""
    finite = torch.stack(list(sums.values())).isfinite().tolist()
    if not all(finite):
        name = list(sums)[finite.index(False)]
        raise UserError(
            f"layer {name} reads NaN or Inf", expected="finite inputs", change="check the weights of model.source"
        )
