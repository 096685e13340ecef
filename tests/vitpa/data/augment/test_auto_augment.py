"""AutoAugment and RandAugment: every operation equals torchvision's to the bit, and is drawn as often as it should be."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import reduce
from itertools import product

import pytest
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from tests.support.augmentation import CPU, every_operation, pictures
from vitpa.data.augment.auto_augment import IDENTITY, SIGNED, Operation, Operations, Policy, magnitudes
from vitpa.data.rng import Purpose, key

Chances = dict[tuple[Operation, ...], float]  # of sequences of operations

POLICIES = {f"autoaugment_{policy.value}": AutoAugment(policy).policies for policy in AutoAugmentPolicy}


def by_torchvision(images: Tensor, operation: Operation) -> Tensor:
    transformed = _apply_op(images, *operation, interpolation=InterpolationMode.NEAREST, fill=None)
    assert isinstance(transformed, Tensor)
    return transformed


def assert_equal_torchvisions(table: list[Operation], size: int) -> None:
    """All operations of `table` on all pictures, several operations in a batch."""
    images = pictures(size)
    operations, N = Operations(table, height=size, width=size, device=CPU), len(images)
    for first in range(0, len(table), 32):
        some = table[first : first + 32]
        got = operations(images.repeat(len(some), 1, 1, 1), torch.arange(first, first + len(some)).repeat_interleave(N))
        assert got.dtype == torch.uint8
        for operation, transformed in zip(some, got.split(N), strict=True):
            assert torch.equal(transformed, by_torchvision(images, operation)), operation


@pytest.mark.parametrize(("num_bins", "size"), [(10, 32), (31, 32), (10, 28), (31, 7)])
def test_every_operation_in_every_bin_equals_torchvisions(num_bins: int, size: int) -> None:
    table = every_operation(num_bins, size)
    assert len(table) == 19 * num_bins + 9
    assert_equal_torchvisions(table, size)


@pytest.mark.slow
def test_operations_equal_torchvisions_on_large_images() -> None:
    table = every_operation(10, 224)
    strongest = dict(table)  # the last bin of each
    assert_equal_torchvisions([*strongest.items(), *table[5::29]], 224)


@pytest.mark.parametrize("transform", [AutoAugment(), RandAugment()])
@pytest.mark.parametrize("size", [(32, 32), (224, 160)])
def test_magnitudes_are_torchvisions(transform: AutoAugment | RandAugment, size: tuple[int, int]) -> None:
    num_bins = 10 if isinstance(transform, AutoAugment) else transform.num_magnitude_bins
    table = magnitudes(num_bins, *size)
    theirs = transform._augmentation_space(num_bins, size)
    expected = {name: values.expand(num_bins).tolist() for name, (values, _) in theirs.items()}
    assert {name: table[name] for name in expected} == expected
    assert {name for name, (_, signed) in theirs.items() if signed} == set(SIGNED)
    assert set(table) - set(expected) == {"Identity" if isinstance(transform, AutoAugment) else "Invert"}
    if isinstance(transform, RandAugment):
        assert list(table)[:-1] == list(expected)  # the order in which torchvision draws them


def make(name: str, *, num_ops: int = 2, magnitude: int = 9, img_size: int = 32) -> Policy:
    return Policy(name, num_ops=num_ops, strengths=[magnitude], img_size=img_size, device=CPU)


def signed(operation: str, value: float) -> list[Operation]:
    return [(operation, value), (operation, -value if operation in SIGNED else value)]


def autoaugment_chances(name: str) -> Chances:
    """The probability of each pair of operations, from torchvision's list of sub-policies."""
    table = magnitudes(10, 32, 32)
    chances: Chances = defaultdict(float)
    for row in POLICIES[name]:
        places = []
        for operation, prob, bin_ in row:
            options = [(one, prob / 2) for one in signed(operation, table[operation][bin_ or 0])]
            places.append([*options, (IDENTITY, 1 - prob)])
        for (first, first_prob), (second, second_prob) in product(*places):
            chances[first, second] += first_prob * second_prob / len(POLICIES[name])
    return chances


def randaugment_chances(num_ops: int, magnitude: int) -> Chances:
    """The probability of each sequence of `num_ops` operations of RandAugment."""
    space = RandAugment()._augmentation_space(31, (32, 32))
    one: defaultdict[Operation, float] = defaultdict(float)
    for operation, (values, _) in space.items():
        for option in signed(operation, float(values[magnitude]) if values.ndim else 0.0):
            one[option] += 1 / 2 / len(space)
    return {options: math.prod(one[option] for option in options) for options in product(one, repeat=num_ops)}


def assert_drawn(policy: Policy, chances: Chances, *, n: int = 200_000) -> None:
    """Pearson's chi-square over all sequences of operations of n samples: their frequencies and their independence."""
    choices = policy.choices(torch.arange(n), torch.tensor([key(0, Purpose.POLICY, 0)]))
    names = policy.operations.names
    sequences, counts = torch.stack(choices, 1).unique(dim=0, return_counts=True)
    drawn = {tuple(names[i] for i in row): count for row, count in zip(sequences.tolist(), counts.tolist(), strict=True)}
    possible = {sequence: n * chance for sequence, chance in chances.items() if chance > 0}
    assert drawn.keys() <= possible.keys()
    assert math.isclose(sum(possible.values()), n)
    assert min(possible.values()) > 20
    chi2 = sum((drawn.get(sequence, 0) - expected) ** 2 / expected for sequence, expected in possible.items())
    freedom = len(possible) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", POLICIES)
def test_pairs_of_operations_are_drawn_as_autoaugment_says(name: str) -> None:
    assert_drawn(make(name), autoaugment_chances(name))


@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 30), (2, 9), (2, 1)])
def test_operations_are_drawn_as_randaugment_says(num_ops: int, magnitude: int) -> None:
    assert_drawn(make("randaugment", num_ops=num_ops, magnitude=magnitude), randaugment_chances(num_ops, magnitude))


@pytest.mark.parametrize("name", [*POLICIES, "randaugment"])
def test_a_policy_applies_the_drawn_operations_one_after_another(name: str) -> None:
    images, policy = pictures(32).repeat(6, 1, 1, 1), make(name, num_ops=3)
    samples, streams = (
        torch.arange(len(images)),
        torch.tensor([key(seed % 3, Purpose.POLICY, 1) for seed in range(len(images))]),
    )
    choices = policy.choices(samples, streams)
    assert len(choices) == (3 if name == "randaugment" else 2)
    expected = []
    for image, places in zip(images, torch.stack(choices, 1).tolist(), strict=True):
        expected.append(reduce(by_torchvision, (policy.operations.names[place] for place in places), image))
    before = images.clone()
    assert torch.equal(policy(images, samples, streams), torch.stack(expected))
    assert torch.equal(images, before)


def test_two_seeds_or_epochs_share_no_draws() -> None:
    policy, samples = make("randaugment"), torch.arange(20_000)
    streams = [key(seed, Purpose.POLICY, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    drawn = [torch.stack(policy.choices(samples, torch.tensor([stream])), 1) for stream in streams]
    alike = sum(chance**2 for chance in randaugment_chances(1, 9).values())  # of one place in two independent draws
    for first, second in ((0, 1), (0, 2), (1, 2)):
        share = (drawn[first] == drawn[second]).double().mean(0)
        assert (share - alike).abs().max() < 5 * math.sqrt(alike * (1 - alike) / len(samples))


@pytest.mark.slow
@pytest.mark.parametrize("size", [16])
def test_compiled_operations_equal_the_eager_ones(size: int) -> None:
    table, images = every_operation(10, size), pictures(size)
    operations = Operations(table, height=size, width=size, device=CPU)
    batch, choice = images.repeat(len(table), 1, 1, 1), torch.arange(len(table)).repeat_interleave(len(images))
    compiled = torch.compile(operations, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(batch, choice), operations(batch, choice))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [28, 32, 224])
def test_every_operation_on_a_gpu_is_that_of_the_cpu(size: int) -> None:
    table, images = every_operation(10, size)[:: 1 if size < 100 else 7], pictures(size)
    choice = torch.arange(len(table)).repeat_interleave(len(images))
    batch = images.repeat(len(table), 1, 1, 1)
    expected = Operations(table, height=size, width=size, device=CPU)(batch, choice)
    operations = Operations(table, height=size, width=size, device=torch.device("cuda"))
    for function in (operations, torch.compile(operations, fullgraph=True, dynamic=False)):
        got = function(batch.cuda(), choice.cuda()).cpu()
        wrong = {table[index] for index in choice[(got != expected).flatten(1).any(1)].tolist()}
        assert not wrong
