"""What rules ask a cluster for follows the model, the device and the processes; time grows only where work is lost."""

from typing import Any

import pytest

from nspo.settings.config import Config, ModelSettings
from nspo.settings.runtime import RuntimeSettings
from nspo.workflow.launch import gpus, launcher
from nspo.workflow.resources import RESUMING, requests


def asked(rule: str, attempt: int = 1, **sections: Any) -> tuple[int, int]:
    """(mem_mb, runtime in minutes) of a rule."""
    found = requests(Config(**sections))(rule)
    return found["mem_mb"](None, attempt), found["runtime"](None, attempt)


def model(name: str) -> dict[str, ModelSettings]:
    """The section of a model on the hub."""
    return {"model": ModelSettings(source=f"hub:org/{name}@main")}


@pytest.mark.parametrize("rule", ["train_policy", "collect_activations", "evaluate", "certify", "compute_bases"])
def test_a_larger_model_asks_for_more(rule: str) -> None:
    """Of memory, and never for less time; 70B more than a host of 64 GB has."""
    small, middle, large = (asked(rule, **model(name)) for name in ("SmolLM2-135M", "Qwen2.5-7B", "Llama-3-70B"))
    assert small[0] < middle[0] < large[0]
    assert small[1] <= middle[1] <= large[1]


def test_certifying_70b_has_the_hours_it_takes() -> None:
    """Fifteen hours were measured for one block times eighty."""
    assert asked("certify", **model("Llama-3-70B"))[1] > 15 * 60


def test_a_name_tells_the_size() -> None:
    """A model that nspo does not know is taken for the known one of about its size."""
    assert asked("evaluate", **model("Other-72B-it")) == asked("evaluate", **model("Llama-3-70B"))
    assert asked("evaluate", **model("Other-360M")) < asked("evaluate", **model("Other-8b-chat"))


def test_a_retry_asks_for_more_memory_and_time_only_where_work_is_lost() -> None:
    """Three times the memory at the third attempt."""
    for rule in ("prepare_model", "train_cost", "make_pairs", "attribute", *sorted(RESUMING)):
        first, third = asked(rule), asked(rule, attempt=3)
        assert third[0] == 3 * first[0]
        assert third[1] == (1 if rule in RESUMING else 3) * first[1]


def test_gpus_follow_the_processes() -> None:
    """One each; none on a CPU."""
    assert gpus(Config(), 4) == 4
    assert gpus(Config(runtime=RuntimeSettings(device="cpu")), 4) == 0


def test_the_launcher_says_how_a_stage_starts() -> None:
    """Alone; claiming devices; several processes that share the threads; split as a configuration says."""
    assert launcher(1, 8) == "python -m"
    assert launcher(1, 8, gpus=2) == "python -m nspo.run.gpus 2 python -m"
    several = launcher(4, 8, "with space/zero2.yaml", 4)
    assert several.startswith("python -m nspo.run.gpus 4 accelerate launch --config_file 'with space/zero2.yaml' ")
    assert "--num_processes 4 --num_cpu_threads_per_process 2 " in several
