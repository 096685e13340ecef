"""Counter-based randomness and batch order, against slow references."""

from __future__ import annotations

import math

import pytest
import torch

from vitpa.data.batches import eval_batches, steps_per_epoch, train_batches
from vitpa.data.counter_rng import Purpose, key, permutation, randint, random_bits, uniform

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


def global_batches(world_size: int, accum_steps: int, start_step: int = 0) -> list[set[int]]:
    """The samples of each step's global batch, put together from all processes."""
    steps: list[set[int]] = [set() for _ in range(steps_per_epoch(103, 12) - start_step)]
    for rank in range(world_size):
        batches = train_batches(
            seed=1, epoch=2, num_samples=103, global_batch_size=12, accum_steps=accum_steps, rank=rank,
            world_size=world_size, start_step=start_step,
        )  # fmt: skip
        for step, micro_batches in zip(steps, batches, strict=True):
            for micro in micro_batches:
                assert len(micro) == 12 // (world_size * accum_steps)
                assert step.isdisjoint(micro.tolist())
                step.update(micro.tolist())
    return steps


@pytest.mark.parametrize(("world_size", "accum_steps"), [(1, 1), (2, 1), (3, 2), (1, 4), (2, 6)])
def test_the_global_batch_is_the_same_for_any_number_of_processes(world_size: int, accum_steps: int) -> None:
    assert global_batches(world_size, accum_steps) == global_batches(1, 1)


def test_an_epoch_sees_each_sample_at_most_once_and_resumes_in_its_middle() -> None:
    steps = global_batches(1, 1)
    assert len(steps) == 8
    assert len(set().union(*steps)) == 96
    assert global_batches(2, 1, start_step=5) == steps[5:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 7, 64, 103])
def test_evaluation_counts_every_sample_once(world_size: int, num_samples: int) -> None:
    seen = []
    for rank in range(world_size):
        for batch in eval_batches(num_samples=num_samples, batch_size=16, rank=rank, world_size=world_size):
            assert len(batch) == 16
            seen += [sample for sample in batch.tolist() if sample >= 0]
    assert sorted(seen) == list(range(num_samples))
