"""Augmentation on the device: batched, per sample, every parameter drawn from (seed, epoch, sample).

Axes: B batch, C channels, H W pixels. Images are uint8 until `normalize`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpa.config import AugmentConfig
from vitpa.data.counter_rng import Purpose, key, randint, random_bits


def crop_and_flip(images: Tensor, samples: Tensor, options: AugmentConfig, *, seed: int, epoch: int) -> Tensor:
    """The random part of augmentation that works on whole batches of decoded images (B, C, H, W) uint8.

    The place for AutoAugment and its kin. random_resized crops are taken where images are decoded: their sizes differ.
    """
    if options.crop == "padded":
        images = padded_crop(images, samples, padding=options.crop_padding_px, seed=seed, epoch=epoch)
    if options.hflip:
        images = horizontal_flip(images, samples, seed=seed, epoch=epoch)
    return images


def padded_crop(images: Tensor, samples: Tensor, *, padding: int, seed: int, epoch: int) -> Tensor:
    """Pad images (B, C, H, W) with `padding` zero pixels on each side and crop back to H x W at a random place.

    `samples` (B,) are the indices of the images in the data set: they choose the place. The usual augmentation of
    CIFAR (He et al. 2015, section 4.2).
    """
    B, _, H, W = images.shape
    stream = key(seed, Purpose.CROP, epoch)
    top = randint(stream, samples, 2 * padding + 1, draw=0)
    left = randint(stream, samples, 2 * padding + 1, draw=1)
    rows = top[:, None] + torch.arange(H, device=images.device)  # B, H
    columns = left[:, None] + torch.arange(W, device=images.device)  # B, W
    padded = F.pad(images, (padding, padding, padding, padding))
    batch = torch.arange(B, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # B, C, H, W


def horizontal_flip(images: Tensor, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Mirror each of the images (B, C, H, W) left to right with probability 1/2, chosen by its index in `samples` (B,)."""
    flip = random_bits(key(seed, Purpose.FLIP, epoch), samples) < 0
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, C, H, W) -> float32, per channel (x / 255 - mean) / std."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)[:, None, None]
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None, None]
    return images.to(torch.float32) * scale - shift
