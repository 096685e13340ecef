"""Child processes: their environment, what they print, and their end with that of their parent; whether a process lives."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitpa.installation import CODE

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


def run_program(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that gets nothing to read; what it has printed, whatever bytes that were, and its exit code.

    Raises:
        OSError, subprocess.TimeoutExpired: as `subprocess.run`.
    """
    return subprocess.run(
        command, env=env, input="", capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False
    )


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal as soon as `parent`, its parent, is dead."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def stat_of_living(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat (proc(5)) from the third, `state`, on; None if the process has ended, waited for or not.

    State Z says only that its first thread has ended. The process lives as long as another one does, and `num_threads` then
    counts both.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command name before may hold spaces and brackets
    state, num_threads = fields[0], int(fields[17])
    return None if state in "ZX" and num_threads < 2 else fields
