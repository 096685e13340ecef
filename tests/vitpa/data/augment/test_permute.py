"""Permuted images: the order of the blocks, where they go, and what comes before and after."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.augmentation import CIFAR10, CPU, random_images
from tests.support.networks import SMALL, networks
from tests.support.trainings import arguments, config_of
from vitpa.config import AugmentConfig
from vitpa.data.augment.permute import block_order, permute_blocks
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.open import open_data
from vitpa.distributed import Group

SIZES = [2, 4, 8, 16, 32]


def slowly_permuted(images: Tensor, block_px: int) -> Tensor:
    blocks = images.shape[3] // block_px
    out = torch.empty_like(images)
    for to, source in enumerate(block_order(blocks).tolist()):
        (top, left), (y, x) = divmod(to, blocks), divmod(source, blocks)
        for row, column in itertools.product(range(block_px), repeat=2):
            pixel = images[:, :, y * block_px + row, x * block_px + column]
            out[:, :, top * block_px + row, left * block_px + column] = pixel
    return out


def augmentation(**options: Any) -> Augmentation:
    return Augmentation([AugmentConfig.model_validate(options)], CIFAR10, img_size=32, device=CPU)


def test_the_order_is_fixed_for_ever() -> None:
    # the results of runs that are done depend on it
    assert block_order(4).tolist() == [0, 4, 13, 10, 12, 2, 6, 3, 1, 5, 7, 8, 9, 14, 11, 15]
    for blocks in range(1, 17):
        order = block_order(blocks)
        assert torch.equal(order.sort().values, torch.arange(blocks**2))
        assert blocks < 4 or (order == torch.arange(blocks**2)).float().mean() < 0.2


@pytest.mark.parametrize("block_px", SIZES)
def test_blocks_go_where_a_slow_loop_puts_them_and_back(block_px: int) -> None:
    images, order = random_images(3), block_order(32 // block_px)
    permuted = permute_blocks(images, order, block_px)
    assert permuted.dtype == torch.uint8
    assert torch.equal(permuted, slowly_permuted(images, block_px))
    assert torch.equal(permute_blocks(permuted, order.argsort(), block_px), images)
    assert torch.equal(permuted, images) == (block_px == 32)  # one block of the whole image


@pytest.mark.parametrize("block_px", SIZES)
def test_training_and_validation_images_are_permuted_alike(block_px: int) -> None:
    whole, images = augmentation(crop="none", hflip=False, permute_block_px=block_px), random_images(6)
    expected = slowly_permuted(whole.normalize(images), block_px)
    assert torch.equal(whole.evaluated(images), expected)
    for seed, epoch in ((0, 0), (5, 3)):
        assert torch.equal(whole(images, torch.arange(6) + 40, epoch_keys([seed], epoch)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"erase_prob": 0.9, "cutout_px": 6},
        {"erase_prob": 0.9, "erase_mode": "pixel"},
        {"policy": "autoaugment_cifar10", "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    ],
)
def test_everything_else_comes_before(options: dict[str, Any]) -> None:
    images, samples, keys = random_images(20), torch.arange(20), epoch_keys([4], 2)
    as_is, permuted = augmentation(**options), augmentation(**options, permute_block_px=4)
    assert torch.equal(permuted.uint8(images, samples, keys), as_is.uint8(images, samples, keys))
    if as_is.mixup is None:
        got, expected = permuted(images, samples, keys), as_is(images, samples, keys)
    else:
        got, *mixed = permuted.mixed(images, samples + 7, samples, keys)
        expected, *others = as_is.mixed(images, samples + 7, samples, keys)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(mixed, others, strict=True))
    assert torch.equal(got, slowly_permuted(expected, 4))


@pytest.mark.parametrize("attention", ["content", "positional"])
@pytest.mark.parametrize("block_px", [2, 4])
def test_a_vit_whose_positions_are_permuted_too_sees_no_difference(attention: str, block_px: int) -> None:
    model, size, patch_px = networks(attention)[0][0], SMALL["img_size"], SMALL["patch_size"]
    images, order = random_images(4, size).double() / 255, block_order(size // block_px)
    expected = model(images)
    positions = torch.arange((size // patch_px) ** 2).view(1, 1, size // patch_px, -1)
    positions = permute_blocks(positions, order, block_px // patch_px).flatten()  # of the patches in a permuted image
    assert not torch.equal(positions, positions.sort().values)
    model.pos_embed.data[:, 1:] = model.pos_embed.data[:, 1 + positions]
    torch.testing.assert_close(model(permute_blocks(images, order, block_px)), expected)


@pytest.mark.parametrize("loader", ["resident", "stream"])
def test_the_preview_shows_permuted_images(digits: Path, tmp_path: Path, loader: str) -> None:
    def preview(block_px: int) -> Tensor:
        options = ["augment.crop=padded", f"augment.permute_block_px={block_px}", f"runtime.loader={loader}"]
        config = config_of(arguments(digits, tmp_path, *options))
        data = open_data([config], Group(0, 1, 0, 1, CPU))
        with closing(data.feed):
            return data.previews([config])[0]

    assert torch.equal(preview(4), slowly_permuted(preview(0), 4))
