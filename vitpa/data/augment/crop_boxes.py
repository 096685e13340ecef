"""Which part of each image of a batch is seen, by the rules of torchvision: geometry only, no pixels.

Training takes RandomResizedCrop's boxes, drawn from (seed, epoch, sample); an evaluation takes Resize and CenterCrop.

Axes: B batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.manifest import Ints
from vitpa.data.rng import uniform

_TRIES = 10


class Crops(NamedTuple):
    """For each image the region that is resized, its size then, and where the window of img_size lies in that.

    All (B,) int64, pixels. No image: a region of 0 x 0.
    """

    left: Ints
    top: Ints
    width: Ints
    height: Ints
    to_width: Ints
    to_height: Ints
    window_left: Ints
    window_top: Ints


def random_resized(streams: Tensor, heights: Ints, widths: Ints, options: AugmentConfig, img_size: int) -> Crops:
    """torchvision's RandomResizedCrop(img_size, crop_scale, crop_ratio).

    Args:
        streams: (B,) int64, a key for each image, from which its numbers are drawn in torchvision's order.
        heights: (B,) of the images.
        widths: (B,) of the images.
        options: The ranges of scale and ratio.
        img_size: Height and width of what is seen.
    """
    (scale_low, scale_high), (ratio_low, ratio_high) = options.crop_scale, options.crop_ratio
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    # where no box fits: the largest central one within the ratios
    width = np.minimum(widths, np.maximum(1, np.rint(heights * ratio_high).astype(np.int64)))
    height = np.minimum(heights, np.maximum(1, np.rint(widths / ratio_low).astype(np.int64)))
    left, top = (widths - width) // 2, (heights - height) // 2
    todo = np.arange(len(heights))
    for attempt in range(_TRIES):
        numbers = torch.arange(4 * attempt, 4 * attempt + 4)
        area_draw, ratio_draw, top_draw, left_draw = uniform(streams[todo, None], numbers).double().numpy().T
        area = heights[todo] * widths[todo] * (scale_low + area_draw * (scale_high - scale_low))
        # libm's exp: NumPy's is another one on another processor, and a box must not depend on that
        ratio = np.array([math.exp(log_low + draw * (log_high - log_low)) for draw in ratio_draw.tolist()])
        w, h = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * ratio, area / ratio))
        fits = (w > 0) & (w <= widths[todo]) & (h > 0) & (h <= heights[todo])
        rows = todo[fits]
        width[rows], height[rows] = w[fits], h[fits]
        top[rows] = (top_draw[fits] * (heights[rows] - h[fits] + 1)).astype(np.int64)
        left[rows] = (left_draw[fits] * (widths[rows] - w[fits] + 1)).astype(np.int64)
        todo = todo[~fits]
        if not len(todo):
            break
    size, zero = np.full(len(heights), img_size), np.zeros(len(heights), np.int64)
    return Crops(left, top, width, height, size, size, zero, zero)


def central(heights: Ints, widths: Ints, options: AugmentConfig, img_size: int) -> Crops:
    """torchvision's Resize(img_size / eval_crop_pct) of the short side and CenterCrop(img_size); 0 x 0 is no image."""
    short = math.floor(img_size / options.eval_crop_pct)
    shorter = np.maximum(1, np.minimum(heights, widths))
    to_width, to_height = (np.maximum(1, (short * sides / shorter).astype(np.int64)) for sides in (widths, heights))
    left, top = (np.rint((sides - img_size) / 2).astype(np.int64) for sides in (to_width, to_height))
    zero = np.zeros(len(heights), np.int64)
    return Crops(zero, zero, widths, heights, to_width, to_height, left, top)
