"""Waiting in tests: it ends when nothing moves any more, not after a fixed time, so that a busy machine passes them.

What moves is a process of these tests that computes or waits for a disk: a descendant of this one, or one that has left it and
still has MARK in its environment, as the workers of a sweep have. This process does not count: it is the one that waits.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from slurm.devcluster_processes import SignsOfLife, descendants

MARK = "STARTED_BY_PYTEST"  # holds the id of the process that runs the tests
IDLE_S = 300.0  # longer than what SLURM does by the clock: time limits, requeues, nodes that do not answer
Value = TypeVar("Value")


def wait_for(
    condition: Callable[[], Value],
    *,
    seen: Callable[[], object] | None = None,
    poll_s: float = 0.001,
    idle_s: float = IDLE_S,
) -> Value:
    """Poll until `condition` is true, as long as something moves.

    Args:
        condition: what is waited for.
        seen: what has come of it so far: a change of it is a sign of life, too, and the message tells it.
        poll_s: pause between two looks.
        idle_s: seconds without a sign of life after which it is in vain.

    Returns:
        What `condition` returned.

    Raises:
        AssertionError: it is in vain; with the line that waits, what was seen last and the processes that are there.
    """
    caller = traceback.extract_stack(limit=2)[0]
    life, last_seen = SignsOfLife(ours), seen and seen()
    looked_s = time.monotonic()
    while not (value := condition()):
        if seen and time.monotonic() - looked_s > 1:
            before, last_seen, looked_s = last_seen, seen(), time.monotonic()
            if last_seen != before:
                life = SignsOfLife(ours)
        if life.idle_s() >= idle_s:
            where = f"{Path(caller.filename).name}:{caller.lineno}: {caller.line}"
            raise AssertionError(in_vain(where, still(idle_s) + (f"\nlast seen: {last_seen}" if seen else "")))
        time.sleep(poll_s)
    return value


def finish(process: subprocess.Popen[str], *, idle_s: float = IDLE_S) -> tuple[str, str]:
    """Wait for the end of a process and take what it prints, as `communicate` does, as long as something moves.

    Raises:
        AssertionError: nothing has moved for `idle_s`; the process has been killed.
    """
    life = SignsOfLife(ours)
    while True:
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            if life.idle_s() >= idle_s:
                message = in_vain(str(process.args), still(idle_s))
                process.kill()
                printed = "\n".join(text or "" for text in process.communicate())
                raise AssertionError(f"{message}\nit has printed:\n{printed}") from None


def run_to_end(
    command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdin: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does, as long as something moves."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = finish(process)
        except BaseException:  # the test's time is up
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def ours() -> list[int]:
    """The living processes of these tests, without this one."""
    me = os.getpid()
    mark = f"\0{MARK}={me}\0".encode()
    gone_from_us = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + path.read_bytes():
                gone_from_us.append(int(path.parent.name))
    return sorted({*gone_from_us, *descendants([me, *gone_from_us])} - {me})


def still(idle_s: float) -> str:
    """Why a wait is given up."""
    return f"nothing has moved for {idle_s:.0f} s"


def in_vain(what: str, why: str) -> str:
    """What to say of a wait that is given up, with a line for each process: pid, state, CPU seconds, command line."""
    lines = [f"{what}: {why}", "processes:"]
    for pid in ours():
        with contextlib.suppress(OSError):
            columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu_s = (int(columns[11]) + int(columns[12])) / os.sysconf("SC_CLK_TCK")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines.append(f"{pid:>8} {columns[0]} {cpu_s:8.1f} {words[:150]}")
    return "\n".join(lines)
