"""Null-space bases of SmolLM2-135M-Instruct by three rules: `NullSpaceBases.load(nspo_gallery.path("contrast"))`."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """What there is."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def path(name: str) -> Path:
    """The file of the bases `name`.

    Raises:
        KeyError: for another name than those of `names`.
    """
    if name not in names():
        raise KeyError(f"the gallery has no {name!r}, expected one of {', '.join(names())}")
    return FOLDER / f"{name}.safetensors"
