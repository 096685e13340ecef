"""Normalisation of images with random erasing by noise, and then with mixup or cutmix, in one pass over memory.

Each erased pixel gets its own numbers, computed inside the box alone: those of `noise` in
vitpa/data/augment/pipeline.py, to the bit. Mixing is that of mixup.py beside it: a program does the same tile of both images
of a pair.

Axes: B batch, C channels, H W pixels, P = H * W.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

TILE = 512  # pixels of a program: 4 a thread, whose numbers are one load of bytes and one store of floats

# SplitMix64's, as in vitpa/data/rng.py
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
def _touches(box, first, W: tl.constexpr, TILE: tl.constexpr):
    """Whether a tile may hold pixels of a box (top, left, height, width)."""
    top, height = tl.load(box), tl.load(box + 2)
    return (height > 0) & (first < (top + height) * W) & (first + TILE > top * W)


@triton.jit
def _in_box(box, pixel, W: tl.constexpr):
    top, left = tl.load(box), tl.load(box + 1)
    row, column = pixel // W - top, pixel % W - left
    return (row >= 0) & (row < tl.load(box + 2)) & (column >= 0) & (column < tl.load(box + 3))


@triton.jit
def _normalized(at, inside, scale, shift):
    return tl.load(at, mask=inside, other=0).to(tl.float32) * tl.load(scale) - tl.load(shift)


@triton.jit
def _erased(value, box, bits, normals, c: tl.constexpr):
    return tl.where(box, tl.load(normals + ((bits >> (16 * c)) & 0xFFFF), mask=box, other=0.0), value)


@triton.jit
def _store_mixed(at, P: tl.constexpr, a, b, weight, cut, inside):
    tl.store(at, tl.where(cut, b, weight * a + (1.0 - weight) * b), mask=inside)
    tl.store(at + 3 * P, tl.where(cut, a, weight * b + (1.0 - weight) * a), mask=inside)


@triton.jit
def _erase_kernel(images, scale, shift, boxes, words, normals, out, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    P: tl.constexpr = H * W
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    pixel = first + tl.arange(0, TILE)
    inside = pixel < P
    at = image * (3 * P) + pixel
    if _touches(boxes + 4 * image, first, W, TILE):
        box = _in_box(boxes + 4 * image, pixel, W)
        bits = _random_bits(tl.load(words + image), pixel)
        for c in tl.static_range(3):
            value = _normalized(images + at + c * P, inside, scale + c, shift + c)
            tl.store(out + at + c * P, _erased(value, box, bits, normals, c), mask=inside)
    else:
        for c in tl.static_range(3):
            tl.store(out + at + c * P, _normalized(images + at + c * P, inside, scale + c, shift + c), mask=inside)


@triton.jit
def _erase_and_mix_kernel(
    images, scale, shift, boxes, words, normals, weights, cuts, out,
    H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = H * W
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    pixel = first + tl.arange(0, TILE)
    inside = pixel < P
    at = pair * (6 * P) + pixel
    weight = tl.load(weights + pair)
    cut = _in_box(cuts + 4 * pair, pixel, W)
    boxes += 8 * pair
    if _touches(boxes, first, W, TILE) | _touches(boxes + 4, first, W, TILE):
        box_a, box_b = _in_box(boxes, pixel, W), _in_box(boxes + 4, pixel, W)
        bits_a, bits_b = _random_bits(tl.load(words + 2 * pair), pixel), _random_bits(tl.load(words + 2 * pair + 1), pixel)
        for c in tl.static_range(3):
            a = _normalized(images + at + c * P, inside, scale + c, shift + c)
            b = _normalized(images + at + (3 + c) * P, inside, scale + c, shift + c)
            a, b = _erased(a, box_a, bits_a, normals, c), _erased(b, box_b, bits_b, normals, c)
            _store_mixed(out + at + c * P, P, a, b, weight, cut, inside)
    else:
        for c in tl.static_range(3):
            a = _normalized(images + at + c * P, inside, scale + c, shift + c)
            b = _normalized(images + at + (3 + c) * P, inside, scale + c, shift + c)
            _store_mixed(out + at + c * P, P, a, b, weight, cut, inside)


@torch.library.custom_op("vitpa::normalize_and_erase", mutates_args=())
def _normalize_and_erase(
    images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor
) -> Tensor:
    B, _, H, W = images.shape
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    kernel: Any = _erase_kernel
    inputs = (tensor.contiguous() for tensor in (images, scale, shift, boxes, words, normals))
    kernel[(triton.cdiv(H * W, TILE) * B,)](*inputs, out, H, W, TILE)
    return out


@_normalize_and_erase.register_fake
def _(images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor) -> Tensor:
    return images.new_empty(images.shape, dtype=torch.float32)


def normalize_and_erase(
    images: UInt8[Tensor, "B 3 H W"], scale: Float32[Tensor, "3 1 1"], shift: Float32[Tensor, "3 1 1"],
    boxes: Int64[Tensor, "B 4"], words: Int64[Tensor, " B"], normals: Float32[Tensor, " 65536"],
) -> Float32[Tensor, "B 3 H W"]:  # fmt: skip
    """Images x -> x * scale - shift, and standard normal numbers in a box of each.

    `boxes`: top, left, height and width, of no pixel for none; `words`: what the numbers of an image are drawn from.
    """
    out: Tensor = _normalize_and_erase(images, scale, shift, boxes, words, normals)
    return out


@torch.library.custom_op("vitpa::normalize_erase_and_mix", mutates_args=())
def _normalize_erase_and_mix(
    images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor, weights: Tensor, cuts: Tensor
) -> Tensor:
    B, _, H, W = images.shape
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    kernel: Any = _erase_and_mix_kernel
    inputs = (tensor.contiguous() for tensor in (images, scale, shift, boxes, words, normals, weights, cuts))
    kernel[(triton.cdiv(H * W, TILE) * (B // 2),)](*inputs, out, H, W, TILE)
    return out


@_normalize_erase_and_mix.register_fake
def _(
    images: Tensor, scale: Tensor, shift: Tensor, boxes: Tensor, words: Tensor, normals: Tensor, weights: Tensor, cuts: Tensor
) -> Tensor:
    return images.new_empty(images.shape, dtype=torch.float32)


def normalize_erase_and_mix(
    images: UInt8[Tensor, "B 3 H W"], scale: Float32[Tensor, "3 1 1"], shift: Float32[Tensor, "3 1 1"],
    boxes: Int64[Tensor, "B 4"], words: Int64[Tensor, " B"], normals: Float32[Tensor, " 65536"],
    weights: Float32[Tensor, " B//2"], cuts: Int64[Tensor, "B//2 4"],
) -> Float32[Tensor, "B 3 H W"]:  # fmt: skip
    """As `normalize_and_erase`, and then each image is mixed with its neighbour: B is even.

    `weights`: of an image's own pixels in what a pair becomes; `cuts`: top, left, height and width of what each takes.
    """
    out: Tensor = _normalize_erase_and_mix(images, scale, shift, boxes, words, normals, weights, cuts)
    return out
