"""Progressive image size (train.image_sizes): the training images' size in each epoch; what it does not go with. Torch-free.

Training begins with small images, which have few patches, and ends with those of the model's size, on which it is evaluated.
"""

from __future__ import annotations

import json
from itertools import pairwise

ImageSizes = tuple[tuple[int, int], ...]  # from which epoch on, how many pixels in height and width


def size_in(sizes: ImageSizes, epoch: int) -> int:
    """Height and width of the training images of `epoch`, pixels; `sizes` begin with epoch 0."""
    return next(img_size for begin, img_size in reversed(sizes) if begin <= epoch)


def unsupported_reason(
    sizes: ImageSizes,
    *,
    epochs: int,
    kind: str,
    img_size: int,
    patch_size: int,
    crop: str,
    permute_block_px: int,
    cutout_px: int,
) -> str | None:
    """Why a run cannot have these train.image_sizes, in a line that names the keys; None if it can.

    `epochs` are those of the training, `kind`, `img_size` and `patch_size` the model's, the rest is of its augmentation.
    """
    if not sizes:
        return None
    begins, pixels = zip(*sizes, strict=True)
    cut = next((px for px in pixels if px % patch_size), None)
    wrong = [
        (kind != "vit", f"is for model.kind=vit, which resamples its positions; model.kind={kind} has none"),
        (
            crop != "random_resized",
            f"is for augment.crop=random_resized, whose crops come in any size, and not for augment.crop={crop}",
        ),
        (
            permute_block_px > 0,
            f"permuted images have one size; leave it out, or set augment.permute_block_px={permute_block_px} to 0",
        ),
        (len(sizes) == 1 and pixels[0] == img_size, f"{img_size} px is the size of all images without it; leave it out"),
        (begins[0] != 0, f"the first size must be that of epoch 0, not of epoch {begins[0]}"),
        (any(after <= before for before, after in pairwise(begins)), "expected [[epoch, px], ...] with rising epochs"),
        (begins[-1] >= epochs, f"epoch {begins[-1]} is not before the end, train.epochs={epochs} (the first epoch is 0)"),
        (max(pixels) > img_size, f"{max(pixels)} px is more than model.img_size={img_size}"),
        (pixels[-1] != img_size, f"the last must be model.img_size={img_size}, which evaluations have"),
        (cut is not None, f"{cut} px is not a multiple of model.patch_size={patch_size}"),
        (cutout_px > min(pixels), f"augment.cutout_px={cutout_px} is more than {min(pixels)} px"),
    ]
    reason = next((text for is_wrong, text in wrong if is_wrong), None)
    return reason and f"train.image_sizes={json.dumps(sizes)}: {reason}"
