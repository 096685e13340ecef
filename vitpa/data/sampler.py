"""What a batch is, and which sample goes into which batch of which process: pure functions of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitpa.data.rng import Purpose, key, permutation, random_bits

BLOCK_BYTES = 2 << 20  # a disk or a network file system reads that at once nearly as fast as it can read at all
BLOCK_SAMPLES = 16  # a block is a multiple of it: `vitpa prep` writes so many samples at least one after another
WINDOW_BYTES = 2 << 30  # the page cache holds two of them: the one in use and the next


class Batch(NamedTuple):
    """Images of one size with what belongs to them, on the device that trains; not augmented, not normalised.

    Attributes:
        images: (B, 3, H, W) uint8.
        samples: (B,) int64, their numbers in the data set; -1 for no image, which fills up a batch of an evaluation.
        labels: (B,) int64; -1 for no image.
    """

    images: Tensor
    samples: Tensor
    labels: Tensor


class Blocks(NamedTuple):
    """How the order `quasi_random` cuts a data set: into blocks of samples with consecutive numbers, which lie together.

    It follows from the sizes of the images alone: files with the same content are trained on in the same order, though
    FFCV's writers, which share the work as it comes, may have put their pages in another.

    Attributes:
        size: samples of a block; the last one may have fewer.
        num_windows: windows of an epoch; each takes its share of the blocks.
    """

    size: int
    num_windows: int

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Blocks:
        """Blocks of about BLOCK_BYTES and windows of at most about WINDOW_BYTES for images of `sizes` (N,), stored bytes."""
        total_bytes = int(sizes.sum())
        parts = max(1, round(BLOCK_BYTES * len(sizes) / total_bytes / BLOCK_SAMPLES))
        return cls(BLOCK_SAMPLES * parts, -(-total_bytes // WINDOW_BYTES))


def labels_of(labels: npt.NDArray[np.int64], samples: Tensor) -> Tensor:
    """Of all `labels` (N,) those of `samples` (B,) on the CPU: (B,) int64, -1 for the sample -1."""
    return torch.where(samples < 0, -1, torch.from_numpy(labels[samples.numpy()]))


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps in an epoch. The last, incomplete batch is left out: other samples in every epoch."""
    return num_samples // global_batch_size


def windows(seed: int, epoch: int, num_samples: int, blocks: Blocks) -> Tensor:
    """In which window of the epoch each sample comes: (num_samples,) int64, the same for all samples of a block.

    Of each `blocks.num_windows` blocks that follow one another every window has one, at random: its samples come from all
    parts of the file, hence of all classes, although files are in the order of the classes.
    """
    num_blocks = -(-num_samples // blocks.size)
    shape = -(-num_blocks // blocks.num_windows), blocks.num_windows
    bits = random_bits(key(seed, Purpose.WINDOW, epoch), torch.arange(shape[0] * shape[1])).view(shape)
    return bits.argsort(dim=1, stable=True).flatten().repeat_interleave(blocks.size)[:num_samples]


def epoch_order(seed: int, epoch: int, num_samples: int, blocks: Blocks | None = None) -> Tensor:
    """The samples of an epoch one after another: (num_samples,) int64.

    A random order; with `blocks` (`quasi_random`) cut into windows, of which each has whole blocks in random order of their
    samples. With one window it is the random order itself.
    """
    order = permutation(key(seed, Purpose.ORDER, epoch), num_samples)
    if blocks is None:
        return order
    return order[windows(seed, epoch, num_samples, blocks)[order].argsort(stable=True)]


def train_batches(
    *,
    seed: int,
    epoch: int,
    num_samples: int,
    blocks: Blocks | None = None,
    global_batch_size: int,
    accum_steps: int,
    rank: int,
    world_size: int,
    start_step: int,
) -> Iterator[list[Tensor]]:
    """The sample indices of this process, step by step from `start_step` of the epoch.

    Yields:
        for each optimiser step a list of `accum_steps` int64 tensors of global_batch_size / (accum_steps * world_size).
        Together the processes see the same global batch whatever their number.
    """
    order = epoch_order(seed, epoch, num_samples, blocks)
    for step in range(start_step, steps_per_epoch(num_samples, global_batch_size)):
        batch = order[step * global_batch_size : (step + 1) * global_batch_size]
        yield list(batch.view(accum_steps, world_size, -1)[:, rank].unbind())


def eval_batches(*, num_samples: int, batch_size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """The sample indices of this process for an exact evaluation: every sample once over all processes.

    Yields:
        int64 tensors of exactly `batch_size`; the last one is filled up with -1, which stands for "no image".
    """
    for batch in torch.arange(num_samples)[rank::world_size].split(batch_size):
        yield torch.nn.functional.pad(batch, (0, batch_size - len(batch)), value=-1)
