"""An event file of TensorBoard, a view of the records for the eye. Torch-free."""

from __future__ import annotations

import os
import socket
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from vitpa.appended_file import AppendedFile


class EventFile:
    """An event file of TensorBoard, which sorts after those that are there; the times in it never go back.

    torch's SummaryWriter names and dates its events by the clock alone: after a clock was put back TensorBoard loses points.
    """

    def __init__(self, folder: Path, purge_step: int, not_before_s: float) -> None:
        """Points from `purge_step` on that other files in `folder` have are not shown."""
        folder.mkdir(parents=True, exist_ok=True)
        self.wall_time_s = not_before_s
        second = max(int(time.time()), _newest_second(folder) + 1)  # TensorBoard reads the files in the order of their names
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = AppendedFile(folder / name, new=True)
        self._buffer = BytesIO()
        self._records = RecordWriter(self._buffer)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, values: Any, step: int | None = None) -> None:
        """Write a Summary."""
        self._write(Event(summary=values, step=step))

    def _write(self, event: Event) -> None:
        self.wall_time_s = event.wall_time = max(time.time(), self.wall_time_s)
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand everything to the operating system; what a full disk does not take, at a later time."""
        data = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        self._file.append(data)

    def close(self) -> None:
        """Write what is left."""
        try:
            self.flush()
        finally:
            self._file.close()


def _newest_second(folder: Path) -> int:
    """The largest number among the names of event files; 0 without any."""
    numbers = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    return max((int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) == 10), default=0)
