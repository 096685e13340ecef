"""AutoAugment and RandAugment on the device: every image of a batch gets its own operations, drawn per sample.

Each operation is, bit for bit, the one of the same name in torchvision.transforms.autoaugment on uint8 tensors (nearest
neighbour, zeros outside), on every device, eager or compiled. Geometry and the pixel maps that do not depend on the image
are tables that torchvision's own functions fill. The rest is computed for the whole batch and each image takes its own:
no shape depends on the data.

Sources: Cubuk et al. 2019 (AutoAugment, arXiv 1805.09501); Cubuk et al. 2020 (RandAugment, arXiv 1909.13719).
Axes: B batch, C channels, H W pixels, P = H * W, K operations, V = 256 pixel values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int32, Int64, Num, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms import functional as tvf

from vitpa.data.rng import materialize, randint, random_bits, uniform
from vitpa.per_replica import numbered, per_sample

Operation = tuple[str, float]  # a name and a magnitude in torchvision's units

IDENTITY: Operation = ("Identity", 0.0)
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
COMPUTED = ("Color", "Sharpness", "Contrast", "AutoContrast", "Equalize")  # what no table made beforehand can hold
AUTOAUGMENT_BINS, RANDAUGMENT_BINS = 10, 31

_GREY = [torch.tensor(weight, dtype=torch.float32).item() for weight in (0.2989, 0.587, 0.114)]  # ITU-R BT.601


def magnitudes(num_bins: int, height: int, width: int) -> dict[str, list[float]]:
    """For each operation of RandAugment, in torchvision's order, and Invert: its magnitude in each bin.

    Shear as a slope, translation in pixels, rotation in degrees, enhancement as the factor minus 1, posterize in bits
    kept, solarize as the threshold; 0 for operations that have none. Source: `_augmentation_space` of
    torchvision.transforms.AutoAugment and RandAugment.
    """

    def linear(first: float, last: float) -> list[float]:
        return [float(value) for value in torch.linspace(first, last, num_bins)]

    nothing = [0.0] * num_bins
    return {
        "Identity": nothing,
        "ShearX": linear(0.0, 0.3),
        "ShearY": linear(0.0, 0.3),
        "TranslateX": linear(0.0, 150.0 / 331.0 * width),
        "TranslateY": linear(0.0, 150.0 / 331.0 * height),
        "Rotate": linear(0.0, 30.0),
        "Brightness": linear(0.0, 0.9),
        "Color": linear(0.0, 0.9),
        "Contrast": linear(0.0, 0.9),
        "Sharpness": linear(0.0, 0.9),
        "Posterize": [float(bits) for bits in 8 - (torch.arange(num_bins) / ((num_bins - 1) / 4)).round()],
        "Solarize": linear(255.0, 0.0),
        "AutoContrast": nothing,
        "Equalize": nothing,
        "Invert": nothing,
    }


class Policy:
    """Which operations an image gets: one row of operations per image (AutoAugment) or per operation (RandAugment)."""

    def __init__(self, name: str, *, num_ops: int, strengths: Sequence[int], img_size: int, device: torch.device):
        """`name` is a value of augment.policy other than none; `num_ops` and the replicas' `strengths` are RandAugment's."""
        self.one_row = name != "randaugment"
        different, self.strength = ([0], 0) if self.one_row else numbered(strengths, device)
        found: dict[Operation, int] = {IDENTITY: 0}

        def index(op: str, value: float) -> int:
            return found.setdefault((op, value), len(found))

        rows = [_rows(name, num_ops, strength, img_size) for strength in different]
        signs = [[[[index(op, m), index(op, -m if op in SIGNED else m)] for op, _, m in row] for row in each] for each in rows]
        self.signed = torch.tensor(signs).to(device)  # strengths, rows, num_ops, 2: the operation as it is, and negated
        self.num_rows, self.num_ops = self.signed.shape[1:3]
        self.prob = torch.tensor([[prob for _, prob, _ in row] for row in rows[0]]).to(device)  # rows, num_ops
        self.operations = Operations(list(found), height=img_size, width=img_size, device=device)

    def choices(self, samples: Int64[Tensor, " B"], stream: Int64[Tensor, " #B"]) -> list[Int64[Tensor, " B"]]:
        """For each of num_ops places the operation, an index of `operations`, of each sample, whose key is in `stream`."""
        found, strength = [], per_sample(self.strength, len(samples))
        for place in range(self.num_ops):
            row = randint(stream, samples, self.num_rows, draw=0 if self.one_row else 3 * place)
            applied = uniform(stream, samples, draw=3 * place + 1) < self.prob[row, place]
            negated = (random_bits(stream + (3 * place + 2), samples) < 0).long()
            found.append(materialize(self.signed[strength, row, place, negated] * applied))
        return found

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], samples: Tensor, stream: Tensor) -> UInt8[Tensor, "B 3 H W"]:
        """The images of `samples` after their operations."""
        for choice in self.choices(samples, stream):
            images = self.operations(images, choice)
        return images


def _rows(name: str, num_ops: int, strength: int, img_size: int) -> list[list[tuple[str, float, float]]]:
    """For each row and place of a policy: operation, probability, magnitude."""
    if name == "randaugment":
        table = magnitudes(RANDAUGMENT_BINS, img_size, img_size)
        return [[(op, 1.0, values[strength])] * num_ops for op, values in table.items() if op != "Invert"]
    table = magnitudes(AUTOAUGMENT_BINS, img_size, img_size)
    policies = AutoAugment(AutoAugmentPolicy(name.removeprefix("autoaugment_"))).policies
    return [[(op, prob, table[op][bin_ or 0]) for op, prob, bin_ in row] for row in policies]


class Operations:
    """Given operations on images of one size: as a function of images and, for each, the index of its operation."""

    def __init__(self, operations: Sequence[Operation], *, height: int, width: int, device: torch.device):
        self.names = operations
        sources = {tuple(range(height * width)): 0}  # row 0: every pixel in its place
        geometry = [sources.setdefault(tuple(_source(op, height, width)), len(sources)) for op in operations]
        self.geometry = torch.tensor(geometry).to(device)  # K, a row of source
        self.source = torch.tensor(list(sources), dtype=torch.int32).to(device)  # rows, P: where a pixel comes from, or -1
        self.values = torch.stack([_values(op) for op in operations]).to(device)  # K, V uint8: what a pixel value becomes
        self.kind = torch.tensor([COMPUTED.index(name) if name in COMPUTED else -1 for name, _ in operations]).to(device)
        ratios = torch.tensor([[1.0 + m, 1.0 - (1.0 + m)] for _, m in operations], dtype=torch.float64)
        self.ratios = ratios.float().double().to(device)  # K, 2: weights of the image and of what it is blended with
        self.stretch = (255 / torch.arange(256).clamp(min=1)).to(device)  # V: AutoContrast's factor for each range
        self.stretch[0] = 1.0
        self.num_pixels = height * width
        self.divisor = torch.tensor(height * width, dtype=torch.float64).to(device)

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], choice: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The images, each after the operation of its index in `choice`."""
        B, C, H, W = images.shape
        # Crops are channels_last, and torch 2.11's compiler, on a GPU, sharpened such images wrongly at 28, 31, 33 and 63 px.
        images = materialize(images.contiguous())
        pixels, kind, ratios = images.reshape(B, C, H * W), self.kind[choice], self.ratios[choice]
        grey = brightness_of(pixels)  # B, 1, P
        whole = pixels.int()  # torch 2.14's compiled minimum of uint8 on the CPU is 0
        histogram = torch.zeros(B, C, 256, dtype=torch.int32, device=pixels.device)
        histogram = histogram.scatter_add(2, pixels.long(), torch.ones_like(pixels, dtype=torch.int32))
        low, high = whole.amin(2, keepdim=True), whole.amax(2, keepdim=True)
        tables = self._tables(choice, histogram, low=low, high=high, grey_total=grey.sum((1, 2)))  # B, C, V
        source = self.source[self.geometry[choice]][:, None]  # B, 1, P
        moved = pixels.gather(2, source.clamp(min=0).long().expand(B, C, H * W))
        out = tables.gather(2, moved.long()).masked_fill(source < 0, 0)
        color, sharpness = (_is(kind, name) for name in ("Color", "Sharpness"))
        other = torch.where(color, grey, blurred(images.int()).reshape(B, C, H * W))
        out = torch.where(color | sharpness, blend(pixels, other, ratios), out)
        return out.view(B, C, H, W)

    def _tables(self, choice: Tensor, histogram: Tensor, *, low: Tensor, high: Tensor, grey_total: Tensor) -> Tensor:
        """What each pixel value becomes under operations that look at no other pixel of it: (B, C, V) uint8.

        Of images with pixel values `histogram` (B, C, V), of which the lowest and the highest are `low` and `high` (B, C, 1),
        and a sum of brightness `grey_total` (B,).
        """
        kind, ratios = self.kind[choice], self.ratios[choice]
        value = torch.arange(256, dtype=torch.int32, device=choice.device)  # V

        stretched = (value - low * (low != high)) * self.stretch[(high - low).long()]

        below = histogram.cumsum(2, dtype=torch.int32) - histogram
        step = (self.num_pixels - histogram.gather(2, high.long())) // 255
        equalized = torch.where(step == 0, value, (below + step // 2) // step.clamp(min=1))  # with Pillow's whole numbers

        mean = (grey_total.double() / self.divisor).float()
        contrasted = blend(value, mean[:, None, None], ratios)

        tables = self.values[choice][:, None].expand_as(histogram)
        tables = torch.where(_is(kind, "AutoContrast"), stretched.clamp(0, 255).to(torch.uint8), tables)
        tables = torch.where(_is(kind, "Equalize"), equalized.clamp(0, 255).to(torch.uint8), tables)
        return torch.where(_is(kind, "Contrast"), contrasted, tables)


def _is(kind: Tensor, name: str) -> Tensor:
    return (kind == COMPUTED.index(name))[:, None, None]  # B, 1, 1


def _source(operation: Operation, height: int, width: int) -> list[int]:
    """For each pixel of the image after a geometric operation the index of the one before, -1 where there is none.

    Other operations leave every pixel in its place.
    """
    name, m = operation
    image = torch.arange(1.0, height * width + 1).view(1, height, width)
    if name == "ShearX":
        image = _sheared(image, [math.degrees(math.atan(m)), 0.0])
    elif name == "ShearY":
        image = _sheared(image, [0.0, math.degrees(math.atan(m))])
    elif name == "TranslateX":
        image = tvf.affine(image, angle=0.0, translate=[int(m), 0], scale=1.0, shear=[0.0, 0.0])
    elif name == "TranslateY":
        image = tvf.affine(image, angle=0.0, translate=[0, int(m)], scale=1.0, shear=[0.0, 0.0])
    elif name == "Rotate":
        image = tvf.rotate(image, m)
    return [int(index) - 1 for index in image.flatten().tolist()]


def _sheared(image: Tensor, degrees: list[float]) -> Tensor:
    sheared = tvf.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    assert isinstance(sheared, Tensor)
    return sheared


def _values(operation: Operation) -> Tensor:
    """What an operation with a table of its own makes of each pixel value: (V,) uint8; for others the value itself."""
    name, m = operation
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    if name == "Brightness":
        values = tvf.adjust_brightness(values, 1.0 + m)
    elif name == "Posterize":
        values = tvf.posterize(values, int(m))
    elif name == "Solarize":
        values = tvf.solarize(values, m)
    elif name == "Invert":
        values = tvf.invert(values)
    return values.flatten()


def blend(image: Num[Tensor, " ..."], other: Num[Tensor, " ..."], ratios: Float64[Tensor, "B 2"]) -> UInt8[Tensor, " ..."]:
    """ratio * image + (1 - ratio) * other, cut, with the two weights `ratios` of each image.

    As torchvision does in float32. The products are taken in float64, where they are exact, and rounded to float32: so
    no compiler can fuse them into the sum with another rounding.
    """
    weight, rest = ratios[:, 0, None, None], ratios[:, 1, None, None]
    return ((weight * image).float() + (rest * other).float()).clamp(0, 255).to(torch.uint8)


def brightness_of(pixels: UInt8[Tensor, "B 3 P"]) -> Int32[Tensor, "B 1 P"]:
    """The brightness of each of the pixels, cut to whole numbers. For rounding see blend."""
    red, green, blue = ((weight * pixels[:, c].double()).float() for c, weight in enumerate(_GREY))
    return (red + green + blue).int()[:, None]


def blurred(images: Int32[Tensor, "B C H W"]) -> Int32[Tensor, "B C H W"]:
    """Images smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13 and rounded; the border as it is."""
    H, W = images.shape[-2:]
    total = 4 * images[..., 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + images[..., row : H - 2 + row, column : W - 2 + column]
    y, x = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
    inner = (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)
    return torch.where(inner, F.pad((2 * total + 13) // 26, (1, 1, 1, 1)), images)
