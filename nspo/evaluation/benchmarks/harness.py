"""Ability by lm-evaluation-harness: its tasks word the prompts and mark the answers, on rows that we chose.

The rows (`doc`) come from `nspo/evaluation/benchmarks/loading.py`, so that leak check and sample are the same for every
benchmark. A task of the harness keeps its own wording, few-shot examples and metric; multiple choice that it does not
have is scored the same way, by the likelihood of each option (per byte, where options are texts). The chat template is
applied once. Answers in words are made by `greedy_answers`: batched by length, and resumed after an interruption.

The harness is an extra: `pip install 'nspo[benchmarks]'`.
"""

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nspo.errors import UserError, first_line
from nspo.evaluation.answers import greedy_answers
from nspo.evaluation.benchmarks.registry import Task
from nspo.models.generation import Generate
from nspo.models.structure.positions import count_left_out, positions_of, prompt_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "num_fewshot": 0,
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}


def check(name: str) -> None:
    """Refuse a benchmark that needs the harness where it is not installed.

    Raises:
        UserError: naming the extra.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"{name} is scored by lm-evaluation-harness: pip install 'nspo[benchmarks]'")


def answer(
    name: str,
    task: Task,
    rows: list[dict[str, Any]],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    generate: Generate,
    max_new_tokens: int,
    batch_size: int,
    work: Path,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Ask the rows' `doc`s and add `prompt`, `response`, `response_tokens` and `correct`.

    Returns:
        The rows that the model has room for, with their answers, and how many others there are, by domain.

    Raises:
        UserError: when the harness cannot make the task, a package or file that it needs is missing, or nothing fits.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # one that knew the harness's own tasks would read 13,000 files
    asked = _model(model, tokenizer, generate, max_new_tokens, batch_size, work, f"answers to {name}")
    try:
        with tempfile.TemporaryDirectory(prefix="nspo-harness-") as folder:
            made = manager.load([_written(name, task, [row["doc"] for row in rows], Path(folder))])["tasks"][name]
            found = lm_eval.simple_evaluate(
                asked,
                tasks=[made],
                task_manager=manager,
                apply_chat_template=True,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
            )
    except (ImportError, LookupError, AssertionError) as error:
        raise UserError(f"{name}: lm-evaluation-harness cannot run it: {first_line(error)}") from error
    (samples,) = found["samples"].values()
    samples = {sample["doc_id"]: sample for sample in samples if sample["filter"] == task.filter}
    kept = []
    for place, row in enumerate(rows):
        sample = samples[place]
        if any(argument[0] in asked.too_long for argument in sample["arguments"]):
            continue
        kept.append(row)
        row["prompt"] = sample["arguments"][0][0]
        row["correct"] = bool(sample[task.metric])
        if made.OUTPUT_TYPE == "multiple_choice":
            likelihoods = [value for value, _ in sample["filtered_resps"]]
            options = [argument[1] for argument in sample["arguments"]]
            row["response"] = options[likelihoods.index(max(likelihoods))].strip()
        else:
            row["response"] = sample["resps"][0][0].strip()
            row["response_tokens"] = len(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    reason = f"asked within the model's {positions_of(model.config)} positions"
    return kept, count_left_out(rows, kept, name, reason, "choose a model with more")


def _written(name: str, task: Task, docs: list[dict[str, Any]], folder: Path) -> str:
    """The file of the harness's task `task.harness`, or multiple choice, on these rows instead of its own download."""
    import lm_eval

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    made = folder / "task.yaml"
    base = {"include": str(Path(lm_eval.__file__).parent / "tasks" / task.harness)} if task.harness else CHOICE
    data = {"data_files": {"test": str(rows)}, "cache_dir": str(folder)}
    splits = {"test_split": "test", **dict.fromkeys(("training_split", "validation_split", "fewshot_split"))}
    own = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data, **splits}
    made.write_text(yaml.safe_dump({**base, **own}), encoding="utf-8")
    return str(made)


def _model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    generate: Generate,
    max_new_tokens: int,
    batch_size: int,
    work: Path,
    description: str,
) -> Any:
    """The model as the harness asks it: likelihoods its own way, answers in words ours."""
    from lm_eval.models.huggingface import HFLM

    positions = positions_of(model.config) or sys.maxsize

    class Asked(HFLM):
        """The harness cuts the beginning off what is longer than the model can read; here it is not asked."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.too_long: set[str] = set()  # contexts

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            room = prompt_room(model.config, max_new_tokens, "benchmarks.max_new_tokens")
            ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in _arguments(requests)}
            self.too_long |= {text for text, row in ids.items() if len(row) > room}
            texts = [text for text, _ in _arguments(requests) if text not in self.too_long]
            asked = [ids[text] for text in texts]
            answers = greedy_answers(generate, asked, max_new_tokens, batch_size, work, description)
            said = {
                text: str(tokenizer.decode(answer, skip_special_tokens=True))
                for text, answer in zip(texts, answers, strict=True)
            }
            return [_cut(said.get(text, ""), options) for text, options in _arguments(requests)]

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
            self.too_long |= {pair[0] for pair, *ids in requests if sum(map(len, ids)) > positions}
            fits = [request for request in requests if request[0][0] not in self.too_long]
            found = super()._loglikelihood_tokens(fits, *args, **options) if fits else []
            known = {request[0]: value for request, value in zip(fits, found, strict=True)}
            return [known.get(pair, (-sys.float_info.max, False)) for pair, *_ in requests]

    return Asked(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False, max_length=positions
    )


def _arguments(requests: list[Any]) -> list[Any]:
    """(text, options) of every request."""
    return [request.args for request in requests]


def _cut(text: str, options: dict[str, Any]) -> str:
    """The answer up to the first of the task's stop strings."""
    for stop in filter(None, options.get("until") or ()):
        text = text.split(stop)[0]
    return text
