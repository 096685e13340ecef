"""Colour jitter on the device: brightness, contrast, saturation and hue of each image change, in an order of its own.

As torchvision.transforms.ColorJitter on uint8 tensors: a factor of each kind, uniform in its range, and any order of the
kinds equally likely; each is rounded to uint8 before the next. Each equals torchvision's function bit for bit, but for one
level where hue is turned by compiled code or on a GPU.

Axes: B batch, H W pixels, P = H * W, K kinds that change anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from vitpa.data.augment.auto_augment import blend, brightness_of
from vitpa.data.rng import materialize, randint, uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in torchvision's order


class ColorJitter:
    """Jitter of given `strengths`: 3 or 4 numbers >= 0, of BRIGHTNESS, CONTRAST, SATURATION and HUE."""

    def __init__(self, strengths: Sequence[float], *, device: torch.device):
        kinds = [kind for kind, strength in enumerate(strengths) if strength]
        ranges = [(-s, s) if kind == HUE else (max(0.0, 1 - s), 1 + s) for kind, s in enumerate(strengths)]
        self.hue, self.num_kinds = HUE in kinds, len(kinds)
        self.orders = torch.tensor(list(permutations(kinds))).to(device)  # K!, K
        self.low = torch.tensor([low for low, _ in ranges], dtype=torch.float64).to(device)
        self.span = torch.tensor([high - low for low, high in ranges], dtype=torch.float64).to(device)

    def draws(
        self, samples: Int64[Tensor, " B"], stream: Int64[Tensor, " #B"]
    ) -> tuple[Int64[Tensor, "B K"], Float64[Tensor, "B K"]]:
        """The kinds of each sample, whose key is in `stream`, in its order, and the factor of each of them."""
        order = self.orders[randint(stream, samples, len(self.orders))]
        numbers = torch.arange(1, 1 + len(self.low), device=samples.device)
        factors = self.low + uniform(stream[:, None], samples[:, None], draw=numbers).double() * self.span  # B, 3 or 4
        return materialize(order), materialize(factors.gather(1, order))

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], samples: Tensor, stream: Tensor) -> UInt8[Tensor, "B 3 H W"]:
        """The images of `samples` with their colours changed."""
        order, factors = self.draws(samples, stream)
        pixels = images.flatten(2)
        for place in range(self.num_kinds):
            pixels = self.changed(pixels, order[:, place], factors[:, place])
        return pixels.view_as(images)

    def changed(
        self, pixels: UInt8[Tensor, "B 3 P"], kind: Int64[Tensor, " B"], factor: Float64[Tensor, " B"]
    ) -> UInt8[Tensor, "B 3 P"]:
        """The pixels after one kind of change, of each image its own."""
        kind = kind[:, None, None]
        grey = brightness_of(pixels)  # B, 1, P
        mean = (grey.sum((1, 2)).double() / pixels.shape[2]).float()[:, None, None]
        other = torch.where(kind == SATURATION, grey.float(), torch.where(kind == CONTRAST, mean, 0.0))
        # torchvision's weights are of float32; materialized, since torch 2.11 compiles .float().double() into nothing
        ratios = materialize(torch.stack([factor, 1 - factor], 1).float()).double()
        out = blend(pixels, other, ratios)
        return torch.where(kind == HUE, turned(pixels, factor.float()), out) if self.hue else out


def turned(pixels: UInt8[Tensor, "B 3 P"], share: Tensor) -> UInt8[Tensor, "B 3 P"]:
    """Pixels whose hue is turned by a `share` (B,) of the circle, as torchvision's adjust_hue does it in float32."""
    red, green, blue = (pixels.float() / 255).unbind(1)  # each B, P
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    even, span = high == low, high - low
    saturation = span / torch.where(even, 1.0, high)
    to_red, to_green, to_blue = ((high - each) / torch.where(even, 1.0, span) for each in (red, green, blue))
    hue = torch.where(high == green, 2.0 + to_red - to_blue, 4.0 + to_green - to_red)
    hue = torch.where(high == red, to_blue - to_green, hue)
    hue = (torch.fmod(hue / 6.0 + 1.0, 1.0) + share[:, None]) % 1.0
    sixth = torch.floor(hue * 6.0)
    past, sixth = hue * 6.0 - sixth, sixth.int() % 6
    p, q, t = ((high * (1.0 - saturation * part)).clamp(0.0, 1.0) for part in (torch.ones_like(past), past, 1.0 - past))
    # by sixth of the circle, from red on
    tables = (high, q, p, p, t, high), (t, high, high, q, p, p), (p, p, t, high, high, q)
    out = torch.stack([_chosen(table, sixth) for table in tables], 1)
    return (out * (256.0 - 1e-3)).to(torch.uint8)


def _chosen(values: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of several tensors, for each place, the one of its `index`."""
    out = values[0]
    for number, value in enumerate(values[1:], 1):
        out = torch.where(index == number, value, out)
    return out
