"""The process in which FFCV writes: reads jobs from stdin, reports lines of JSON on stdout, dies with its parent.

Started by write.py as `python -m data_prep.writer_process PARENT_PID`. FFCV is imported late, after the death of the parent
has been made the death of this process.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

from data_prep.images import CorruptImageError, shrink
from data_prep.write import Job
from vitpa.data.manifest import Pixels

PR_SET_PDEATHSIG = 1  # prctl(2)
MAX_REASON = 600  # characters; a line, 6 bytes a character at worst, is below PIPE_BUF (4096) and so written at once
MAX_SIDE_PX = 65_500  # of a JPEG
CHUNK_SAMPLES = 16  # handed to a worker at a time; also the grain of the progress
WATCH_EVERY_S = 0.1


class Reports:
    """The pipe to the parent, for this process and its workers."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def send(self, kind: Literal["progress", "corrupt", "seen", "failed", "written"], content: object) -> None:
        """Report `content`, as one line written at once."""
        os.write(self._pipe, json.dumps({kind: content}).encode() + b"\n")

    def failed(self, error: BaseException) -> None:
        """Report the error that ends the writing."""
        self.send("failed", _one_line(error))


class Samples:
    """A split as FFCV wants it: (pixels, label) by index. Corrupt images are reported and written as one black pixel."""

    def __init__(self, job: Job, reports: Reports) -> None:
        self._job = job
        self._reports = reports

    def __len__(self) -> int:
        return len(self._job.split)

    def __getitem__(self, position: int) -> tuple[Pixels, int]:
        index = int(position)
        try:
            photo = self._job.split.photo(index, self._job.settings.white_level)
            pixels = shrink(photo.pixels, self._job.settings)
            height, width = pixels.shape[:2]
            if pixels.nbytes > self._job.page_bytes or max(height, width) > MAX_SIDE_PX:
                raise CorruptImageError(
                    f"{width}x{height} px is too large; bring it down with --short-side-px or --max-side-px"
                )
            if photo.more_frames or photo.value_range:
                self._reports.send("seen", (index, photo.more_frames, photo.value_range))
        except CorruptImageError as error:
            self._reports.send("corrupt", (index, str(error)[:MAX_REASON]))
            pixels = np.zeros((1, 1, 3), np.uint8)
        # FFCV draws JPEG or raw from NumPy's global state, which all its workers share at the start: one draw per sample
        np.random.seed(index)
        return pixels, int(self._job.split.labels[index])


def main(parent_pid: int) -> None:
    """Do the jobs on stdin until it ends; the first failure ends everything."""
    _die_with(parent_pid)
    reports = Reports(os.dup(1))
    os.dup2(2, 1)  # what a library prints is no report
    this = os.getpid()
    os.register_at_fork(after_in_child=lambda: _die_with(this))
    multiprocessing.set_start_method("fork")  # FFCV hands its workers what cannot be pickled
    try:
        tools = _import_ffcv(reports)
        while True:
            try:
                job: Job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            _write(job, reports)
            reports.send("written", tools)
    except Exception as error:  # the parent turns it into the one line that the user sees
        reports.failed(error)
        os._exit(1)  # no joining of workers that wait for ever


def _write(job: Job, reports: Reports) -> None:
    from ffcv.fields import IntField, RGBImageField  # noqa: PLC0415  # see the module's first lines
    from ffcv.writer import DatasetWriter  # noqa: PLC0415

    share, quality = job.settings.jpeg_share, job.settings.jpeg_quality
    image = RGBImageField(
        write_mode={0.0: "raw", 1.0: "jpg"}.get(share, "proportion"), compress_probability=share, jpeg_quality=quality or 0
    )
    writer = DatasetWriter(
        str(job.path), {"image": image, "label": IntField()}, page_size=job.page_bytes, num_workers=job.workers
    )
    reports.send("progress", 0)  # the time of imports is not counted as work
    writer.from_indexed_dataset(Samples(job, reports), chunksize=CHUNK_SAMPLES)


def _import_ffcv(reports: Reports) -> dict[str, str]:
    """Import FFCV and put our progress and our watched workers in the place of its own; the versions in use."""
    import cv2  # noqa: PLC0415  # see the module's first lines
    import ffcv.writer  # noqa: PLC0415
    import PIL  # noqa: PLC0415

    cv2.setNumThreads(0)  # the workers are the parallelism

    class Progress:
        """Stands for tqdm in ffcv.writer."""

        def __init__(self, total: int) -> None:
            self.total = total

        def update(self, samples: int) -> None:
            reports.send("progress", int(samples))

        def close(self) -> None:
            """Nothing to close."""

    workers: list[multiprocessing.Process] = []

    def watched_process(target: Callable[..., None], args: tuple[Any, ...]) -> multiprocessing.Process:
        process = multiprocessing.Process(target=_work, args=(reports, target, args))
        workers.append(process)
        return process

    ffcv.writer.tqdm, ffcv.writer.Process = Progress, watched_process
    threading.Thread(target=_watch, args=(workers, reports), daemon=True).start()
    return {
        "python": sys.version.split()[0],
        "ffcv": _version("ffcv"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
    }


def _version(package: str) -> str:
    """Its version; a copy that was not installed by a package manager has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _work(reports: Reports, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """What a worker process runs: FFCV's work, with the cause of a failure reported."""
    try:
        target(*args)
    except BaseException as error:
        reports.failed(error)
        raise


def _watch(workers: list[multiprocessing.Process], reports: Reports) -> None:
    """End this process when one of its workers has died, for which FFCV would wait for ever."""
    while True:
        time.sleep(WATCH_EVERY_S)
        for process in list(workers):
            code = process.exitcode  # None before its start and while it runs
            if code == 0:
                workers.remove(process)
            elif code is not None:
                reports.send("failed", _cause_of_death(code))  # after the worker's own report, if it could make one
                os._exit(1)


def _cause_of_death(code: int) -> str:
    if code > 0:
        return f"a worker process ended with exit code {code}"
    hints = {signal.SIGKILL: " (out of memory?)", signal.SIGBUS: " (is /dev/shm full?)"}
    return f"a worker process was killed by {signal.Signals(-code).name}{hints.get(signal.Signals(-code), '')}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        hint = "; free some space and start again" if error.errno == errno.ENOSPC else ""
        text = f"{error.strerror}{where}{hint}"
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MAX_REASON]


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
