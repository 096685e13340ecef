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
from torch import Tensor

ROWS = 16  # of the output, a program
NUM_WARPS = 4


@triton.jit
def _resize_kernel(plan, out, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    ONE: tl.constexpr = 1 << 22  # of the weights
    image = tl.program_id(2).to(tl.int64)
    at = plan + image * 10
    pixels = tl.load(at).to(tl.pointer_type(tl.uint8)) + tl.program_id(1) * tl.load(at + 3)
    row_stride, column_stride = tl.load(at + 1), tl.load(at + 2)
    # integers in float64, which holds all of them exactly
    height, width = tl.load(at + 4).to(tl.float64), tl.load(at + 5).to(tl.float64)
    to_height, to_width = tl.load(at + 6).to(tl.float64), tl.load(at + 7).to(tl.float64)
    window_y, window_x = tl.load(at + 8), tl.load(at + 9)
    reach_y, reach_x = 2 * tl.maximum(height, to_height), 2 * tl.maximum(width, to_width)  # half width of the triangle

    # Distances are in units of 1 / (2 * to_width) pixels: pixel u weighs reach_x - |(2u + 1) to_width - (2x + 1) width|.
    column = tl.arange(0, COLUMNS)
    centre_x = (2 * (window_x + column).to(tl.float64) + 1) * width
    left = tl.maximum(tl.floor((centre_x - reach_x + to_width) / (2 * to_width)), 0.0)
    taps = tl.ceil(reach_x / to_width).to(tl.int32) + 1
    total_x = tl.zeros((COLUMNS,), tl.float64)
    for tap in range(taps):
        weight = tl.maximum(reach_x - tl.abs((2 * (left + tap) + 1) * to_width - centre_x), 0.0)
        total_x += tl.where(left + tap < width, weight, 0.0)
    scale_x = ONE / tl.maximum(total_x, 1.0)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    centre_y = (2 * (window_y + row).to(tl.float64) + 1) * height
    first_y = (2 * (window_y + tl.program_id(0) * ROWS).to(tl.float64) + 1) * height
    last_y = (2 * (window_y + tl.minimum(tl.program_id(0) * ROWS + ROWS, S) - 1).to(tl.float64) + 1) * height
    top = tl.maximum(tl.floor((first_y - reach_y + to_height) / (2 * to_height)), 0.0).to(tl.int32)
    bottom = tl.minimum(tl.floor((last_y + reach_y + to_height) / (2 * to_height)), height).to(tl.int32)
    total_y = tl.zeros((ROWS,), tl.float64)
    for v in range(top, bottom):
        total_y += tl.maximum(reach_y - tl.abs((2 * v + 1) * to_height - centre_y), 0.0)
    scale_y = ONE / tl.maximum(total_y, 1.0)

    result = tl.full((ROWS, COLUMNS), ONE // 2, tl.int32)
    for v in range(top, bottom):
        along = tl.full((COLUMNS,), ONE // 2, tl.int32)
        for tap in range(taps):
            u = left + tap
            weight = tl.maximum(reach_x - tl.abs((2 * u + 1) * to_width - centre_x), 0.0)
            inside = (u < width) & (column < S)
            value = tl.load(pixels + v * row_stride + u.to(tl.int64) * column_stride, mask=inside, other=0)
            along += tl.floor(weight * scale_x + 0.5).to(tl.int32) * value.to(tl.int32)
        weight = tl.maximum(reach_y - tl.abs((2 * v + 1) * to_height - centre_y), 0.0)
        result += tl.floor(weight * scale_y + 0.5).to(tl.int32)[:, None] * (along >> 22)[None, :]
    to = ((image * 3 + tl.program_id(1)) * S + row)[:, None] * S + column[None, :]
    tl.store(out + to, (result >> 22).to(tl.uint8), mask=(row < S)[:, None] & (column < S)[None, :])


def resize(plan: Tensor, out: Tensor) -> None:
    """Fill `out` with a window of each image, resized.

    Args:
        plan: (B, 10) int64 on the device of the images. For each image: the address of the first byte of its region; the
            strides of a row, a column and a channel in bytes; height and width of the region; height and width to which
            all of the region is resized; top and left of the window in that. Pixels beyond the region have no influence.
            A region without pixels is black.
        out: (B, 3, S, S) uint8, contiguous: the windows.
    """
    B, _, S, _ = out.shape
    kernel: Any = _resize_kernel
    if B:
        kernel[(triton.cdiv(S, ROWS), 3, B)](plan, out, S, ROWS, triton.next_power_of_2(S), num_warps=NUM_WARPS)
