"""Running FFCV's writer in a process of its own, under watch, so that whatever fails in it ends in one clear line.

FFCV's DatasetWriter waits for ever when one of its workers raises or dies. The process (writer_process.py) reports over a
pipe; this side gives up when it dies, says why, or says nothing for long. Killing it takes its workers along, and its
resource tracker then removes the shared memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from data_prep.sources import Split
from vitpa.child_process import child_environment
from vitpa.data.manifest import ImageSettings

STALL_S = 900.0  # without a sign of life; a slow network file system may take minutes for a few photos
CLEAN_UP_S = 20.0  # for the resource tracker of a killed writer
KEPT_ERROR_BYTES = 16_384


class WriterError(Exception):
    """The writer could not finish: one line with the cause."""


@dataclass(frozen=True)
class Job:
    """What is to be written where. A page holds at least one whole image, so it bounds their size."""

    split: Split
    path: Path
    settings: ImageSettings
    workers: int
    page_bytes: int


class Seen(NamedTuple):
    """What of an image's file is not stored as it is; see `Photo`."""

    more_frames: bool
    value_range: tuple[int, int, int] | None


@dataclass(frozen=True)
class Written:
    """How a job ended."""

    corrupt: dict[int, str]  # the reasons by index
    seen: dict[int, Seen]  # of the images that are not stored as they are in their files, by index
    tools: dict[str, str]  # the versions of those that wrote


class Writer:
    """A process with FFCV in it that does one job after the other; `with` ends it, whatever happened."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        self._stall_s = stall_s
        self._lines: list[bytes] = []
        self._partial_line = b""
        self._errors = b""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.writer_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # FFCV compiles a part of its decoder whenever it is imported, for seconds; writing needs none of it
            env={**child_environment(), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is for this process, which ends the writer
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin = self._process.stdin
        self._pipes = selectors.DefaultSelector()
        self._pipes.register(self._process.stdout, selectors.EVENT_READ, "reports")
        self._pipes.register(self._process.stderr, selectors.EVENT_READ, "errors")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._pipes.close()
        with contextlib.suppress(BrokenPipeError), self._process:  # part of a job that was not taken
            pass  # its pipes are closed

    def write(self, job: Job, progress: Callable[[int], None]) -> Written:
        """Write one .beton; `progress` is called with the number of samples since the last call.

        Raises:
            WriterError: it was not written; the writer has ended.
        """
        try:
            return self._write(job, progress)
        except BaseException:  # Ctrl-C too: a worker that has just started would create the file again after its removal
            self._end()
            raise

    def _write(self, job: Job, progress: Callable[[int], None]) -> Written:
        corrupt: dict[int, str] = {}
        seen: dict[int, Seen] = {}
        try:
            pickle.dump(job, self._stdin, pickle.HIGHEST_PROTOCOL)
            self._stdin.flush()
        except BrokenPipeError:
            raise WriterError(self._autopsy()) from None
        while (message := self._next_message()) is not None:
            if "progress" in message:
                progress(message["progress"])
            elif "corrupt" in message:
                index, corrupt[index] = message["corrupt"]
            elif "seen" in message:
                index, *found = message["seen"]
                seen[index] = Seen(*found)
            elif "failed" in message:
                raise WriterError(message["failed"])
            else:
                return Written(corrupt, seen, message["written"])
        raise WriterError(self._autopsy())

    def _next_message(self) -> dict[str, Any] | None:
        """The next report; None if the writer has ended."""
        while not self._lines:
            if "reports" not in (key.data for key in self._pipes.get_map().values()):
                return None
            if not self._read(self._stall_s):
                raise WriterError(f"no progress for {self._stall_s:.0f} s; is the disk or the network file system hanging?")
        message: dict[str, Any] = json.loads(self._lines.pop(0))
        return message

    def _read(self, timeout_s: float) -> bool:
        """Take in what the writer has said; False if that was nothing."""
        ready = self._pipes.select(timeout_s)
        for key, _ in ready:
            data = os.read(key.fd, 65_536)
            if not data:
                self._pipes.unregister(key.fileobj)
            elif key.data == "errors":
                self._errors = (self._errors + data)[-KEPT_ERROR_BYTES:]
            else:
                *lines, self._partial_line = (self._partial_line + data).split(b"\n")
                self._lines += lines
        return bool(ready)

    def _end(self) -> None:
        """Kill the writer and wait until its workers and its resource tracker, which hold the pipes, are gone too."""
        self._process.kill()
        deadline = time.monotonic() + CLEAN_UP_S
        while self._pipes.get_map() and (left_s := deadline - time.monotonic()) > 0:
            self._read(left_s)
        self._process.wait()

    def _autopsy(self) -> str:
        self._end()
        last_words = self._errors.decode(errors="replace").strip().splitlines()
        return f"FFCV's writer ended ({self._process.returncode}): {last_words[-1] if last_words else 'without a word'}"
