"""Small data sets: all images as one uint8 tensor on the device, batches cut there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data import augment
from vitpa.data.batches import Batch
from vitpa.data.beton import Beton, BetonError
from vitpa.datasets import DatasetFacts


def decoded(beton: Beton, img_size: int) -> tuple[Tensor, Tensor]:
    """All images (N, 3, H, W) uint8 and labels (N,) of a .beton, whose whole content is checked against its manifest.

    Raises:
        BetonError: the content is damaged, or the images are not all of `img_size` pixels.
    """
    if beton.image_size_px != (img_size, img_size):
        raise BetonError(
            f"{beton.path}: images of {beton.image_size_px or 'different sizes'} cannot stay on the device at "
            f"model.img_size={img_size}; set runtime.loader=stream"
        )
    if beton.content_sha256() != beton.manifest.beton_sha256:
        raise BetonError(f"{beton.path}: its content is not what its manifest says; convert again with `vitpa prep --force`")
    images = np.empty((len(beton), img_size, img_size, 3), np.uint8)
    for index in range(len(beton)):
        beton.read_image(index, out=images[index])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(beton.labels.copy())


class ResidentImages:
    """Images (N, 3, H, W) uint8, all of one size, with their labels (N,), on a device."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        facts: DatasetFacts,
        options: AugmentConfig,
        *,
        seed: int,
        device: torch.device,
    ):
        self.images, self.labels = images.to(device), labels.to(device)
        self.augmentation = augment.Augmentation(options, facts, img_size=images.shape[-1], device=device)
        self.device, self.seed = device, seed

    @staticmethod
    def bytes_needed(beton: Beton) -> int:
        """Bytes of device memory that the decoded images of `beton` take."""
        return int((beton.heights.astype(np.int64) * beton.widths).sum()) * 3

    def train_batches(self, indices: Iterable[Tensor], epoch: int) -> Iterator[Batch]:
        """A batch for each int64 tensor of sample indices (B,); whole images look the same in every epoch."""
        for samples in indices:
            on_device = samples.to(self.device, non_blocking=True)
            yield Batch(self.images[on_device], on_device, self.labels[on_device])

    def augmented(self, samples: Tensor, epoch: int) -> Tensor:
        """The images of `samples` (B,) as epoch `epoch` sees them before normalisation and erasing: (B, 3, H, W) uint8."""
        samples = samples.to(self.device)
        keys = augment.epoch_keys([self.seed], epoch).to(self.device)
        return self.augmentation.uint8(self.images[samples], samples, keys)

    def eval_batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """The same for an evaluation; index -1 gives some image with the label -1."""
        for samples in indices:
            on_device = samples.to(self.device, non_blocking=True)
            labels = torch.where(on_device < 0, -1, self.labels[on_device])
            yield Batch(self.images[on_device], on_device, labels)
