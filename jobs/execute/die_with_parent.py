"""Bind a program to its parent's life: `python -m jobs.execute.die_with_parent PROGRAM [ARGUMENT ...]` becomes PROGRAM.

When the parent dies, even by kill -9, the kernel kills PROGRAM: no training goes on unsupervised. torchrun does not do that
for its processes, so they are started through this, too. SIGTERM, SIGUSR1 and SIGUSR2, which SLURM sends to every process
of a step, are blocked from here on, also for a program that has handlers for them, such as torchrun: the supervisor, which
gets them as well, tells the training to stop by a file, and there is time for a checkpoint.

Also the environment in which every child process is started (`child_environment`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import sysconfig
from pathlib import Path

from vitpa import CODE

PARENT = "VITPA_PARENT"  # pid of the process that is to be outlived by nobody
PR_SET_PDEATHSIG = 1  # prctl(2); kept across exec


def child_environment(code: Path | None = None) -> dict[str, str]:
    """This process's environment, in which children import the code that runs here and nothing from their current folder.

    With `code`, a folder that holds our packages, they import from there.
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    here = str(code or CODE)
    if here not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # a checkout
        paths = [here, *(path for path in paths if path != here)]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def main(command: list[str]) -> None:
    """Become `command`, bound to the parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})  # kept across fork and exec
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    parent = os.environ.get(PARENT)
    if parent is not None and int(parent) != os.getppid():
        sys.exit("the process that wanted this is dead")  # it died before it could be bound to
    os.environ[PARENT] = str(os.getpid())  # for what `command` starts through this
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
