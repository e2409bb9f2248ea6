"""What the benchmarks share: rivals timed side by side in one process, their ratio, and one JSON file with a table.

Every figure is a ratio of two things measured in the same run: the rivals take turns, so that whatever else the machine
does meets them alike. The first turn of each is not counted.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nspo.files.manifest import write_json
from nspo.run.progress import say
from nspo.run.tables import table


def take_turns(
    rivals: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every rival in every round; all rivals run once per round, in the given order, after one warm-up.

    Args:
        clock: `time.process_time` counts the seconds of the processor, on a machine that others use too.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> dict[str, float]:
    """Median, least and greatest of the round-by-round ratios of `name` to `to`."""
    ratios = [a / b for a, b in zip(times[name], times[to], strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def conclude(name: str, out: Path, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print `rows` as a table and write them with `facts` and the machine's identity to `out/NAME.json`."""
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(out / f"{name}.json", {"rows": list(rows), "machine": machine, **facts})
    say(table(rows))
    for key, value in facts.items():
        say(f"{key}: {value}")
