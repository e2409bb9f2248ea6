"""Which code counts as a stage's: all that it imports from this package, at any depth, and only what can shape it."""

import shutil
from pathlib import Path

import pytest

from nspo.run.stage_code import PACKAGE, code_hash, stage_modules


def test_imports_are_followed(tmp_path: Path) -> None:
    """Imports of imports, of submodules, and inside functions count; errors and other packages do not."""
    files = {
        "__init__.py": "from nspo.unused import x",
        "errors.py": "",
        "stage.py": "from nspo.errors import UserError\nfrom nspo.part import tool\ndef f(): import nspo.late\n",
        "part/__init__.py": "from nspo.deep import x",
        "part/tool.py": "",
        "deep.py": "import nspo.stage",
        "late.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = set(stage_modules("nspo.stage", package=tmp_path))
    assert found == {"nspo.stage", "nspo.part", "nspo.part.tool", "nspo.deep", "nspo.late"}


STAGES = {
    "activations": "nspo.activations.stage",
    "bases": "nspo.bases.stage",
    "preference": "nspo.preference.stage",
    "pairs": "nspo.policy.pairs.stage",
    "policy": "nspo.policy.stage",
    "evaluation": "nspo.evaluation.stage",
    "report": "nspo.report.stage",
}
EDITS = {  # file, a line added to its end: the stages that run again
    "evaluation/sandbox/jail.py": ("NEW = 1", {"evaluation"}),
    "evaluation/sandbox/programs.py": ("NEW = 1", {"evaluation"}),
    "evaluation/checks.py": ("NEW = 1", {"evaluation"}),
    "data/labels.py": ("NEW = 1", set()),
    "data/readers.py": ("NEW = 1", {"activations"}),  # whose prompts with images are read from their own file
    "nullspace/projection.py": ("NEW = 1", {"policy"}),
    "nullspace/spectra.py": ("NEW = 1", {"bases", "policy"}),
    "models/generation.py": ("NEW = 1", {"activations", "preference", "pairs", "policy", "evaluation", "report"}),
    "policy/stage.py": ("# a comment", set()),
    "errors.py": ("NEW = 1", set()),
    "run/progress.py": ("NEW = 1", set()),
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_reruns_the_stages_that_it_may_change(file: str, tmp_path: Path) -> None:
    """No more, and no less: a sandbox retrains nothing, the projection retrains every policy."""
    edited = tmp_path / "nspo"
    shutil.copytree(PACKAGE, edited, ignore=shutil.ignore_patterns("__pycache__"))
    line, expected = EDITS[file]
    with (edited / file).open("a", encoding="utf-8") as text:
        text.write(f"\n{line}\n")
    changed = {name for name, module in STAGES.items() if code_hash(module) != code_hash(module, package=edited)}
    assert changed == expected


SETTINGS = '''"""Settings."""
class Method(Section):
    """A method."""
    exact: ClassVar[bool] = True
    rate: float = Field(1.0, description="how fast")
    @property
    def constrained(self) -> bool:
        """Whether."""
        return self.constraint == "exact"
    @model_validator(mode="after")
    def _fits(self):
        return self
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("how fast", "how quickly", False),  # what a setting means
        ("1.0", "2.0", False),  # its default, which reaches the stage as a flag
        ("return self\n", "return self or None\n", False),  # a check
        ('"""Whether."""', '"""If."""', False),
        ('== "exact"', '!= "none"', True),  # what is constrained
        ("= True", "= False", True),  # the same, as a fact about the class
    ],
)
def test_of_settings_only_what_computes_counts(old: str, new: str, counts: bool, tmp_path: Path) -> None:
    """A change of what is constrained retrains; of a text, a default or a check does not."""
    hashes = []
    for place, text in (("a", SETTINGS), ("b", SETTINGS.replace(old, new))):
        (tmp_path / place / "settings").mkdir(parents=True)
        (tmp_path / place / "settings" / "policy.py").write_text(text)
        (tmp_path / place / "stage.py").write_text("from nspo.settings.policy import Method")
        hashes.append(code_hash("nspo.stage", package=tmp_path / place))
    assert SETTINGS.replace(old, new) != SETTINGS
    assert (hashes[0] != hashes[1]) == counts
