"""Arithmetic of a training: of an image in a step, and of epochs whose images are smaller than the model's; torch-free."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitpa.config import RunConfig


def gflop_per_image(config: RunConfig, img_size: int | None = None) -> float:
    """Of a training step, 10^9 operations: products of matrices only, the backward pass as twice the forward pass.

    The image has `img_size` pixels in height and width; None: those of the model.
    """
    model = config.model if img_size is None else config.model.model_copy(update={"img_size": img_size})
    D, tokens = model.embed_dim, model.num_tokens
    per_token = (4 + 2 * model.mlp_ratio) * D * D + 2 * tokens * D  # multiply-adds of a block
    if model.attention == "positional":
        per_token -= 2 * D * D + tokens * D  # queries, keys and scores are computed once per step, not per image
    patches = (tokens - model.num_prefix_tokens) * 3 * model.patch_size**2 * D
    return 3 * 2 * (tokens * model.depth * per_token + patches) / 1e9


def full_size_epochs(config: RunConfig, epochs: float) -> float:
    """How many epochs on images of the model's size have the arithmetic of the first `epochs` epochs (a part of one counts).

    The same number, unless train.image_sizes says otherwise.
    """
    sizes = config.train.image_sizes
    if not sizes:
        return epochs
    ends = [*(begin for begin, _ in sizes[1:]), config.train.epochs]
    spans = [(begin, min(epochs, end)) for (begin, _), end in zip(sizes, ends, strict=True)]
    return math.fsum(max(0.0, end - begin) * size_share(config, begin) for begin, end in spans)


def size_share(config: RunConfig, epoch: int) -> float:
    """What a training image of `epoch` takes of the arithmetic of one of the model's size."""
    if not config.train.image_sizes:
        return 1.0
    return gflop_per_image(config, config.train_img_size(epoch)) / gflop_per_image(config)
