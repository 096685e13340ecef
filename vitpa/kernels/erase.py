"""Normalisation of images with random erasing by noise: each pixel gets its own numbers, computed inside the box alone.

The numbers are those of `noise` in vitpa/data/augment.py, to the bit.

Axes: B batch, C channels, H W pixels, P = H * W.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # pixels of a program

# SplitMix64's, as in vitpa/data/counter_rng.py
_GOLDEN, _MIX1, _MIX2 = (tl.constexpr(n - 2**64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def _shifted(z, bits: tl.constexpr):
    mask: tl.constexpr = (1 << (64 - bits)) - 1
    return (z >> bits) & mask


@triton.jit
def _random_bits(word, pixel):
    z = pixel.to(tl.int64) * _GOLDEN + word
    for _ in tl.static_range(2):
        z = (z ^ _shifted(z, 30)) * _MIX1
        z = (z ^ _shifted(z, 27)) * _MIX2
        z = z ^ _shifted(z, 31)
    return z


@triton.jit
def _kernel(images, scale, shift, boxes, words, normals, out, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    P: tl.constexpr = H * W
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TILE
    pixel = first + tl.arange(0, TILE)
    inside = pixel < P
    at = image * (3 * P) + pixel
    top, left = tl.load(boxes + 4 * image), tl.load(boxes + 4 * image + 1)
    bottom, right = top + tl.load(boxes + 4 * image + 2), left + tl.load(boxes + 4 * image + 3)
    if (bottom > top) & (first < bottom * W) & (first + TILE > top * W):
        row, column = pixel // W, pixel % W
        box = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        bits = _random_bits(tl.load(words + image), pixel)
        for c in tl.static_range(3):
            value = tl.load(images + at + c * P, mask=inside, other=0).to(tl.float32)
            noise = tl.load(normals + ((bits >> (16 * c)) & 0xFFFF), mask=box, other=0.0)
            value = tl.where(box, noise, value * tl.load(scale + c) - tl.load(shift + c))
            tl.store(out + at + c * P, value, mask=inside)
    else:
        for c in tl.static_range(3):
            value = tl.load(images + at + c * P, mask=inside, other=0).to(tl.float32)
            tl.store(out + at + c * P, value * tl.load(scale + c) - tl.load(shift + c), mask=inside)


@torch.library.custom_op("vitpa::normalize_and_erase", mutates_args=())
def _normalize_and_erase(
    images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor
) -> Tensor:
    B, _, H, W = images.shape
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    kernel: Any = _kernel
    inputs = (tensor.contiguous() for tensor in (images, scale, shift, boxes, words, normals))
    kernel[(triton.cdiv(H * W, TILE), B)](*inputs, out, H, W, TILE)
    return out


@_normalize_and_erase.register_fake
def _(images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor) -> Tensor:
    return images.new_empty(images.shape, dtype=torch.float32)


def normalize_and_erase(images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> float32 x * scale - shift, and standard normal numbers in a box of each.

    `scale` and `shift` are of 3 float32, a channel each; `boxes` (B, 4) int64: top, left, height and width, of no pixel for
    none; `words` (B,) int64: what the numbers of an image are drawn from; `normals` (65536,) float32: the numbers.
    """
    out: Tensor = _normalize_and_erase(images, scale, shift, boxes, words, normals)
    return out
