"""Progress for a person: a live bar with ETA on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr; yields the function to call with the number of samples done since its last call, 0 to begin."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda samples: bar.advance(task, samples)


def _lines(console: Console, what: str, total: int) -> Callable[[int], None]:
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
            console.print(f"{what}: {done:,} of {total:,}, ETA {eta_s / 60:.1f} min", markup=False, highlight=False)

    return advance
