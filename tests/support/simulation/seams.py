"""Where the simulation takes the place of the system: the clock, processes, the disk, and SLURM's programs.

What is replaced is what the real code calls; nothing in it knows of this. Threads that are not simulated get the real thing.
"""

from __future__ import annotations

import datetime as real_datetime
import functools
import io
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TextIO
from unittest.mock import patch

import submitit
from submitit.core.utils import CommandFunction, FailedJobError

import jobs.cancel
import jobs.execute.slurm
import jobs.scheduler.client
import jobs.submit.snapshot
import jobs.submit.submission
import jobs.submit.submit
import vitpa.config_file
import vitpa.records
from jobs.submit.snapshot import RECORD
from jobs.submit.submission import SubmissionDir
from tests.support.simulation.disk import Disk, Operations
from tests.support.simulation.processes import BIRTH_S, Child, Process, this_process
from tests.support.simulation.slurm import Slurm
from tests.support.simulation.trainer import CODE
from vitpa.child_process import run_program
from vitpa.code_version import RECORDED
from vitpa.documents import parse_yaml
from vitpa.records import to_json

SNAPSHOT = {  # of the code, much smaller than it is
    "vitpa/step/step.py": b"step = 1\n",
    "jobs/command.py": b"",
    RECORD: to_json(dict.fromkeys(sorted(RECORDED), CODE)).encode(),
}
StartProgram = Callable[[Process, Sequence[str], dict[str, Any]], Child]


class Simulated:
    """The history that is running: what the replaced functions turn to."""

    slurm: Slurm
    start_program: StartProgram


HISTORY = Simulated()


class Environment(MutableMapping[str, str]):
    """`os.environ`: each simulated process has its own."""

    def __init__(self, real: MutableMapping[str, str]) -> None:
        self.real = real

    def _own(self) -> MutableMapping[str, str]:
        process = this_process()
        return self.real if process is None else process.environment

    def __getitem__(self, key: str) -> str:
        return self._own()[key]

    def __setitem__(self, key: str, value: str) -> None:
        self._own()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._own()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own())

    def __len__(self) -> int:
        return len(self._own())


class Words(io.TextIOBase):
    """`sys.stdout` and `sys.stderr`: what a simulated process prints goes where its words go."""

    def __init__(self, real: TextIO) -> None:
        self.real = real

    def write(self, text: str) -> int:
        process = this_process()
        if process is None:
            return self.real.write(text)
        process.on_words(text)
        return len(text)

    def flush(self) -> None:
        if this_process() is None:
            self.real.flush()

    def isatty(self) -> bool:
        return False


class OneByOne:
    """`ThreadPoolExecutor`: the same calls one after another, in an order of the history's."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        process, todo = this_process(), list(enumerate(items))
        assert process is not None
        found: list[Any] = [None] * len(todo)
        process.park.random.shuffle(todo)
        for number, item in todo:
            found[number] = function(item)
        return found


class Datetime(real_datetime.datetime):
    """`datetime.datetime`, by the simulated clock."""

    @classmethod
    def now(cls, tz: real_datetime.tzinfo | None = None) -> Any:
        process = this_process()
        if process is None:
            return real_datetime.datetime.now(tz)
        return real_datetime.datetime.fromtimestamp(BIRTH_S + process.park.now_s, tz)


def _instead(real: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make of a function of a process and arguments one that calls `real` for threads that are not simulated."""

    def decorate(simulated: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(simulated)
        def chosen(*arguments: Any, **keys: Any) -> Any:
            process = this_process()
            return real(*arguments, **keys) if process is None else simulated(process, *arguments, **keys)

        return chosen

    return decorate


@_instead(time.sleep)
def _sleep(process: Process, seconds: float) -> None:
    process.wait_until(process.park.now_s + seconds)


@_instead(time.monotonic)
def _monotonic(process: Process) -> float:
    return process.park.now_s


@_instead(time.time)
def _time(process: Process) -> float:
    return BIRTH_S + process.park.now_s


@_instead(os.getpid)
def _getpid(process: Process) -> int:
    return process.pid


@_instead(socket.gethostname)
def _gethostname(process: Process) -> str:
    return process.host.name


@_instead(os.killpg)
def _killpg(process: Process, pid: int, number: int) -> None:
    process.wait_until(process.park.now_s)
    found = process.park.processes.get(pid)
    if found is None:
        raise ProcessLookupError(3, "No such process")
    found.get_signal(number)


@_instead(signal.signal)
def _signal(process: Process, number: int, handler: Any) -> None:
    process.handlers[number] = handler


@_instead(signal.pthread_sigmask)
def _sigmask(process: Process, how: int, numbers: Iterable[int]) -> set[int]:
    return process.block(how, set(numbers))


@_instead(secrets.token_hex)
def _token_hex(process: Process, count: int) -> str:
    return process.park.random.randbytes(count).hex()


@_instead(uuid.uuid4)
def _uuid4(process: Process) -> uuid.UUID:
    return uuid.UUID(bytes=process.park.random.randbytes(16))


@_instead(subprocess.Popen)
def _popen(process: Process, command: Sequence[str], **keys: Any) -> Child:
    return HISTORY.start_program(process, command, keys)


@_instead(run_program)
def _run_program(process: Process, command: Sequence[str], **keys: Any) -> Any:
    return HISTORY.slurm.run_program(command, **keys)


@_instead(jobs.submit.submission._sbatch_at_work)
def _sbatch_at_work(process: Process, submission: SubmissionDir) -> bool:
    return HISTORY.slurm.sbatch_at_work(process.host, str(submission.submitit))


@_instead(vitpa.records._boot_id)
def _boot_id(process: Process) -> str:
    return process.host.boot_id


@_instead(vitpa.records._start_ticks)
def _start_ticks(process: Process, pid: int) -> int | None:
    found = process.park.processes.get(pid)
    return found.started_ticks if found is not None and found.host is process.host else None


def _sbatch(command: CommandFunction) -> str:
    """What submitit's CommandFunction does with sbatch."""
    try:
        return HISTORY.slurm.submit(command.command[-1])
    except ValueError as error:
        print(error, file=sys.stderr)
        raise FailedJobError(str(error)) from error


def _remembering(parse: Callable[[bytes | str], Any]) -> Callable[[bytes | str], Any]:
    """PyYAML takes 40 ms for a configuration, and a history reads the same ones again and again."""
    known: dict[bytes | str, bytes] = {}

    def remembered(text: bytes | str) -> Any:
        if text not in known:
            known[text] = pickle.dumps(parse(text))
        return pickle.loads(known[text])

    return remembered


@contextmanager
def installed(disk: Disk) -> Iterator[None]:
    """Have all of it replaced while histories run."""
    with ExitStack() as stack:
        for owner, name, new in (
            (time, "sleep", _sleep),
            (time, "monotonic", _monotonic),
            (time, "time", _time),
            (os, "getpid", _getpid),
            (os, "killpg", _killpg),
            (os, "environ", Environment(os.environ)),
            (socket, "gethostname", _gethostname),
            (signal, "signal", _signal),
            (signal, "pthread_sigmask", _sigmask),
            (secrets, "token_hex", _token_hex),
            (uuid, "uuid4", _uuid4),
            (subprocess, "Popen", _popen),
            (sys, "stdout", Words(sys.stdout)),
            (sys, "stderr", Words(sys.stderr)),
            (vitpa.records, "_boot_id", _boot_id),
            (vitpa.records, "_start_ticks", _start_ticks),
            (vitpa.records, "datetime", Datetime),
            (vitpa.config_file, "parse_yaml", _remembering(parse_yaml)),
            (jobs.submit.submit, "datetime", Datetime),
            (jobs.submit.submit, "ThreadPoolExecutor", OneByOne),
            (jobs.submit.submission, "ThreadPoolExecutor", OneByOne),
            (jobs.submit.snapshot, "ThreadPoolExecutor", OneByOne),
            (jobs.submit.snapshot, "_read_code", lambda: (SNAPSHOT, CODE)),
            (jobs.submit.submit, "code_version", lambda: CODE),
            (jobs.execute.slurm, "code_version", lambda: CODE),
            (jobs.cancel, "ThreadPoolExecutor", OneByOne),
            (jobs.scheduler.client, "run_program", _run_program),
            (jobs.submit.submission, "_sbatch_at_work", _sbatch_at_work),
            (CommandFunction, "__call__", _sbatch),
            (submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2)),
        ):
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(Operations(disk).installed())
        yield
