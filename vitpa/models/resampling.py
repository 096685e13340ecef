"""Positional encodings for smaller images than the model's: those of its patches, resampled by one fixed matrix.

As timm does it for images of other sizes (`resample_abs_pos_embed`: bicubic, antialiased), which is linear in the encodings.
The matrix is what it makes of the identity, so that gradients flow back to the encodings of all patches, by one product.

Axes: P patches of the model's images, Q of the smaller ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def resampling_matrix(side: int, new_side: int) -> Float32[Tensor, "Q P"]:
    """What makes encodings of `new_side` x `new_side` patches from those of `side` x `side`, row by row; on the CPU."""
    identity = torch.eye(side * side)[None]  # 1, P, P: a position per row
    resampled: Tensor = resample_abs_pos_embed(identity, [new_side] * 2, [side] * 2, num_prefix_tokens=0)
    return resampled[0]
