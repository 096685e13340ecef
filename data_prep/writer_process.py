"""The process in which FFCV writes: reads jobs from stdin, reports lines of JSON on stdout, dies with its parent.

Started by write.py as `python -m data_prep.writer_process PARENT_PID`. FFCV is imported late, after the death of the parent
has been made the death of this process.
"""

from __future__ import annotations

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
from typing import Any

import numpy as np

from data_prep.images import CorruptImageError, shrink
from data_prep.write import Job
from vitpa.child_process import die_with_parent
from vitpa.data.manifest import Pixels
from vitpa.errors import os_error_line

MAX_REASON = 600  # characters; a line, 6 bytes a character at worst, is below PIPE_BUF (4096) and so written at once
MAX_SIDE_PX = 65_500  # of a JPEG
CHUNK_SAMPLES = 16  # handed to a worker at a time; also the grain of the progress
WATCH_EVERY_S = 0.1


Send = Callable[[str, object], None]  # reports "progress", "corrupt", "seen", "failed" or "written", with its content


class Samples:
    """A split as FFCV wants it: (pixels, label) by index. Corrupt images are reported and written as one black pixel."""

    def __init__(self, job: Job, send: Send) -> None:
        self._job, self._send = job, send

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
                self._send("seen", (index, photo.more_frames, photo.value_range))
        except CorruptImageError as error:
            self._send("corrupt", (index, str(error)[:MAX_REASON]))
            pixels = np.zeros((1, 1, 3), np.uint8)
        # FFCV draws JPEG or raw from NumPy's global state, which all its workers share at the start: one draw per sample
        np.random.seed(index)
        return pixels, int(self._job.split.labels[index])


def main(parent_pid: int) -> None:
    """Do the jobs on stdin until it ends; the first failure ends everything."""
    die_with_parent(parent_pid)
    pipe = os.dup(1)  # to the parent, for this process and its workers
    os.dup2(2, 1)  # what a library prints is no report

    def send(kind: str, content: object) -> None:
        os.write(pipe, json.dumps({kind: content}).encode() + b"\n")  # as one line written at once

    this = os.getpid()
    os.register_at_fork(after_in_child=lambda: die_with_parent(this))
    multiprocessing.set_start_method("fork")  # FFCV hands its workers what cannot be pickled
    try:
        tools = _import_ffcv(send)
        while True:
            try:
                job: Job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            _write(job, send)
            send("written", tools)
    except Exception as error:  # the parent turns it into the one line that the user sees
        send("failed", _one_line(error))
        os._exit(1)  # no joining of workers that wait for ever


def _write(job: Job, send: Send) -> None:
    from ffcv.fields import IntField, RGBImageField  # noqa: PLC0415  # see the module's first lines
    from ffcv.writer import DatasetWriter  # noqa: PLC0415

    share, quality = job.settings.jpeg_share, job.settings.jpeg_quality
    image = RGBImageField(
        write_mode={0.0: "raw", 1.0: "jpg"}.get(share, "proportion"), compress_probability=share, jpeg_quality=quality or 0
    )
    writer = DatasetWriter(
        str(job.path), {"image": image, "label": IntField()}, page_size=job.page_bytes, num_workers=job.workers
    )
    send("progress", 0)  # the time of imports is not counted as work
    writer.from_indexed_dataset(Samples(job, send), chunksize=CHUNK_SAMPLES)


def _import_ffcv(send: Send) -> dict[str, str]:
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
            send("progress", int(samples))

        def close(self) -> None:
            """Nothing to close."""

    workers: list[multiprocessing.Process] = []

    def watched_process(target: Callable[..., None], args: tuple[Any, ...]) -> multiprocessing.Process:
        process = multiprocessing.Process(target=_work, args=(send, target, args))
        workers.append(process)
        return process

    ffcv.writer.tqdm, ffcv.writer.Process = Progress, watched_process
    threading.Thread(target=_watch, args=(workers, send), daemon=True).start()
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


def _work(send: Send, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """What a worker process runs: FFCV's work, with the cause of a failure reported."""
    try:
        target(*args)
    except BaseException as error:
        send("failed", _one_line(error))
        raise


def _watch(workers: list[multiprocessing.Process], send: Send) -> None:
    """End this process when one of its workers has died, for which FFCV would wait for ever."""
    while True:
        time.sleep(WATCH_EVERY_S)
        for process in list(workers):
            code = process.exitcode  # None before its start and while it runs
            if code == 0:
                workers.remove(process)
            elif code is not None:
                send("failed", _cause_of_death(code))  # after the worker's own report, if it could make one
                os._exit(1)


def _cause_of_death(code: int) -> str:
    if code > 0:
        return f"a worker process ended with exit code {code}"
    hints = {signal.SIGKILL: " (out of memory?)", signal.SIGBUS: " (is /dev/shm full?)"}
    return f"a worker process was killed by {signal.Signals(-code).name}{hints.get(signal.Signals(-code), '')}"


def _one_line(error: BaseException) -> str:
    text = os_error_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MAX_REASON]


if __name__ == "__main__":
    main(int(sys.argv[1]))
