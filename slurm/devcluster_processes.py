"""Processes of the development cluster: bound to their parent's life, found by descent, ended by pid.

Linux only: prctl(2) and /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vitpa.child_process import die_with_parent, stat_of_living

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 1.0  # between two looks at the processes
LONGEST_S = 30.0  # that counts of what is between two looks: longer ones mean that this machine, or process, stood still
MOVED_S = 0.03  # of a CPU since the last sign of life: less says nothing
BUSY_SHARE = 0.03  # of a CPU: what only looks whether it may go on takes less
RUNNABLE_SHARE = 0.5  # of the time: what computes has a CPU or waits for one, however many want it


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none can escape: slurmstepd does otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bound_to_this_process() -> Callable[[], None]:
    """A `preexec_fn`: the program that is started dies with this process."""
    parent = os.getpid()
    return lambda: die_with_parent(parent)


def descendants(roots: Iterable[int]) -> list[int]:
    """All living descendants of the processes `roots`, zombies aside."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    new = list(roots)
    while new:
        new = [child for pid in new for child in children.get(pid, [])]
        found += new
    return found


def with_descendants(roots: Iterable[int]) -> list[int]:
    """The processes `roots` that live, and their living descendants."""
    pids = list(roots)
    return [*pids, *descendants(pids)]


def _processes() -> Iterable[tuple[int, int]]:
    """The pid of each that lives, and its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (fields := stat_of_living(int(entry.name))) is not None:
                    yield int(entry.name), int(fields[1])


@dataclass(frozen=True)
class Activity:
    """What a process has done since it began."""

    busy_s: float = 0.0  # it, and its children that have ended, computed or waited for a disk
    runnable_s: float = 0.0  # it had a CPU or waited for one


class SignsOfLife:
    """Whether processes get on: how long none of them has computed or waited for a disk.

    For waits that end when nothing moves any more. Any fixed limit is too short for a busy machine and too long for a quiet
    one; what hangs sleeps, or looks now and then whether it may go on.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._idle_s = 0.0
        self._looked_s = time.monotonic()
        self._disk_s: dict[tuple[int, str], float] = {}
        self._counted_s: dict[tuple[int, str], float] = {}  # by the kernel, which counts a wait for a CPU when it ends
        self._starved_s: dict[tuple[int, str], float] = {}  # of waits that had not ended
        self._at_last_sign: dict[tuple[int, str], Activity] = {}

    def idle_s(self) -> float:
        """Seconds since the last sign of life, as far as this process itself was awake; looks at most once a second."""
        passed_s = time.monotonic() - self._looked_s
        if passed_s >= SAMPLE_S:
            self._looked_s += passed_s
            self._idle_s += min(passed_s, LONGEST_S)
            found = self._looked(passed_s)
            if any(self._moved(activity, self._at_last_sign.get(process, Activity())) for process, activity in found.items()):
                self._idle_s, self._at_last_sign = 0.0, found
        return self._idle_s

    def _moved(self, now: Activity, before: Activity) -> bool:
        busy_s, runnable_s = now.busy_s - before.busy_s, now.runnable_s - before.runnable_s
        return busy_s >= max(MOVED_S, BUSY_SHARE * self._idle_s) or runnable_s >= max(MOVED_S, RUNNABLE_SHARE * self._idle_s)

    def _looked(self, passed_s: float) -> dict[tuple[int, str], Activity]:
        """What each process, by its pid and start, has done so far."""
        found: dict[tuple[int, str], Activity] = {}
        for pid in self._pids():
            with contextlib.suppress(OSError):
                columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5): from the third on
                process = pid, columns[19]
                if columns[0] == "D":
                    self._disk_s[process] = self._disk_s.get(process, 0.0) + passed_s
                busy_s = sum(map(int, columns[11:15])) / os.sysconf("SC_CLK_TCK") + self._disk_s.get(process, 0.0)
                counted_s = _runnable_s(pid)
                if columns[0] == "R" and self._counted_s.get(process) == counted_s:  # waits ever since the last look
                    self._starved_s[process] = self._starved_s.get(process, 0.0) + passed_s
                self._counted_s[process] = counted_s
                found[process] = Activity(busy_s, counted_s + self._starved_s.get(process, 0.0))
        return found


def _runnable_s(pid: int) -> float:
    """Seconds that the first thread of a process has had a CPU or waited for one; 0 where the kernel does not count them."""
    try:
        running_ns, waiting_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()  # sched-stats.rst of the kernel
    except (OSError, ValueError):
        return 0.0
    return (int(running_ns) + int(waiting_ns)) / 1e9


def writes_below(pid: int, folder: Path) -> bool:
    """Whether a process holds a file below `folder` open for writing; False if that is not ours to know."""
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for link in links:
        with contextlib.suppress(OSError):
            if link.lstat().st_mode & stat.S_IWUSR and link.readlink().is_relative_to(folder):
                return True
    return False


def _environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def reap() -> dict[int, int]:
    """Take in the children that have ended: pid -> exit code, negative for a signal."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def kill_descendants() -> None:
    """End everything below this process, and what it starts while it is being ended."""

    def living() -> list[int]:
        reap()
        return descendants([os.getpid()])

    kill_all(living)


def kill_all(find: Callable[[], list[int]]) -> None:
    """Kill what `find` finds until it finds nothing, or for LONGEST_S the same: what is stuck in the kernel stays."""
    before: list[int] = []
    changed_s = time.monotonic()
    while found := find():
        kill(found)
        if set(found) != set(before):
            before, changed_s = found, time.monotonic()
        if time.monotonic() - changed_s > LONGEST_S:
            return
        time.sleep(0.01)


def kill(pids: Iterable[int], signal_number: int = signal.SIGKILL) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)


def remains_of(root: Path, slurm_conf: Path) -> list[int]:
    """Processes of a cluster in `root` whose supervisor was killed: daemons and steps, which write logs there, and jobs.

    The environment of slurmstepd says nothing: its title is written over it. A shell in which a user has exported
    SLURM_CONF is not in a job and stays.
    """
    marked = []
    for pid in {pid for pid, _ in _processes()} - {os.getpid()}:
        environment = _environment(pid)
        of_job = "SLURMD_NODENAME" in environment and environment.get("SLURM_CONF") == str(slurm_conf)
        if of_job or writes_below(pid, root / "log"):
            marked.append(pid)
    return [*marked, *descendants(marked)]
