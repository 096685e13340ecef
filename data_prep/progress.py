"""What a person sees of a conversion: lines, and progress as a live bar on a terminal, elsewhere a line every ten seconds.

No conversion stops half-way because something cannot be printed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vitpa.console import PrintableConsole

LOGGER = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class Report:
    """Prints lines on stdout; what fails in it is kept for the end."""

    failure: OSError | SystemExit | None = None  # why not all lines were printed; None if they were

    def __call__(self, line: str) -> None:
        """Print a line; characters that stdout's encoding does not have are escaped."""
        if self.failure:
            return
        try:
            encoding = sys.stdout.encoding or "ascii"
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except (OSError, SystemExit) as error:  # SystemExit: of the command's stdout, when nobody reads it any more
            self.failure = error
            with suppress(OSError, ValueError):  # what is still in its buffer would fail again at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr; yields the function to call with the number of samples done since its last call, 0 to begin."""
    console = PrintableConsole(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda samples: bar.advance(task, samples)


def _lines(what: str, total: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def advance(samples: int) -> None:
        nonlocal start, last, done
        done += samples
        now = time.monotonic()
        if done == 0:
            start = last = now
        if now - last >= LINE_EVERY_S and 0 < done < total:
            last = now
            eta_s = (now - start) / done * (total - done)
            with suppress(OSError, ValueError, SystemExit):  # nobody reads it any more
                LOGGER.info(f"{what}: {done:,} of {total:,}, ETA {eta_s / 60:.1f} min")

    return advance
