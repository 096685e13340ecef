"""What happens to `vitpa prep` when processes are killed, the disk is full or nothing moves: real processes, real signals."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import PrepError
from data_prep.prep import Options, prepare
from data_prep.sources import FolderSplit
from data_prep.write import Job, Writer, WriterError
from tests.support.waiting import finish, wait_for
from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, ImageSettings, beton_path

PREP = """
import argparse, sys, data_prep.command
parser = argparse.ArgumentParser()
data_prep.command.add_parser(parser.add_subparsers(required=True))
options = parser.parse_args(["prep", *sys.argv[1:]])
sys.exit(options.run(options))
"""
MARK = "VITPA_TEST_MARK"
WORKERS = 2
Value = TypeVar("Value")


class Run:
    """A `vitpa prep` in a process of its own, whose descendants can be found also when they are orphans."""

    def __init__(self, *arguments: object, before: str = "") -> None:
        self.mark = f"{MARK}={secrets.token_hex(8)}".encode()
        self.shared_memory = set(Path("/dev/shm").iterdir())
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + PREP, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: self.mark.decode().partition("=")[2]},
        )

    def descendants(self) -> list[int]:
        """All living processes that were started by this run, itself included, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended in between
        return sorted(found)

    def workers(self) -> list[int]:
        """FFCV's worker processes; waits until they are at work."""
        return wait_for(self._workers)

    def _workers(self) -> list[int]:
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.descendants()}
        found = [pid for pid, command in commands.items() if b"data_prep.writer_process" in command][1:]  # [0]: FFCV itself
        return found if len(found) == WORKERS else []  # one alone may yet become Python's resource tracker

    def finish(self) -> tuple[int, str]:
        """Wait for the end; exit code and stderr."""
        _, errors = finish(self.process)
        return self.process.returncode, errors

    def assert_nothing_left(self) -> None:
        """No process and no shared memory."""
        wait_for(lambda: not self.descendants())
        extra = set(Path("/dev/shm").iterdir()) - self.shared_memory  # those of tests beside this one go by themselves
        wait_for(lambda: not any(path.exists() for path in extra))


@pytest.fixture
def slow_source(tmp_path: Path) -> Path:
    """200 train photos that take some 20 s to convert, and 2 small val photos."""
    for split, copies, side_px in (("train", 200, 4000), ("val", 1, 20)):
        original = tmp_path / f"{split}.png"
        Image.new("RGB", (side_px, side_px), "red").save(original, compress_level=1)
        for index in range(copies):
            path = tmp_path / "source" / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(original)
    (tmp_path / "source" / "val" / "class1").mkdir()
    (tmp_path / "val.png").rename(tmp_path / "source" / "val" / "class1" / "0.png")
    return tmp_path / "source"


@pytest.mark.slow
def test_killed_worker(slow_source: Path, tmp_path: Path) -> None:
    run = Run("pets", "--source", slow_source, "--out", tmp_path / "out", "--workers", WORKERS)
    os.kill(run.workers()[0], signal.SIGKILL)
    code, errors = run.finish()
    assert code == 1
    assert errors.endswith(
        f"vitpa prep: writing {tmp_path}/out/pets/train.beton failed: "
        "a worker process was killed by SIGKILL (out of memory?)\n"
    )
    assert not (tmp_path / "out" / "pets").exists()
    run.assert_nothing_left()


@pytest.mark.slow
def test_killed_command_and_two_at_once(slow_source: Path, tmp_path: Path) -> None:
    arguments = ("pets", "--source", slow_source, "--out", tmp_path / "out", "--workers", WORKERS)
    run = Run(*arguments)
    run.workers()
    with pytest.raises(PrepError, match=f"process {run.process.pid} is converting this data set; wait for it or end it"):
        prepare(Options("pets", source=slow_source, out=tmp_path / "out"), print)

    run.process.kill()
    run.finish()
    run.assert_nothing_left()
    train = beton_path(tmp_path / "out", "pets", "train")
    assert len(list(train.parent.glob(".train.beton.*.part"))) == 1  # there had been something to be half-finished
    with pytest.raises(BetonError, match="no such file"):
        Beton.open(train)

    for path in sorted(slow_source.glob("train/*/*.png"))[1:-1]:
        path.unlink()
    assert Run(*arguments).finish()[0] == 0
    assert len(Beton.open(train, "pets", "train")) == 2
    assert {path.name for path in train.parent.iterdir()} == {"train.beton", "train.json", "val.beton", "val.json"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "at_work"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted(number: signal.Signals, at_work: bool, slow_source: Path, tmp_path: Path) -> None:
    run = Run("pets", "--source", slow_source, "--out", tmp_path / "out", "--workers", WORKERS)
    wait_for(lambda: len(run.descendants()) > 1)
    if at_work:
        run.workers()
    run.process.send_signal(number)
    code, errors = run.finish()
    assert code == 128 + number
    assert errors == "vitpa prep: interrupted; what was not finished has been removed\n"
    assert not (tmp_path / "out" / "pets").exists()
    run.assert_nothing_left()


@pytest.mark.slow
def test_full_disk(tmp_path: Path) -> None:
    """On a disk that is full within the last page of digits/train.beton; without root a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({3 << 20}, {3 << 20}))"
    try:
        run = Run("digits", "--out", disk, before="" if mounted else limit)
        code, errors = run.finish()
        left = list(disk.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
    cause = "No space left on device; free some space and start again" if mounted else "File too large"
    assert code == 1
    assert errors.endswith(f"vitpa prep: writing {disk}/digits/train.beton failed: {cause}\n")
    assert not left
    run.assert_nothing_left()


def job(folder: Path, *names: str) -> Job:
    settings = ImageSettings(resize="none", size_px=None, jpeg_share=0.0, jpeg_quality=None)
    split = FolderSplit("train", ("all",), np.zeros(len(names), np.int64), "here", "", folder, names)
    return Job(split, folder / "train.beton", settings, workers=1, page_bytes=1 << 21)


def test_no_progress(tmp_path: Path) -> None:
    with Writer(stall_s=0.2) as writer, pytest.raises(WriterError, match="no progress for 0 s; is the disk"):
        writer.write(job(tmp_path, "any.png"), lambda samples: None)


def test_killed_writer(tmp_path: Path) -> None:
    with Writer() as writer:
        writer._process.kill()
        writer._process.wait()
        with pytest.raises(WriterError, match=r"FFCV's writer ended \(-9\): without a word"):
            writer.write(job(tmp_path, "any.png"), lambda samples: None)
