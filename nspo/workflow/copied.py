"""Results that were copied without Snakemake's memory of them, which it would make again and remove first."""

from base64 import urlsafe_b64encode
from pathlib import Path

from nspo.run.progress import say

LONGEST = 250  # bytes of a name that Snakemake keeps in one piece


def warn_if_copied(results: Path, snakemake: Path) -> None:
    """Say, before anything is removed, that the folder `snakemake` knows nothing of the model in `results`.

    Snakemake writes down what it made in `.snakemake`, below the folder that it runs in. Without it every output counts
    as made by unknown code, is planned again, and is removed when its job starts.
    """
    made = results / "model"
    name = urlsafe_b64encode(str(made).encode()).decode()
    if not made.is_dir() or len(name) > LONGEST or (snakemake / "metadata" / name).is_file():
        return
    say(
        f"warning: {results} was made elsewhere: {snakemake} has no record of it, so its stages are made again, and "
        "what is there is removed as they start. To keep it, stop now and run the same command once with --touch; "
        f"`nspo status {results}` says what it holds"
    )
