"""Copying the .beton files of a data set to a disk of the node itself, once per node, before a training reads them.

A copy lies in a folder that is named by what the manifests say: all runs on those data share it, other data have another.
Who copies holds a claim there: numbered files, of which the last counts; whoever finds its holder dead makes the next one.
Only what a copy has left unfinished or damaged is ever deleted here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vitpa.config import ConfigError, expand_path
from vitpa.data.beton import Beton, BetonError, BetonFile, Manifest, beton_path, manifest_path
from vitpa.datasets import SPLITS
from vitpa.distributed import Group
from vitpa.rundir import ProcessId, RunError, create_exclusive, read_json, write_json

POLL_S = 1.0
LINE_EVERY_S = 10.0
COPIERS = 4  # threads; one alone keeps neither a disk nor a network busy
CHUNK_BYTES = 4 << 20
SPARE = 0.05  # of what is copied: room that is left to others
GIB = 2**30


def staged(data_dir: Path, dataset: str, stage_dir: str, group: Group) -> Path:
    """The folder to read a data set from instead of `data_dir`: its copy on this node, which is made if it is not there.

    Called by all processes of a run at once; the first one of each node copies, or waits for another run that does. A copy
    is compared with the hash in its manifest when it is made; one that is there already only by its sizes and tables.

    Args:
        data_dir: The folder with `<dataset>/train.beton` and so on.
        dataset: The data set's name.
        stage_dir: A folder on a disk of the node; `~` and variables such as $TMPDIR are those of the node.
        group: The processes of the run.

    Returns:
        a folder to be used like `data_dir`.

    Raises:
        ConfigError: `stage_dir` cannot be used, or the copy does not fit; in all processes, also if it is so on one node.
        BetonError: the data are missing or damaged.
    """
    abandoned = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="stage") as pool:
        work = pool.submit(_stage, data_dir, dataset, stage_dir, abandoned, copies=group.local_rank == 0)
        try:
            return _when_all_are_done(work, group)
        finally:
            abandoned.set()


def _when_all_are_done(work: Future[Path], group: Group) -> Path:
    """The result of `work`, once that of all processes is done. They ask each other often: a single long wait times out."""
    while True:
        wait([work], timeout=POLL_S)
        done = work.done()
        error = work.exception() if done else None
        failure = "" if error is None else str(error) or type(error).__name__
        answers = group.from_all((done, failure))
        failures = [each for _, each in answers if each]
        if failures and not failure:
            raise ConfigError(failures[0])
        if failures or all(each for each, _ in answers):
            return work.result()


def _stage(data_dir: Path, dataset: str, stage_dir: str, abandoned: threading.Event, *, copies: bool) -> Path:
    """What one process does: find the folder and, if it is the one that `copies`, see that the copy is there."""
    manifests = {split: Manifest.read(manifest_path(beton_path(data_dir, dataset, split))) for split in SPLITS}
    names = hashlib.sha256("".join(manifest.model_dump_json() for manifest in manifests.values()).encode()).hexdigest()
    folder = expanded(stage_dir) / f"vitpa-{os.getuid()}" / f"{dataset}-{names[:16]}"
    staging = _Staging(data_dir, dataset, manifests, stage_dir, folder, abandoned)
    if copies:
        try:
            staging.run()
        except OSError as error:
            what = f"the copy of {data_dir / dataset} to {folder} on {socket.gethostname()} failed: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what += f"; it needs {_gib(staging.bytes_of(SPLITS))}"
            raise staging.refusal(what) from error
    return folder


def expanded(stage_dir: str) -> Path:
    """`runtime.stage_dir` as it is on this node.

    Raises:
        ConfigError: a variable is not set here, or it is no absolute path.
    """
    try:
        path = expand_path(stage_dir, "runtime.stage_dir")
        why = "" if path.is_absolute() else f"runtime.stage_dir={stage_dir}: {path} is not an absolute path"
    except ConfigError as error:
        why = str(error)
    if why:
        raise ConfigError(f"{why}; on {socket.gethostname()} name a folder of the node's own disk, or null")
    return path


@dataclass(frozen=True)
class _Staging:
    """One data set's copy on this node."""

    data_dir: Path
    dataset: str
    manifests: dict[str, Manifest]  # by split
    stage_dir: str  # as the user wrote it
    folder: Path
    abandoned: threading.Event  # set when nobody waits for the copy any more

    def run(self) -> None:
        """See that the copy is there: find it, make it, or wait for the process that makes it."""
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        self.folder.parent.mkdir(mode=0o700, exist_ok=True)  # others use the node, too, and the data may not be for them
        claims = self.folder / "claims"
        for folder in (self.folder, self.folder / self.dataset, claims):
            folder.mkdir(exist_ok=True)
        while self._missing():
            last = max((int(path.name) for path in claims.iterdir() if path.name.isdecimal()), default=0)
            holder = self._holder(claims / str(last)) if last else None
            claim = claims / str(last + 1)  # of several that found the last one given up, one can make it
            if holder is not None:
                _say(f"{self.dataset}: process {holder.pid} copies it to {self.folder}; waiting for it")
                while self._holder(claims / str(last)):
                    self._pause(POLL_S)
            elif create_exclusive(claim, ProcessId.mine().model_dump_json()):
                try:
                    self._copy(claim.name)
                finally:
                    _given_up(claim).touch()
                break
        _say(f"{self.dataset}: is read from its copy in {self.folder} on {socket.gethostname()}")

    def bytes_of(self, splits: Sequence[str]) -> int:
        """What these splits take on the disk."""
        return sum(self.manifests[split].file_size_bytes for split in splits)

    def refusal(self, what: str) -> ConfigError:
        """The error for a copy that cannot be made."""
        mend = f"set runtime.stage_dir=null to read from {self.data_dir}, or name a folder on another disk"
        return ConfigError(f"runtime.stage_dir={self.stage_dir}: {what}; {mend}")

    def _pause(self, seconds: float = 0.0) -> None:
        """Wait; ends this thread if nobody waits for the copy any more."""
        if self.abandoned.wait(seconds):
            raise CancelledError

    def _holder(self, claim: Path) -> ProcessId | None:
        """The process that has a claim; None if it has given it up, or is dead."""
        if _given_up(claim).exists():
            return None
        try:
            document = read_json(claim)
            holder = None if document is None else ProcessId.model_validate(document)
        except (RunError, ValidationError) as error:
            raise self.refusal(f"{claim} does not say which process copies; delete it if none does") from error
        if holder is None or holder.alive() is False:
            return None
        if holder.alive() is None:
            raise self.refusal(
                f"process {holder.pid} on {holder.host} copies, says {claim}, and cannot be seen from {socket.gethostname()}: "
                "each node needs a disk of its own for this (if there is no such process, delete that file)"
            )
        return holder

    def _missing(self) -> list[str]:
        """The splits without a copy, or with one that can be seen to be damaged without reading all of it."""
        return [split for split in SPLITS if not self._is_there(split)]

    def _is_there(self, split: str) -> bool:
        try:
            with Beton.open(beton_path(self.folder, self.dataset, split)) as copy:
                return copy.manifest == self.manifests[split]
        except (BetonError, OSError):
            return False

    def _copy(self, claim: str) -> None:
        """Copy what is missing; only the holder of the claim does."""
        splits = self._missing()  # the last holder may have been ready just now
        for split in splits:  # what is damaged goes first: there may not be room for both
            for path in beton_path(self.folder, self.dataset, split).parent.glob(f"{split}.*"):
                path.unlink()
        needed, disk = self.bytes_of(splits) * (1 + SPARE), os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise self.refusal(
                f"{self.dataset} needs {_gib(needed)} below {self.folder.parent} on {socket.gethostname()} "
                f"({100 * SPARE:.0f} % to spare), {_gib(free)} are free"
            )
        for split in splits:
            self._copy_split(split, claim)

    def _copy_split(self, split: str, claim: str) -> None:
        """Copy a .beton and, last of all, its manifest, which says that the copy is whole."""
        source, target = (beton_path(folder, self.dataset, split) for folder in (self.data_dir, self.folder))
        Beton.open(source, self.dataset, split).close()  # what is damaged itself is not worth the copying
        manifest, partial = self.manifests[split], target.with_name(f"{target.name}.{claim}")
        size, began_s = manifest.file_size_bytes, time.monotonic()
        _say(f"{self.dataset}: copying {source} ({_gib(size)}) to {target}")
        try:
            with source.open("rb") as reader, partial.open("xb") as writer:
                os.posix_fallocate(writer.fileno(), 0, size)  # a disk that is too full says so now, not in the middle
                copied = _Progress(f"{self.dataset}/{split} copied", size)
                with closing(_copy_chunks(reader.fileno(), writer.fileno(), size)) as chunks:
                    for count in chunks:
                        copied.add(count)
                        self._pause()
                os.fsync(writer.fileno())
                os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # checked is what the disk has
            copied_s = time.monotonic() - began_s
            if self._content_sha256(partial, split) != manifest.beton_sha256:
                raise self.refusal(
                    f"the copy of {source} is not what its manifest says; `vitpa prep {self.dataset} --verify` tells "
                    "whether it is the original that is damaged"
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        write_json(manifest_path(target), manifest.model_dump(mode="json"))
        checked_s = time.monotonic() - began_s - copied_s
        _say(f"{self.dataset}: {target} copied in {copied_s:.1f} s, checked in {checked_s:.1f} s")

    def _content_sha256(self, path: Path, split: str) -> str:
        """The hash of the samples in a copy, or why there is none."""
        manifest = self.manifests[split]
        bytes_per_sample = manifest.file_size_bytes / manifest.num_samples
        checked = _Progress(f"{self.dataset}/{split} checked", manifest.file_size_bytes)

        def count(samples: int) -> None:
            checked.add(samples * bytes_per_sample)
            self._pause()

        try:
            with BetonFile(path) as copy:
                return copy.content_sha256(count)
        except BetonError as error:
            return str(error)


class _Progress:
    """A line every ten seconds: how far, how fast and how long still. On a terminal, too: each node prints its own."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._began_s = self._printed_s = time.monotonic()

    def add(self, count: float) -> None:
        """So many bytes more are done."""
        self._done += count
        now_s = time.monotonic()
        if now_s - self._printed_s >= LINE_EVERY_S:
            self._printed_s = now_s
            rate = max(1.0, self._done) / (now_s - self._began_s)
            left_s = (self._total - self._done) / rate
            far = f"{self._done / GIB:.1f} of {_gib(self._total)}"
            _say(f"{self._what}: {far}, {rate / 2**20:,.0f} MiB/s, {left_s:.0f} s left")


def _copy_chunks(source: int, target: int, size: int) -> Generator[int, None, None]:
    """Copy `size` bytes from one open file to another, by several threads; yields the number of bytes of each chunk."""
    pool = ThreadPoolExecutor(COPIERS, thread_name_prefix="copy")
    try:
        yield from pool.map(lambda start: _copy_chunk(source, target, start, size), range(0, size, CHUNK_BYTES))
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_chunk(source: int, target: int, start: int, size: int) -> int:
    data = memoryview(os.pread(source, min(CHUNK_BYTES, size - start), start))
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], start + done)
    return done  # less than asked for if the source has been cut meanwhile, which the check of the copy finds


def _given_up(claim: Path) -> Path:
    """There when the holder of a claim does not need it any more."""
    return claim.with_suffix(".given_up")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
