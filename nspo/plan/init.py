"""A first configuration for a model, data and machine of yours, with its plan beneath. Command: `nspo init --model M`.

Nothing is downloaded: what a name alone does not tell (a revision, the size of the model) is left to be filled in, and
said so.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from nspo.data.readers import READERS, read_file
from nspo.errors import UserError, first_line
from nspo.files.atomic import atomic_path
from nspo.files.sources import HUB, Source
from nspo.plan.plan import MACHINES, stages
from nspo.plan.shapes import Shape, shape_of
from nspo.plan.show import rows
from nspo.run.progress import say
from nspo.run.tables import table
from nspo.settings.config import Config
from nspo.settings.reading import check_config

# The commits that the paper's configurations pin.
PINNED = {
    "Qwen/Qwen2.5-7B-Instruct": "a09a35458c702b33eeacc393d103063234e8bc28",
    "meta-llama/Meta-Llama-3-8B-Instruct": "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
    "PKU-Alignment/PKU-SafeRLHF": "9421ffafec3fa40a1f1a7d567b4d525079477ecb",
}
SAFE_RLHF = {"prompt", "response_0", "response_1", "is_response_0_safe", "safer_response_id"}
PROMPTS = ("prompt", "instruction", "question", "goal", "query", "behavior", "text", "value")
LARGE = 1e9  # weights: from here on the paper's learning rate, and activations are computed again
ANSWERS = 256  # per update on GPUs, about


def write_first_config(model: str, data: str | None, gpus: int | None, out: Path | None) -> None:
    """Write a commented configuration to `out` or the screen, with the plan beneath it.

    Args:
        model: a folder, a source, or ORG/NAME on the hub.
        data: harmful prompts: a file, a source, or ORG/NAME on the hub; by default the default's.
        gpus: of one machine; 0, the default, means the CPU.

    Raises:
        UserError: no such model or data, no column of prompts, a negative number of GPUs, or a file that is there.
    """
    gpus = gpus or 0
    if gpus < 0:
        raise UserError(f"--gpus {gpus}", expected="0 for the CPU, or how many GPUs the machine has")
    if out and out.exists():
        raise UserError(f"{out} is there", change="choose another --out, or delete it")
    shape = _shape(source := _source(model, "--model"))
    text = _text(model, source, data, gpus, shape)
    config = check_config(yaml.safe_load(text), "nspo init")
    text += _plan(config, shape, "h100" if gpus else "cpu")
    if not out:
        sys.stdout.write(text)
        return
    with atomic_path(out) as scratch:
        scratch.write_text(text, encoding="utf-8")
    say(f"{out}: written. Next: nspo config check {shlex.quote(str(out))}")


def _text(typed: str, model: Source, data: str | None, gpus: int, shape: Shape | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    writer = Environment(
        loader=PackageLoader("nspo", "plan"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    large = bool(gpus) if shape is None else shape.weights >= LARGE
    rounds = max(1, ANSWERS // 8 // max(gpus, 1))
    minibatch = 8 * max(gpus, 1) * rounds
    command = ["nspo init --model", shlex.quote(typed), *(["--data", shlex.quote(data)] if data else [])]
    values = {
        "command": " ".join([*command, "--gpus", str(gpus)]),
        "results": "results/" + _plain(_spelt(model)),
        "model": _yaml(_spelt(model)),
        "unpinned_model": model.kind == "hub" and not model.revision,
        "layers": round(shape.blocks / 2) if shape else 0,
        "rate": "1.0e-06" if large else "1.0e-04",
        "gpus": gpus,
        "large": large,
        "minibatch": minibatch,
        "prompts": 2 * minibatch // 8,
    }
    return writer.get_template("init.yaml.j2").render(**values, **_data(data))


def _data(data: str | None) -> dict[str, Any]:
    """What the template says of the harmful prompts."""
    if data is None:
        default = Config().data.harmful
        facts = {"data": default.source, "prompt": default.prompt, "name": default.name}
        return {**facts, "fraction": 1.0, "paired": False, "unpinned_data": False}
    source = _source(data, "--data")
    prompt, paired = "prompt", source.location == "PKU-Alignment/PKU-SafeRLHF"
    if source.kind == "path":
        columns = _columns(Path(source.location))
        paired = columns >= SAFE_RLHF
        found = [name for name in PROMPTS if name in columns]
        if not found:
            names = ", ".join(sorted(columns))
            raise UserError(f"--data {data}: found the columns {names}", expected=f"one of {', '.join(PROMPTS)}")
        prompt = found[0]
    return {
        "data": _yaml(_spelt(source)),
        "prompt": prompt,
        "name": _plain(_spelt(source)),
        "fraction": 0.4 if paired and source.kind == "hub" else 1.0,  # the paper's share of PKU-SafeRLHF
        "paired": paired,
        "unpinned_data": source.kind == "hub" and not source.revision,
    }


def _columns(path: Path) -> set[str]:
    found = read_file(path)
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise UserError(f"--data {path}", expected="a file with one prompt a row")
    return set(map(str, found[0]))


def _source(text: str, flag: str) -> Source:
    """A source, where the hub may be named by ORG/NAME alone; what is pinned by the paper's runs gets that revision.

    Raises:
        UserError: for a path where nothing is.
    """
    source = Source.parse(text)
    if source.kind == "path" and not Path(text).exists():
        if not HUB.fullmatch(text) or text.startswith(".") or Path(text).suffix in READERS:
            raise UserError(f"{flag} {text}: nothing is there", expected="a path, or ORG/NAME[@REVISION] on the hub")
        source = Source.parse(f"hub:{text}")
    if source.kind == "hub" and not source.revision:
        return Source("hub", source.location, PINNED.get(source.location))
    return source


def _spelt(source: Source) -> str:
    """The source as a configuration names it."""
    if source.kind == "wheel":
        return "wheel:" + "+".join(f"{requirement}:{member}" for requirement, member in source.parts)
    name = source.location + (f"@{source.revision}" if source.revision else "")
    return name if source.kind in ("path", "storage") else f"{source.kind}:{name}"


def _plain(name: str) -> str:
    """The last part of a name without its revision, as a folder and a label may be called."""
    last = name.partition("@")[0].rpartition("/")[2].removesuffix(".gz")
    last = last.removesuffix(Path(last).suffix) if Path(last).suffix in READERS else last
    return re.sub(r"[^a-z0-9._]+", "-", last.lower()).strip("-.") or "mine"


def _yaml(text: str) -> str:
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _shape(model: Source) -> Shape | None:
    """The sizes of the model, where they can be had without a download."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    place = _spelt(model)
    if model.kind == "hub":
        try:
            cached = try_to_load_from_cache(model.location, "config.json", revision=model.revision)
        except HFValidationError as error:
            raise UserError(f"--model: {first_line(error)}") from error
        place = cached if isinstance(cached, str) else place
    elif model.kind == "path" and not (Path(model.location) / "config.json").is_file():
        raise UserError(f"--model {model.location}: no config.json there", expected="the folder of a model")
    try:
        return shape_of(place)
    except UserError:
        if model.kind == "path":
            raise
        return None


def _plan(config: Config, shape: Shape | None, machine: str) -> str:
    """The plan as comments."""
    if shape is None:
        found = "The plan needs the model's size, which its name does not tell: nspo plan --config FILE --model FOLDER"
    else:
        costs = stages(config, shape, MACHINES[machine])
        found = f"The plan (nspo plan --machine {machine}), right to a factor of two or three:\n"
        found += table(list(rows(costs, MACHINES[machine])))
    return "\n" + "".join(f"# {line}".rstrip() + "\n" for line in found.splitlines())
