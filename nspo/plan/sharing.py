"""What a study costs: a stage counts once for all variants whose settings agree up to it, as in the workflow.

The workflow asks its rules which settings shape a stage (nspo/workflow/homes.py). Here, where there are no rules, it is
written down; a test compares the two key by key.
"""

import json
from collections.abc import Iterable
from typing import Any

from nspo.plan.plan import Cost
from nspo.settings.config import Config
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.evaluation import AnsweringSettings, JudgeSettings
from nspo.settings.policy.losses import WDOOR
from nspo.settings.policy.section import PairSettings, TrainingSettings
from nspo.settings.types import Section


def shared(planned: Iterable[tuple[Config, list[Cost]]]) -> list[Cost]:
    """The costs of variants, without what an earlier variant pays for already."""
    found: dict[str, Cost] = {}
    for config, costs in planned:
        shaped = _Shaped(config)
        for cost in costs:
            found.setdefault(json.dumps([cost.stage, shaped.by(cost.stage)], sort_keys=True), cost)
    return list(found.values())


class _Shaped:
    """What shapes each stage: settings of its own, and what shapes its inputs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        model, policy = config.model.identity(), config.policy
        prompts, self.labels = _part(config.data, PromptSettings), _part(config.data, LabelSettings)
        self.start = [model, prompts]
        self.cost, self.reward = ([model, self.labels, part.identity()] for part in (config.cost, config.reward))
        self.collected = [*self.start, config.activations.identity()]
        self.bases: Any = config.bases.precomputed or [
            self.collected,
            config.bases.identity({"rule", "threshold", "weights"}),
        ]
        self.pairs = [*self.start, self.reward, self.cost, _part(policy, PairSettings)]
        self.pairs += [self.labels] if policy.pairs == "labels" else []

    def by(self, stage: str) -> Any:
        """All that shapes a stage of the plan, equal where two variants share it."""
        kind, _, run = stage.partition(" ")
        method = run.partition(" seed ")[0]
        config = self.config
        if kind == "evaluate":
            judged = [self.cost, self.labels, config.second_judge.identity(), config.evaluation.identity()]
            return [*self.start, judged, self.matched(method)]
        if kind == "benchmark":
            asked = [config.benchmarks.identity(), _part(config.evaluation, JudgeSettings)]
            return [*self.start, self.labels, self.cost, asked, self.matched(method)]
        if kind == "attribute":
            own = config.attribution.identity({"harmful_prompts", "general_prompts"})
            return [own, self.by(f"certify {run}"), self.by(f"evaluate {run}")]
        return {
            "collect_activations": lambda: self.collected,
            "compute_bases": lambda: self.bases,
            "train_cost": lambda: self.cost,
            "train_reward": lambda: self.reward,
            "make_pairs": lambda: self.pairs,
            "train_policy": lambda: self.trained(method),
            "match_safety": lambda: self.matched(method),
            "certify": lambda: [self.matched(method), self.collected, self.bases],
        }[kind]()

    def trained(self, method: str) -> Any:
        """What shapes a policy."""
        policy = self.config.policy
        own = policy.methods[method]
        bases = own.own_bases.identity() if own.own_bases else self.bases
        settings = [_part(policy, TrainingSettings), own.identity(), self.config.activations.identity({"layers"})]
        return [
            *self.start,
            self.reward,
            self.cost,
            settings,
            self.trained(own.loss.guide) if isinstance(own.loss, WDOOR) else None,
            [self.collected, bases] if own.constraint.needs_bases else None,
            self.pairs if own.loss.on_pairs else None,
        ]

    def matched(self, method: str) -> Any:
        """What shapes the policy that is tested; nothing more for the base model."""
        if method not in self.config.policy.methods:
            return None
        answering = _part(self.config.evaluation, AnsweringSettings)
        return [self.trained(method), self.config.matching.identity(), answering]


def _part(section: Section, kind: type[Section]) -> dict[str, Any]:
    return section.identity(set(kind.model_fields))
