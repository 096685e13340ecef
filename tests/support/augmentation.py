"""Images and operations for the tests of augmentation."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from vitpa.data.augment.auto_augment import SIGNED, Operation, magnitudes
from vitpa.datasets import facts_of

CPU = torch.device("cpu")
CIFAR10 = facts_of("cifar10")
FILL = (124, 116, 104)  # R, G, B


def pictures(size: int) -> Tensor:
    """Noise, smooth images and those without any contrast, (11, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randint(0, 256, (3, 3, size, size), generator=generator)
    noise[2, 1:] = noise[2, 1:] // 8 + 90  # two channels of a narrow range
    coarse = torch.randint(0, 256, (3, 3, 6, 6), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
    flat = torch.tensor([0, 255, 7]).view(3, 1, 1, 1).expand(3, 3, size, size)
    two = torch.tensor([3, 200])[torch.randint(0, 2, (2, 3, size, size), generator=generator)]
    two[1] = two[1, 0]  # grey
    return torch.cat([noise, smooth, flat, two]).to(torch.uint8)


def every_operation(num_bins: int, size: int) -> list[Operation]:
    """All operations in all bins, negated, too, where torchvision negates."""
    return [
        (name, sign * value)
        for name, values in magnitudes(num_bins, size, size).items()
        for value in dict.fromkeys(values)
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]


def random_images(n: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def some(names: list[Operation], count: int) -> list[int]:
    """Indices of up to `count` operations of each name, and always its strongest, at random."""
    places: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(names):
        places.setdefault(name, []).append(index)
    return [index for found in places.values() for index in {*random.sample(found, min(count, len(found))), found[-1]}]
