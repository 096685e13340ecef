"""Small data sets: all images as one uint8 tensor on the device, batches cut and augmented there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data import augment
from vitpa.data.beton import Beton, BetonError
from vitpa.datasets import DatasetFacts


class ResidentImages:
    """The images of one .beton, all of one size, on a device. The whole content is checked against the manifest."""

    def __init__(
        self, beton: Beton, facts: DatasetFacts, options: AugmentConfig, *, img_size: int, seed: int, device: torch.device
    ):
        if beton.image_size_px != (img_size, img_size):
            raise BetonError(
                f"{beton.path}: images of {beton.image_size_px or 'different sizes'} cannot stay on the device at "
                f"model.img_size={img_size}; set runtime.loader=stream"
            )
        if beton.content_sha256() != beton.manifest.beton_sha256:
            raise BetonError(
                f"{beton.path}: its content is not what its manifest says; convert again with `vitpa prep --force`"
            )
        images = np.empty((len(beton), img_size, img_size, 3), np.uint8)
        for index in range(len(beton)):
            beton.read_image(index, out=images[index])
        self.images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # N, C, H, W
        self.labels = torch.from_numpy(beton.labels.copy()).to(device)
        self.device, self.facts, self.options, self.seed = device, facts, options, seed

    def train_batches(self, indices: Iterable[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each int64 tensor of sample indices (B,): augmented images (B, 3, H, W) float32 and labels (B,)."""
        for samples in indices:
            on_device = samples.to(self.device, non_blocking=True)
            yield self._finish(self.augmented(on_device, epoch)), self.labels[on_device]

    def augmented(self, samples: Tensor, epoch: int) -> Tensor:
        """The images of `samples` (B,) as epoch `epoch` sees them: (B, 3, H, W) uint8."""
        samples = samples.to(self.device)
        return augment.crop_and_flip(self.images[samples], samples, self.options, seed=self.seed, epoch=epoch)

    def eval_batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same without augmentation; index -1 gives some image with the label -1."""
        for samples in indices:
            on_device = samples.to(self.device, non_blocking=True)
            yield self._finish(self.images[on_device]), torch.where(on_device < 0, -1, self.labels[on_device])

    def _finish(self, images: Tensor) -> Tensor:
        return augment.normalize(images, self.facts.mean, self.facts.std)
