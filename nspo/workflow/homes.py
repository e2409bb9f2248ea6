"""Where a job's files are in a study: in a home that is shared by all variants whose settings agree up to that job.

A home is a hash of what shaped a job: of the parameters of its rule that Snakemake watches, as the job's settings give
them, and of the homes of its inputs. Both are asked of the rule itself, so whatever would run a job again gives it
another home in another variant, and nothing else does: a variant that comes, goes or takes another name moves nothing.
A report stands below the name of its variant. Without a study there are no homes, and one configuration, called "".
"""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from nspo.settings.config import Config

FOLDER = "stages"  # of all homes
HOME = "[0-9a-f]{12}"
OF_THE_PACKAGE = {"code", "builtin", "templates"}  # hashes of what the package holds: new ones run again where it is


class Homes:
    """The settings of every variant, and the home of every job."""

    def __init__(self, variants: Mapping[str, Config]) -> None:
        self.variants = variants
        self._variant_at: dict[str, str] = {}  # the first that has this home
        self._known: dict[tuple[Any, ...], str] = {}
        self._watched: dict[str, list[str]] = {}  # by rule

    def variant(self, wildcards: Any) -> str:
        """The variant of a job, or one of those that share it."""
        home = wildcards.get("home", "")
        name: str | None = wildcards.get("variant", self._variant_at.get(home) if home else "")
        if name is None:
            sys.exit(f"{FOLDER}/{home}: no variant of this study has its home there")
        return name

    def settings(self, wildcards: Any) -> Config:
        """The settings of a job."""
        return self.variants[self.variant(wildcards)]

    def of(self, rule: Any, wildcards: Mapping[str, Any]) -> str:
        """The home of a rule's job.

        Args:
            wildcards: of the job, and its `variant`.
        """
        from snakemake.iocontainers import Wildcards

        own = {name: str(wildcards[name]) for name in rule.wildcard_names if name != "home"}
        key = (rule.name, wildcards["variant"], *sorted(own.items()))
        if key not in self._known:
            job = Wildcards(fromdict={**own, "variant": wildcards["variant"], "home": ""})
            settings = {name: rule.params[name](job) for name in self._watched_of(rule)}
            inputs = {name: _homes(_paths(value, job)) for name, value in rule.input.items()}
            text = json.dumps([settings, inputs], sort_keys=True)
            home = hashlib.sha256(text.encode()).hexdigest()[:12]
            self._variant_at.setdefault(home, wildcards["variant"])
            self._known[key] = home
        return self._known[key]

    def _watched_of(self, rule: Any) -> list[str]:
        if rule.name not in self._watched:
            self._watched[rule.name] = [name for name, value in rule.params.items() if _watched(name, value)]
        return self._watched[rule.name]


def _watched(name: str, value: Any) -> bool:
    """Whether it is a setting whose change Snakemake takes for a reason to run again: a function of wildcards alone."""
    return callable(value) and len(inspect.signature(value).parameters) == 1 and name not in OF_THE_PACKAGE


def _paths(value: Any, job: Any) -> Iterable[str]:
    values = [value] if callable(value) or isinstance(value, str) else value
    for item in values:
        found = item(job) if callable(item) else item
        yield from [found] if isinstance(found, str) else found


def _homes(paths: Iterable[str]) -> list[str]:
    return sorted({home for path in paths for home in re.findall(f"/{FOLDER}/({HOME})/", path)})
