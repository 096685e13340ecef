"""The errors that are the user's to act on, and the one place that makes of them a line on stderr and an exit code.

UserError                          what, where and how to fix it; exit code 1
ConfigError       vitpa/arguments         a configuration, an option, a variable
RunError          vitpa/records           a run directory, a record
BetonError        vitpa/data/manifest     a .beton or its manifest
TrainError        vitpa/train             a training that cannot go on
TheoryError       vitpa/theory_command/saved  an experiment that cannot go on
PrepError         data_prep/errors        a conversion that cannot be done
SweepError        jobs/sweep              a sweep, a submission
SchedulerError  jobs/scheduler/client   SLURM does not answer, or refuses; exit code 3
DevClusterError   slurm/devcluster        a SLURM on this machine
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vitpa.terminal import printable

HINTS = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EACCES: "choose a place that you may read and write, or have its rights changed",
    errno.EPERM: "choose a place that you may read and write, or have its rights changed",
    errno.EROFS: "choose a place that can be written to",
}


def os_error_line(error: OSError) -> str:
    """`/root/runs: Permission denied; choose a place ...`."""
    if error.errno is None or error.strerror is None:  # raised by Python code with its own text, not by the system
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
    return f"{where}{error.strerror}{hint}"


class UserError(Exception):
    """Something that the user has to act on: what, where and how to fix it, in one line."""

    exit_code = 1  # of a command that ends with it
    keep = ""  # control characters that its text may have: a newline, where lists follow on lines of their own


def run_command(name: str, command: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Run a command, such as "vitpa train", and return its exit code; an error of the user's or the system's becomes one line.

    `interrupted` is the line printed after Ctrl-C, or a signal that raises KeyboardInterrupt with its number.
    """
    try:
        return command()
    except UserError as error:
        line, code = printable(str(error), keep=error.keep), error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        line, code = printable(os_error_line(error)), 1
    except KeyboardInterrupt as interrupt:
        line, code = interrupted, 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)
    print(f"{name}: {line}", file=sys.stderr)
    return code


@contextmanager
def at_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Have `handler` called with the number of SIGTERM or SIGHUP, unless it is ignored, as SIGHUP is under nohup."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, its in before.items():
            signal.signal(number, its)
