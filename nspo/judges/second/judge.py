"""The second judge at work: is the answer unsafe, and is it on the topic of its prompt?

It gave no reward: its features are sentence embeddings of the answer, which the cost model never sees, and its labels
are people's judgements that neither reward model learnt from (`nspo.judges.second.stage`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, check_fingerprints, check_manifest, read_json
from nspo.files.tensors import load_tensors
from nspo.judges.second.encoder import Encoder
from nspo.judges.second.kinds import Kind, kind_of

NAME = "second_judge"
KIND = "second_judge"
HEAD = "head.safetensors"


class Reading(NamedTuple):
    """What the judge finds in N answers."""

    verdicts: list[float]  # log-odds of being harmful: above zero means unsafe
    closeness: list[float]  # cosine of the embeddings of prompt and answer


class SecondJudge:
    """Is the answer unsafe, by a read-out of its sentence embedding?"""

    name = NAME

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        """Load what the stage `train-second-judge` wrote.

        Raises:
            UserError: the folder holds no such judge, or one that was changed or damaged since it was written.
        """
        manifest = read_json(folder / MANIFEST_NAME)
        check_manifest(manifest, KIND, folder)
        check_fingerprints(folder, manifest["model"])
        settings = manifest["settings"]
        self.near: float = manifest["topic"]["threshold"]
        self.identity: dict[str, Any] = {key: manifest[key] for key in ("model", "labels", "encoder")}
        self.encoder = Encoder.load(folder, f"{folder}", settings["max_tokens"], settings["layer"], device)
        self.head = load_tensors(folder / HEAD, KIND)[1]

    def read(self, prompts: Sequence[str], answers: Sequence[str]) -> Reading:
        """Verdicts and closeness of the answers; shows progress.

        Raises:
            UserError: when none of the verdicts is a finite number.
        """
        asked = self.encoder.embed(prompts, "prompts to the second judge")
        said = self.encoder.embed(answers, "answers to the second judge")
        verdicts = (said.words @ self.head["weight"] + self.head["bias"]).tolist()
        if verdicts and not any(value == value for value in verdicts):
            raise UserError("none of the verdicts of the second judge is a number: train it again")
        return Reading(verdicts, (asked.meaning * said.meaning).sum(-1).tolist())

    def kinds(self, answers: Sequence[str], refused: Sequence[bool], closeness: Sequence[float]) -> list[Kind]:
        """The kind of each answer (`nspo.judges.second.kinds`)."""
        return [kind_of(*row, self.near) for row in zip(answers, refused, closeness, strict=True)]

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """As `Judge.verdicts`: the log-odds of being harmful."""
        return self.read(prompts, answers).verdicts
