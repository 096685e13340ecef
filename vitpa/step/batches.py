"""What a network is called with: the batches of a step and of an evaluation, made of what the feed has put on the device.

Axes: R replicas, B images of a replica in a micro-batch of this process, E images of an evaluation's batch, P purposes of
random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation
from vitpa.data.loader import Feed
from vitpa.data.rng import Purpose
from vitpa.step.drop_path import branch_scales, keep_probabilities
from vitpa.step.losses import Targets


@dataclass(frozen=True)
class TrainBatches:
    """Batches of training images of one size."""

    feed: Feed
    augmentation: Augmentation
    keep: Tensor | None  # the probability that a branch stays, as of `branch_scales`; None: all stay
    replicas: int

    def make(
        self, inputs: tuple[Tensor, ...], keys: Int64[Tensor, "R P"]
    ) -> tuple[Float32[Tensor, "R B 3 H W"], Targets, Float32[Tensor, "depth 2 R B"] | None]:
        """The images that the feed's `inputs` stand for, augmented and normalised, what they show, the scales of branches."""
        R, B = self.replicas, self.feed.batch_size
        images, samples, labels = self.feed.gather(*inputs)
        own_keys = keys.repeat_interleave(B, dim=0)
        if self.augmentation.mixup is None:
            batch, shown = self.augmentation(images, samples, own_keys), [labels]
        else:
            batch, *mixed = self.augmentation.mixed(images, labels, samples, own_keys)
            shown = [labels, *mixed]
        targets = Targets(*(each.view(R, B) for each in shown))
        scales = None
        if self.keep is not None:
            scales = branch_scales(samples, own_keys[:, Purpose.DROP_PATH], self.keep)
            scales = scales.view(*scales.shape[:2], R, B)  # depth, branches, R, B
        return batch.view(R, B, *batch.shape[1:]), targets, scales


@dataclass(frozen=True)
class EvalBatches:
    """Batches of an evaluation."""

    feed: Feed
    augmentation: Augmentation

    def make(self, inputs: tuple[Tensor, ...]) -> tuple[Float32[Tensor, "E 3 H W"], Int64[Tensor, " E"]]:
        """The val images that the feed's `inputs` stand for, as the network takes them, and their labels."""
        images, _, labels = self.feed.gather_eval(*inputs)
        return self.augmentation.evaluated(images), labels


def kept_branches(configs: Sequence[RunConfig], batch_size: int, device: torch.device) -> Tensor | None:
    """The probability that a branch stays: (depth,), or where replicas differ that of each image, (depth, R * B).

    None where no replica leaves any out: images are `batch_size`, B, of each.
    """
    model, rates = configs[0].model, [each.model.drop_path_rate for each in configs]
    if model.kind != "vit" or not any(rates):
        return None
    keep = [keep_probabilities(rate, model.depth).to(device) for rate in rates]
    return keep[0] if len(set(rates)) == 1 else torch.stack(keep, 1).repeat_interleave(batch_size, 1)
