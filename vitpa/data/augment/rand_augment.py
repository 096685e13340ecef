"""RandAugment as timm does it and DeiT trains with it (`rand-m9-mstd0.5-inc1`), on the device, drawn per sample.

Each operation is Pillow's of the same argument: byte for byte, but for bicubic interpolation, which is done in whole numbers
and differs by one grey level in fewer than one value of a hundred. All arguments are known beforehand, since 1,024 equally
likely quantiles stand for the normal distribution of the magnitude: so tables hold what is transcendental, and every device
makes the same bytes. Two more differences from timm: factors of blends are rounded to 2^-14, and 0 bits kept (at magnitude
10), which Pillow 13 refuses, makes an image black.

Sources: Cubuk et al. 2020 (RandAugment, arXiv 1909.13719); timm/data/auto_augment.py; Pillow's Geometry.c and Blend.c.
Axes: B batch, C channels, H W pixels, P = H * W, K operations, V = 256 pixel values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from vitpa.data.augment.auto_augment import IDENTITY, Operation, blend, blurred
from vitpa.data.rng import materialize, randint, random_bits
from vitpa.per_replica import numbered, per_sample

KINDS = ("Copy", "Table", "Color", "Sharpness", "Move", "Contrast", "AutoContrast", "Equalize")  # in vitpa/kernels/policy.py
LEVELS = 1024  # quantiles of the magnitude
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
NAMES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", *GEOMETRY, *ENHANCEMENTS)


def quantiles(magnitude: float, std: float) -> list[float]:
    """LEVELS equally likely values of N(magnitude, std^2) cut to [0, 10]."""
    normal = NormalDist().inv_cdf
    return [min(10.0, max(0.0, magnitude + std * normal((level + 0.5) / LEVELS))) for level in range(LEVELS)]


def argument(name: str, magnitude: float, *, negated: bool, img_size: int) -> float:
    """What an operation of magnitude 0 to 10 is called with: 0 if it takes nothing.

    Rotation in degrees against the clock, shear as a slope, translation in pixels, enhancement as a factor, posterize in
    bits kept, solarize as the threshold, SolarizeAdd as what is added below 128. Source: timm's `*_level_to_arg`.
    """
    share = magnitude / 10
    signed = -share if negated else share
    if name in ENHANCEMENTS:
        return round(max(0.1, 1.0 + 0.9 * signed) * 2**14) / 2**14
    return {
        "Rotate": signed * 30.0,
        "ShearX": signed * 0.3,
        "ShearY": signed * 0.3,
        "TranslateX": signed * 0.45 * img_size,
        "TranslateY": signed * 0.45 * img_size,
        "Posterize": float(4 - int(share * 4)),
        "Solarize": float(256 - min(256, int(share * 256))),
        "SolarizeAdd": float(min(128, int(share * 110))),
    }.get(name, 0.0)


@functools.lru_cache(maxsize=8)  # a training has several of the same
def operations_of(
    strengths: tuple[tuple[float, float], ...], img_size: int
) -> tuple[tuple[Operation, ...], Int64[Tensor, "strengths 15 2 levels"]]:
    """K different operations, and which of them is meant by a strength, a name, whether it is negated, and a quantile."""
    found: dict[Operation, int] = {IDENTITY: 0}
    index = [
        [[[found.setdefault((name, argument(name, m, negated=negated, img_size=img_size)), len(found)) for m in values]
          for negated in (False, True)]
         for name in NAMES]
        for values in (quantiles(mean, std) for mean, std in strengths)
    ]  # fmt: skip
    return tuple(found), torch.tensor(index)


@functools.lru_cache(maxsize=8)
def tables_of(operations: tuple[Operation, ...], height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What PillowOperations knows of K operations.

    Returns:
        (K,) int32, the kinds; (K, 6) int64, the matrices times 2^32; (K, 2) float64, the weights of the image and of the
        other; (K,) int64, a row of the last one: (rows, V) uint8, what a pixel value becomes. Not to be changed.
    """
    kind = torch.tensor([_kind(name) for name, _ in operations], dtype=torch.int32)
    matrices = [_matrix(op, height, width) for op in operations]
    matrix = torch.tensor([[round(m * 2**32) for m in matrix] for matrix in matrices])
    factors = torch.tensor([m if name in ENHANCEMENTS else 1.0 for name, m in operations], dtype=torch.float64)
    tables: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([tables.setdefault(_values(op), len(tables)) for op in operations])
    return kind, matrix, torch.stack([factors, 1 - factors], 1), rows, torch.tensor(list(tables), dtype=torch.uint8)


class RandAugment:
    """`num_ops` operations, each of the 15 as likely as any other and then applied to every second image."""

    def __init__(
        self,
        *,
        num_ops: int,
        strengths: Sequence[tuple[float, float]],
        fill: Sequence[int],
        img_size: int,
        device: torch.device,
        kernels: bool = True,
    ):
        """`strengths`: the replicas' means and standard deviations of the magnitude; `fill`: the colour (R, G, B) outside.

        `kernels`: whether a GPU does the operations by kernels.
        """
        different, self.strength = numbered(strengths, device)
        operations, index = operations_of(tuple(different), img_size)
        self.index = index.to(device)
        self.num_ops = num_ops
        self.operations = PillowOperations(
            operations, fill=fill, height=img_size, width=img_size, device=device, kernels=kernels
        )

    def choices(self, samples: Int64[Tensor, " B"], stream: Int64[Tensor, " #B"]) -> list[Int64[Tensor, " B"]]:
        """For each of num_ops places the operation, an index of `operations`, of each sample, whose key is in `stream`."""
        found, strength = [], per_sample(self.strength, len(samples))
        for place in range(self.num_ops):
            name = randint(stream, samples, len(NAMES), draw=4 * place)
            negated, applied = ((random_bits(stream + (4 * place + draw), samples) < 0).long() for draw in (1, 2))
            level = randint(stream, samples, LEVELS, draw=4 * place + 3)
            found.append(materialize(self.index[strength, name, negated, level] * applied))
        return found

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], samples: Tensor, stream: Tensor) -> UInt8[Tensor, "B 3 H W"]:
        """The images of `samples` after their operations."""
        for choice in self.choices(samples, stream):
            images = self.operations(images, choice)
        return images


class PillowOperations:
    """Given operations on images of one size: as a function of images and, for each, the index of its operation.

    On a GPU kernels do to each image what it needs. Elsewhere everything is computed for all of them.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        *,
        fill: Sequence[int],
        height: int,
        width: int,
        device: torch.device,
        kernels: bool = True,
    ):
        """`fill` is the colour (R, G, B) outside of the images; `kernels`: whether a GPU uses them."""
        self.names, self.kernels = operations, kernels
        tables = tables_of(tuple(operations), height, width)
        self.kind, self.matrix, self.ratios, self.row, self.values = (each.to(device) for each in tables)
        stretch = [[i * (255.0 / span) if span else float(i) for i in range(256)] for span in range(256)]
        self.stretch = torch.tensor(stretch, dtype=torch.float64).to(device)  # range of values, V
        self.fill = torch.tensor(fill, dtype=torch.uint8).to(device)

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], choice: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The images, each after the operation of its index in `choice`."""
        if images.is_cuda and self.kernels:
            return self.by_kernel(images, choice)
        kind, ratios, pixels = self.kind[choice], self.ratios[choice], images.flatten(2)
        grey = _grey(pixels)
        counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
        histogram = counts.scatter_add(2, pixels.long(), torch.ones_like(pixels, dtype=torch.int32))
        tables = self._tables(choice, histogram, grey.sum((1, 2)), pixels.shape[2])
        looked_up = tables.gather(2, pixels.long()).view_as(images)
        colored = blend(pixels, grey, ratios).view_as(images)
        sharpened = blend(pixels, blurred(images.int()).flatten(2), ratios).view_as(images)
        others = {"Color": colored, "Sharpness": sharpened, "Move": _moved(images, self.matrix[choice], self.fill)}
        for name, other in others.items():
            looked_up = torch.where((kind == KINDS.index(name))[:, None, None, None], other, looked_up)
        return looked_up

    def by_kernel(self, images: UInt8[Tensor, "B 3 H W"], choice: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The same by kernels, each image's operation alone."""
        from vitpa.kernels import policy  # noqa: PLC0415 - Triton is needed on a GPU only

        kind, images = self.kind[choice], images.contiguous()
        histogram, grey_total = policy.statistics(images, kind)
        tables = self._tables(choice, histogram, grey_total, images.shape[2] * images.shape[3])
        return policy.apply(images, kind, tables, self.ratios[choice], self.matrix[choice], self.fill)

    def _tables(self, choice: Tensor, histogram: Tensor, grey_total: Tensor, num_pixels: int) -> Tensor:
        """What each pixel value becomes under operations that look at no other pixel of it: (B, C, V) uint8.

        Of images with pixel values `histogram` (B, C, V) and a sum of brightness `grey_total` (B,); for AutoContrast and
        Equalize the one counts, for Contrast the other.
        """
        kind, ratios = self.kind[choice][:, None, None], self.ratios[choice]
        value = torch.arange(256, dtype=torch.int32, device=choice.device)  # V
        low, high = extremes(histogram)
        span = (high - low).long()
        stretched = self.stretch[span[..., 0]] - (self.stretch[span, low.long()] * (span > 0))

        below = histogram.cumsum(2, dtype=torch.int32) - histogram
        step = (num_pixels - histogram.gather(2, high.long())) // 255
        equalized = torch.where(step == 0, value, (below + step // 2) // step.clamp(min=1))

        mean = (2 * grey_total.long() + num_pixels) // (2 * num_pixels)
        contrasted = blend(value, mean[:, None, None], ratios)

        tables = self.values[self.row[choice]][:, None].expand_as(histogram)
        tables = torch.where(kind == KINDS.index("AutoContrast"), stretched.clamp(0, 255).to(torch.uint8), tables)
        tables = torch.where(kind == KINDS.index("Equalize"), equalized.clamp(0, 255).to(torch.uint8), tables)
        return torch.where(kind == KINDS.index("Contrast"), contrasted, tables)


def extremes(histogram: Int32[Tensor, "B C V"]) -> tuple[Int32[Tensor, "B C 1"], Int32[Tensor, "B C 1"]]:
    """The lowest and the highest pixel value of each `histogram`, alike if it is empty."""
    value = torch.arange(256, dtype=torch.int32, device=histogram.device)
    high = torch.where(histogram > 0, value, 0).amax(2, keepdim=True)
    return torch.minimum(torch.where(histogram > 0, value, 255).amin(2, keepdim=True), high), high


def _kind(name: str) -> int:
    if name in KINDS:
        return KINDS.index(name)
    return KINDS.index("Copy" if name == "Identity" else "Move" if name in GEOMETRY else "Table")


def _matrix(operation: Operation, height: int, width: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the pixel in column x and row y comes from (a x + b y + c, d x + e y + f).

    A pixel's centre is at its number plus 1/2 in the source; here x and y are the numbers themselves.
    """
    name, m = operation
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "ShearX":
        b = m
    elif name == "ShearY":
        d = m
    elif name == "TranslateX":
        c = m
    elif name == "TranslateY":
        f = m
    elif name == "Rotate":
        a, b = math.cos(math.radians(m)), -math.sin(math.radians(m))
        d, e = -b, a
        c, f = width / 2 - (a * width + b * height) / 2, height / 2 - (d * width + e * height) / 2
    return a, b, c + (a + b) / 2, d, e, f + (d + e) / 2


def _values(operation: Operation) -> tuple[int, ...]:
    """What an operation with a table of its own makes of each pixel value; for others the value itself."""
    name, m = operation
    if name == "Invert":
        return tuple(255 - v for v in range(256))
    if name == "Posterize":
        return tuple(v & ~(2 ** (8 - int(m)) - 1) for v in range(256))
    if name == "Solarize":
        return tuple(v if v < m else 255 - v for v in range(256))
    if name == "SolarizeAdd":
        return tuple(min(255, v + int(m)) if v < 128 else v for v in range(256))
    if name == "Brightness":
        return tuple(min(255, int(m * v)) for v in range(256))
    return tuple(range(256))


def _grey(pixels: Tensor) -> Tensor:
    """Pillow's brightness of each of the pixels (B, 3, P) uint8: (B, 1, P) int32."""
    red, green, blue = pixels.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16)[:, None]


def _moved(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Bicubic interpolation (Pillow's, a = -1) of images (B, 3, H, W) at the places of `matrix` (B, 6), `fill` outside.

    In whole numbers: places in units of 2^-32, weights of 2^-15, a row's sum of 2^-7, the whole of 2^-22, cut off.
    """
    B, C, H, W = images.shape
    column = torch.arange(W, device=images.device)
    row = torch.arange(H, device=images.device)[:, None]
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    x, y = a * column + b * row + c, d * column + e * row + f  # B, H, W
    filled = (x < 0) | (x >> 32 >= W) | (y < 0) | (y >> 32 >= H)
    x, y = materialize(x - 2**31), materialize(y - 2**31)
    x_weights, y_weights = ([materialize(weight)[:, None] for weight in _cubic(place)] for place in (x, y))  # 4 of B, 1, H, W
    columns, rows = (
        [materialize(((place >> 32) + step).clamp(0, size - 1)) for step in (-1, 0, 1, 2)] for place, size in ((x, W), (y, H))
    )
    pixels, total = images.reshape(B, C, H * W), torch.zeros(B, C, H, W, dtype=torch.int32, device=images.device)
    for i in range(4):
        line = torch.zeros_like(total)
        for j in range(4):
            there = (rows[i] * W + columns[j]).view(B, 1, H * W).expand(B, C, H * W)
            line = line + pixels.gather(2, there).view_as(images).int() * x_weights[j]
        total = total + ((line + 128) >> 8) * y_weights[i]
    return torch.where(filled[:, None], fill[:, None, None], (total >> 22).clamp(0, 255).to(torch.uint8))


def _cubic(place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The int32 weights, in units of 2^-15, of the four neighbours of a place in units of 2^-32."""
    past = (((place & (2**32 - 1)) + 2**16) >> 17).int()
    square = (past * past) >> 15
    cube = (square * past) >> 15
    first, third, fourth = 2 * square - past - cube, past + square - cube, cube - square
    return first, 2**15 - first - third - fourth, third, fourth
