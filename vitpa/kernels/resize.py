"""Crops of images of different sizes, resampled to one size: Pillow's antialiased bilinear filter, to the bit.

The filter is a triangle whose support grows with the reduction. Like Pillow's (Resample.c) it goes along rows first, rounds
to 8 bits, then along columns, with weights of 22 bits after the point. The weights are ratios of integers here, and come out
as in Pillow, which computes them in floating point. Pillow 13 goes along columns first where height is reduced and width is
not, or less: there, and nowhere else, pixels may differ from its by 1.

Axes: B batch, S height and width of what comes out.
"""

from typing import Any

import triton
import triton.language as tl
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

ROWS = 4  # of the output, a program
NUM_WARPS = 2


@triton.jit
def _weights_kernel(plan, weights, S, taps, PIXELS: tl.constexpr):
    ONE: tl.constexpr = 1 << 22  # of the weights
    image = tl.program_id(0).to(tl.int64)
    axis = tl.program_id(1)
    at = plan + image * 10 + axis
    # integers in float64, which holds all of them exactly
    size, to, window = tl.load(at + 4).to(tl.float64), tl.load(at + 6).to(tl.float64), tl.load(at + 8)
    reach = 2 * tl.maximum(size, to)  # half width of the triangle
    # distances are in units of 1 / (2 * to) pixels: pixel u weighs reach - |(2u + 1) to - (2x + 1) size|
    pixel = tl.arange(0, PIXELS)
    centre = (2 * (window + pixel).to(tl.float64) + 1) * size
    first = tl.maximum(tl.floor((centre - reach + to) / (2 * to)), 0.0)
    total = tl.zeros((PIXELS,), tl.float64)
    for tap in range(taps):
        weight = tl.maximum(reach - tl.abs((2 * (first + tap) + 1) * to - centre), 0.0)
        total += tl.where(first + tap < size, weight, 0.0)
    scale = ONE / tl.maximum(total, 1.0)
    target = weights + (image * 2 + axis) * (taps + 1) * S + pixel
    tl.store(target, first.to(tl.int32), mask=pixel < S)
    for tap in range(taps):
        weight = tl.maximum(reach - tl.abs((2 * (first + tap) + 1) * to - centre), 0.0)
        weight = tl.where(first + tap < size, weight, 0.0)
        tl.store(target + (tap + 1) * S, tl.floor(weight * scale + 0.5).to(tl.int32), mask=pixel < S)


@triton.jit
def _resize_kernel(plan, weights, out, S, taps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    HALF: tl.constexpr = 1 << 21
    tiles = tl.cdiv(S, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * ROWS
    at = plan + image * 10
    pixels = tl.load(at).to(tl.pointer_type(tl.uint8))
    row_stride, column_stride, channel_stride = tl.load(at + 1), tl.load(at + 2).to(tl.int32), tl.load(at + 3)
    height, width = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
    to_height, to_width = tl.load(at + 6).to(tl.int32), tl.load(at + 7).to(tl.int32)
    taps_y = tl.cdiv(2 * tl.maximum(height, to_height), to_height) + 1
    taps_x = tl.cdiv(2 * tl.maximum(width, to_width), to_width) + 1

    row, column = begin + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    along_y = weights + image * 2 * (taps + 1) * S
    along_x = along_y + (taps + 1) * S + column
    first_y = tl.load(along_y + row, mask=row < S, other=0)
    first_x = tl.load(along_x, mask=column < S, other=0)
    top = tl.load(along_y + begin)
    bottom = tl.minimum(tl.load(along_y + tl.minimum(begin + ROWS, S) - 1) + taps_y, height)

    red = tl.full((ROWS, COLUMNS), HALF, tl.int32)
    green, blue = red, red
    for v in range(top, bottom):
        line = pixels + v * row_stride
        r = tl.full((COLUMNS,), HALF, tl.int32)
        g, b = r, r
        for tap in range(taps_x):
            u = first_x + tap
            inside = (u < width) & (column < S)
            weight = tl.load(along_x + (tap + 1) * S, mask=inside, other=0)
            pixel = line + u * column_stride
            r += weight * tl.load(pixel, mask=inside, other=0).to(tl.int32)
            g += weight * tl.load(pixel + channel_stride, mask=inside, other=0).to(tl.int32)
            b += weight * tl.load(pixel + 2 * channel_stride, mask=inside, other=0).to(tl.int32)
        tap_y = v - first_y
        there = (tap_y >= 0) & (tap_y < taps_y) & (row < S)
        weight = tl.load(along_y + (tap_y + 1) * S + row, mask=there, other=0)[:, None]
        red += weight * (r >> 22)[None, :]
        green += weight * (g >> 22)[None, :]
        blue += weight * (b >> 22)[None, :]
    to = out + ((image * 3 * S + row)[:, None] * S + column[None, :])
    mask = (row < S)[:, None] & (column < S)[None, :]
    tl.store(to, (red >> 22).to(tl.uint8), mask=mask)
    tl.store(to + S * S, (green >> 22).to(tl.uint8), mask=mask)
    tl.store(to + 2 * S * S, (blue >> 22).to(tl.uint8), mask=mask)


def room(B: int, S: int, taps: int) -> int:
    """How many numbers `resize` needs as weights."""
    return B * 2 * (taps + 1) * S


def resize(plan: Int64[Tensor, "B 10"], weights: Int32[Tensor, " n"], out: UInt8[Tensor, "B 3 S S"], *, taps: int) -> None:
    """Fill `out` with a window of each image, resized.

    Args:
        plan: On the device of the images. For each image: the address of the first byte of its region; the
            strides of a row, a column and a channel in bytes; height and width of the region; height and width to which
            all of the region is resized; top and left of the window in that. Pixels beyond the region have no influence.
            A region without pixels is black.
        weights: n >= `room(B, S, taps)`, for the use of this function.
        out: Contiguous: the windows.
        taps: How many pixels of a region make one along an axis: 1 + 2 * size / (what it is resized to), rounded up, and at
            least 3; the largest of all.
    """
    B, _, S, _ = out.shape
    assert len(weights) >= room(B, S, taps)
    find_weights: Any = _weights_kernel
    kernel: Any = _resize_kernel
    if B:
        power = triton.next_power_of_2(S)
        find_weights[(B, 2)](plan, weights, S, taps, power, num_warps=4)
        kernel[(triton.cdiv(S, ROWS) * B,)](plan, weights, out, S, taps, ROWS, power, num_warps=NUM_WARPS)
