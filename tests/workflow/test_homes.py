"""Homes of a study: made of a job's settings and of what it reads, and of nothing else."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from snakemake.iocontainers import Wildcards

from nspo.settings.bases import BasesSettings
from nspo.settings.config import Config
from nspo.settings.policy.section import PolicySettings
from nspo.workflow.homes import FOLDER, HOME, Homes
from nspo.workflow.parameters import Chosen, flags, tracked

RULES = Path(__file__).parents[2] / "workflow/rules"


@dataclass
class Rule:
    """What homes ask of a rule of Snakemake."""

    name: str
    params: dict[str, Any]
    input: dict[str, Any] = field(default_factory=dict)
    wildcard_names: frozenset[str] = frozenset({"home"})


def study(**clips: float) -> tuple[Homes, Callable[[str, str], str]]:
    """Variants `name=clip` of two rules, `bases` and then `train`, and a function from rule and variant to the home."""
    homes = Homes({name: Config(policy=PolicySettings(clip=clip)) for name, clip in clips.items()})
    bases, policy = (
        Chosen(kind, lambda wildcards, name=name: getattr(homes.settings(wildcards), name))
        for name, kind in (("bases", BasesSettings), ("policy", PolicySettings))
    )
    first = Rule(
        "bases", {**tracked("bases", bases), "flags": flags(bases), "code": lambda wildcards: "of the package"}
    )

    def made(wildcards: Any) -> str:
        return f"results/{FOLDER}/{homes.of(first, wildcards)}/bases.safetensors"

    second = Rule("train", {**tracked("policy", policy), "target": "--x"}, {"bases": made, "data": ["here.csv"]})
    rules = {rule.name: rule for rule in (first, second)}
    return homes, lambda rule, variant: homes.of(rules[rule], {"variant": variant})


def test_what_agrees_is_shared_and_what_differs_is_not() -> None:
    """Two clips: one file of bases, two policies; and a home is the settings' own, whoever else is in the study."""
    homes, home = study(a=0.2, b=0.3, c=0.2)
    assert re.fullmatch(HOME, home("bases", "a"))
    assert home("bases", "a") == home("bases", "b")
    assert home("train", "a") == home("train", "c") != home("train", "b")
    alone = study(other=0.3)[1]
    assert (alone("bases", "other"), alone("train", "other")) == (home("bases", "b"), home("train", "b"))
    assert homes.settings(Wildcards(fromdict={"home": home("train", "b")})).policy.clip == 0.3


def test_hashes_of_the_package_move_nothing() -> None:
    """Nor do parameters that Snakemake does not watch: edited code runs again where it is."""
    homes = Homes({"a": Config()})
    setting = {"x": lambda wildcards: "--x 1"}
    plain = homes.of(Rule("plain", setting), {"variant": "a"})
    beside = {"code": lambda wildcards: "1", "derived": lambda wildcards, threads: "2", "constant": "3"}
    assert homes.of(Rule("beside", setting | beside), {"variant": "a"}) == plain
    assert homes.of(Rule("other", {"x": lambda wildcards: "--x 2"}), {"variant": "a"}) != plain


def test_one_configuration_has_no_homes() -> None:
    """Without a study every job has the one configuration, and an unknown home ends the run in a line."""
    config = Config()
    assert Homes({"": config}).settings(Wildcards(fromdict={"method": "nspo"})) is config
    with pytest.raises(SystemExit, match="stages/0123456789ab: no variant of this study has its home there"):
        Homes({"a": config}).settings(Wildcards(fromdict={"home": "0123456789ab"}))


@pytest.mark.parametrize("file", sorted(RULES.glob("*.smk")), ids=lambda path: path.name)
def test_flags_of_a_rule_are_its_watched_settings(file: Path) -> None:
    """Whatever settings a command gets are parameters that Snakemake watches, so they shape homes; and the reverse."""
    for block in re.split(r"^(?:use )?rule (?=\w+)", file.read_text(), flags=re.M)[1:]:
        given = re.findall(r"=flags\((.*)\),$", block, re.M)
        watched = re.findall(r'\*\*tracked\("\w+", (.*)\),$', block, re.M)
        assert sorted(given) == sorted(watched), block.partition(":")[0]
