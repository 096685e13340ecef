r"""The bytes of a checkpoint file: what torch wrote, and a last line that says what it is, with a checksum. Torch-free.

    <torch's archive>\n{"vitpa_checkpoint": 2, "signature": "...", "step": 88, "archive_bytes": 61234, "sha256": "..."}\n

`sha256` is over the archive and the rest of the line. torch.load reads such a file as well. Files
of earlier versions of vitpa end with the archive, which has a CRC-32 of each of its parts.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpa.documents import DocumentError, read_bytes, read_end
from vitpa.records import RunError, make_folders, write_atomic

MAX_LINE = 512
NO_FILE = (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENOENT)  # a pipe, a folder, links that lead nowhere: no checkpoint
_END_OF_ARCHIVE = b"PK\x05\x06"
_END_BYTES = 22  # of the archive's last record, without a comment


class CheckpointError(Exception):
    """A file that is not believed to be a checkpoint: why, without its name."""


class Footer(BaseModel):
    """The last line of a checkpoint file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    vitpa_checkpoint: Literal[2] = 2
    signature: str = Field(pattern=r"^[0-9a-f]{16}$")
    step: int = Field(ge=1)
    archive_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @staticmethod
    def of(archive: bytes, signature: str, step: int) -> Footer:
        """That of a file that holds `archive`."""
        digest = hashlib.sha256(archive)
        digest.update(f"\n{signature} {step} {len(archive)}".encode())
        return Footer(signature=signature, step=step, archive_bytes=len(archive), sha256=digest.hexdigest())

    def line(self) -> bytes:
        """As it is in the file, with the line break before it."""
        return f"\n{json.dumps(self.model_dump())}\n".encode()

    @staticmethod
    def read(end: bytes) -> Footer | None:
        """The footer at the end of a file of which `end` are the last bytes; None if there is none, or not a whole one."""
        line = end[-MAX_LINE:].rstrip(b"\n").rpartition(b"\n")[2]
        try:
            footer = Footer.model_validate_json(line)
        except ValidationError:
            return None
        return footer if end.endswith(footer.line()) else None


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step_{step:09d}.pt"


def step_of(name: str) -> int | None:
    """The steps that a file name stands for; None if no checkpoint is called like that."""
    match = re.fullmatch(r"step_([0-9]{9,18})\.pt", name)
    return int(match[1]) if match and int(match[1]) and name == name_of(int(match[1])) else None


def files_by_step(folder: Path) -> dict[int, Path]:
    """The files of a folder that are called like checkpoints, by their steps, in order; none without the folder.

    Raises:
        RunError: it cannot be read, so that nobody knows what is in it.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.glob takes a folder that cannot be read for an empty one
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return {}
        raise unreadable(folder, error) from error
    return dict(sorted((step, folder / name) for name in names if (step := step_of(name)) is not None))


def unreadable(path: Path, error: OSError | MemoryError) -> RunError:
    """What to raise where an error says nothing about what is in a file or a folder, such as a disk that does not answer."""
    reason = (error.strerror if isinstance(error, OSError) else None) or "out of memory"
    return RunError(f"{path}: cannot be read ({reason}); all is left as it is: try again when it can be")


def write_archive(folder: Path, archive: bytes, signature: str, step: int) -> Path:
    """Write what torch has made after `step` steps of the run `signature`, with its last line; the folder is made."""
    make_folders(folder)
    path = folder / name_of(step)
    write_atomic(path, archive + Footer.of(archive, signature, step).line())
    return path


def read_archive(path: Path, signature: str, max_bytes: int) -> tuple[bytes, bool]:
    """What torch wrote into a checkpoint of the run `signature`, and whether a checksum says that it is as it was written.

    It is False for a whole file of an earlier version of vitpa, which has none.

    Raises:
        CheckpointError: no whole file, larger than `max_bytes`, of another run, or not of the step in its name.
        RunError: it cannot be read, which says nothing about what is in it.
    """
    try:
        return _checked(path, _read(path, max_bytes), signature)
    except MemoryError as error:
        raise unreadable(path, error) from error


def _checked(path: Path, content: bytes, signature: str) -> tuple[bytes, bool]:
    footer = Footer.read(content[-MAX_LINE:])
    if footer is None:
        _check_archive(content)
        return content, False
    archive = content[: -len(footer.line())]
    if Footer.of(archive, footer.signature, footer.step) != footer:
        raise CheckpointError("its checksum does not fit: it was damaged or changed")
    if footer.signature != signature:
        raise CheckpointError(f"it is a checkpoint of another run ({footer.signature})")
    if footer.step != step_of(path.name):
        raise CheckpointError(f"it is a checkpoint of step {footer.step}, which is not what its name says")
    return archive, True


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        return read_bytes(path, max_bytes)
    except DocumentError as error:
        raise CheckpointError(f"it is {error}, the most that a checkpoint of this run has") from error
    except OSError as error:
        if error.errno not in NO_FILE:
            raise unreadable(path, error) from error
        raise CheckpointError(f"it cannot be read ({error.strerror})") from error


def _check_archive(content: bytes) -> None:
    """Raise CheckpointError unless `content` is the archive that an earlier version of vitpa wrote, by its CRCs."""
    if not content:
        raise CheckpointError("it is empty")
    if not _ends_archive(content):
        raise CheckpointError("it does not end as a checkpoint does: it was cut, or its end is damaged")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = archive.testzip() if stored else "compressed"
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises many types
        damaged = type(error).__name__
    if damaged is not None:
        raise CheckpointError(f"it is damaged ({damaged})")


def _ends_archive(end: bytes) -> bool:
    return end[-_END_BYTES:].startswith(_END_OF_ARCHIVE) and end.endswith(b"\0\0")


def is_plausible(path: Path, signature: str) -> bool:
    """Whether a file is a checkpoint of the run `signature` by its name, size and end; its checksum is not looked at."""
    step = step_of(path.name)
    if step is None:
        return False
    try:
        size, end = path.stat().st_size, read_end(path, MAX_LINE)
    except OSError:
        return False
    footer = Footer.read(end)
    if footer is None:
        return _ends_archive(end)
    return (footer.signature, footer.step, footer.archive_bytes + len(footer.line())) == (signature, step, size)
