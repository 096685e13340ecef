"""What a batch is, and which sample goes into which batch of which process: pure functions of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitpa.data.counter_rng import Purpose, key, permutation


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


def labels_of(labels: npt.NDArray[np.int64], samples: Tensor) -> Tensor:
    """Of all `labels` (N,) those of `samples` (B,) on the CPU: (B,) int64, -1 for the sample -1."""
    return torch.where(samples < 0, -1, torch.from_numpy(labels[samples.numpy()]))


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps in an epoch. The last, incomplete batch is left out: other samples in every epoch."""
    return num_samples // global_batch_size


def train_batches(
    *,
    seed: int,
    epoch: int,
    num_samples: int,
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
    order = permutation(key(seed, Purpose.ORDER, epoch), num_samples)
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
