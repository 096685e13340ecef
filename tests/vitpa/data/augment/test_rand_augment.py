"""timm's RandAugment: every operation is Pillow's, its arguments are timm's, and it is drawn as often as it should be."""

from __future__ import annotations

import math
import random
from functools import partial, reduce

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timms
from torch import Tensor

from tests.support.augmentation import CPU, FILL, pictures, some
from vitpa.data.augment.auto_augment import IDENTITY, Operation
from vitpa.data.augment.rand_augment import (
    ENHANCEMENTS,
    GEOMETRY,
    LEVELS,
    NAMES,
    PillowOperations,
    RandAugment,
    argument,
    quantiles,
)
from vitpa.data.rng import Purpose, key

THEIR_NAMES = {
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
    **{name: f"{name}Increasing" for name in ENHANCEMENTS},
}


def make(*, num_ops: int = 2, magnitude: float = 9, std: float = 0.5, img_size: int = 32) -> RandAugment:
    return RandAugment(num_ops=num_ops, strengths=[(magnitude, std)], fill=FILL, img_size=img_size, device=CPU)


def by_timm(image: Tensor, operation: Operation) -> Tensor:
    """An image (3, H, W) after an operation by timm's function on Pillow's image."""
    name, value = operation
    if name == "Identity":
        return image
    if operation == ("Posterize", 0.0):  # Pillow 13 refuses it; before, and in torchvision, it is black
        return torch.zeros_like(image)
    arguments: list[float]
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        arguments = [int(value)]
    else:
        arguments = [value / image.shape[-1]] if name.startswith("Translate") else [value]
    if name in ("AutoContrast", "Equalize", "Invert"):
        arguments = []
    function = timms.NAME_TO_OP[THEIR_NAMES.get(name, name)]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    changed = function(picture, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def test_tables_are_made_once_for_the_augmentations_of_a_training() -> None:
    first, again, other = make(), make(), make(magnitude=8)
    assert first.index is again.index and first.index is not other.index
    for name in ("kind", "matrix", "ratios", "row", "values"):
        assert getattr(first.operations, name) is getattr(again.operations, name) is not getattr(other.operations, name)


def test_the_operations_are_those_of_timm() -> None:
    assert sorted(THEIR_NAMES.get(name, name) for name in NAMES) == sorted(timms._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("negated", [False, True])
def test_arguments_are_those_of_timm(monkeypatch: pytest.MonkeyPatch, name: str, negated: bool) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.9 if negated else 0.1)
    level_to_argument = timms.LEVEL_TO_ARG[THEIR_NAMES.get(name, name)]
    for magnitude in [0.0, 2.5, 9.0, 9.99, 10.0, *torch.rand(200).mul(10).tolist()]:
        got = argument(name, magnitude, negated=negated, img_size=224)
        if level_to_argument is None:
            assert got == 0
            continue
        (expected,) = level_to_argument(magnitude, {})
        expected *= 224 if name.startswith("Translate") else 1
        assert abs(got - expected) <= (2**-15 if name in ENHANCEMENTS else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(32, 30), (33, 6), (7, 6), (224, 2)])
def test_every_operation_is_pillows(size: int, count: int) -> None:
    operations, images = make(img_size=size).operations, pictures(size)[:: 1 if size < 100 else 3]
    differ = []
    for index in some(list(operations.names), count):
        name, _ = operation = operations.names[index]
        got = operations(images, torch.full((len(images),), index))
        assert got.dtype == torch.uint8
        apart = (got.int() - torch.stack([by_timm(image, operation) for image in images]).int()).abs()
        if name in GEOMETRY:  # sums that are cut off fall on the other side of a whole number at times
            assert apart.max() <= 1, operation
            differ.append((apart > 0).double().mean().item())
        else:
            assert apart.max() == 0, operation
    assert np.mean(differ) < 0.01
    assert max(differ) < 0.15  # of translations by next to whole numbers


def test_without_a_move_and_in_even_colour_interpolation_changes_nothing() -> None:
    images = pictures(20)
    operations: list[Operation] = [("Rotate", 0.0), ("ShearX", 0.0), ("TranslateY", 3.0), ("Rotate", 29.0)]
    still, sheared, translated, rotated = (
        PillowOperations(operations, fill=(7, 7, 7), height=20, width=20, device=CPU)(images, torch.full((len(images),), i))
        for i in range(4)
    )
    assert torch.equal(still, images)
    assert torch.equal(sheared, images)
    assert torch.equal(translated[:, :, :17], images[:, :, 3:])
    assert (translated[:, :, 17:] == 7).all()
    flat = (images == 7).flatten(1).all(1)
    assert flat.any()
    assert torch.equal(rotated[flat], images[flat])


@pytest.mark.parametrize(("magnitude", "std"), [(9, 0.5), (9, 0.0), (5, 2.0), (10, 1.0)])
def test_magnitudes_are_a_normal_distribution_cut_to_0_and_10(magnitude: float, std: float) -> None:
    got = torch.tensor(quantiles(magnitude, std), dtype=torch.float64)
    assert len(got) == LEVELS
    if std == 0:
        assert (got == magnitude).all()
        return
    generator = torch.Generator().manual_seed(0)
    drawn = (magnitude + std * torch.randn(400_000, dtype=torch.float64, generator=generator)).clamp(0, 10)
    assert abs(got.mean() - drawn.mean()) < 0.005 * std + 5 * std / math.sqrt(len(drawn))
    assert abs(got.std() / drawn.std() - 1) < 0.01
    for bound in (0.0, 10.0):
        assert abs((got == bound).double().mean() - (drawn == bound).double().mean()) < 0.002


def test_pairs_of_operations_are_drawn_evenly_and_half_are_applied() -> None:
    """Pearson's chi-square over all pairs of what two places do, and over levels and signs."""
    n, policy = 200_000, make(std=2.0, magnitude=5)
    names = [IDENTITY[0], *NAMES]
    numbers = torch.tensor([names.index(name) for name, _ in policy.operations.names])
    choices = policy.choices(torch.arange(n), torch.tensor([key(0, Purpose.POLICY, 0)]))
    assert len(choices) == 2
    pairs = torch.bincount(numbers[choices[0]] * 16 + numbers[choices[1]], minlength=256).double()
    one = torch.tensor([0.5] + [1 / 30] * 15, dtype=torch.float64)
    expected = n * one.outer(one).flatten()
    chi2 = ((pairs - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    for choice in choices:
        drawn = [policy.operations.names[i][1] for i in choice.tolist() if policy.operations.names[i][0] == "Rotate"]
        normal = partial(stats.norm.cdf, loc=15, scale=6)  # 3 degrees for each unit of magnitude; 1 % are cut off
        assert stats.kstest(np.abs(drawn), normal).statistic < 0.01 + 2 / math.sqrt(len(drawn))
        assert abs(np.mean(np.array(drawn) > 0) - 0.5) < 2.5 / math.sqrt(len(drawn))


def test_a_policy_applies_the_drawn_operations_one_after_another() -> None:
    images, policy = pictures(32).repeat(8, 1, 1, 1), make(num_ops=3)
    samples = torch.arange(len(images))
    streams = torch.tensor([key(seed % 3, Purpose.POLICY, 1) for seed in range(len(images))])
    choices = torch.stack(policy.choices(samples, streams), 1)
    assert choices.shape == (len(images), 3)
    before, got = images.clone(), policy(images, samples, streams)
    assert torch.equal(images, before)
    for image, result, row in zip(images, got, choices.tolist(), strict=True):
        places = [policy.operations.names[i] for i in row]
        if not any(name in GEOMETRY for name, _ in places):
            assert torch.equal(result, reduce(by_timm, places, image))
        one_by_one = image[None]
        for i in row:
            one_by_one = policy.operations(one_by_one, torch.tensor([i]))
        assert torch.equal(result, one_by_one[0])


def test_two_seeds_or_epochs_share_no_draws() -> None:
    policy, samples = make(), torch.arange(20_000)
    streams = [key(seed, Purpose.POLICY, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    drawn = [policy.choices(samples, torch.tensor([stream]))[0] for stream in streams]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        share = (drawn[first] == drawn[second]).double().mean().item()
        assert 0.235 < share < 0.275  # both leave the image alone, or by chance do the same


@pytest.mark.slow
def test_compiled_operations_equal_the_eager_ones() -> None:
    policy, images = make(img_size=16), pictures(16)
    chosen = some(list(policy.operations.names), 2)
    batch, choice = images.repeat(len(chosen), 1, 1, 1), torch.tensor(chosen).repeat_interleave(len(images))
    compiled = torch.compile(policy.operations, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(batch, choice), policy.operations(batch, choice))
