"""Results that were copied without Snakemake's records of them: it would remove them and make them again."""

from base64 import urlsafe_b64encode
from pathlib import Path

from nspo.run.progress import say

LONGEST = 100  # characters of a name of which Snakemake surely keeps the start in one piece


def warn_if_copied(results: Path, snakemake: Path) -> None:
    """Say, before anything is removed, that the folder `snakemake` has no record of anything in `results`.

    Snakemake writes down what it made in `.snakemake`, below the folder that it runs in. Without it dates alone decide:
    where a copy did not keep them, an output is planned again and removed when its job starts; where it did, changed
    settings or code are not noticed. `--touch --forceall` writes it all down anew; `--touch` only what is planned.
    """
    start = f"{results}/".encode()
    name = urlsafe_b64encode(start[: len(start) // 3 * 3]).decode()[:LONGEST]  # how the records below it begin
    records = (snakemake / "metadata").iterdir() if (snakemake / "metadata").is_dir() else ()
    made = [results / "model", *results.glob("stages/*/model")]
    if not any(folder.is_dir() for folder in made) or any(
        record.name.removeprefix("@").startswith(name) for record in records
    ):
        return
    say(
        f"warning: {results} was made elsewhere: {snakemake} has no record of it. Stages that look outdated by their "
        "dates are made again, and what is there is removed as they start. To keep it, stop now and run the same "
        f"command once with --touch --forceall; `nspo status {results}` says what it holds"
    )
