"""TensorBoard and trackio through transformers' own integrations; neither unless `runtime.trackers` names it.

They are shown the rows of `training.parquet`, and the probes. TensorBoard's files lie in the working folder while a
policy trains and in the policy's folder afterwards; trackio keeps its own database on this machine. Nothing leaves it,
unless the user's environment tells trackio to (`TRACKIO_SPACE_ID`, `TRACKIO_SERVER_URL`).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from nspo.errors import UserError
from nspo.settings.runtime import Tracker

TENSORBOARD_FOLDER = "tensorboard"


def check_trackers(names: Sequence[Tracker]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: naming the package.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"runtime.trackers: {name} is not installed: pip install {name}, or leave it out")


def tracker_callbacks(names: Sequence[Tracker], work: Path, done: int) -> list[TrainerCallback]:
    """The callbacks that write to `names`, to be called after the one that keeps the log.

    Args:
        done: the update that the run resumes from; TensorBoard forgets what an interrupted run showed of later ones.
    """
    found: list[TrainerCallback] = []
    if "tensorboard" in names and PartialState().is_main_process:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        found.append(TensorBoardCallback(SummaryWriter(str(work / TENSORBOARD_FOLDER), purge_step=done + 1)))
    if "trackio" in names:
        from transformers.integrations import TrackioCallback

        found.append(TrackioCallback())
    return found
