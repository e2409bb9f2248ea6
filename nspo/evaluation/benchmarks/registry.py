"""The table of named benchmarks: what each measures, where its data lies, and how a row of it is read.

A benchmark is read from the user's own copy (`file`, below the folder `benchmarks.data`) or from the hub at a revision.
Revisions stand here only where independent public projects pin the same one; for every other data set the user pins it
(`benchmarks.sources`), so that all who name a benchmark mean the same data. Gated sets need the user's own access.

`prompt` and `category` name columns; where copies in use name them differently, the first that a row has counts.
`keep` says which rows belong to the benchmark: values by column, for columns that the copy has.

Nothing heavy is imported: settings check the names. Command: `nspo benchmark --model DIR --tasks advbench,xstest ...`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Axis = Literal["safety", "over_refusal", "ability"]
Format = Literal["prompts", "instructions", "xstest", "code", "livecodebench", "choices", "options", "maths", "harness"]


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    axis: Axis
    licence: str
    file: str  # the local copy, below `benchmarks.data`; may be a pattern for several files, whose stems are categories
    hub: str = ""  # ORG/NAME
    revision: str = ""  # a commit of it, where one is known
    subset: str = ""  # the hub's name of a configuration
    split: str = "test"
    hub_file: str = ""  # read this file of the repository, not a split: it has no table of its own
    gated: bool = False
    prompt: tuple[str, ...] = ("prompt",)
    category: tuple[str, ...] = ("category",)
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    format: Format = "prompts"  # how rows become prompts (nspo/evaluation/benchmarks/formats.py)
    harness: str = ""  # the file of lm-evaluation-harness's task that words and scores it
    metric: str = "acc"  # its figure, one value per prompt
    filter: str = "none"  # its way of finding the answer in a text

    @property
    def compared(self) -> bool:
        """Whether its answers may be compared with others' (`benchmarks.comparison`)."""
        return self.format == "instructions"


# fmt: off
TASKS: dict[str, Task] = {
    # ---- safety: harmful requests
    "advbench": Task(
        "safety", "MIT", "advbench/harmful_behaviors.csv", "walledai/AdvBench",
        split="train", gated=True, prompt=("goal", "prompt"),
    ),
    "harmbench": Task(
        "safety", "MIT", "harmbench/harmbench_behaviors_text_test.csv", "walledai/HarmBench",
        subset="standard", split="train", gated=True, prompt=("Behavior", "prompt"),
        category=("SemanticCategory", "category"), keep={"FunctionalCategory": ("standard", "contextual")},
    ),
    "sorry_bench": Task(
        "safety", "own agreement", "sorry_bench/question.jsonl", "sorry-bench/sorry-bench-202503",
        split="train", gated=True, prompt=("turns",), keep={"prompt_style": ("base",)},
    ),
    "jailbreakbench": Task(
        "safety", "MIT", "jailbreakbench/harmful-behaviors.csv", "JailbreakBench/JBB-Behaviors",
        "886acc352edf07581148c468cb03ce07d956dd55", subset="behaviors", split="harmful",
        prompt=("Goal",), category=("Category",),
    ),
    "alert": Task("safety", "CC-BY-NC-SA-4.0", "alert/alert.jsonl", "Babelscape/ALERT", subset="alert"),
    "harmfulqa": Task(
        "safety", "Apache-2.0", "red_instruct/harmfulqa.json", "declare-lab/HarmfulQA",
        split="train", prompt=("question", "prompt"), category=("topic", "category"),
    ),
    "pku_saferlhf": Task(
        "safety", "CC-BY-NC-4.0", "pku_saferlhf/test.jsonl", "PKU-Alignment/PKU-SafeRLHF", category=("prompt_source",),
    ),
    "catqa": Task(
        "safety", "Apache-2.0", "red_instruct/catqa_english.json", "declare-lab/CategoricalHarmfulQA",
        split="en", prompt=("Question", "prompt"), category=("Category", "category"),
    ),
    "adversarialqa": Task("safety", "Apache-2.0", "red_instruct/adversarialqa.json"),
    "dangerousqa": Task("safety", "Apache-2.0", "red_instruct/dangerousqa.json"),
    "do_not_answer": Task(
        "safety", "Apache-2.0", "do_not_answer/*.jsonl", "LibrAI/do-not-answer",
        split="train", prompt=("question", "prompt"), category=("risk_area", "category"),
    ),
    "ailuminate": Task(
        "safety", "CC-BY-4.0", "ailuminate_demo/airr_official_1.0_demo_en_us.csv",
        prompt=("prompt_text",), category=("hazard",),
    ),
    # ---- over-refusal: harmless requests that look harmful
    "xstest": Task(
        "over_refusal", "CC-BY-4.0", "xstest/xstest_prompts.csv", "Paul/XSTest",
        split="train", category=("type",), format="xstest",
    ),
    "or_bench": Task(
        "over_refusal", "CC-BY-4.0", "or_bench/or-bench-hard-1k.csv", "bench-llm/or-bench",
        subset="or-bench-hard-1k", split="train",
    ),
    "coconot": Task(
        "over_refusal", "ODC-By", "coconot_pref/coconot_pref.json", "allenai/coconot", subset="contrast",
    ),
    # ---- ability: answers that can be checked
    "math": Task(
        "ability", "MIT", "math/test.jsonl", "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        prompt=("problem",), category=("subject", "type"), format="harness",
        harness="minerva_math/minerva_math500.yaml", metric="math_verify",
    ),
    "olympiadbench": Task(
        "ability", "Apache-2.0", "olympiadbench/OE_TO_maths_en_COMP.jsonl", "Hothan/OlympiadBench",
        subset="OE_TO_maths_en_COMP", split="train", prompt=("question",), category=("subfield",), format="maths",
    ),
    "gsm8k": Task(
        "ability", "MIT", "gsm8k/test.jsonl", "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866",
        subset="main", prompt=("question",), format="harness",
        harness="gsm8k/gsm8k-cot-zeroshot.yaml", metric="exact_match", filter="flexible-extract",
    ),
    "humaneval": Task(
        "ability", "MIT", "humaneval/HumanEval.jsonl.gz", "openai/openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", format="code",
    ),
    "mbpp": Task(
        "ability", "CC-BY-4.0", "mbpp/mbpp.jsonl", "google-research-datasets/mbpp",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c", subset="full", prompt=("text",), format="code",
    ),
    "livecodebench": Task(
        "ability", "CC", "livecodebench/test6.jsonl", "livecodebench/code_generation_lite",
        "0fe84c3912ea0c4d4a78037083943e8f0c4dd505", hub_file="test6.jsonl", prompt=("question_content",),
        category=("difficulty",), format="livecodebench",
    ),
    "ifeval": Task(
        "ability", "Apache-2.0", "ifeval/input_data.jsonl", "google/IFEval", "966cd89545d6b6acfd7638bc708b98261ca58e84",
        split="train", format="harness", harness="ifeval/ifeval.yaml", metric="prompt_level_strict_acc",
    ),
    "mmlu": Task(
        "ability", "MIT", "mmlu/test.parquet", "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe",
        subset="all", prompt=("question",), category=("subject",), format="harness",
        harness="mmlu/default/_default_template_yaml",
    ),
    "supergpqa": Task(
        "ability", "ODC-By", "supergpqa/SuperGPQA-all.jsonl", "m-a-p/SuperGPQA",
        split="train", prompt=("question",), category=("discipline",), format="options",
    ),
    "alpaca_eval": Task(
        "ability", "CC-BY-NC-4.0", "alpaca_eval/alpaca_eval.json", "tatsu-lab/alpaca_eval",
        hub_file="alpaca_eval.json", prompt=("instruction",), category=("dataset",), format="instructions",
    ),
    "truthfulqa": Task(
        "ability", "Apache-2.0", "truthfulqa/mc_task.json", "truthfulqa/truthful_qa",
        subset="multiple_choice", split="validation", prompt=("question",), format="harness",
        harness="truthfulqa/truthfulqa_mc1.yaml",
    ),
    # Multiple choice as LLM-Adapters words it (its copies leave out BoolQ's passages); licences are upstream.
    "arc_easy": Task("ability", "CC-BY-SA-4.0", "commonsense/ARC-Easy_test.json", format="choices", metric="acc_norm"),
    "arc_challenge": Task(
        "ability", "CC-BY-SA-4.0", "commonsense/ARC-Challenge_test.json", format="choices", metric="acc_norm",
    ),
    "boolq": Task("ability", "CC-BY-SA-3.0", "commonsense/boolq_test.json", format="choices"),
    "openbookqa": Task(
        "ability", "Apache-2.0", "commonsense/openbookqa_test.json", format="choices", metric="acc_norm",
    ),
    "piqa": Task("ability", "AFL-3.0", "commonsense/piqa_test.json", format="choices", metric="acc_norm"),
    "siqa": Task("ability", "not stated", "commonsense/social_i_qa_test.json", format="choices", metric="acc_norm"),
    "winogrande": Task(
        "ability", "Apache-2.0", "commonsense/winogrande_test.json", format="choices", metric="acc_norm",
    ),
}
# fmt: on
