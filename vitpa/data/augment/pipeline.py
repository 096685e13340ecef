"""Augmentation on the device: batched, per sample, every parameter drawn from (seed, epoch, sample).

In the usual order of torchvision and timm: padded crop, flip, policy, colour jitter, all on uint8; normalisation; random
erasing and cutout; mixing. Last of all, and at evaluation, too, blocks are permuted. No shape depends on the data, nothing is
copied from the host and nothing waits for the device, so that a CUDA graph can hold it. Replicas may differ in a policy's
strength, erasing, cutout and mixing: a batch then holds the images of all of them, one replica after the other
(vitpa/per_replica.py).

Axes: B batch, C channels, H W pixels, P purposes of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from vitpa.config import AugmentConfig, RunConfig
from vitpa.data.augment.auto_augment import Policy
from vitpa.data.augment.color_jitter import ColorJitter
from vitpa.data.augment.mixup import Mixup, partners_of
from vitpa.data.augment.permute import block_order, permute_blocks
from vitpa.data.augment.rand_augment import RandAugment
from vitpa.data.rng import Purpose, key, materialize, randint, random_bits, uniform
from vitpa.datasets import DatasetFacts, facts_of
from vitpa.per_replica import Setting, per_sample, setting

_ERASE_TRIES = 10
_NORMALS = 2**16  # equally likely values in place of the normal distribution's

Images = UInt8[Tensor, "B C H W"]
Normalized = Float32[Tensor, "B C H W"]
Samples = Int64[Tensor, " B"]  # indices of images in the data set
Keys = Int64[Tensor, "#B P"]  # the rows of `epoch_keys` that belong to their seeds: a batch may hold samples of several
Stream = int | Int64[Tensor, " #B"]  # one key, or a sample's own


def epoch_keys(seeds: Sequence[int], epoch: int) -> Int64[Tensor, "R P"]:
    """The keys of an epoch on the CPU: a row for each seed, column p for Purpose(p); column 0 is unused."""
    purposes = sorted(Purpose)
    return torch.tensor([[0, *(key(seed, purpose, epoch) for purpose in purposes)] for seed in seeds])


class Erasing(NamedTuple):
    """How a random rectangle is erased, of each replica or of all: what is drawn uniformly as its first value and its span."""

    prob: Setting
    scale: tuple[Setting, Setting]  # share of the image's area
    log_ratio: tuple[Setting, Setting]  # logarithm of height / width

    @staticmethod
    def of(options: Sequence[AugmentConfig], device: torch.device) -> Erasing:
        """As the replicas' options say."""
        scales = [each.erase_scale for each in options]
        ratios = [(math.log(low), math.log(high)) for low, high in (each.erase_ratio for each in options)]
        scale, log_ratio = (
            (setting([low for low, _ in ranges], device), setting([high - low for low, high in ranges], device))
            for ranges in (scales, ratios)
        )
        return Erasing(setting([each.erase_prob for each in options], device, torch.float32), scale, log_ratio)


class Augmentation:
    """What the replicas' `options` do to training images of one size."""

    def __init__(
        self,
        options: Sequence[AugmentConfig],
        facts: DatasetFacts,
        *,
        img_size: int,
        device: torch.device,
        torch_operations: Collection[str] = (),
    ):
        """`options` are those of each replica, or of all; they may differ as vitpa/together.py says.

        A GPU does `policy` and `erase` by kernels, but for those among `torch_operations`.
        """
        self.options = shape = options[0]  # beside what may differ
        self.erases_by_kernel = device.type == "cuda" and "erase" not in torch_operations
        shift = [mean / std for mean, std in zip(facts.mean, facts.std, strict=True)]
        self.scale = torch.tensor([1 / (255 * std) for std in facts.std])[:, None, None].to(device)
        self.shift = torch.tensor(shift)[:, None, None].to(device)
        self.normals = torch.special.ndtri((torch.arange(_NORMALS).double() + 0.5) / _NORMALS).float().to(device)
        if shape.erase_mode == "const":  # for the kernel that erases and mixes
            self.normals.zero_()
        self.erases = any(each.erase_prob for each in options)
        self.erasing = Erasing.of(options, device)
        self.cuts_out = any(each.cutout_px for each in options)
        self.cutout_px = setting([each.cutout_px for each in options], device, torch.int64)
        self.mixup = Mixup(options, device=device) if any(each.mixes for each in options) else None
        self.block_order: Tensor | None = None
        if shape.permute_block_px:
            self.block_order = block_order(img_size // shape.permute_block_px).to(device)
        self.jitter = ColorJitter(shape.color_jitter, device=device) if any(shape.color_jitter) else None
        self.policy: Policy | RandAugment | None = None
        if shape.policy == "randaugment_timm":
            self.policy = RandAugment(
                num_ops=shape.randaugment_num_ops,
                strengths=[(each.randaugment_magnitude, each.randaugment_magnitude_std) for each in options],
                fill=[round(255 * mean) for mean in facts.mean],
                img_size=img_size,
                device=device,
                kernels="policy" not in torch_operations,
            )
        elif shape.policy != "none":
            self.policy = Policy(
                shape.policy,
                num_ops=shape.randaugment_num_ops,
                strengths=[each.randaugment_magnitude for each in options],
                img_size=img_size,
                device=device,
            )

    @staticmethod
    def of(configs: Sequence[RunConfig], *, img_size: int, device: torch.device) -> Augmentation:
        """That of runs that train together, for images of `img_size` pixels."""
        return Augmentation(
            [each.augment for each in configs],
            facts_of(configs[0].dataset),
            img_size=img_size,
            device=device,
            torch_operations=configs[0].runtime.torch_operations,
        )

    def __call__(self, images: Images, samples: Samples, keys: Keys) -> Normalized:
        """Images as the model takes them: augmented, normalised, permuted.

        Erased pixels are 0, the mean colour of the data set, or noise.
        """
        return self.permuted(self._unpermuted(images, samples, keys))

    def evaluated(self, images: Images) -> Normalized:
        """Images as the model takes them at evaluation: normalised, permuted."""
        return self.permuted(self.normalize(images))

    def permuted(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of any type with their blocks in the order of all images, if they are permuted."""
        if self.block_order is None:
            return images
        return permute_blocks(images, self.block_order, self.options.permute_block_px)

    def _unpermuted(self, images: Tensor, samples: Tensor, keys: Tensor) -> Tensor:
        images = self.uint8(images, samples, keys)
        if self.erases and self.options.erase_mode == "pixel":
            out = self._normalize_and_erase(images, samples, keys)
        else:
            out = self.normalize(images)
            if self.erases:
                out = random_erase(out, samples, self.erasing, stream=keys[:, Purpose.ERASE])
        if self.cuts_out:
            out = cutout(out, samples, side=self.cutout_px, stream=keys[:, Purpose.CUTOUT])
        return out

    def mixed(
        self, images: Images, labels: Int64[Tensor, " B"], samples: Samples, keys: Keys
    ) -> tuple[Float32[Tensor, "B C H W"], Int64[Tensor, " B"], Float32[Tensor, " B"]]:
        """The same, mixed before they are permuted: images, the partners' labels, the weights of the own ones (see Mixup).

        Raises:
            ValueError: B is odd.
        """
        assert self.mixup is not None
        if not self.erases_by_kernel or self.cuts_out:
            out, partners, lam = self.mixup(self._unpermuted(images, samples, keys), labels, samples, keys)
            return self.permuted(out), partners, lam
        from vitpa.kernels.erase import normalize_erase_and_mix  # noqa: PLC0415 - Triton is needed on a GPU only

        lam, weights, cuts = self.mixup.draws(samples, keys, size=(images.shape[2], images.shape[3]))
        images, erasing = self.uint8(images, samples, keys), self._erasing(images, samples, keys)
        out = normalize_erase_and_mix(images, self.scale, self.shift, *erasing, weights, cuts)
        return self.permuted(out), partners_of(labels), lam.repeat_interleave(2)

    def uint8(self, images: Images, samples: Samples, keys: Keys) -> Images:
        """The part before normalisation. random_resized crops are taken where images are decoded: their sizes differ."""
        options = self.options
        if options.crop == "padded":
            images = padded_crop(images, samples, padding=options.crop_padding_px, stream=keys[:, Purpose.CROP])
        if options.hflip:
            images = horizontal_flip(images, samples, stream=keys[:, Purpose.FLIP])
        if self.policy is not None:
            images = self.policy(images, samples, keys[:, Purpose.POLICY])
        if self.jitter is not None:
            images = self.jitter(images, samples, keys[:, Purpose.COLOR_JITTER])
        return images

    def normalize(self, images: Images) -> Normalized:
        """Per channel (x / 255 - mean) / std."""
        return images.to(torch.float32) * self.scale - self.shift

    def _normalize_and_erase(self, images: Tensor, samples: Tensor, keys: Tensor) -> Tensor:
        """Normalised images with standard normal noise in random rectangles (timm's RandomErasing, mode pixel)."""
        boxes, words, normals = self._erasing(images, samples, keys)
        if self.erases_by_kernel:
            from vitpa.kernels.erase import normalize_and_erase  # noqa: PLC0415 - Triton is needed on a GPU only

            return normalize_and_erase(images, self.scale, self.shift, boxes, words, normals)
        return torch.where(_inside(images, *boxes.unbind(1)), noise(words, normals, images.shape), self.normalize(images))

    def _erasing(self, images: Tensor, samples: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The boxes (B, 4), the words (B,) and the numbers (65536,) that noise is made of."""
        size = (images.shape[2], images.shape[3])
        boxes = erased_boxes(samples, self.erasing, size=size, stream=keys[:, Purpose.ERASE])
        return torch.stack(boxes, 1), materialize(random_bits(keys[:, Purpose.ERASE_NOISE], samples)), self.normals


def padded_crop(images: Images, samples: Samples, *, padding: int, stream: Stream) -> Images:
    """Pad images with `padding` zero pixels on each side and crop back to H x W at a random place.

    The usual augmentation of CIFAR (He et al. 2015, section 4.2).
    """
    B, _, H, W = images.shape
    top, left = (materialize(randint(stream, samples, 2 * padding + 1, draw=draw)) for draw in (0, 1))
    rows = top[:, None] + torch.arange(H, device=images.device)  # B, H
    columns = left[:, None] + torch.arange(W, device=images.device)  # B, W
    padded = F.pad(images, (padding, padding, padding, padding))
    batch = torch.arange(B, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # B, C, H, W


def horizontal_flip(images: Images, samples: Samples, *, stream: Stream) -> Images:
    """Mirror images left to right with probability 1/2."""
    flip = materialize(random_bits(stream, samples) < 0)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def random_erase(images: Normalized, samples: Samples, erasing: Erasing, *, stream: Stream) -> Normalized:
    """Set a random rectangle of each image to 0, with a probability.

    By the rule of torchvision's RandomErasing (Zhong et al. 2017, arXiv 1708.04896, algorithm 1), in whose order the
    numbers of each try are drawn.
    """
    top, left, height, width = erased_boxes(samples, erasing, size=(images.shape[2], images.shape[3]), stream=stream)
    return _blank(images, top, left, height, width)


def erased_boxes(
    samples: Samples, erasing: Erasing, *, size: tuple[int, int], stream: Stream
) -> tuple[Int64[Tensor, " B"], Int64[Tensor, " B"], Int64[Tensor, " B"], Int64[Tensor, " B"]]:
    """Top, left, height and width of what is erased of images of `size` (H, W); 0 x 0 for nothing."""
    H, W = size
    num_samples = len(samples)
    (low, span), (log_low, log_span) = (
        [per_sample(each, num_samples, ndim=2) for each in pair] for pair in (erasing.scale, erasing.log_ratio)
    )
    streams = stream[:, None] if isinstance(stream, Tensor) else stream
    tries = torch.arange(_ERASE_TRIES, device=samples.device)
    numbers = torch.arange(1 + 4 * _ERASE_TRIES, device=samples.device)
    draws = materialize(uniform(streams, samples[:, None], draw=numbers))  # B, numbers
    area, ratio, top, left = draws[:, 1:].view(-1, _ERASE_TRIES, 4).double().unbind(2)  # B, tries; devices agree in float64
    area = H * W * (low + area * span)
    ratio = torch.exp(log_low + ratio * log_span)
    height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    top, left = (top * (H - height + 1)).floor(), (left * (W - width + 1)).floor()
    first = tries.masked_fill((height >= H) | (width >= W), _ERASE_TRIES).amin(1)  # B: the first that fits
    erased = (first < _ERASE_TRIES) & (draws[:, 0] < per_sample(erasing.prob, num_samples))
    first = first.clamp(max=_ERASE_TRIES - 1)[:, None]
    boxes = (materialize(values.gather(1, first)[:, 0].long() * erased) for values in (top, left, height, width))
    top, left, height, width = boxes
    return top, left, height, width


def cutout(images: Normalized, samples: Samples, *, side: Setting, stream: Stream) -> Normalized:
    """Set a square of `side` pixels of each image to 0, as far as it lies in the image.

    Its centre is a random pixel (DeVries & Taylor 2017, arXiv 1708.04552).
    """
    sides = per_sample(side, len(samples))
    top, left = (
        materialize(randint(stream, samples, size, draw=draw) - sides // 2) for draw, size in enumerate(images.shape[2:])
    )
    length = torch.zeros_like(top) + sides
    return _blank(images, top, left, length, length)


def noise(words: Int64[Tensor, " B"], normals: Float32[Tensor, " 65536"], shape: Sequence[int]) -> Normalized:
    """Numbers of `shape`, each one of `normals`: 16 bits of a hash, which a pixel's channels share, of its image's word."""
    _, C, H, W = shape
    pixels = materialize(torch.arange(H * W, device=words.device))  # else the compiler multiplies it by a constant beforehand
    bits = materialize(random_bits(words[:, None], pixels))[:, None]  # B, 1, P
    return normals[bits >> 16 * torch.arange(C, device=words.device)[:, None] & 0xFFFF].view(*shape)


def _blank(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """The images (B, C, H, W) with 0 in a box (B,) of each."""
    return images.masked_fill(_inside(images, top, left, height, width), 0)


def _inside(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Which pixels of images (B, C, H, W) are in the box (B,) of their image: (B, 1, H, W) bool."""
    y, x = (torch.arange(n, device=images.device) for n in images.shape[2:])
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])  # B, H
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])  # B, W
    return rows[:, None, :, None] & columns[:, None, None, :]
