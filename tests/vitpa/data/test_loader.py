"""Where a step's batches come from: the same from resident and from streamed images, whatever the processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.beton import Beton
from vitpa.data.loader import Feed, ResidentFeed, StreamedFeed
from vitpa.data.manifest import Ints, beton_path
from vitpa.data.prefetch import extents
from vitpa.data.resident import ResidentImages, decoded
from vitpa.data.rng import Purpose, key, permutation
from vitpa.data.sampler import Batch, Shards, epoch_order
from vitpa.data.stream import StreamedImages
from vitpa.distributed import Group

CPU = torch.device("cpu")
SEEDS = (3, 8)


def group(rank: int = 0, world_size: int = 1) -> Group:
    return Group(rank, world_size, rank, world_size, CPU)


@pytest.fixture(scope="module")
def betons(digits: Path) -> dict[str, Beton]:
    """1,437 and 360 images of 8 x 8."""
    return {split: Beton.open(beton_path(digits, "digits", split)) for split in ("train", "val")}


@pytest.fixture(scope="module")
def resident_images(betons: dict[str, Beton]) -> dict[str, ResidentImages]:
    return {split: ResidentImages(*decoded(beton, 8), device=CPU) for split, beton in betons.items()}


def resident(
    images: dict[str, ResidentImages],
    *,
    rank: int = 0,
    world_size: int = 1,
    seeds: tuple[int, ...] = SEEDS,
    batch_size: int = 64,
    accum_steps: int = 1,
) -> ResidentFeed:
    return ResidentFeed(images, group(rank, world_size), seeds=seeds, batch_size=batch_size, accum_steps=accum_steps)


def streamed(
    betons: dict[str, Beton],
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 3,
    batch_size: int = 64,
    accum_steps: int = 1,
    order: Literal["random", "quasi_random"] = "random",
) -> StreamedFeed:
    options = AugmentConfig(crop="none")
    images = {
        split: StreamedImages(beton, options, img_size=8, seed=seed, device=CPU, workers=2) for split, beton in betons.items()
    }
    place = group(rank, world_size)
    return StreamedFeed(images, place, seed=seed, batch_size=batch_size, accum_steps=accum_steps, order=order)


def steps(feed: Feed, count: int, accum_steps: int = 1) -> Iterator[list[Batch]]:
    """The micro-batches of the next steps, copied."""
    for _ in range(count):
        feed.load()
        micros = []
        for micro in range(accum_steps):
            micros.append(Batch(*(each.clone() for each in feed.gather(*feed.inputs(micro)))))
            feed.advance()
        yield micros


def evaluation(feed: Feed) -> list[Batch]:
    feed.begin_evaluation()
    found = []
    for _ in range(feed.num_eval_batches):
        feed.load_eval()
        found.append(Batch(*(each.clone() for each in feed.gather_eval(*feed.eval_inputs()))))
        feed.advance_eval()
    return found


def pixels(beton: Beton, samples: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(beton.read_image(index).copy()) for index in samples.tolist()]).permute(0, 3, 1, 2)


def test_each_replica_goes_through_an_order_of_its_own(
    betons: dict[str, Beton], resident_images: dict[str, ResidentImages]
) -> None:
    feed = resident(resident_images)
    feed.begin_epoch(5, 0)
    found = [micro for (micro,) in steps(feed, 22)]
    for replica, seed in enumerate(SEEDS):
        samples = torch.cat([batch.samples.view(2, 64)[replica] for batch in found])
        assert torch.equal(samples, permutation(key(seed, Purpose.ORDER, 5), 1437)[: 22 * 64])
    for batch in found[:3]:
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, pixels(betons["train"], batch.samples))
        assert batch.labels.tolist() == betons["train"].labels[batch.samples.numpy()].tolist()


@pytest.mark.parametrize(("world_size", "accum_steps"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_all_processes_and_micro_batches_together_are_the_batch_of_one(
    betons: dict[str, Beton], resident_images: dict[str, ResidentImages], world_size: int, accum_steps: int
) -> None:
    whole = resident(resident_images, seeds=(3,))
    whole.begin_epoch(2, 7)
    expected = [micro for (micro,) in steps(whole, 15)]
    batch_size = 64 // (world_size * accum_steps)
    sizes: dict[str, Any] = {"world_size": world_size, "batch_size": batch_size, "accum_steps": accum_steps}
    parts = []
    for rank in range(world_size):
        feeds = resident(resident_images, rank=rank, seeds=(3,), **sizes), streamed(betons, rank=rank, **sizes)
        found = []
        for feed in feeds:
            feed.begin_epoch(2, 7)
            found.append(list(steps(feed, 15, accum_steps)))
            feed.close()
        for ours, theirs in zip(*found, strict=True):
            assert all(torch.equal(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))
        parts.append(found[0])
    for number, batch in enumerate(expected):
        micros = [parts[rank][number][micro] for micro in range(accum_steps) for rank in range(world_size)]
        for place, whole_batch in enumerate(batch):
            assert torch.equal(torch.cat([micro[place] for micro in micros]), whole_batch)


@pytest.mark.parametrize(("world_size", "accum_steps"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("start_step", [0, 13])
def test_quasi_random_is_the_same_for_any_number_of_processes_and_reads_ahead(
    betons: dict[str, Beton], monkeypatch: pytest.MonkeyPatch, world_size: int, accum_steps: int, start_step: int
) -> None:
    monkeypatch.setattr("vitpa.data.sampler.SHARD_BYTES", 32 * 192)
    monkeypatch.setattr("vitpa.data.sampler.BUFFER_BYTES", 1437 * 192 // 7)
    shards = Shards(32, 8)
    order = epoch_order(3, 2, 1437, shards)[: 22 * 64].view(22, accum_steps, world_size, -1)
    shares: list[int] = []

    def recording(beton: Beton, samples: Ints) -> list[tuple[int, int]]:
        shares.append(len(samples))
        return extents(beton, samples)

    for rank in range(world_size):
        batch_size = 64 // (world_size * accum_steps)
        feed = streamed(
            betons, rank=rank, world_size=world_size, batch_size=batch_size, accum_steps=accum_steps, order="quasi_random"
        )
        assert feed.shards == shards
        monkeypatch.setattr("vitpa.data.prefetch.extents", recording)
        feed.begin_epoch(2, start_step)
        for number, micros in enumerate(steps(feed, 22 - start_step, accum_steps), start_step):
            for micro, batch in enumerate(micros):
                assert torch.equal(batch.samples, order[number, micro, rank])
                assert torch.equal(batch.images, pixels(betons["train"], batch.samples))
        if not start_step:
            assert sum(shares) == 1437
            shares.clear()
        feed.begin_epoch(3, 5)
        feed.load()
        feed.close()
        shares.clear()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "read-ahead"))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_takes_every_image_once(
    betons: dict[str, Beton], resident_images: dict[str, ResidentImages], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitpa.data.loader.EVAL_BATCH_SIZE", 50)
    for kind in ("resident", "streamed"):
        seen: list[int] = []
        for rank in range(world_size):
            feed: Feed = streamed(betons, rank=rank, world_size=world_size)
            if kind == "resident":
                feed = resident(resident_images, rank=rank, world_size=world_size)
            for _ in range(2):  # again from the start
                found = evaluation(feed)
            assert len({batch.images.shape for batch in found}) == 1  # a graph has one shape
            for images, samples, labels in found:
                real = labels >= 0
                assert torch.equal(images[real], pixels(betons["val"], samples[real]))
                assert labels[real].tolist() == betons["val"].labels[samples[real].numpy()].tolist()
                seen += samples[real].tolist()
            feed.close()
        assert sorted(seen) == list(range(360)), kind
