"""What the rules read: files behind the sources of a configuration, and which model belongs to which job."""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from nspo.files.sources import Source, repository_name, wheel_folder
from nspo.settings.config import Config
from nspo.settings.judges import AnyJudge
from nspo.settings.types import path_fault

ELSEWHERE = "hub:ORG/NAME@REVISION, or what a storage plugin of Snakemake fetches"
PLUGINS = "expected an installed plugin for it, such as `pip install snakemake-storage-plugin-s3` or -http"
BASE = "base"  # what the model before training is called among the methods
Sources = Mapping[str, list[Source]]


def files_on_disk(section: str, sources: Sources) -> list[str]:
    """The files that a section's sources name by their path, sorted; of a folder all that are in it.

    Raises:
        SystemExit: naming the key whose path does not exist, or cannot be a path in Snakemake.
    """
    found: set[str] = set()
    for key, source in _each(sources):
        if source.kind != "path":
            continue
        path = Path(source.location)
        if not path.exists():
            sys.exit(f"{section}.{key}: {path} does not exist, expected a file or folder, or builtin:, wheel:, hub:")
        for file in (p for p in (path.iterdir() if path.is_dir() else [path]) if p.is_file()):
            if fault := path_fault(str(file)):
                sys.exit(f"{section}.{key}: {fault}")
            found.add(str(file))
    return sorted(found)


def wheels(sources: Sources) -> list[str]:
    """The folder names of the wheels that these sources name, sorted."""
    return sorted({wheel_folder(wheel) for _, source in _each(sources) for wheel in source.wheels})


def repositories(sources: Sources) -> list[str]:
    """The folder names of the repositories of the hub that these sources name, sorted."""
    return sorted({repository_name(source) for _, source in _each(sources) if source.kind == "hub"})


def builtin_hash(section: str, sources: Sources) -> str:
    """16 hex digits over the package's own data files that these sources name: for a parameter, as they are not inputs.

    Raises:
        SystemExit: naming the key whose file the package lacks.
    """
    digest = hashlib.sha256()
    for key, source in sorted(_each(sources), key=lambda entry: entry[1].location):
        if source.kind == "builtin":
            file = files("nspo.data") / "builtin" / source.location
            if not file.is_file():
                sys.exit(f"{section}.{key}: {source.location} does not exist, expected one of {', '.join(builtins())}")
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def builtins() -> list[str]:
    """The names of the data files that the package carries."""
    return sorted(path.name for path in (files("nspo.data") / "builtin").iterdir())


def templates_hash(*packages: str) -> str:
    """16 hex digits over the templates of these packages: for a parameter, like the hash of their code."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((files(package) / "templates").iterdir(), key=lambda path: path.name):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _each(sources: Sources) -> Iterable[tuple[str, Source]]:
    return ((key, source) for key, several in sources.items() for source in several)


def model_source(settings: Config) -> Sources:
    """Where the base model is, and the file of its chat template."""
    templates = map(Source.parse, settings.model.template_files())
    return {"source": [Source.parse(settings.model.source)], "chat_template": [*templates]}


def backbone_source(settings: Config, target: str) -> Sources:
    """Where the model is that the reward or the cost model builds on; none where it is the policy's own."""
    backbone = getattr(settings, target).backbone
    return {"backbone": [Source.parse(backbone)]} if backbone else {}


def encoder_source(settings: Config) -> Sources:
    """Where the encoder of the second judge is; none where there is no such judge."""
    encoder = settings.second_judge.encoder
    return {"encoder": [Source.parse(encoder)]} if encoder else {}


def image_source(settings: Config) -> Sources:
    """The folder of images to collect inputs over, and all folders in it; none where there is none."""
    if (images := settings.activations.images) is None:
        return {}
    inside = sorted(str(path) for path in Path(images).rglob("*") if path.is_dir())
    return {"images": [Source.parse(path) for path in (images, *inside)]}


def bases_source(source: Source) -> Sources:
    """Where `bases.precomputed` is, which must be one file.

    Raises:
        SystemExit: for a folder, or nothing at all.
    """
    if not Path(source.location).is_file():
        found = "is a folder" if Path(source.location).is_dir() else "does not exist"
        sys.exit(f"bases.precomputed: {source.location} {found}, expected a bases file (.safetensors), {ELSEWHERE}")
    return {"precomputed": [source]}


def reward_judge_source(settings: Config) -> Sources:
    """Where the judge is that gives the reward, where it is a model of its own."""
    return judge_sources({"judge": settings.policy.judge}) if settings.policy.judge else {}


def flat(patterns: Iterable[Any]) -> Iterable[str]:
    """Patterns, and the patterns in lists of them."""
    return chain.from_iterable([it] if isinstance(it, str) else it for it in patterns)


def judge_sources(judges: Mapping[str, AnyJudge]) -> Sources:
    """Where the judges are that are models of their own, by name."""
    return {name: [Source.parse(judge.source)] for name, judge in judges.items() if judge.kind != "endpoint"}
