"""Reading a .beton that the node's memory does not hold: shuffle buffers of `quasi_random`, one ahead of the training.

The decoders take a buffer's images one by one, in random order. Threads read all that lies together at once before, into the
kernel's page cache, where the decoders find it. To ask the kernel for it by posix_fadvise (WILLNEED) would not do: of a
request it reads no more than the larger of the device's read-ahead and best request: 1.25 of 4 MiB where it was tried (Linux,
mm/readahead.c, `force_page_cache_ra`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from vitpa.data.beton import BetonFile
from vitpa.data.manifest import BetonError, Ints

READERS = 4  # threads; one alone keeps neither a disk nor a network busy
READ_BYTES = 4 << 20  # at a time, at most

Step = TypeVar("Step")


def read_ahead(
    steps: Iterable[Step], beton: BetonFile, buffers: Ints, *, batch_size: int, start_step: int, share: tuple[int, int]
) -> Generator[Step, None, None]:
    """Each of `steps` as it is, when the buffers of its samples have been read; the buffer after them is read meanwhile.

    Args:
        steps: What stands for the steps of an epoch from `start_step` on.
        beton: The file.
        buffers: (N,) int64, in which shuffle buffer of the epoch each sample comes: 0, 1, ...; -1 for those that do not come.
        batch_size: Samples of a step, of all processes.
        start_step: Number of the first of `steps` in the epoch.
        share: (i, n) if this is process i of n on the node; each reads its part of a buffer.

    Raises:
        OSError: the file cannot be read.
        BetonError: it has become shorter.
    """
    ends = np.cumsum(np.bincount(buffers[buffers >= 0]))  # positions in the epoch
    begun = ready = int(np.searchsorted(ends, start_step * batch_size, side="right"))  # buffers
    reading: deque[list[Future[None]]] = deque()
    with beton.path.open("rb") as file, ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead") as pool:
        try:
            for number, step in enumerate(steps, start_step):
                last = int(np.searchsorted(ends, min((number + 1) * batch_size, ends[-1]) - 1, side="right"))
                while begun < min(last + 2, len(ends)):
                    parts = extents(beton, np.flatnonzero(buffers == begun))[share[0] :: share[1]]
                    reading.append([pool.submit(_read, beton, file.fileno(), *part) for part in parts])
                    begun += 1
                while ready <= last:
                    for part in reading.popleft():
                        part.result()
                    ready += 1
                yield step
        finally:
            pool.shutdown(cancel_futures=True)


def extents(beton: BetonFile, samples: Ints) -> list[tuple[int, int]]:
    """Where the stored bytes of `samples` (n,) lie: (begin, end) in the file's order, each of READ_BYTES at most.

    Images that lie one after another, as the images of a shard do, are one extent.
    """
    samples = samples[np.argsort(beton.offsets[samples])]
    begins, ends = beton.offsets[samples], beton.offsets[samples] + beton.sizes[samples]
    apart = begins[1:] != ends[:-1]
    runs = zip(begins[np.append(True, apart)].tolist(), ends[np.append(apart, True)].tolist(), strict=True)
    return [(at, min(at + READ_BYTES, end)) for begin, end in runs for at in range(begin, end, READ_BYTES)]


def _read(beton: BetonFile, file: int, begin: int, end: int) -> None:
    """Have bytes `begin` to `end` read into the page cache."""
    while begin < end:
        count = len(os.pread(file, end - begin, begin))
        if not count:
            raise BetonError(f"{beton.path}: was cut at byte {begin} while it was read; restore it")
        begin += count
