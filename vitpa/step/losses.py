"""What a step minimises, and what an evaluation sums up: functions of logits and labels.

Axes: R replicas, B images of a replica in a training step, E images of an evaluation's batch, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from vitpa.per_replica import Setting


class Targets(NamedTuple):
    """What images show: a label, and where images are mixed another one, and the share of the first."""

    labels: Int64[Tensor, "R B"]
    partners: Int64[Tensor, "R B"] | None = None
    share: Float[Tensor, "R B"] | None = None


def training_loss(
    logits: Float[Tensor, "R B K"], targets: Targets, smoothing: Setting
) -> tuple[Float[Tensor, " R"], Int64[Tensor, " R"]]:
    """The mean loss with labels smoothed by `smoothing`, and the number of predictions of what an image shows most of."""
    logits = logits.float()
    labels, partners, share = targets
    losses = _cross_entropy(logits, labels, smoothing)
    if partners is not None and share is not None:
        losses = share * losses + (1 - share) * _cross_entropy(logits, partners, smoothing)
        labels = torch.where(share < 0.5, partners, labels)
    return losses.mean(1), (logits.detach().argmax(2) == labels).sum(1)


def evaluation_sums(logits: Float[Tensor, "R E K"], labels: Int64[Tensor, " E"]) -> Float64[Tensor, "R 4"]:
    """Sums over images: cross-entropy, top-1, top-5, images. The label -1 stands for "no image"."""
    logits = logits.float()
    real = labels >= 0  # the others fill up the last batch
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), ignore_index=-1, reduction="none")
    hits = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None]  # R, E, 5
    loss = losses.view(len(logits), -1).double().sum(1)
    images_counted = real.double().sum().expand(len(logits))
    return torch.stack([loss, hits[:, :, 0].sum(1).double(), hits.sum((1, 2)).double(), images_counted], dim=1)


def _cross_entropy(logits: Float[Tensor, "R B K"], labels: Int64[Tensor, "R B"], smoothing: Setting) -> Float[Tensor, "R B"]:
    """The loss of each image, with smoothed labels."""
    if isinstance(smoothing, Tensor):
        return smoothed_cross_entropy(logits, labels, smoothing)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="none")
    return losses.view(labels.shape)


def smoothed_cross_entropy(
    logits: Float[Tensor, "R B K"], labels: Int64[Tensor, "R B"], smoothing: Float64[Tensor, " R"]
) -> Float[Tensor, "R B"]:
    """The loss of each image, as F.cross_entropy has it with the `label_smoothing` of its replica."""
    log_probs = torch.log_softmax(logits, dim=2)
    own = -log_probs.gather(2, labels[:, :, None])[:, :, 0]
    of_label, of_all = (share.to(logits.dtype)[:, None] for share in (1 - smoothing, smoothing / logits.shape[2]))
    return of_label * own - of_all * log_probs.sum(2)
