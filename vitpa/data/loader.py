"""How a step gets its batches: gathered from images that lie on the device, or put there by the host before each step.

Either way a step reads tensors that stay in their places (`inputs`, `eval_inputs`), so that a CUDA graph can hold it, and
makes batches of them by functions of tensors alone (`gather`, `gather_eval`), so that a compiler can. The samples are those of
vitpa/data/sampler.py: the same for any number of processes and of accumulation steps.

Axes: R replicas, B images of a replica in a micro-batch of this process, E images of an evaluation's batch, N of a split.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from vitpa.data.prefetch import read_ahead
from vitpa.data.resident import ResidentImages
from vitpa.data.rng import Purpose, key, permutation
from vitpa.data.sampler import Batch, Shards, eval_batches, shuffle_buffers, train_batches
from vitpa.data.stream import StreamedImages
from vitpa.distributed import Group

EVAL_BATCH_SIZE = 1000


class ResidentFeed:
    """Batches of R replicas, each with its own order, gathered from images on the device; the host has nothing to do."""

    def __init__(
        self, images: Mapping[str, ResidentImages], group: Group, *, seeds: Sequence[int], batch_size: int, accum_steps: int
    ) -> None:
        """`images` are by split; `batch_size` is B."""
        self.images, self.group, self.seeds, self.batch_size = images, group, seeds, batch_size
        self.global_batch_size = batch_size * accum_steps * group.world_size
        device = group.device
        self.order = torch.zeros(len(seeds), len(images["train"].labels), dtype=torch.int64, device=device)  # R, N
        self.next = torch.zeros((), dtype=torch.int64, device=device)  # position in the order, of this process
        self.eval_next = torch.zeros((), dtype=torch.int64, device=device)  # in the val split, of this process
        num_val = len(images["val"].labels)
        self.eval_batch_size = min(EVAL_BATCH_SIZE, -(-num_val // group.world_size))
        self.num_eval_batches = -(-num_val // (group.world_size * self.eval_batch_size))

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order of `epoch`, from its step `step` on."""
        for replica, seed in enumerate(self.seeds):
            self.order[replica] = permutation(key(seed, Purpose.ORDER, epoch), self.order.shape[1], self.order.device)
        self.next.fill_(step * self.global_batch_size + self.group.rank * self.batch_size)

    def load(self) -> None:
        """Put the next step's images on the device: they are there."""

    def inputs(self, micro: int) -> tuple[Tensor, ...]:
        """What `gather` needs for the next micro-batch, number `micro` of its step."""
        return self.order, self.next

    def gather(self, order: Int64[Tensor, "R N"], first: Int64[Tensor, ""]) -> Batch:
        """The R * B images from position `first` of the order on."""
        images = self.images["train"]
        columns = first + torch.arange(self.batch_size, device=order.device)
        samples = order.index_select(1, columns).flatten()  # R*B
        return Batch(images.images[samples], samples, images.labels[samples])

    def advance(self) -> None:
        """Go on to the next micro-batch."""
        self.next += self.group.world_size * self.batch_size

    def begin_evaluation(self) -> None:
        """Go to the first images of the val split."""
        self.eval_next.fill_(self.group.rank)

    def load_eval(self) -> None:
        """Put the next images of the evaluation on the device: they are there."""

    def eval_inputs(self) -> tuple[Tensor, ...]:
        """What `gather_eval` needs for the next batch."""
        return (self.eval_next,)

    def gather_eval(self, first: Int64[Tensor, ""]) -> Batch:
        """The E val images from `first` on, this process's share; the label -1 stands for "no image"."""
        images, stride = self.images["val"], self.group.world_size
        samples = first + stride * torch.arange(self.eval_batch_size, device=first.device)
        real = samples < len(images.labels)  # the others fill up the last batch
        samples = torch.where(real, samples, 0)
        return Batch(images.images[samples], samples, torch.where(real, images.labels[samples], -1))

    def advance_eval(self) -> None:
        """Go on to the next batch."""
        self.eval_next += self.group.world_size * self.eval_batch_size

    def positions(self) -> list[Tensor]:
        """The tensors that `advance` and `advance_eval` change."""
        return [self.next, self.eval_next]

    def close(self) -> None:
        """Nothing is open."""


class StreamedFeed:
    """Batches of one run, copied into fixed places on the device as they are decoded."""

    def __init__(
        self,
        images: Mapping[str, StreamedImages],
        group: Group,
        *,
        seed: int,
        batch_size: int,
        accum_steps: int,
        order: Literal["random", "quasi_random"] = "random",
    ) -> None:
        """`images` are by split; `batch_size` is B."""
        self.images, self.group, self.seed, self.accum_steps = images, group, seed, accum_steps
        self.shards = Shards.of(images["train"].beton.sizes) if order == "quasi_random" else None
        self.batch_size, self.global_batch_size = batch_size, batch_size * accum_steps * group.world_size
        num_val = len(images["val"].beton)
        self.eval_batch_size = min(EVAL_BATCH_SIZE, -(-num_val // group.world_size))
        self.num_eval_batches = -(-num_val // (group.world_size * self.eval_batch_size))
        self._eval_slot = _slot(self.eval_batch_size, images["val"].img_size, group.device)
        self.use_img_size(images["train"].img_size)
        self._indices: Iterator[Tensor] = iter(())
        self._train: Iterator[Batch] = iter(())
        self._eval: Iterator[Batch] = iter(())

    def use_img_size(self, img_size: int) -> None:
        """Give training images of `img_size` pixels from the next `begin_epoch` on; they have another place on the device."""
        self.img_size = img_size
        self._slots = _slot(self.accum_steps * self.batch_size, img_size, self.group.device)

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Begin to decode the images of `epoch`, from its step `step` on."""
        _close(self._train)
        _close(self._indices)
        self._indices = self.indices(epoch, step)
        self._train = self.images["train"].train_batches(self._indices, epoch, self.img_size)

    def indices(self, epoch: int, step: int) -> Generator[Tensor, None, None]:
        """The samples (B,) of each micro-batch of this process, from step `step` of `epoch` on.

        In the order `quasi_random` they come when what lies around them in the file has been read.
        """
        beton, group, shards = self.images["train"].beton, self.group, self.shards
        steps: Iterator[list[Tensor]] = train_batches(
            seed=self.seed,
            epoch=epoch,
            num_samples=len(beton),
            shards=shards,
            global_batch_size=self.global_batch_size,
            accum_steps=self.accum_steps,
            rank=group.rank,
            world_size=group.world_size,
            start_step=step,
        )
        if shards is not None and shards.num_buffers > 1:  # else all is in memory from the second epoch on
            steps = read_ahead(
                steps,
                beton,
                shuffle_buffers(self.seed, epoch, len(beton), shards).numpy(),
                batch_size=self.global_batch_size,
                start_step=step,
                share=(group.local_rank, group.local_world_size),
            )
        try:
            for micros in steps:
                yield from micros
        finally:
            _close(steps)

    def load(self) -> None:
        """Put the next step's images on the device.

        Raises:
            BetonError: an image cannot be decoded.
        """
        for micro in range(self.accum_steps):
            _copy(next(self._train), self._micro(micro))

    def inputs(self, micro: int) -> tuple[Tensor, ...]:
        """What `gather` needs for micro-batch number `micro` of the step."""
        return tuple(self._micro(micro))

    def gather(self, images: Tensor, samples: Tensor, labels: Tensor) -> Batch:
        """The images as they are."""
        return Batch(images, samples, labels)

    def advance(self) -> None:
        """Go on to the next micro-batch: it has a place of its own."""

    def begin_evaluation(self) -> None:
        """Begin to decode the val split, this process's share."""
        _close(self._eval)
        indices = eval_batches(
            num_samples=len(self.images["val"].beton),
            batch_size=self.eval_batch_size,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )
        self._eval = self.images["val"].eval_batches(indices)

    def load_eval(self) -> None:
        """Put the next images of the evaluation on the device; beyond this process's share there are none."""
        batch = next(self._eval, None)
        if batch is None:
            self._eval_slot.labels.fill_(-1)
        else:
            _copy(batch, self._eval_slot)

    def eval_inputs(self) -> tuple[Tensor, ...]:
        """What `gather_eval` needs for the next batch."""
        return tuple(self._eval_slot)

    gather_eval = gather  # the label -1 stands for "no image"

    def advance_eval(self) -> None:
        """Go on to the next batch: `load_eval` does."""

    def positions(self) -> list[Tensor]:
        """No tensor is changed by `advance` or `advance_eval`."""
        return []

    def close(self) -> None:
        """Decode and read no more."""
        _close(self._train)
        _close(self._indices)
        _close(self._eval)

    def _micro(self, micro: int) -> Batch:
        return Batch(*(each[micro * self.batch_size : (micro + 1) * self.batch_size] for each in self._slots))


Feed = ResidentFeed | StreamedFeed


def _slot(count: int, size: int, device: torch.device) -> Batch:
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=device)
    samples, labels = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    return Batch(images, samples, labels)


def _copy(batch: Batch, to: Batch) -> None:
    """By arithmetic: a GPU's engine for copies may be busy for milliseconds with a batch that comes from the host."""
    for source, target in zip(batch, to, strict=True):
        torch.add(source, 0, out=target)


def _close(items: Iterator[object]) -> None:
    """Leave the loop over `items`: a generator's threads end."""
    if isinstance(items, Generator):
        items.close()
