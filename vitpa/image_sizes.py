"""Progressive image size (train.image_sizes): the training images' size in each epoch; what it does not go with. Torch-free.

Training begins with small images, which have few patches, and ends with those of the model's size, on which it is evaluated.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitpa.config import RunConfig

ImageSizes = tuple[tuple[int, int], ...]  # from which epoch on, how many pixels in height and width


def size_in(sizes: ImageSizes, epoch: int) -> int:
    """Height and width of the training images of `epoch`, pixels; `sizes` begin with epoch 0."""
    return next(img_size for begin, img_size in reversed(sizes) if begin <= epoch)


def unsupported_reason(config: RunConfig) -> str | None:
    """Why a configuration cannot have these train.image_sizes, in a line that names the keys; None if it can."""
    model, augment, sizes = config.model, config.augment, config.train.image_sizes
    if not sizes:
        return None
    epochs, pixels = zip(*sizes, strict=True)
    cut = next((px for px in pixels if px % model.patch_size), None)
    wrong = [
        (model.kind != "vit", f"is for model.kind=vit, which resamples its positions; model.kind={model.kind} has none"),
        (
            augment.crop != "random_resized",
            f"is for augment.crop=random_resized, whose crops come in any size, and not for augment.crop={augment.crop}",
        ),
        (
            augment.permute_block_px > 0,
            f"permuted images have one size; leave it out, or set augment.permute_block_px={augment.permute_block_px} to 0",
        ),
        (epochs[0] != 0, f"the first size must be that of epoch 0, not of epoch {epochs[0]}"),
        (any(after <= before for before, after in pairwise(epochs)), "expected [[epoch, px], ...] with rising epochs"),
        (
            epochs[-1] >= config.train.epochs,
            f"epoch {epochs[-1]} is not before the end, train.epochs={config.train.epochs} (the first epoch is 0)",
        ),
        (max(pixels) > model.img_size, f"{max(pixels)} px is more than model.img_size={model.img_size}"),
        (pixels[-1] != model.img_size, f"the last must be model.img_size={model.img_size}, which evaluations have"),
        (cut is not None, f"{cut} px is not a multiple of model.patch_size={model.patch_size}"),
        (augment.cutout_px > min(pixels), f"augment.cutout_px={augment.cutout_px} is more than {min(pixels)} px"),
    ]
    reason = next((text for is_wrong, text in wrong if is_wrong), None)
    return reason and f"train.image_sizes={json.dumps(sizes)}: {reason}"
