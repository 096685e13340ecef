"""Small data sets: all images as one uint8 tensor on the device."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError


def decoded(beton: Beton, img_size: int) -> tuple[UInt8[Tensor, "N 3 H W"], Int64[Tensor, " N"]]:
    """All images and labels of a .beton, whose whole content is checked against its manifest.

    Raises:
        BetonError: the content is damaged, or the images are not all of `img_size` pixels.
    """
    if beton.image_size_px != (img_size, img_size):
        raise BetonError(
            f"{beton.path}: images of {beton.image_size_px or 'different sizes'} cannot stay on the device at "
            f"model.img_size={img_size}; set runtime.loader=stream"
        )
    if (beton.whole or beton).content_sha256() != beton.manifest.beton_sha256:
        raise BetonError(f"{beton.path}: its content is not what its manifest says; convert again with `vitpa prep --force`")
    images = np.empty((len(beton), img_size, img_size, 3), np.uint8)
    if beton.is_jpeg.any():
        for index in range(len(beton)):
            beton.read_image(index, out=images[index])
    else:
        beton.copy(beton.offsets, beton.sizes, images.reshape(-1))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(beton.labels.copy())


class ResidentImages:
    """Images, all of one size, with their labels, on a device."""

    def __init__(self, images: UInt8[Tensor, "N 3 H W"], labels: Int64[Tensor, " N"], *, device: torch.device):
        self.images, self.labels = images.to(device), labels.to(device)
