"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines with the same in a log file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

LOG_SECONDS = 10.0
DELAY_SECONDS = 3.0  # work that is over sooner shows no bar
_silent = False


class _LogLines:
    """A stream for tqdm that turns each redrawn bar into a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            with suppress(BrokenPipeError):
                sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def track(description: str, total: int, unit: str, start: int = 0) -> Iterator["tqdm[None]"]:
    """A progress bar; call `.update(n)` on it. `start` counts work that an earlier, interrupted run had done."""
    terminal = sys.stderr.isatty()
    with tqdm(
        disable=_silent,
        desc=description,
        total=total,
        initial=start,
        unit=unit,
        file=sys.stderr if terminal else _LogLines(),
        mininterval=0.1 if terminal else LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        delay=DELAY_SECONDS,
        position=None if terminal else 0,  # a log has no cursor to move
        dynamic_ncols=terminal,
        ascii=not terminal,
    ) as bar:
        yield bar


def say(message: str) -> None:
    """One plain line on standard error, above any bar."""
    if not _silent:
        with suppress(BrokenPipeError):  # whoever read the log was ended by the same signal; the work goes on
            tqdm.write(message, file=sys.stderr)


def silence() -> None:
    """Say and show nothing from here on: another process does the same work and speaks for this one."""
    global _silent
    _silent = True
