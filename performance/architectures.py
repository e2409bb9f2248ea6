"""Which architectures of the installed transformers can be trained inside the null space: docs/models.md, by trying.

Every type that transformers maps to a causal language model, or to one that reads images and writes text, is built tiny
with random weights and walks the real path: saved, prepared, inputs collected, bases computed, constrained AdamW steps,
saved again and verified. The table says what share of the blocks' weights is constrained and what the certificate
found, or the line that refused. One process each, with a bounded time of CPU; a type that cannot be built from small
sizes says why. Rows of another call with the same transformers are kept. Command:
`python performance/architectures.py [--only TYPE ...] [--out DIR] [--docs docs/models.md]`.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tiny_configs import TOKENIZER, TRIES, config_of
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from nspo import NullSpaceBases, constrain
from nspo.activations.stage import collect
from nspo.bases.stage import compute_bases
from nspo.certify.certificate import verify
from nspo.errors import UserError, first_line
from nspo.files.atomic import atomic_path
from nspo.files.manifest import read_json, write_json
from nspo.models.folders.classes import model_class
from nspo.models.loading import load_model
from nspo.models.stage import prepare_model
from nspo.run.progress import say, silence
from nspo.settings.bases import ActivationSettings, BasesSettings
from nspo.settings.model import ModelSettings
from nspo.settings.runtime import RuntimeSettings

STEPS, LIMIT_S = 3, 60  # seconds of CPU


def walk(kind: str, folder: Path) -> dict[str, Any]:
    """Take a type along the whole path; the row of the table."""
    silence()
    row: dict[str, Any] = {"type": kind, "architecture": "", "stage": "build"}
    try:
        model = build(kind)
        row["architecture"] = type(model).__name__
        for stage, run in path(model, folder).items():
            row["stage"] = stage
            row.update(run() or {})
        row["stage"] = "done"
    except UserError as error:
        row["said"] = str(error)
    except BaseException as error:
        row["said"] = f"{type(error).__name__}: {first_line(error) if str(error) else ''}"
    return row


def build(kind: str) -> Any:
    """A tiny random model, of the first set of sizes that fit together, which a forward pass shows.

    Raises:
        UserError: a class that is none for language models.
        Exception: what the first set of sizes ended in, when none fits.
    """
    errors: list[Exception] = []
    for attempt in range(TRIES):
        try:
            config = config_of(kind, attempt)
            cls: Any = model_class(config)
            torch.manual_seed(0)
            model = cls(config).float().eval()
            ids, mask = torch.arange(3, 19).view(2, 8), torch.ones(2, 8, dtype=torch.int64)
            mask[1, 6:] = 0
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            return model
        except UserError:
            raise
        except Exception as error:
            errors.append(error)
    raise errors[0]


def path(model: Any, folder: Path) -> dict[str, Any]:
    """What is done to a model, in order; the last gives the figures."""
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
    base, tuned = folder / "model", folder / "tuned"

    def save() -> None:
        model.save_pretrained(folder / "made")
        TOKENIZER.save_pretrained(folder / "made")

    def prepare() -> None:
        prepare_model(ModelSettings(source=str(folder / "made")), folder, base)

    def gather() -> None:
        prompts = write_prompts(folder / "prompts.parquet")
        settings = ActivationSettings(
            samples=24, harmful_samples=0, benign_samples=0, max_new_tokens=4, storage="raw", max_prompt_tokens=128
        )
        collect(settings, base, prompts, folder / "activations", runtime)

    def bases() -> None:
        settings = BasesSettings(rule="energy", threshold=0.9)
        compute_bases(settings, folder / "activations", folder / "b.safetensors", runtime)

    def train() -> None:
        network = load_model(base).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
        constrain(network, optimizer, NullSpaceBases.load(folder / "b.safetensors"), anchor=base)
        for seed in range(STEPS):
            ids = torch.randint(3, len(TOKENIZER), (2, 16), generator=torch.Generator().manual_seed(seed))
            logits = network(input_ids=ids, use_cache=False).logits[:, :-1]  # some models' own loss wants images
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        network.save_pretrained(tuned)
        TOKENIZER.save_pretrained(tuned)

    def check() -> dict[str, Any]:
        found = verify(base, tuned, folder / "b.safetensors")
        assert found["summary"]["update_norm"] > 0, "nothing moved"
        return {"leakage": found["summary"]["leakage_basis"]["max"], "coverage": found["coverage"]}

    return {"save": save, "prepare": prepare, "collect": gather, "bases": bases, "train": train, "verify": check}


def write_prompts(file: Path) -> Path:
    """General prompts of one domain, for both splits."""
    words = ["add", "the", "two", "numbers", "and", "write", "a", "short", "poem", "about", "rivers", "in", "spring"]
    rows = [
        {
            "id": f"{split}-{n}",
            "role": "general",
            "domain": "words",
            "split": split,
            "prompt": f"{n} " + " ".join(words[(n * k) % len(words)] for k in range(1, 9)),
            "check": "",
            "category": "",
        }
        for split in ("train", "validation", "heldout")
        for n in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def attempt(kind: str) -> dict[str, Any]:
    """`walk` in a process of its own, which may fail in any way, or take too long."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="architecture-") as folder:
        result = Path(folder, "row.json")
        process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, Path(folder), result))
        process.start()
        process.join()
        row: dict[str, Any] = {"type": kind, "architecture": "", "stage": "build"}
        row["said"] = f"TimeoutError: more than {LIMIT_S} s of CPU, or a crash"
        if result.is_file():
            row = json.loads(result.read_text(encoding="utf-8"))
    return {**row, "seconds": time.perf_counter() - start}


def _child(kind: str, folder: Path, result: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        row = walk(kind, folder)
    result.write_text(json.dumps(row), encoding="utf-8")


def kinds() -> list[str]:
    """All types that transformers maps to a causal language model or to one that reads images and writes text."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    mapped = {**text, **images}
    return sorted(kind for kind in mapped if kind in CONFIG_MAPPING)


def outcome(row: dict[str, Any]) -> str:
    """`works`, `refused` by a line of ours, `not tried` where no small model could be made of it, or `fails`."""
    if row["stage"] == "done":
        return "works"
    if row["said"].split(":")[0].endswith(("Error", "Exception", "Interrupt")):
        return "not tried" if row["stage"] in ("build", "save") else "fails"
    return "refused"


def document(rows: list[dict[str, Any]]) -> str:
    """The page docs/models.md."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in ("works", "refused", "fails", "not tried")}
    for row in rows:
        groups[outcome(row)].append(row)
    left = sorted(set(kinds()) - {row["type"] for row in rows})
    lines = [
        HEAD.format(
            version=transformers.__version__,
            total=len(rows),
            left=len(left),
            **{k.replace(" ", "_"): len(v) for k, v in groups.items()},
        )
    ]
    lines += ["| type | class | constrained | frozen | largest leakage | other inputs |", "|---|---|---|---|---|---|"]
    for row in groups["works"]:
        found = row["coverage"]
        other = ", ".join(found["unprotected_inputs"])
        shares = f"{found['constrained']:.1%} | {found['frozen']:.1%} | {row['leakage']:.1e}"
        lines.append(f"| {row['type']} | {row['architecture']} | {shares} | {other} |")
    for name, title in (("refused", "Refused"), ("fails", "Fails"), ("not tried", "Not tried")):
        if groups[name]:
            lines += ["", f"## {title}", "", f"{TITLES[name]}", "", "| type | at | what it said |", "|---|---|---|"]
            lines += [f"| {row['type']} | {row['stage']} | {_cell(row['said'])} |" for row in groups[name]]
    if left:
        lines += ["", "## Not run", "", f"{', '.join(left)}."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    made_in = rf"{re.escape(tempfile.gettempdir())}/\S*?architecture-\w+/"
    plain = re.sub(made_in, "", text).replace("|", "/").replace("\n", " ")
    return plain if len(plain) <= 220 else plain[:217] + "..."


HEAD = """# Models

What `nspo` does with each architecture of transformers {version}, found by trying: a tiny model with random weights is
saved, prepared, its inputs are collected, bases computed, three AdamW steps constrained, the saved weights verified.
Of {total} types {works} work, {refused} are refused, {fails} fail and {not_tried} could not be built small; {left} more
that transformers maps to a language model were not run.
Written by `python performance/architectures.py --docs docs/models.md`.

*Constrained* is the share of the weights of the blocks that may move in their null space, *frozen* the rest, which does
not move; nothing trains without a basis. Shares are those of the tiny model, where norms, routers and convolutions
weigh more than at full size. *Leakage* is ||dW Q|| / ||W Q|| of the worst layer on the saved weights: below 1e-6 it is
rounding. *Other inputs* are what the model reads beside text. Only text is collected here, so they are unprotected;
images can be protected too: [images.md](images.md).

A real model of another family: Gemma 3 270M (config/gemma3-270m.yaml, with fewer prompts and three steps of 16 answers)
went through collection, bases, reinforcement learning and `nspo verify`: 5.5e-8, no change outside the constraint.
"""
TITLES = {
    "refused": "One line, before any training.",
    "fails": "Reformer's reversible layers pass no gradient on while embeddings are frozen; else not understood yet.",
    "not tried": "No small model of it could be made from its configuration's sizes alone; nothing is known of it.",
}


def main() -> None:
    """Try all types, write the figures, and the page where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="these types alone")
    parser.add_argument("--out", type=Path, default=Path("results/performance"))
    parser.add_argument("--docs", type=Path, help="write the page here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file, done = arguments.out / "architectures.json", {}
    if file.is_file() and (kept := read_json(file))["transformers"] == transformers.__version__:
        done = {row["type"]: row for row in kept["rows"]}
    for kind in kinds() if arguments.only is None else arguments.only:
        done[kind] = row = attempt(kind)
        say(f"{kind}: {outcome(row)} ({row['seconds']:.0f} s) {row.get('said', '')[:160]}")
        rows = [done[name] for name in sorted(done)]
        write_json(file, {"transformers": transformers.__version__, "rows": rows})
    if arguments.docs:
        with atomic_path(arguments.docs) as scratch:
            scratch.write_text(document([done[name] for name in sorted(done)]), encoding="utf-8")


if __name__ == "__main__":
    main()
