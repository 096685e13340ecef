"""Windows read ahead of the training: all of them, each byte once on a node, not before their time, and no thread left."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep.prep import Options, prepare
from vitpa.data import prefetch
from vitpa.data.beton import Beton, BetonFile
from vitpa.data.manifest import BetonError, beton_path
from vitpa.data.prefetch import extents
from vitpa.data.sampler import SHARD_SAMPLES, Shards, epoch_order, shuffle_buffers

NUM_WINDOWS, BATCH_SIZE = 9, 64
BLOCKS = Shards(16, NUM_WINDOWS)


@pytest.fixture(scope="module")
def train(digits: Path) -> Beton:
    """1,437 images of 192 bytes."""
    return Beton.open(beton_path(digits, "digits", "train"))


@pytest.fixture
def bytes_read(train: Beton, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """How often each byte of the file has been read."""
    counts, pread, turn = np.zeros(train.path.stat().st_size, np.int64), os.pread, threading.Lock()

    def counting(file: int, count: int, offset: int) -> bytes:
        time.sleep(0.005)  # whoever does not wait for it is found out
        found = pread(file, min(count, 500), offset)  # less than asked for, as a file system may
        with turn:
            counts[offset : offset + len(found)] += 1
        return found

    monkeypatch.setattr(os, "pread", counting)
    return counts


def ahead(beton: BetonFile, *, start_step: int = 0, share: tuple[int, int] = (0, 1)) -> Generator[int, None, None]:
    """The numbers of the steps of epoch 1."""
    steps = range(start_step, len(beton) // BATCH_SIZE)
    buffer_of = shuffle_buffers(0, 1, len(beton), BLOCKS).numpy()
    return prefetch.read_ahead(steps, beton, buffer_of, batch_size=BATCH_SIZE, start_step=start_step, share=share)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def of_samples(beton: BetonFile, samples: np.ndarray) -> np.ndarray:
    """The numbers of their bytes in the file."""
    return np.concatenate([np.arange(0), *(np.arange(beton.sizes[i]) + beton.offsets[i] for i in samples)])


@pytest.mark.parametrize("start_step", [0, 1, 13])
def test_a_step_comes_when_its_windows_have_been_read_and_one_more_is_begun(
    train: Beton, bytes_read: np.ndarray, start_step: int
) -> None:
    order, buffer_of = epoch_order(0, 1, len(train), BLOCKS).numpy(), shuffle_buffers(0, 1, len(train), BLOCKS).numpy()
    found = []
    for step in ahead(train, start_step=start_step):
        last = buffer_of[order[(step + 1) * BATCH_SIZE - 1]]
        first = buffer_of[order[start_step * BATCH_SIZE]]
        due = of_samples(train, np.flatnonzero((first <= buffer_of) & (buffer_of <= last)))
        assert (bytes_read[due] == 1).all()
        others = of_samples(train, np.flatnonzero((buffer_of < first) | (buffer_of > last + 1)))
        assert not bytes_read[others].any()
        found.append(step)
    assert found == list(range(start_step, 22))
    assert not readers()


def test_of_some_samples_the_last_step_being_short(train: Beton, bytes_read: np.ndarray) -> None:
    buffer_of = np.full(len(train), -1)
    buffer_of[300:500] = np.arange(200) // 70
    steps = prefetch.read_ahead(range(4), train, buffer_of, batch_size=60, start_step=0, share=(0, 1))
    for step in steps:
        due = of_samples(train, np.arange(300, 300 + min(200, 60 * (step + 1))))
        assert (bytes_read[due] == 1).all()
    assert bytes_read.sum() == len(of_samples(train, np.arange(300, 500)))


def test_the_processes_of_a_node_share_the_reading(train: Beton, bytes_read: np.ndarray) -> None:
    for process in range(3):
        assert list(ahead(train, share=(process, 3))) == list(range(22))
    images = of_samples(train, np.arange(len(train)))
    assert (bytes_read[images] == 1).all()
    assert bytes_read.sum() == len(images)  # and nothing else


def test_what_lies_together_is_read_at_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beton = Beton.open(beton_path(photos, "photos", "train"))
    monkeypatch.setattr(prefetch, "READ_BYTES", 10**9)
    in_order = np.argsort(beton.offsets)
    (whole,) = extents(beton, np.arange(12))
    assert whole == (beton.offsets.min(), (beton.offsets + beton.sizes).max())
    without = np.delete(in_order, 5)[::-1]  # in any order
    assert extents(beton, without) == [
        (whole[0], beton.offsets[in_order[5]]),
        (beton.offsets[in_order[6]], whole[1]),
    ]
    monkeypatch.setattr(prefetch, "READ_BYTES", 1000)
    pieces = extents(beton, np.arange(12))
    assert {end - begin for begin, end in pieces[:-1]} == {1000}
    assert (pieces[0][0], pieces[-1][1]) == whole
    assert all(left[1] == right[0] for left, right in pairwise(pieces))


def test_a_file_that_becomes_shorter_is_one_clear_error(train: Beton, tmp_path: Path) -> None:
    path = tmp_path / "digits" / "train.beton"
    path.parent.mkdir()
    shutil.copy(train.path, path)
    beton = BetonFile(path)
    os.truncate(path, int(np.median(beton.offsets)))
    with pytest.raises(BetonError, match=r"train\.beton: was cut at byte \d+ while it was read; restore it$"):
        list(ahead(beton))
    assert not readers()


def test_an_error_of_the_disk_comes_through(train: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_file: int, _count: int, _offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match="Input/output error"):
        list(ahead(train))
    assert not readers()


def test_leaving_early_reads_nothing_more(train: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    count, pread = [0], os.pread

    def slow(file: int, size: int, offset: int) -> bytes:
        count[0] += 1
        time.sleep(0.05)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    monkeypatch.setattr(prefetch, "READERS", 1)
    steps = ahead(train)
    next(steps)
    assert len(readers()) == 1
    before = count[0]
    steps.close()
    assert not readers()
    assert count[0] <= before + 5  # of the 10 shards of the buffer after


@pytest.mark.slow
def test_blocks_lie_together_though_several_writers_made_the_file(train: Beton, tmp_path: Path) -> None:
    beton = train
    for attempt in range(10):  # on a busy machine one writer may have done all before the others have started
        out = tmp_path / str(attempt)
        assert prepare(Options(dataset="digits", out=out, workers=3), lambda _: None)
        beton = Beton.open(beton_path(out, "digits", "train"))
        assert beton.manifest.beton_sha256 == train.manifest.beton_sha256
        if not np.array_equal(beton.offsets, train.offsets):
            break
    assert not np.array_equal(beton.offsets, train.offsets)
    assert Shards.of(beton.sizes) == Shards.of(train.sizes)  # equal content, equal order
    for first in range(0, len(beton), SHARD_SAMPLES):
        assert len(extents(beton, np.arange(first, min(first + SHARD_SAMPLES, len(beton))))) == 1
