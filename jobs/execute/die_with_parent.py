"""Bind a program to its parent's life: `python -m jobs.execute.die_with_parent PROGRAM [ARGUMENT ...]` becomes PROGRAM.

When the parent dies, even by kill -9, the kernel kills PROGRAM: no training goes on unsupervised. torchrun does not do that
for its processes, so they are started through this, too. SIGTERM, SIGUSR1 and SIGUSR2, which SLURM sends to every process
of a step, are blocked from here on, also for a program that has handlers for them, such as torchrun: the supervisor, which
gets them as well, tells the training to stop by a file, and there is time for a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys

from vitpa.child_process import die_with_parent

PARENT = "VITPA_PARENT"  # pid of the process that is to be outlived by nobody


def main(command: list[str]) -> None:
    """Become `command`, bound to the parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})  # kept across fork and exec
    die_with_parent(int(os.environ.get(PARENT, os.getppid())))
    os.environ[PARENT] = str(os.getpid())  # for what `command` starts through this
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
