"""Counter-based randomness and batch order, against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitpa.data.rng import Purpose, key, permutation, randint, random_bits, uniform
from vitpa.data.sampler import (
    BUFFER_BYTES,
    SHARD_BYTES,
    SHARD_SAMPLES,
    Shards,
    epoch_order,
    eval_batches,
    shuffle_buffers,
    steps_per_epoch,
    train_batches,
)

MASK = 2**64 - 1


def splitmix64(z: int) -> int:
    """The finaliser in Python's whole numbers (Steele, Lea, Flood 2014, figure 16 with Stafford's constants)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_bits_equal_the_published_generator() -> None:
    stream = key(3, Purpose.CROP, 7)
    counters = [0, 1, 2, 49_999, 2**40]
    expected = [splitmix64(splitmix64((c * 0x9E3779B97F4A7C15 + stream) & MASK)) for c in counters]
    got = [bits & MASK for bits in random_bits(stream, torch.tensor(counters)).tolist()]
    assert got == expected


def test_streams_are_uniform_and_unlike_each_other() -> None:
    n = 100_000
    draws = [uniform(key(seed, Purpose.CROP, epoch), torch.arange(n)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    draws.append(uniform(key(0, Purpose.FLIP, 0), torch.arange(n)))
    draws.append(uniform(key(0, Purpose.CROP, 0), torch.arange(n), draw=1))
    for values in draws:
        assert values.min() >= 0 and values.max() < 1
        counts = torch.histc(values, 100, 0, 1)
        chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
        assert chi2 < 99 + 5 * math.sqrt(2 * 99)
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_a_number_depends_on_its_counter_alone() -> None:
    stream = key(0, Purpose.CROP, 0)
    whole = randint(stream, torch.arange(1000), 9)
    assert torch.equal(randint(stream, torch.tensor([400, 7, 999]), 9), whole[[400, 7, 999]])
    assert set(whole.tolist()) == set(range(9))


def test_numbers_of_several_streams_and_draws_at_once_are_those_of_each() -> None:
    keys = [key(seed, Purpose.POLICY, 3) for seed in range(4)]
    counters, draws = torch.arange(5), torch.arange(3)
    streams = torch.tensor(keys)[:, None, None]
    together = uniform(streams, counters[:, None], draw=draws)  # streams, counters, draws
    whole = randint(streams, counters[:, None], 1000, draw=draws)
    for row, stream in enumerate(keys):
        assert torch.equal(random_bits(streams, counters)[row, 0], random_bits(stream, counters))
        for draw in draws.tolist():
            assert torch.equal(together[row, :, draw], uniform(stream, counters, draw))
            assert torch.equal(whole[row, :, draw], randint(stream, counters, 1000, draw))


def test_orders_of_seeds_and_epochs_differ() -> None:
    # FFCV's order(seed 1, epoch 0) is its order(seed 0, epoch 1); ours must not be
    orders = {tuple(permutation(key(seed, Purpose.ORDER, epoch), 50).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def global_batches(world_size: int, accum_steps: int, start_step: int = 0, *, shards: Shards | None = None) -> list[set[int]]:
    """The samples of each step's global batch, put together from all processes."""
    steps: list[set[int]] = [set() for _ in range(steps_per_epoch(103, 12) - start_step)]
    for rank in range(world_size):
        batches = train_batches(
            seed=1, epoch=2, num_samples=103, global_batch_size=12, accum_steps=accum_steps, rank=rank,
            world_size=world_size, start_step=start_step, shards=shards,
        )  # fmt: skip
        for step, micro_batches in zip(steps, batches, strict=True):
            for micro in micro_batches:
                assert len(micro) == 12 // (world_size * accum_steps)
                assert step.isdisjoint(micro.tolist())
                step.update(micro.tolist())
    return steps


ORDERS = pytest.mark.parametrize("shards", [None, Shards(4, 5)], ids=["random", "quasi_random"])


@ORDERS
@pytest.mark.parametrize(("world_size", "accum_steps"), [(1, 1), (2, 1), (3, 2), (1, 4), (2, 6), (4, 1)])
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    world_size: int, accum_steps: int, shards: Shards | None
) -> None:
    assert global_batches(world_size, accum_steps, shards=shards) == global_batches(1, 1, shards=shards)


@ORDERS
def test_an_epoch_sees_each_sample_at_most_once_and_resumes_in_its_middle(shards: Shards | None) -> None:
    steps = global_batches(1, 1, shards=shards)
    assert len(steps) == 8
    assert len(set().union(*steps)) == 96
    assert global_batches(2, 1, start_step=5, shards=shards) == steps[5:]


def slow_quasi_random(seed: int, epoch: int, num_samples: int, shards: Shards) -> list[int]:
    """Buffer after buffer, sample after sample, from random numbers that are drawn one by one."""
    taken: list[list[int]] = [[] for _ in range(shards.num_buffers)]
    for first in range(0, -(-num_samples // shards.size), shards.num_buffers):
        together = range(first, first + shards.num_buffers)
        draws = {shard: int(random_bits(key(seed, Purpose.SHUFFLE_BUFFER, epoch), torch.tensor(shard))) for shard in together}
        for shard, drawn in zip(together, sorted(together, key=lambda shard: draws[shard]), strict=True):
            taken[drawn - first] += range(shard * shards.size, min((shard + 1) * shards.size, num_samples))
    draws = {sample: int(random_bits(key(seed, Purpose.ORDER, epoch), torch.tensor(sample))) for sample in range(num_samples)}
    return [sample for buffer in taken for sample in sorted(buffer, key=lambda sample: draws[sample])]


@pytest.mark.parametrize(("num_samples", "shards"), [(103, Shards(4, 5)), (96, Shards(16, 3)), (50, Shards(1, 7))])
def test_quasi_random_equals_a_slow_loop_and_has_every_sample_once(num_samples: int, shards: Shards) -> None:
    for seed, epoch in ((0, 0), (3, 8)):
        order = epoch_order(seed, epoch, num_samples, shards).tolist()
        assert order == slow_quasi_random(seed, epoch, num_samples, shards)
        assert sorted(order) == list(range(num_samples))


def test_quasi_random_differs_by_seed_and_epoch_and_in_one_window_is_random() -> None:
    shards = Shards(16, 6)
    orders = {tuple(epoch_order(seed, epoch, 1000, shards).tolist()) for seed in range(4) for epoch in range(4)}
    ways = {tuple(shuffle_buffers(seed, epoch, 1000, shards).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == len(ways) == 16
    assert torch.equal(epoch_order(2, 3, 1000, Shards(16, 1)), epoch_order(2, 3, 1000))


@pytest.mark.parametrize("num_samples", [1600, 1601, 1931])
def test_a_window_takes_its_samples_from_whole_blocks_all_over_the_file(num_samples: int) -> None:
    shards = Shards(16, 8)
    order, buffer_of = epoch_order(1, 2, num_samples, shards), shuffle_buffers(1, 2, num_samples, shards)
    strata = math.ceil(num_samples / 16 / 8)
    assert (buffer_of[order].diff() >= 0).all()  # one buffer after another
    for buffer in range(8):
        samples = torch.nonzero(buffer_of == buffer).flatten()
        touched = samples.div(16, rounding_mode="floor").unique()
        assert strata - 1 <= len(touched) <= strata
        whole = torch.cat([torch.arange(16 * shard, min(16 * shard + 16, num_samples)) for shard in touched.tolist()])
        assert torch.equal(whole, samples)
        assert torch.equal(touched.div(8, rounding_mode="floor"), torch.arange(len(touched)))  # one of each 8 neighbours
    # however a batch lies over the borders of buffers, no more than two buffers' shards are touched within one's length
    smallest = int(buffer_of.bincount().min())
    for first in range(0, num_samples - smallest, 37):
        assert len(buffer_of[order[first : first + smallest]].unique()) <= 2


def test_over_many_epochs_a_sample_comes_anywhere_and_its_neighbours_apart() -> None:
    num_samples, epochs, shards = 960, 400, Shards(16, 6)
    at = torch.stack([epoch_order(5, epoch, num_samples, shards).argsort() for epoch in range(epochs)])  # epochs, samples
    counts = torch.stack([torch.histc(at[:, sample].float(), 24, 0, num_samples) for sample in range(num_samples)])
    chi2 = ((counts - epochs / 24) ** 2 / (epochs / 24)).sum(dim=1)
    assert abs(chi2.mean() - 23) < 5 * math.sqrt(2 * 23 / num_samples)  # 23 degrees of freedom, for each sample
    assert chi2.max() < 23 + 8 * math.sqrt(2 * 23)
    within = (at[:, 0::16] - at[:, 1::16]).abs().float()  # of one shard: in one buffer of 160, a third of it apart
    assert abs(within.mean() - 161 / 3) < 2
    across = torch.corrcoef(torch.stack([at[:, 0], at[:, 16], at[:, 480], at[:, 959]]).float()) - torch.eye(4)
    assert across[0, 2:].abs().max() < 5 / math.sqrt(epochs)
    assert across[0, 1] < 0  # shards beside each other are never in one buffer


def test_windows_have_all_classes_of_a_file_in_their_order() -> None:
    labels = torch.arange(64_000) // 640  # 100 classes, one after another, as `vitpa prep` writes them
    counts = labels[epoch_order(0, 0, 64_000, Shards(16, 20))].view(20, 3200)  # buffers, samples
    for buffer in counts:
        assert torch.equal(buffer.bincount(minlength=100), torch.full((100,), 32))


def test_blocks_follow_from_the_stored_sizes() -> None:
    def of(size: int, count: int) -> Shards:
        return Shards.of(np.full(count, size))

    assert of(110_000, 1_281_167) == Shards(16, 66)
    assert of(40_000, 1_281_167) == Shards(48, 24)
    assert of(192, 1437).num_buffers == 1
    assert of(SHARD_BYTES, 5000) == Shards(SHARD_SAMPLES, 5)
    assert of(SHARD_BYTES, BUFFER_BYTES // SHARD_BYTES + 1).num_buffers == 2
    sizes = np.random.default_rng(0).integers(1000, 200_000, 10_000)
    assert Shards.of(sizes) == Shards.of(np.roll(sizes, 77))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 7, 64, 103])
def test_evaluation_counts_every_sample_once(world_size: int, num_samples: int) -> None:
    seen = []
    for rank in range(world_size):
        for batch in eval_batches(num_samples=num_samples, batch_size=16, rank=rank, world_size=world_size):
            assert len(batch) == 16
            seen += [sample for sample in batch.tolist() if sample >= 0]
    assert sorted(seen) == list(range(num_samples))
