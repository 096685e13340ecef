"""Random operations on whole batches of images: every image has its own, and a program does a tile of one image.

What an image needs is chosen on the device by its kind: programs of the others leave at once. Pixels are computed in whole
numbers, or in floats whose products are exact, so that nothing depends on how a compiler contracts them: the results are,
byte for byte, those of the formulation in torch of vitpa/data/augment/rand_augment.py. Counts are added atomically, as whole
numbers.

Axes: B batch, H W pixels, P = H * W, V = 256 pixel values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor

# What an operation looks at: nothing, a pixel's value, its three channels, its neighbours, other places; the last three
# look at a pixel's value too, through a table that is made from statistics of the whole image.
KINDS = ("Copy", "Table", "Color", "Sharpness", "Move", "Contrast", "AutoContrast", "Equalize")
_COPY, _TABLE, _COLOR, _SHARPNESS, _MOVE, _CONTRAST, _AUTOCONTRAST = map(tl.constexpr, range(7))

TILE = 2048  # pixels of a program: 16 a thread, as many bytes as one load takes
TILE_OF_NEIGHBOURS = 256  # pixels at a time where each has up to 16 sources: more do not fit into registers


@triton.jit
def _grey(red, green, blue):
    """Brightness of int32 pixels, as Pillow computes it."""
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _blend(pixel, other, weight, rest):
    first = (pixel.to(tl.float64) * weight).to(tl.float32)
    total = first + (other.to(tl.float64) * rest).to(tl.float32)
    return tl.minimum(tl.maximum(total, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _statistics_kernel(images, kind, histogram, grey, P: tl.constexpr, TILE: tl.constexpr):
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    what = tl.load(kind + image)
    pixel = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = pixel < P
    at = images + image * (3 * P) + pixel
    if what == _CONTRAST:
        red = tl.load(at, mask=inside, other=0).to(tl.int32)
        green = tl.load(at + P, mask=inside, other=0).to(tl.int32)
        blue = tl.load(at + 2 * P, mask=inside, other=0).to(tl.int32)
        tl.atomic_add(grey + image, tl.sum(_grey(red, green, blue), 0).to(tl.int64))
    if what >= _AUTOCONTRAST:
        value = tl.arange(0, 256)
        padding = tl.sum((pixel >= P).to(tl.int32), 0)
        for c in tl.static_range(3):
            counts = tl.histogram(tl.load(at + c * P, mask=inside, other=0).to(tl.int32), 256)
            counts -= tl.where(value == 0, padding, 0)
            tl.atomic_add(histogram + (image * 3 + c) * 256 + value, counts)


@triton.jit
def _pixel_kernel(images, kind, tables, ratios, out, P: tl.constexpr, TILE: tl.constexpr):
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    what = tl.load(kind + image)
    pixel = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = pixel < P
    at = images + image * (3 * P) + pixel
    to = out + image * (3 * P) + pixel
    if what == _COPY:
        for c in tl.static_range(3):
            tl.store(to + c * P, tl.load(at + c * P, mask=inside, other=0), mask=inside)
    if (what == _TABLE) | (what >= _CONTRAST):
        table = tables + image * (3 * 256)
        for c in tl.static_range(3):
            value = tl.load(at + c * P, mask=inside, other=0).to(tl.int32)
            tl.store(to + c * P, tl.load(table + c * 256 + value), mask=inside)
    if what == _COLOR:
        weight, rest = tl.load(ratios + 2 * image), tl.load(ratios + 2 * image + 1)
        red = tl.load(at, mask=inside, other=0).to(tl.int32)
        green = tl.load(at + P, mask=inside, other=0).to(tl.int32)
        blue = tl.load(at + 2 * P, mask=inside, other=0).to(tl.int32)
        grey = _grey(red, green, blue)
        tl.store(to, _blend(red, grey, weight, rest), mask=inside)
        tl.store(to + P, _blend(green, grey, weight, rest), mask=inside)
        tl.store(to + 2 * P, _blend(blue, grey, weight, rest), mask=inside)


@triton.jit
def _cubic(d):
    """The weights of four neighbours for the part d of a pixel's width past the second, all in units of 2^-15."""
    d2 = (d * d) >> 15
    d3 = (d2 * d) >> 15
    first, third, fourth = 2 * d2 - d - d3, d + d2 - d3, d3 - d2
    return first, 32768 - first - third - fourth, third, fourth


@triton.jit
def _inner(i, last: tl.constexpr):
    return tl.minimum(tl.maximum(i, 0), last)


@triton.jit
def _row(at, x0, x1, x2, x3, w0, w1, w2, w3):
    """A row's four neighbours, weighted, in units of 2^-7."""
    total = tl.load(at + x0).to(tl.int32) * w0 + tl.load(at + x1).to(tl.int32) * w1
    total += tl.load(at + x2).to(tl.int32) * w2 + tl.load(at + x3).to(tl.int32) * w3
    return (total + 128) >> 8


@triton.jit
def _affine(at, to, pixel, matrix, fill, H: tl.constexpr, W: tl.constexpr):
    """Bicubic interpolation at the places that `matrix`, in units of 2^-32, says; `fill` where they are outside."""
    P: tl.constexpr = H * W
    inside = pixel < P
    row, column = (pixel // W).to(tl.int64), (pixel % W).to(tl.int64)
    x = tl.load(matrix) * column + tl.load(matrix + 1) * row + tl.load(matrix + 2)
    y = tl.load(matrix + 3) * column + tl.load(matrix + 4) * row + tl.load(matrix + 5)
    filled = ((x >> 32) < 0) | ((x >> 32) >= W) | ((y >> 32) < 0) | ((y >> 32) >= H)
    half: tl.constexpr = 1 << 31
    low: tl.constexpr = (1 << 32) - 1
    x, y = x - half, y - half
    w0, w1, w2, w3 = _cubic((((x & low) + (1 << 16)) >> 17).to(tl.int32))
    h0, h1, h2, h3 = _cubic((((y & low) + (1 << 16)) >> 17).to(tl.int32))
    left, top = (x >> 32).to(tl.int32), (y >> 32).to(tl.int32)
    x0, x1, x2, x3 = _inner(left - 1, W - 1), _inner(left, W - 1), _inner(left + 1, W - 1), _inner(left + 2, W - 1)
    y0, y1 = _inner(top - 1, H - 1) * W, _inner(top, H - 1) * W
    y2, y3 = _inner(top + 1, H - 1) * W, _inner(top + 2, H - 1) * W
    for c in tl.static_range(3):
        total = h0 * _row(at + c * P + y0, x0, x1, x2, x3, w0, w1, w2, w3)
        total += h1 * _row(at + c * P + y1, x0, x1, x2, x3, w0, w1, w2, w3)
        total += h2 * _row(at + c * P + y2, x0, x1, x2, x3, w0, w1, w2, w3)
        total += h3 * _row(at + c * P + y3, x0, x1, x2, x3, w0, w1, w2, w3)
        value = tl.where(filled, tl.load(fill + c).to(tl.int32), _inner(total >> 22, 255))
        tl.store(to + c * P + pixel, value.to(tl.uint8), mask=inside)


@triton.jit
def _sharpness(at, to, pixel, weight, rest, H: tl.constexpr, W: tl.constexpr):
    P: tl.constexpr = H * W
    inside = pixel < P
    row, column = pixel // W, pixel % W
    inner = (row > 0) & (row < H - 1) & (column > 0) & (column < W - 1)
    for c in tl.static_range(3):
        centre = tl.load(at + c * P + pixel, mask=inside, other=0).to(tl.int32)
        total = 4 * centre
        for dy in tl.static_range(3):
            for dx in tl.static_range(3):
                there = at + c * P + pixel + ((dy - 1) * W + dx - 1)
                total += tl.load(there, mask=inner & inside, other=0).to(tl.int32)
        blurred = tl.where(inner, (2 * total + 13) // 26, centre)
        tl.store(to + c * P + pixel, _blend(centre, blurred, weight, rest), mask=inside)


@triton.jit
def _neighbour_kernel(
    images, kind, ratios, matrix, fill, out,
    H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = H * W
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    what = tl.load(kind + image)
    first = tl.program_id(0) % tiles * TILE
    at = images + image * (3 * P)
    to = out + image * (3 * P)
    if what == _SHARPNESS:
        weight, rest = tl.load(ratios + 2 * image), tl.load(ratios + 2 * image + 1)
        for start in range(0, TILE, PART):
            _sharpness(at, to, first + start + tl.arange(0, PART), weight, rest, H, W)
    if what == _MOVE:
        for start in range(0, TILE, PART):
            pixel = first + start + tl.arange(0, PART)
            _affine(at, to, pixel, matrix + 6 * image, fill, H, W)


@torch.library.custom_op("vitpa::image_statistics", mutates_args=())
def _statistics(images: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    B, _, H, W = images.shape
    histogram = torch.zeros(B, 3, 256, dtype=torch.int32, device=images.device)
    grey = torch.zeros(B, dtype=torch.int64, device=images.device)
    kernel: Any = _statistics_kernel
    kernel[(triton.cdiv(H * W, TILE) * B,)](images.contiguous(), kind.contiguous(), histogram, grey, H * W, TILE)
    return histogram, grey


@_statistics.register_fake
def _(images: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    B = images.shape[0]
    return images.new_empty(B, 3, 256, dtype=torch.int32), images.new_empty(B, dtype=torch.int64)


@torch.library.custom_op("vitpa::image_operations", mutates_args=())
def _operations(images: Tensor, kind: Tensor, tables: Tensor, ratios: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    B, _, H, W = images.shape
    images, kind, ratios = images.contiguous(), kind.contiguous(), ratios.contiguous()
    out = torch.empty_like(images)
    grid = (triton.cdiv(H * W, TILE) * B,)
    pixels: Any = _pixel_kernel
    pixels[grid](images, kind, tables.contiguous(), ratios, out, H * W, TILE)
    neighbours: Any = _neighbour_kernel
    neighbours[grid](images, kind, ratios, matrix.contiguous(), fill, out, H, W, TILE, TILE_OF_NEIGHBOURS)
    return out


@_operations.register_fake
def _(images: Tensor, kind: Tensor, tables: Tensor, ratios: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def statistics(
    images: UInt8[Tensor, "B 3 H W"], kind: Int32[Tensor, " B"]
) -> tuple[Int32[Tensor, "B 3 256"], Int64[Tensor, " B"]]:
    """Of images that need them: histograms and sums of brightness; of others 0.

    `kind` are indices of KINDS: AutoContrast and Equalize need a histogram, Contrast needs the sum.
    """
    found: tuple[Tensor, Tensor] = _statistics(images, kind)
    return found


def apply(
    images: UInt8[Tensor, "B 3 H W"], kind: Int32[Tensor, " B"], tables: UInt8[Tensor, "B 3 256"],
    ratios: Float64[Tensor, "B 2"], matrix: Int64[Tensor, "B 6"], fill: UInt8[Tensor, " 3"],
) -> UInt8[Tensor, "B 3 H W"]:  # fmt: skip
    """The images, each after the operation of its kind, as Pillow does it.

    `tables`: what becomes of a pixel value; `ratios`: the weights of the image and of what it is blended with; `matrix` in
    units of 2^-32: [x, y of the source] = matrix.view(2, 3) @ [column, row, 1], where a pixel's centre is at its number plus
    1/2; `fill`: the colour outside.
    """
    out: Tensor = _operations(images, kind, tables, ratios, matrix, fill)
    return out
