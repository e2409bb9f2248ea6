"""Wrong input in bulk: mutated configurations, damaged data files and artifacts end in clear lines, never a traceback.

The mutations are systematic, not random: every key of the default and of the smoke configuration, with every fault.
"""

import contextlib
import copy
import datetime
import json
import math
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.told import check_lines, outcome

from nspo.cli import main as cli
from nspo.cli.config_files import json_schema
from nspo.errors import UserError
from nspo.settings.config import Config
from nspo.settings.reading import check_config, load_config

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "config/smoke.yaml"
SCHEMA = jsonschema.Draft202012Validator(json.loads(json_schema()))
GONE, MISSPELT = object(), object()
# Mappings whose keys a user chooses.
NAMED = {
    *("wheels", "general", "harmful_heldout", "general_heldout", "labels", "methods", "weights", "judges", "only"),
    *("grades", "sources", "rules", "gold"),
}
EVERY_KEY: dict[str, Any] = {  # what the default leaves out
    "model": {"source": "tiny:llama"},
    "data": {
        "wheels": {},
        "general": {"maths": {"source": "builtin:maths.jsonl", "only": {"level": "[1-3]"}, "fraction": 0.5}},
        "harmful": {"source": "harmful.csv"},
        "harmful_heldout": {"other": {"source": "other.csv"}},
        "general_heldout": {"novel": {"source": "novel.csv"}},
        "gold": {"exam": {"source": "exam.csv"}},
        "labels": {
            "graded": {
                "kind": "graded",
                "source": ["graded.csv"],
                "target": "cost",
                "questions": {"source": "questions.csv"},
                "grades": {"0": 1.0, "1": 0.0},
            },
            "pairs": {"kind": "pairs", "source": ["pairs.jsonl"], "target": "reward", "fraction": 0.5},
            "rlhf": {"kind": "safe_rlhf", "source": ["rlhf.jsonl"], "target": "cost", "only": {"severity": "[23]"}},
        },
    },
    "second_judge": {"encoder": "tiny:llama"},
    "bases": {"weights": {"maths": 2.0, "benign": 0.5}, "precomputed": "hub:org/name@main"},
    "policy": {
        "methods": {
            "dpo": {"objective": "dpo", "learning_rate": 1e-4, "loss": {"beta": 0.2}},
            "tokens": {
                "loss": {"kind": "wdoor", "token_temperature": 0.5, "safety_share": 0.3, "guide": "dpo"},
                "constraint": {"kind": "exact", "mode": "anchor"},
                "learning_rate": 1e-4,
            },
            "limit": {
                "objective": "nspo_lagrangian",
                "learning_rate": 1e-4,
                "loss": {"cost_limit": 0.2, "multiplier_init": 1.5, "multiplier_lr": 0.2, "multiplier_max": 4.0},
            },
            "near": {"objective": "grpo", "learning_rate": 1e-4, "loss": {"kind": "grpo", "kl": 0.04}},
        },
        "delta": 3.0,
        "seeds": [0, 1],
        "judge": {"kind": "endpoint", "url": "http://host/v1", "model": "m", "template": "{prompt}|{response}"},
    },
    "evaluation": {
        "judges": {
            "net": {"kind": "endpoint", "url": "http://host/v1", "model": "m", "api_key_env": "KEY"},
            "guard": {"kind": "guard", "source": "guard", "safe": "no", "unsafe": "yes", "line": "Harmful response:"},
            "labels": {"kind": "classifier", "source": "hub:org/name@main", "unsafe": ["toxic"], "threshold": 0.4},
        }
    },
    "benchmarks": {"tasks": ["advbench", "xstest"], "sources": {"advbench": "a.csv", "xstest": "hub:org/name@main"}},
    "runtime": {"requests": {"retries": 1}, "vllm": {"server": "http://host:8000"}, "trackers": ["tensorboard"]},
}
LOOP: list[Any] = []
LOOP.append(LOOP)
WRONG: list[Any] = [
    GONE,
    None,
    [],
    {},
    [1, "two"],
    {"key": 1},
    LOOP,
    True,
    "",
    "text",
    "1e-6",
    "\u202e\x1b[31m\n",
    "x" * 100_000,
    -1,
    0,
    1,
    0.5,
    1.5,
    2**31,
    10**400,
    16**5000,
    -1e-9,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    datetime.date(2026, 1, 1),
    b"\xff",
]

Path_ = tuple[str | int, ...]


def places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every key and of every entry of a list."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(node: Any, path: Path_) -> Any:
    for part in path:
        node = node[part]
    return node


def change(raw: dict[str, Any], path: Path_, wrong: Any) -> Path_:
    """Let `wrong` stand at `path` of a configuration, take the key away, or misspell it; the path that is wrong now."""
    parent = at(raw, path[:-1])
    if wrong is GONE:
        del parent[path[-1]]
    elif wrong is MISSPELT:
        path = (*path[:-1], f"{path[-1]}x")
        parent[path[-1]] = parent.pop(path[-1][:-1])
    else:
        parent[path[-1]] = wrong
    return path


def faults(shipped: dict[str, Any]) -> Iterator[tuple[Path_, Any]]:
    """Every place of a configuration, with all that it can wrongly become."""
    for path in places(shipped):
        for wrong in WRONG:
            if path[-1] != "kind" or wrong != 16**5000:
                yield path, wrong  # pydantic-core prints a note of its own when it cannot write out the tag of a union
        if isinstance(path[-1], str) and (len(path) < 2 or path[-2] not in NAMED):
            yield path, MISSPELT


def mutations(shipped: dict[str, Any]) -> Iterator[tuple[Path_, Any, dict[str, Any]]]:
    """(path, what stands there now, configuration): each key with each wrong value, missing, and misspelt."""
    for path, wrong in faults(shipped):
        raw = copy.deepcopy(shipped)
        yield change(raw, path, wrong), wrong, raw


def names_key(line: str, path: Path_) -> bool:
    """Whether a message names the key at `path`, or the mapping or list that it is an entry of."""
    return any(str(part) in line for part in path[-2:] if isinstance(part, str))


def shipped(name: str) -> dict[str, Any]:
    """A configuration without fault."""
    written = {"default": Config().dump, "smoke": lambda: yaml.safe_load(SMOKE.read_text()), "every": lambda: EVERY_KEY}
    return written[name]()


@pytest.mark.parametrize("name", ["default", "smoke", "every"])
def test_every_wrong_value_is_refused_by_key(name: str) -> None:
    """What is accepted is allowed by the schema and kept as it is; all else is refused, naming the file and the key."""
    refused = 0
    for path, wrong, raw in mutations(shipped(name)):
        config, message = outcome(lambda raw=raw: check_config(raw, "my.yaml"))
        if message:
            refused += 1
            assert any(names_key(line, path) for line in check_lines(message, "my.yaml: ")), (path, wrong, message)
            continue
        assert wrong is not MISSPELT, path
        if wrong is not GONE:
            kept = at(config.dump(), path)
            assert wrong in ({}, []) or kept == wrong, (path, wrong)
            assert type(kept) is type(wrong) or (type(kept), type(wrong)) == (float, int), (path, wrong)
            assert SCHEMA.is_valid(raw), (path, wrong)
    assert refused > 700


def test_several_faults_are_told_at_once() -> None:
    """Of two to four faults in one configuration, whatever they make of each other, the first to be told is one."""
    chance = random.Random(0)
    for name in ("default", "smoke", "every"):
        known = list(faults(shipped(name)))
        for _ in range(150):
            raw, wrong = copy.deepcopy(shipped(name)), []
            for path, value in sorted(chance.sample(known, chance.randint(2, 4)), key=lambda fault: -len(fault[0])):
                with contextlib.suppress(LookupError):  # what another fault took away
                    wrong.append(change(raw, path, value))
            _, message = outcome(lambda raw=raw: check_config(raw, "my.yaml"))
            line = check_lines(message, "my.yaml: ")[0] if message else ""
            assert any(names_key(line, path) for path in wrong) or not message, (wrong, message)


def test_wrong_files_end_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same through a file and the command line: exit code 2 and nothing but lines about this file."""
    file, tried = tmp_path / "my.yaml", 0
    every = list(mutations(yaml.safe_load(SMOKE.read_text())))
    for path, wrong, raw in random.Random(0).sample(every, 300):
        if wrong == 16**5000:
            continue  # Python cannot write it out
        file.write_text(yaml.safe_dump(raw, allow_unicode=True))
        code = cli.main(["config", "check", str(file)])
        printed = capsys.readouterr().err
        if code == 0:
            continue
        tried += 1
        assert code == 2
        assert any(names_key(line, path) for line in check_lines(printed, f"nspo: error: {file}: ")), (path, printed)
    assert tried >= 200


PAIRS = {target: {"kind": "pairs", "source": ["x.jsonl"], "target": target} for target in ("cost", "reward")}
METHOD = {"objective": "nspo", "learning_rate": 1e-4}
TINY = {
    "wheels": {},
    "general": {"a": {"source": "a.csv"}},
    "harmful": {"source": "b.csv"},
    "harmful_heldout": {},
    "general_heldout": {},
    "gold": {},
    "labels": {},
}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"policy": {"seeds": [0, 1, 0]}}, "policy: seeds: found 0 twice"),
        ({"policy": {"minibatch_size": 64}}, "prompts_per_step x group_size (4 x 8 = 32) must be divisible"),
        ({"policy": {"micro_batch_size": 5}}, "policy: minibatch_size (32) must be divisible by micro_batch_size (5)"),
        (
            {"policy": {"methods": {"a": METHOD | {"kl": 0.1}}}},
            "policy.methods.a.kl: moved to policy.methods.a.loss.kl",
        ),
        ({"policy": {"methods": {"a": METHOD | {"loss": {"kl": -1.0}}}}}, "policy.methods.a.loss.kl: found -1.0"),
        ({"policy": {"methods": {"a": METHOD | {"loss": "dpo"}}}}, "policy.methods.a.loss: found 'dpo', "),
        ({"policy": {"methods": {"a": METHOD | {"objective": ["x"]}}}}, "policy.methods.a.objective: found ['x']"),
        ({"policy": {"methods": {1: METHOD}}}, "policy.methods.1: found 1, expected a valid string"),
        ({"bases": {"rule": "rank", "threshold": 2.5}}, "bases: threshold 2.5 counts directions for rule 'rank'"),
        ({"bases": {"weights": {"mahts": 2.0}}}, "bases.weights.mahts, expected the name of a domain: benign, code"),
        (
            {"bases": {"weights": dict.fromkeys(("maths", "code", "commonsense", "instructions", "benign"), 0.0)}},
            "bases.weights is 0 for every domain",
        ),
        (
            {"activations": {"harmful_samples": 0}},
            "bases.rule 'contrast' compares with harmful inputs, but activations.",
        ),
        ({"activations": {"layers": "model.("}}, "activations.layers: found 'model.(', expected a regular expression"),
        ({"data": {"heldout_fraction": 0.9}}, "data: validation_fraction + heldout_fraction leave nothing"),
        ({"data": {"labels": {}}}, "data.labels holds no set for the cost model"),
        ({"data": {"labels": PAIRS}}, "data.labels holds pairs only for the cost model"),
        (
            {"data": {"labels": {"a": PAIRS["cost"] | {"kind": "ranks"}}}},
            "data.labels.a.kind: expected one of: graded, pairs",
        ),
        ({"data": {"labels": {"a": PAIRS["cost"] | {"response": "x"}}}}, "data.labels.a.response: unknown key"),
        ({"data": {"labels": {"a": PAIRS["cost"] | {"fraction": 0.0}}}}, "data.labels.a.fraction: found 0.0"),
        ({"data": TINY | {"general": {"all": {"source": "a"}}}}, "data: general.all: the name 'all' is reserved"),
        (
            {"data": TINY | {"harmful": {"source": "b", "name": "x"}, "harmful_heldout": {"x": {"source": "c"}}}},
            "data: harmful.name 'x' is a name in harmful_heldout too",
        ),
        ({"data": TINY | {"harmful": {"source": "wheel:x"}}}, "data.harmful.source: source 'wheel:x', expected wheel:"),
        ({"data": TINY | {"harmful": {"source": "tiny:llama"}}}, "data.harmful.source: found 'tiny:llama', expected a"),
        ({"data": {"wheels": {"x==1\n--index-url=http://evil": "0" * 64}}}, "data.wheels.x==1\\n--index-url=http"),
        ({"data": {"wheels": {"x==1": "123"}}}, "data.wheels.x==1: found '123', expected pattern"),
        ({"model": {"source": "tiny:gpt"}}, "model.source: source 'tiny:gpt', expected tiny:llama"),
        (
            {"second_judge": {"encoder": "tiny:llama", "max_tokens": 65}, "evaluation": {"max_new_tokens": 64}},
            "second_judge.max_tokens is 65, expected at most evaluation.max_new_tokens (64)",
        ),
        ({"model": {"source": "wheel:x==1:a"}}, "model.source names the wheel x==1, but data.wheels pins no sha256"),
        ({"runtime": {"results": "results/{method}"}}, "runtime.results: found '{' in the path 'results/{method}'"),
    ],
)
def test_contradictions(raw: dict[str, Any], said: str) -> None:
    """Values that are each allowed but do not fit together are refused before any work."""
    with pytest.raises(UserError) as error:
        check_config(raw, "my.yaml")
    (line,) = (line for line in check_lines(str(error.value), "my.yaml: ") if said in line)
    assert line.startswith(f"my.yaml: {said}") or line.startswith("my.yaml: policy: prompts_per_step")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"policy: {steps: 1}\npolicy: {steps: 2}", "line 2, column 1: found the key 'policy' twice"),
        (b"policy:\n  steps: 1\n  clip: 0.1\n  steps: 2", "line 4, column 3: found the key 'steps' twice"),
        (
            b"policy:\n\tsteps: 1",
            r"line 2, column 1: while scanning for the next token, found character '\t' that cannot start any token",
        ),
        (b"policy: *steps", "line 1, column 9: found undefined alias 'steps'"),
        (b"policy: &a {steps: *a}", "policy.steps: found {'steps': {'steps': {...}}}, expected a valid integer"),
        (b"policy: &a [*a]", "policy: found [[[...]]], expected a mapping"),
        (b"policy: {<<: 3}", "expected a mapping or list of mappings for merging"),
        (b"policy: {steps: 1", "line 1, column 18: while parsing a flow mapping, expected ',' or '}'"),
        (b"policy: !!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
        (b"!!python/name:os.system policy: 1", "could not determine a constructor for the tag"),
        (b"policy: !!timestamp x", "is not valid YAML"),
        (b"policy: !!int ''", "is not valid YAML"),
        (b"policy: 2026-13-45", "month must be in 1..12"),
        (b"policy: !!set {a}", "policy: found {'a'}, expected a mapping"),
        (b"policy: {steps: 2026-01-01}", "policy.steps: found datetime.date(2026, 1, 1), expected a valid integer"),
        (b"policy: {steps: 1" + b"0" * 5000 + b"}", "is not valid YAML: Exceeds the limit"),
        (b"policy: {steps: 0x" + b"f" * 5000 + b"}", "policy.steps: found a number with thousands of digits"),
        (b"[" * 5000, "is not valid YAML"),
        (b"? [policy]\n: 1", "found unhashable key"),
        (b"1: {}", "found the key 1, expected text"),
        (b"yes: {}", "found the key True, expected text"),
        (b"null: {}", "found the key None, expected text"),
        (b"\xfe\xff\xd8\x00", "is not valid YAML"),
        (b"PK\x03\x04\x00", "is not valid YAML"),
        (
            b"policy: {}\n---\npolicy: {}",
            "line 2, column 1: expected a single document in the stream, but found another document",
        ),
        (b"- policy", "found list, expected a mapping"),
        (b"[]", "found list, expected a mapping"),
        (b"false", "found bool, expected a mapping"),
        (b"policy", "found str, expected a mapping"),
        (b"policy:", "policy: found None, expected a mapping of keys to values"),
        (b'"po\\nlicy": 1', "po\\nlicy: unknown key, did you mean 'policy'?"),
        ("\u03c0olicy: {}".encode(), "\u03c0olicy: unknown key, did you mean 'policy'?"),
        (b"policy: {steps: 1:30, cilp: 1}", "line 1, column 17: found '1:30', which YAML 1.1 reads as 90"),
        (b"".join(b"key%d: 1\n" % i for i in range(50)), "and 30 faults more"),
    ],
)
def test_wrong_yaml(text: bytes, said: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file as YAML is told in lines that name the file and, where there is one, the line."""
    file = tmp_path / "my.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert said in "\n".join(check_lines(str(error.value), str(file)))


def test_a_key_may_override_what_is_merged_in(tmp_path: Path) -> None:
    """Anchors and merge keys work; an overridden key is not a key that stands twice. An empty file is the default."""
    (tmp_path / "a.yaml").write_text(
        "reward: &head {max_tokens: 10, l2: 1.0}\ncost:\n  <<: *head\n  l2: 2.0\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "a.yaml")
    assert (config.cost.max_tokens, config.cost.l2, config.reward.l2) == (10, 2.0, 1.0)
    (tmp_path / "b.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "b.yaml") == Config()


def test_repeated_aliases_are_not_written_out(tmp_path: Path) -> None:
    """A file of 200 bytes that stands for 10^9 values is refused at once."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "my.yaml").write_text("\n".join([*rows, "policy: *a8", "bases: {weights: {a: *a8}}"]))
    with pytest.raises(UserError, match="policy: found"):
        load_config(tmp_path / "my.yaml")


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    """A path that cannot be read as a file is refused by name."""
    with pytest.raises(UserError, match=r"cannot be read .*, expected a configuration file"):
        load_config(tmp_path)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.data())
def test_damaged_text_never_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The smoke configuration with bytes flipped, cut out or put in is read or refused, nothing else."""
    text = bytearray(SMOKE.read_bytes())
    start = data.draw(st.integers(0, len(text)))
    text[start : start + data.draw(st.integers(0, 12))] = data.draw(
        st.binary(max_size=6) | st.text("{}[]:-*&!|>%@`'\"#\t\n ", max_size=6).map(str.encode)
    )
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(text)
    _, message = outcome(lambda: load_config(file))
    if message:
        check_lines(message, str(file))


def test_a_wrong_configuration_is_refused_within_two_seconds(tmp_path: Path) -> None:
    """From the start of the process to its message: processor time, which a busy machine does not stretch."""
    (tmp_path / "bad.yaml").write_text("policy: {stepz: 1}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "nspo", "config", "check", str(tmp_path / "bad.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
