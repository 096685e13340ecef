"""Permuted images: square blocks of pixels in one random order, the same in every image, of train and of val.

Jelassi, Sander, Li, "Vision Transformers provably learn spatial structure", NeurIPS 2022, the experiment on permuted images. A
ViT whose patches fit into a block has the same problem as before up to the order of its positions; a network that relies on
neighbouring pixels has not.
"""

from __future__ import annotations

from jaxtyping import Int64, Shaped
from torch import Tensor

from vitpa.data.rng import Purpose, key, permutation


def block_order(blocks: int) -> Int64[Tensor, " n"]:
    """Where the blocks of an image of `blocks` x `blocks` come from: n = blocks^2 numbers, on the CPU.

    Counted row by row, block b of the permuted image is block `block_order(blocks)[b]` of the original. It is the same in all
    runs, whatever their seeds.
    """
    return permutation(key(0, Purpose.BLOCKS, blocks), blocks**2)


def permute_blocks(images: Shaped[Tensor, "B C H W"], order: Int64[Tensor, " n"], block_px: int) -> Shaped[Tensor, "B C H W"]:
    """Images whose blocks of `block_px` x `block_px` pixels stand in `order`; `order.argsort()` puts them back."""
    H, W = images.shape[2:]
    rows, columns = H // block_px, W // block_px
    blocks = images.unflatten(3, (columns, block_px)).unflatten(2, (rows, block_px)).transpose(3, 4)
    moved = blocks.flatten(2, 3)[:, :, order]  # B, C, n, block_px, block_px
    permuted: Tensor = moved.unflatten(2, (rows, columns)).transpose(3, 4).reshape(images.shape)
    return permuted
