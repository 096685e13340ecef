"""Pillow's resizing, written out slowly."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BILINEAR = Image.Resampling.BILINEAR


def slow_resize(plan: Tensor, weights: Tensor, out: Tensor, *, taps: int) -> None:
    """What `vitpa.kernels.resize.resize` does, on the CPU by Pillow, along rows first in any version of it."""
    size = out.shape[-1]
    for row, (address, *strides, height, width, to_height, to_width, top, left) in enumerate(plan.tolist()):
        out[row] = 0
        if height and width:
            span = 1 + sum((n - 1) * stride for n, stride in zip((height, width, 3), strides, strict=True))
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(address))
            region = np.ascontiguousarray(np.lib.stride_tricks.as_strided(memory, (height, width, 3), strides))
            resized = Image.fromarray(region).resize((to_width, height), BILINEAR).resize((to_width, to_height), BILINEAR)
            window = resized.crop((left, top, left + size, top + size))
            out[row] = torch.from_numpy(np.array(window)).permute(2, 0, 1)
