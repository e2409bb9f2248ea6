"""Settings of how stages run, which change nothing that they make."""

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat

from nspo.settings.types import Count, PathText, Section, Whole


class VLLMSettings(Section):
    """Where vLLM answers, for `policy.rollout`, `evaluation.engine` and `benchmarks.engine`."""

    server: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="For rollouts: address of a running `vllm serve`; null: vLLM runs inside the training processes, "
        "on their GPUs.",
    )
    gpu_memory: float = Field(
        0.3, gt=0, lt=1, description="Share of a GPU's memory for vLLM inside a stage: weights and cache."
    )
    tensor_parallel: Count = Field(
        1, description="GPUs over which vLLM inside a stage splits the model; divides the training processes."
    )


class RequestSettings(Section):
    """How judges at endpoints are asked."""

    concurrency: Count = Field(8, description="Requests under way at once.")
    per_minute: Whole = Field(0, description="Most requests a minute, evenly spaced, repeated ones included; 0: any.")
    timeout: PositiveFloat = Field(60.0, description="Seconds to wait for a reply.")
    retries: int = Field(
        6, ge=0, le=1000, description="Further tries after a timeout, a lost connection, or status 408, 409, 429, 5xx."
    )


def _plain(folder: str) -> str:
    """Without `./` and double slashes, of which Snakemake would make other files."""
    return str(PurePath(folder))


Tracker = Literal["tensorboard", "trackio"]


class RuntimeSettings(Section):
    """How stages run, not what they make: changing these reruns nothing."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where tensors live; auto takes a GPU when there is one."
    )
    processes: Count = Field(
        1, description="Processes that collect activations, one per GPU (`accelerate launch`); the store is the same."
    )
    log_every: Count = Field(1, description="Steps between log lines.")
    recompute_activations: bool = Field(
        False,
        description="While policies train, keep fewer activations and compute them again in the backward pass "
        "(gradient checkpointing): less memory, about a third more time. Large models need it.",
    )
    requests: RequestSettings = RequestSettings()
    vllm: VLLMSettings = VLLMSettings()
    trackers: list[Tracker] = Field(
        [], description="Also show the training of policies in these: tensorboard, trackio (each a package to install)."
    )
    results: Annotated[PathText, AfterValidator(_plain)] = Field(
        "results", description="Folder of all outputs; give every configuration its own."
    )
    workdir: str = Field(
        "results/.work",
        exclude=True,
        description="Scratch folder for what lets an interrupted stage resume; the workflow uses RESULTS/.work.",
    )
