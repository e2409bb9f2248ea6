"""Reports of configurations that YAML, a shell or a file system reads as something else than who wrote them.

yaml/pyyaml#173 and calliope-project/calliope#57 (1e-4 is text), and what stands beside it: keys that stand twice, off
that is false, numbers to the base of 8 or 60, names too long for a disk, names that only case tells apart.
"""

from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.settings.reading import load_config

METHOD = "{objective: nspo, learning_rate: 1.0e-4}"
TRAPS = {
    "policy: {methods: {nspo: {objective: nspo, learning_rate: 1e-4}}}": "YAML 1.1 reads 1e-6 as text: write 1.0e-6",
    "policy: {steps: '4'}": "policy.steps: found '4', expected a valid integer",
    "policy: {steps: 010}": "found '010', which YAML 1.1 reads as 8: write that, or quote the text",
    "policy: {steps: 1:30}": "found '1:30', which YAML 1.1 reads as 90: write that, or quote the text",
    "bases: {threshold: 1:30.5}": "found '1:30.5', which YAML 1.1 reads as 90.5",
    "policy: {steps: yes}": "policy.steps: found True, expected a valid integer",
    "policy: {steps: 4.0}": "policy.steps: found 4.0, expected a valid integer",
    "policy: {steps: 1, steps: 2}": "found the key 'steps' twice",
    "policy:\n  steps: 1\n  'steps': 2": "found the key 'steps' twice",
    "policy:\n\tsteps: 1": "cannot start any token",
    "policy: {steps: 1}\n---\npolicy: {steps: 2}": "another document",
    "reward: &r {l2: 0.1}\npolicy: {<<: *r}": "policy.l2: unknown key",
    "cost: {l2: .nan}": "cost.l2: found nan, expected a finite number",
    "cost: {l2: -0.1}": "cost.l2: found -0.1, expected greater than 0",
    "policy: {temperature: .inf}": "policy.temperature: found inf, expected a finite number",
    f"policy: {{methods: {{off: {METHOD}}}}}": "found False, expected a valid string (YAML 1.1 reads yes, no",
    "data: {general: {no: {source: 'builtin:maths.jsonl'}}}": "put the text in quotes",
    f"policy: {{methods: {{n\u0455po: {METHOD}}}}}": "expected letters, digits, _ and -, up to 100",
    f"policy: {{methods: {{'nspo\u200b': {METHOD}}}}}": "expected letters, digits, _ and -, up to 100",
    f"policy: {{methods: {{'..': {METHOD}}}}}": "expected letters, digits, _ and -, up to 100",
    f"policy: {{methods: {{{'m' * 300}: {METHOD}}}}}": "expected letters, digits, _ and -, up to 100",
    f"policy: {{methods: {{nspo: {METHOD}, NSPO: {METHOD}}}}}": "one folder where case does not count",
    f"runtime: {{results: {'r' * 300}}}": "found a path of 300 bytes, expected at most 2000, and 255 in each name",
    f"runtime: {{results: {'r/' * 1500}r}}": "found a path of 3001 bytes, expected at most 2000",
    'runtime: {results: "a\\uD800"}': "expected Unicode text",
}


@pytest.mark.parametrize(("text", "said"), TRAPS.items(), ids=range(len(TRAPS)))
def test_what_is_read_as_something_else_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """In a line that names the file, and before any work."""
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert said in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "steps"),
    [("policy: {steps: 1_0}", 10), ("policy: {steps: 0x10}", 16), ("policy: {steps: 0}\npolicy: {steps: 1}", None)],
)
def test_other_numbers_are_what_they_say(text: str, steps: int | None, tmp_path: Path) -> None:
    """Underscores between digits, and hexadecimal numbers, mean one thing to everybody."""
    path = tmp_path / "c.yaml"
    path.write_text(f"\ufeff{text}\n", encoding="utf-8")
    if steps is None:
        with pytest.raises(UserError, match="twice"):
            load_config(path)
    else:
        assert load_config(path).policy.steps == steps
