"""Copying the .beton files of a data set to a disk of the node itself, once per node, before a training reads them.

A copy lies in a folder that is named by what the manifests say: all runs on those data share it, other data have another.
Who copies holds the last of numbered claims there.
Only what a copy has left unfinished or damaged is ever deleted here.

Other users of the node can write to its disk, too. So the folders of a copy are ours alone (private_folder.py), and a copy
is read only if its content was compared with the hash in its manifest by one of our own processes: that leaves a stamp,
which counts as long as inode, size and times of the file are those that it names.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from vitpa.arguments import ConfigError, expand_path
from vitpa.data.beton import Beton, BetonFile
from vitpa.data.manifest import BetonError, Manifest, beton_path, manifest_path
from vitpa.data.private_folder import NotOursError, PrivateFolder, is_private_file
from vitpa.datasets import SPLITS
from vitpa.distributed import Group
from vitpa.documents import DocumentError, parse_json
from vitpa.records import ProcessId, next_claim, to_json

LOGGER = logging.getLogger(__name__)
POLL_S = 1.0
LINE_EVERY_S = 10.0
COPIERS = 4  # threads; one alone keeps neither a disk nor a network busy
CHUNK_BYTES = 4 << 20
SPARE = 0.05  # of what is copied: room that is left to others
STAMPS = ".checked"  # no data set can be called so
GIB = 2**30


def staged(data_dir: Path, dataset: str, stage_dir: str, group: Group) -> Path:
    """The folder to read a data set from instead of `data_dir`: its copy on this node, which is made if it is not there.

    Called by all processes of a run at once; the first one of each node copies, or waits for another run that does. The
    content of a copy is compared with the hash in its manifest when it is made, and when its file has changed since then.

    Args:
        data_dir: The folder with `<dataset>/train.beton` and so on.
        dataset: The data set's name.
        stage_dir: A folder on a disk of the node; `~` and variables such as $TMPDIR are expanded on the node.
        group: The processes of the run.

    Returns:
        a folder to be used like `data_dir`, by `open_copy`.

    Raises:
        ConfigError: `stage_dir` cannot be used, another user has written there, or the copy does not fit; in all processes,
            even if it is so on one node only.
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
        answers = group.all_gather((done, failure))
        failures = [each for _, each in answers if each]
        if failures and not failure:
            raise ConfigError(failures[0])
        if failures or all(each for each, _ in answers):
            return work.result()


def _stage(data_dir: Path, dataset: str, stage_dir: str, abandoned: threading.Event, *, copies: bool) -> Path:
    """What one process does: find the folder and, if it is the one that `copies`, see that the copy is there."""
    manifests = {split: Manifest.read(manifest_path(beton_path(data_dir, dataset, split))) for split in SPLITS}
    names = hashlib.sha256("".join(manifest.model_dump_json() for manifest in manifests.values()).encode()).hexdigest()
    disk = Path(os.path.realpath(expanded(stage_dir)))  # once; Path.resolve raises RuntimeError for a link to itself
    folder = disk / f"vitpa-{os.geteuid()}" / f"{dataset}-{names[:16]}"
    staging = _Staging(data_dir, dataset, manifests, stage_dir, folder, abandoned)
    if copies:
        try:
            staging.run()
        except NotOursError as error:
            raise staging.refusal(f"{error} (on {socket.gethostname()})") from error
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


def open_copy(folder: Path, dataset: str, split: str) -> Beton:
    """Open a split in the folder that `staged` has returned.

    Raises:
        ConfigError: another user has written there.
        BetonError: it was changed, or removed, since it was checked.
    """
    try:
        with _Folders.open(folder, dataset) as folders:
            beton = Beton.open(beton_path(folder, dataset, split), dataset, split, folders.data.descriptor)
            if not folders.was_checked(split, beton.status, beton.manifest):
                raise BetonError(f"{beton.path}: was changed after it was checked; start again: the copy is checked again")
    except NotOursError as error:
        raise ConfigError(f"runtime.stage_dir: {error}") from error
    beton.is_copy = True
    return beton


def _stamp_of(status: os.stat_result, manifest: Manifest) -> dict[str, str | int]:
    """Which file was checked, against which hash. Without its times it could be another one of the same size."""
    file = {"inode": status.st_ino, "size_bytes": status.st_size}
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    return {"beton_sha256": manifest.beton_sha256, **file, **times}


@dataclass(frozen=True)
class _Folders:
    """The folders of a copy, opened."""

    data: PrivateFolder  # the .beton files and their manifests
    claims: PrivateFolder
    stamps: PrivateFolder  # <split>.json

    @classmethod
    @contextmanager
    def open(cls, folder: Path, dataset: str) -> Iterator[_Folders]:
        """Open the files of the copy in `folder`, or make them; raises as `PrivateFolder.open`."""
        with ExitStack() as stack:
            above = stack.enter_context(PrivateFolder.open(folder.parent))
            copy = stack.enter_context(above.folder(folder.name))
            yield cls(*(stack.enter_context(copy.folder(name)) for name in (dataset, "claims", STAMPS)))

    def was_checked(self, split: str, status: os.stat_result, manifest: Manifest) -> bool:
        """Whether the content of this file, of ours, was compared with the hash in its manifest."""
        try:
            stamp = parse_json(self.stamps.read(f"{split}.json") or b"")
        except (DocumentError, NotOursError):
            return False
        return is_private_file(status) and bool(stamp == _stamp_of(status, manifest))


@dataclass
class _Staging:
    """One data set's copy on this node."""

    data_dir: Path
    dataset: str
    manifests: dict[str, Manifest]  # by split
    stage_dir: str  # as the user wrote it
    folder: Path
    abandoned: threading.Event  # set when nobody waits for the copy any more
    folders: _Folders = field(init=False)  # while `run` runs

    def run(self) -> None:
        """See that the copy is there: find it, make it, or wait for the process that makes it."""
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        with _Folders.open(self.folder, self.dataset) as self.folders:
            claims = self.folders.claims
            while self._missing():
                claim = str(next_claim(claims.names(), self._waited_for))
                if claim != "0" and claims.create(claim, ProcessId.mine().model_dump_json()):
                    try:
                        self._copy(claim)
                    finally:
                        claims.create(_given_up(claim), "")
                    break
        LOGGER.info(f"{self.dataset}: is read from its copy in {self.folder} on {socket.gethostname()}")

    def bytes_of(self, splits: Sequence[str]) -> int:
        """What these splits take on the disk."""
        return sum(self.manifests[split].file_size_bytes for split in splits)

    def refusal(self, what: str) -> ConfigError:
        """The error for a copy that cannot be made."""
        hint = f"set runtime.stage_dir=null to read from {self.data_dir}, or name a folder on another disk"
        return ConfigError(f"runtime.stage_dir={self.stage_dir}: {what}; {hint}")

    def _pause(self, seconds: float = 0.0) -> None:
        """Wait; ends this thread if nobody waits for the copy any more."""
        if self.abandoned.wait(seconds):
            raise CancelledError

    def _waited_for(self, number: int) -> bool:
        """Whether somebody had a claim, until now."""
        if holder := self._holder(number):
            LOGGER.info(f"{self.dataset}: process {holder.pid} copies it to {self.folder}; waiting for it")
            while self._holder(number):
                self._pause(POLL_S)
        return holder is not None

    def _holder(self, number: int) -> ProcessId | None:
        """The process that has a claim; None if it has given it up, or is dead."""
        claims, claim = self.folders.claims, self.folder / "claims" / str(number)
        if claims.status(_given_up(claim.name)):
            return None
        try:
            document = claims.read(claim.name)
            holder = None if document is None else ProcessId.model_validate_json(document)
        except (NotOursError, ValidationError) as error:
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
        """The splits without a copy that has been checked and is as it was then."""
        return [split for split in SPLITS if not self._is_there(split, checked=True)]

    def _is_there(self, split: str, *, checked: bool) -> bool:
        """Whether a copy has the right size, tables and manifest, and if asked for a stamp that is still right."""
        path, folders = beton_path(self.folder, self.dataset, split), self.folders
        try:
            with Beton.open(path, dir_fd=folders.data.descriptor) as copy:
                same = copy.manifest == self.manifests[split] and is_private_file(copy.status)
                return same and (not checked or folders.was_checked(split, copy.status, copy.manifest))
        except (BetonError, OSError):
            return False

    def _copy(self, claim: str) -> None:
        """Copy what is missing; only the holder of the claim does."""
        data = self.folders.data
        missing = self._missing()  # the last holder may have been ready just now
        splits = [split for split in missing if not self._was_whole(split)]
        for split in splits:  # what is damaged goes first: there may not be room for both
            for name in data.names():
                if name.startswith(f"{split}."):
                    data.remove(name)
        needed, disk = self.bytes_of(splits) * (1 + SPARE), os.fstatvfs(data.descriptor)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise self.refusal(
                f"{self.dataset} needs {_gib(needed)} below {self.folder.parent} on {socket.gethostname()} "
                f"({100 * SPARE:.0f} % to spare), {_gib(free)} are free"
            )
        for split in splits:
            self._copy_split(split, claim)

    def _was_whole(self, split: str) -> bool:
        """Check a copy that is there without a stamp, or was touched since."""
        if not self._is_there(split, checked=False):
            return False
        path = beton_path(self.folder, self.dataset, split)
        LOGGER.info(f"{self.dataset}: checking {path}, which is there already")
        if self._content_sha256(path, split) != self.manifests[split].beton_sha256:
            LOGGER.info(f"{self.dataset}: {path} is not what its manifest says; it is made again")
            return False
        self._stamp(split)
        return True

    def _copy_split(self, split: str, claim: str) -> None:
        """Copy a .beton, its manifest and, last of all, the stamp, which says that the copy is whole."""
        source, target = (beton_path(folder, self.dataset, split) for folder in (self.data_dir, self.folder))
        Beton.open(source, self.dataset, split).close()  # what is damaged itself is not worth the copying
        data, manifest, partial = self.folders.data, self.manifests[split], target.with_name(f"{target.name}.{claim}")
        size, began_s = manifest.file_size_bytes, time.monotonic()
        LOGGER.info(f"{self.dataset}: copying {source} ({_gib(size)}) to {target}")
        try:
            with source.open("rb") as reader, os.fdopen(data.new_file(partial.name), "wb") as writer:
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
            data.rename(partial.name, target.name)
        finally:
            data.remove(partial.name)
        data.write(manifest_path(target).name, to_json(manifest.model_dump(mode="json")))
        self._stamp(split)
        checked_s = time.monotonic() - began_s - copied_s
        LOGGER.info(f"{self.dataset}: {target} copied in {copied_s:.1f} s, checked in {checked_s:.1f} s")

    def _stamp(self, split: str) -> None:
        """Write down that the content of a split was checked."""
        status = self.folders.data.status(f"{split}.beton")
        assert status is not None
        self.folders.stamps.write(f"{split}.json", to_json(_stamp_of(status, self.manifests[split])))

    def _content_sha256(self, path: Path, split: str) -> str:
        """The hash of the samples in a copy, or why there is none."""
        manifest = self.manifests[split]
        bytes_per_sample = manifest.file_size_bytes / manifest.num_samples
        checked = _Progress(f"{self.dataset}/{split} checked", manifest.file_size_bytes)

        def count(samples: int) -> None:
            checked.add(samples * bytes_per_sample)
            self._pause()

        try:
            with BetonFile(path, self.folders.data.descriptor) as copy:
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
            LOGGER.info(f"{self._what}: {far}, {rate / 2**20:,.0f} MiB/s, {left_s:.0f} s left")


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


def _given_up(claim: str) -> str:
    """There when the holder of a claim does not need it any more."""
    return f"{claim}.given_up"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
