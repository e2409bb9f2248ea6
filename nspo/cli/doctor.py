"""What a folder of results holds: which artifacts are whole, what made them, and which no longer fit together.

`nspo status RESULTS` reads what every artifact says of itself. `nspo doctor RESULTS` also recomputes what is cheap:
fingerprints of weights, checksums of tables, counts, scores from the answers, and the leakage of the weights on disk.
Both print a table, and end with status 1 where something is not whole.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nspo.errors import UserError, first_line
from nspo.files.manifest import MANIFEST_NAME, check_fingerprints, check_made_with, fingerprint_files, read_json
from nspo.files.tables import read_table, table_manifest
from nspo.files.tensors import load_tensors, read_tensor_manifest
from nspo.run.tables import table

Manifest = dict[str, Any]
LEAKAGE = 1e-6  # how far the leakage that is measured again may lie from the certificate's


@dataclass
class Artifact:
    """One artifact: where it lies, what it says of itself, and what was found wrong or worth knowing."""

    path: Path
    manifest: Manifest
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder that it is, or lies in."""
        return self.path if self.path.is_dir() else self.path.parent


class Results:
    """A folder of results, and those of its parts that other artifacts were made with."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def model(self) -> dict[str, Any] | None:
        """Fingerprints of the base model, None where it is not here."""
        path = self.root / "model" / MANIFEST_NAME
        return {"weights": read_json(path)["model"]["weights"]} if path.is_file() else None

    @cached_property
    def bases(self) -> Path | None:
        """The file of the bases, None where it is not here."""
        found = (self.root / "bases" / name for name in ("bases.safetensors", "fetched.safetensors"))
        return next((path for path in found if path.is_file()), None)

    def policy(self, manifest: Mapping[str, Any]) -> Path:
        """The folder of the model that an artifact is about: the policy where safety is matched, else as trained."""
        run = Path(str(manifest.get("method")), f"seed{manifest.get('seed')}")
        matched = self.root / "matched" / run
        return matched if matched.is_dir() else self.root / "policy" / run


def show_status(results: Path) -> None:
    """Print what `results` holds and what made it."""
    _show(results, examine(results, deep=False))


def show_doctor(results: Path) -> None:
    """Print what `results` holds, after recomputing what is cheap."""
    _show(results, examine(results, deep=True))


def examine(results: Path, deep: bool) -> list[Artifact]:
    """Every artifact in a folder of results, with its faults.

    Args:
        deep: recompute what is cheap; else believe what the artifacts say of themselves.

    Raises:
        UserError: when there is no such folder, or nothing in it.
    """
    if not results.is_dir():
        raise UserError(f"{results} does not exist", expected="a folder of results (`runtime.results`)")
    here = Results(results)
    found = list(_artifacts(results))
    if not found:
        raise UserError(f"{results} holds no artifacts", expected="a folder of results (`runtime.results`)")
    for artifact in found:
        checks = [INPUTS.get(kind_of(artifact)), DEEP.get(kind_of(artifact)) if deep else None]
        for check in checks:
            if check is None or artifact.faults:
                continue
            try:
                check(artifact, here)
            except UserError as error:
                artifact.faults.append(str(error))
            except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
                artifact.faults.append(f"cannot be examined ({type(error).__name__}: {first_line(error)})")
    return found


def kind_of(artifact: Artifact) -> str:
    """What the artifact calls itself; `table` for the logs beside a policy."""
    return str(artifact.manifest.get("kind", "table"))


def _artifacts(folder: Path) -> Iterator[Artifact]:
    """Everything below a folder that is an artifact by itself, in order of its path."""
    whole = (folder / MANIFEST_NAME).is_file()  # a model, a store of activations, a wheel
    if whole:
        artifact = _read(folder, lambda path: _object(read_json(path / MANIFEST_NAME)))
        yield artifact
        if kind_of(artifact) == "activations":
            return
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.suffix == ".parquet" and path.is_file():
            yield _read(path, table_manifest)
        elif path.is_dir() and not whole:
            yield from _artifacts(path)
        elif path.suffix == ".safetensors" and not whole:
            yield _read(path, lambda file: read_tensor_manifest(file, "bases"))
        elif path.suffix == ".json" and not whole:
            found = _read(path, lambda file: _object(read_json(file)))
            if found.faults or "kind" in found.manifest:
                yield found


def _read(path: Path, manifest: Callable[[Path], Manifest]) -> Artifact:
    try:
        return Artifact(path, manifest(path))
    except UserError as error:
        return Artifact(path, {}, [str(error)])


def _object(value: Any) -> Manifest:
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------- what it was made with


def _of_model(artifact: Artifact, here: Results) -> None:
    """Check that the base model which the artifact names is the one in these results."""
    made_with = artifact.manifest.get("base") or artifact.manifest.get("model") or {}
    if isinstance(artifact.manifest.get("model"), dict) and "base" in artifact.manifest["model"]:
        made_with = artifact.manifest["model"]["base"]
    if here.model and isinstance(made_with, dict) and "weights" in made_with:
        check_made_with(made_with, here.model, artifact.path, "make it again for this model")


def _of_policy(artifact: Artifact, here: Results) -> None:
    """Check that a certificate, an evaluation or an attribution is about the policy in these results."""
    _of_model(artifact, here)
    manifest = artifact.manifest
    tuned = manifest.get("tuned") or manifest.get("policy")
    folder = here.policy(manifest)
    if tuned and (folder / MANIFEST_NAME).is_file():
        there = read_json(folder / MANIFEST_NAME)["tuned"]
        check_made_with(tuned, {"weights": there["weights"]}, artifact.path, "make it again for this policy")
    _of_files(artifact, here)


def _of_files(artifact: Artifact, here: Results) -> None:
    """Check that the files which the artifact names by fingerprint are those in these results."""
    manifest = artifact.manifest
    seed = manifest.get("seed")
    files = {
        "prompts": here.root / "prompts.parquet",
        "labels": here.root / "labels.parquet",
        "pairs": here.root / "pairs" / f"seed{seed}.parquet",
    }
    if kind_of(artifact) == "policy" and here.bases:
        files["bases"] = here.bases
    there = {
        name: fingerprint_files([path])
        for name, path in files.items()
        if isinstance(manifest.get(name), str) and path.is_file()
    }
    check_made_with(manifest, there, artifact.path, "make it again: the workflow does, as its inputs have changed")
    for name in ("reward", "cost"):
        path = here.root / name / MANIFEST_NAME
        if isinstance(manifest.get(name), dict) and path.is_file():
            now = read_json(path)
            check_made_with(manifest[name], {"model": now["model"]}, artifact.path, f"make it again with this {name}")


def _of_policy_inputs(artifact: Artifact, here: Results) -> None:
    _of_model(artifact, here)
    _of_files(artifact, here)


def _of_preference(artifact: Artifact, here: Results) -> None:
    if not artifact.manifest["settings"].get("backbone"):
        _of_model(artifact, here)
    _of_files(artifact, here)


# ------------------------------------------------------------------------------------------- recomputed


def _weights(key: str) -> Callable[[Artifact, Results], None]:
    def check(artifact: Artifact, here: Results) -> None:
        if artifact.path.is_dir():  # the metrics of its training carry the same manifest
            check_fingerprints(artifact.folder, artifact.manifest[key])

    return check


def _tensors(artifact: Artifact, here: Results) -> None:
    load_tensors(artifact.path, "bases")


def _rows(artifact: Artifact, here: Results) -> None:
    """Check that every page matches its checksum, and that there are as many rows as were written."""
    rows = read_table(artifact.path)
    counted = artifact.manifest.get("rows", artifact.manifest.get("pairs") if kind_of(artifact) == "pairs" else None)
    if isinstance(counted, int) and counted != len(rows):
        artifact.faults.append(f"{artifact.path}: {len(rows)} rows, its manifest says {counted}: make it again")


def _store(artifact: Artifact, here: Results) -> None:
    """Check that every file is there, and that every second moment can be read to its end."""
    from nspo.activations.store import ActivationStore

    store = ActivationStore(artifact.path)
    for site in store.sites:
        for split in ("basis", "validation"):
            store.gram(site, split)


def _scores(artifact: Artifact, here: Results) -> None:
    """Check that the scores are those of the answers beside them; count the verdicts that failed."""
    from nspo.evaluation.benchmarks.stage import benchmark_scores
    from nspo.evaluation.scores import compute_scores

    manifest = artifact.manifest
    rows = read_table(artifact.path.with_name("responses.parquet"))
    judged = [name for name in manifest["judges"] if f"judge_{name}" in rows[0]]
    if kind_of(artifact) == "metrics":
        scores = compute_scores(rows, manifest["settings"]["first_tokens"], judged)
    else:
        name = manifest["benchmark"]["name"]
        scores = benchmark_scores(name, rows, judged, "cost_model" in manifest["judges"])
    for made, again in zip(manifest["scores"], scores, strict=True):
        if not _alike(made["value"], again["value"]) or made["n"] != again["n"]:
            told = f"{made['axis']} {made['name']} of {made['domain']}: {made['value']}"
            artifact.faults.append(f"{artifact.path}: {told}, its answers give {again['value']}: evaluate again")
            break
    failed: dict[str, int] = {}
    for score in manifest["scores"]:
        if score.get("failures") and not score.get("category"):
            failed[score["judge"]] = failed.get(score["judge"], 0) + score["failures"]
            if score["failures"] == score["n"]:
                artifact.faults.append(f"{artifact.path}: every verdict of {score['judge']} failed: evaluate again")
    artifact.notes += [f"{count} failed verdicts of {judge}" for judge, count in sorted(failed.items())]


def _leakage(artifact: Artifact, here: Results) -> None:
    """Check that the weights on disk leak as much as the certificate says."""
    from nspo.certify.certificate import verify

    policy, base = here.policy(artifact.manifest), here.root / "model"
    if here.bases is None or not (policy / MANIFEST_NAME).is_file() or not base.is_dir():
        artifact.notes.append("not measured again: bases or models are not here")
        return
    again = verify(base, policy, here.bases)
    worst = 0.0
    for layer, made in artifact.manifest["layers"].items():
        found = again["layers"][layer]["leakage_basis"]
        worst = max(worst, found)
        if not abs(found - made["leakage_basis"]) <= LEAKAGE + 0.01 * made["leakage_basis"]:
            told = f"{layer} leaks {made['leakage_basis']:.3g}, the weights on disk {found:.3g}"
            artifact.faults.append(f"{artifact.path}: {told}: certify again")
            return
    artifact.notes.append(f"largest leakage on disk {worst:.2g}")


def _alike(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


INPUTS: dict[str, Callable[[Artifact, Results], None]] = {
    "activations": _of_model,
    "bases": _of_model,
    "preference_model": _of_preference,
    "second_judge": _of_files,
    "policy": _of_policy_inputs,
    "pairs": _of_policy_inputs,
    "responses": _of_policy,
    "metrics": _of_policy,
    "certificate": _of_policy,
    "attribution": _of_policy,
}
DEEP: dict[str, Callable[[Artifact, Results], None]] = {
    "model": _weights("model"),
    "preference_model": _weights("model"),
    "second_judge": _weights("model"),
    "policy": _weights("tuned"),
    "activations": _store,
    "bases": _tensors,
    "metrics": _scores,
    "benchmark": lambda artifact, here: (_scores if artifact.path.suffix == ".json" else _rows)(artifact, here),
    "certificate": _leakage,
    **dict.fromkeys(("prompts", "labels", "pairs", "responses", "table"), _rows),
}


def _show(results: Path, found: list[Artifact]) -> None:
    rows = [
        {
            "artifact": str(artifact.path.relative_to(results)),
            "kind": kind_of(artifact),
            "made by": f"nspo {artifact.manifest['nspo_version']}" if "nspo_version" in artifact.manifest else None,
            "state": "; ".join(artifact.faults) or ", ".join(["whole", *artifact.notes]),
        }
        for artifact in found
    ]
    sys.stdout.write(table(rows) + "\n")
    if broken := sum(bool(artifact.faults) for artifact in found):
        sys.stdout.write(f"\n{broken} of {len(found)} are not whole\n")
        raise SystemExit(1)
