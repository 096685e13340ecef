"""Mixup and cutmix of neighbours in a batch, on the device: both images of a pair are mixed with one another.

As timm's Mixup in mode `pair`, with neighbours for partners: the order of samples is random already, and neighbours stay
together however a batch is divided. The draws of a pair depend on (seed, epoch, its first sample). A Beta distribution is
replaced by 16,384 equally likely quantiles of it, so that every device draws the same.

Sources: Zhang et al. 2018 (mixup, arXiv 1710.09412); Yun et al. 2019 (CutMix, arXiv 1905.04899); timm/data/mixup.py.
Axes: B batch, H W pixels, P purposes of random numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.counter_rng import Purpose, kept, randint, uniform

LEVELS = 2**14  # quantiles of an image's weight


def mixes(options: AugmentConfig) -> bool:
    """Whether `options` ask for mixup, cutmix or both."""
    return bool(options.mixup_alpha or options.cutmix_alpha)


class Mixup:
    """What `options` ask for; one of mixup_alpha and cutmix_alpha at least must be above 0."""

    def __init__(self, options: AugmentConfig, *, device: torch.device):
        mixup, cutmix = options.mixup_alpha, options.cutmix_alpha
        self.cutmix_prob = options.mixup_switch_prob if mixup and cutmix else float(cutmix > 0)
        self.quantiles = torch.stack([_quantiles(alpha or 1.0) for alpha in (mixup, cutmix)]).to(device)  # 2, LEVELS

    def __call__(self, images: Tensor, labels: Tensor, samples: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed images (B, 3, H, W), the labels (B,) of the partners and the weights lam (B,) float32 of the own labels.

        The loss is lam * loss(labels) + (1 - lam) * loss(partners' labels). `images` are normalised floats, `samples` (B,)
        their indices in the data set and `keys` (B or 1, P) the rows of `epoch_keys` that belong to their seeds.

        Raises:
            ValueError: B is odd.
        """
        B, C, H, W = images.shape
        if B % 2:
            raise ValueError(
                f"mixup of {B} images: they are no pairs; change train.global_batch_size to give each process an even number"
            )
        stream = keys[:, Purpose.MIX].expand(B)[::2]
        cutmix, lam, box = self.draws(samples[::2], stream, size=(H, W))
        pairs = images.view(B // 2, 2, C, H, W)
        partners = pairs.flip(1)
        y, x = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
        top, bottom, left, right = (side[:, None, None] for side in box)
        cut = ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None, None]  # B / 2, 1, 1, H, W
        weight, is_cutmix = (values[:, None, None, None, None] for values in (lam, cutmix))
        mixed = torch.where(is_cutmix, torch.where(cut, partners, pairs), weight * pairs + (1 - weight) * partners)
        return mixed.to(images.dtype).view(B, C, H, W), labels.view(-1, 2).flip(1).flatten(), lam.repeat_interleave(2)

    def draws(
        self, samples: Tensor, stream: Tensor, *, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of pairs with first `samples` (N,): if by cutmix, each image's own share, and the box (top, bottom, left, right).

        The share, float32, is mixup's weight, or what cutmix's box leaves of an image of `size` (H, W). All are (N,).
        `stream` (N,) are keys of Purpose.MIX. The box is timm's `rand_bbox`, with ends that are not inside.
        """
        H, W = size
        cutmix = uniform(stream, samples) < self.cutmix_prob
        lam = self.quantiles[cutmix.long(), randint(stream, samples, LEVELS, draw=1)]
        y, x = randint(stream, samples, H, draw=2), randint(stream, samples, W, draw=3)
        height, width = ((n * (1 - lam).sqrt()).long() for n in (H, W))
        top, bottom = ((y + part).clamp(0, H) for part in (-(height // 2), (height + 1) // 2))
        left, right = ((x + part).clamp(0, W) for part in (-(width // 2), (width + 1) // 2))
        rest = 1 - ((bottom - top) * (right - left)).double() / (H * W)
        lam = kept(torch.where(cutmix, rest, lam).float())
        return kept(cutmix), lam, (kept(top), kept(bottom), kept(left), kept(right))


def _quantiles(alpha: float) -> Tensor:
    """LEVELS equally likely values of Beta(alpha, alpha), float64."""
    return torch.from_numpy(betaincinv(alpha, alpha, (np.arange(LEVELS) + 0.5) / LEVELS))
