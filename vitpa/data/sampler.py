"""What a batch is, and which sample goes into which batch of which process: pure functions of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vitpa.data.rng import Purpose, key, permutation, random_bits

SHARD_BYTES = 2 << 20  # a disk or a network file system reads that at once nearly as fast as it can read at all
SHARD_SAMPLES = 16  # a shard is a multiple of it: `vitpa prep` writes so many samples at least one after another
BUFFER_BYTES = 2 << 30  # of a shuffle buffer: the page cache holds two of them: the one in use and the next


class Batch(NamedTuple):
    """Images of one size with what belongs to them, on the device that trains; not augmented, not normalised."""

    images: UInt8[Tensor, "B 3 H W"]
    samples: Int64[Tensor, " B"]  # their numbers in the data set; -1 for no image, which fills up a batch of an evaluation
    labels: Int64[Tensor, " B"]  # -1 for no image


class Shards(NamedTuple):
    """How the order `quasi_random` cuts a data set: into shards of samples with consecutive numbers, which lie together.

    It follows from the sizes of the images alone: files with the same content are trained on in the same order, though
    FFCV's writers, which share the work as it comes, may have put their pages in another.
    """

    size: int  # samples of a shard; the last one may have fewer
    num_buffers: int  # shuffle buffers of an epoch; each takes its share of the shards

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Shards:
        """Shards of about SHARD_BYTES and buffers of at most about BUFFER_BYTES for images of `sizes` (N,), stored bytes."""
        total_bytes = int(sizes.sum())
        parts = max(1, round(SHARD_BYTES * len(sizes) / total_bytes / SHARD_SAMPLES))
        return cls(SHARD_SAMPLES * parts, -(-total_bytes // BUFFER_BYTES))


def labels_of(labels: Int64[np.ndarray, " N"], samples: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """The labels of `samples`, out of all `labels`, on the CPU; -1 for the sample -1."""
    return torch.where(samples < 0, -1, torch.from_numpy(labels[samples.numpy()]))


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps in an epoch. The last, incomplete batch is left out: other samples in every epoch."""
    return num_samples // global_batch_size


def shuffle_buffers(seed: int, epoch: int, num_samples: int, shards: Shards) -> Int64[Tensor, " num_samples"]:
    """In which shuffle buffer of the epoch each sample comes: the same for all samples of a shard.

    Of each `shards.num_buffers` shards that follow one another every buffer has one, at random: its samples come from all
    parts of the file, hence of all classes, although files are in the order of the classes.
    """
    num_shards = -(-num_samples // shards.size)
    shape = -(-num_shards // shards.num_buffers), shards.num_buffers
    bits = random_bits(key(seed, Purpose.SHUFFLE_BUFFER, epoch), torch.arange(shape[0] * shape[1])).view(shape)
    return bits.argsort(dim=1, stable=True).flatten().repeat_interleave(shards.size)[:num_samples]


def epoch_order(seed: int, epoch: int, num_samples: int, shards: Shards | None = None) -> Int64[Tensor, " num_samples"]:
    """The samples of an epoch one after another.

    A random order; with `shards` (`quasi_random`) cut into shuffle buffers, of which each has whole shards in random order
    of their samples. With one buffer it is the random order itself.
    """
    order = permutation(key(seed, Purpose.ORDER, epoch), num_samples)
    if shards is None:
        return order
    return order[shuffle_buffers(seed, epoch, num_samples, shards)[order].argsort(stable=True)]


def train_batches(
    *,
    seed: int,
    epoch: int,
    num_samples: int,
    shards: Shards | None = None,
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
    order = epoch_order(seed, epoch, num_samples, shards)
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
