"""Mixup and cutmix of neighbours in a batch, on the device: both images of a pair are mixed with one another.

As timm's Mixup in mode `pair`, with neighbours for partners: the order of samples is random already, and neighbours stay
together however a batch is divided. The draws of a pair depend on (seed, epoch, its first sample). A Beta distribution is
replaced by 16,384 equally likely quantiles of it, so that every device draws the same. Each replica of a batch has its own;
where one does not mix, an image's weight is always 1.

Sources: Zhang et al. 2018 (mixup, arXiv 1710.09412); Yun et al. 2019 (CutMix, arXiv 1905.04899); timm/data/mixup.py.
Axes: B batch, H W pixels, P purposes of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.rng import Purpose, materialize, randint, uniform
from vitpa.per_replica import numbered, per_sample, setting

LEVELS = 2**14  # quantiles of an image's weight


class Mixup:
    """What the replicas' `options` ask for; one of mixup_alpha and cutmix_alpha at least must be above 0 in one of them."""

    def __init__(self, options: Sequence[AugmentConfig], *, device: torch.device):
        alphas, self.distribution = numbered([(each.mixup_alpha, each.cutmix_alpha) for each in options], device)
        self.cutmix_prob = setting([_cutmix_prob(each) for each in options], device, torch.float32)
        quantiles = [torch.stack([_quantiles(alpha) for alpha in both]) for both in alphas]
        self.quantiles = torch.stack(quantiles).to(device)  # distributions, 2, LEVELS

    def __call__(
        self,
        images: Float[Tensor, "B C H W"],
        labels: Int64[Tensor, " B"],
        samples: Int64[Tensor, " B"],
        keys: Int64[Tensor, "#B P"],
    ) -> tuple[Float[Tensor, "B C H W"], Int64[Tensor, " B"], Float32[Tensor, " B"]]:
        """Mixed images, the labels of the partners and the weights lam of the own labels.

        The loss is lam * loss(labels) + (1 - lam) * loss(partners' labels). `images` are normalised, `samples`
        their indices in the data set and `keys` the rows of `epoch_keys` that belong to their seeds.

        Raises:
            ValueError: B is odd.
        """
        B, C, H, W = images.shape
        lam, weight, box = self.draws(samples, keys, size=(H, W))
        y, x = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
        top, left, height, width = box[:, :, None, None].unbind(1)
        cut = ((y >= top) & (y < top + height) & (x >= left) & (x < left + width))[:, None, None]  # B / 2, 1, 1, H, W
        pairs, weight = images.view(B // 2, 2, C, H, W), weight[:, None, None, None, None]
        partners = pairs.flip(1)
        mixed = torch.where(cut, partners, weight * pairs + (1 - weight) * partners).to(images.dtype)
        return mixed.view(B, C, H, W), partners_of(labels), lam.repeat_interleave(2)

    def draws(
        self, samples: Int64[Tensor, " B"], keys: Int64[Tensor, "#B P"], *, size: tuple[int, int]
    ) -> tuple[Float32[Tensor, " B//2"], Float32[Tensor, " B//2"], Int64[Tensor, "B//2 4"]]:
        """Of the pairs in `samples` of size (H, W), with the rows `keys`, what each image of a pair becomes.

        lam: its own share; weight: that of its pixels, 1 in cutmix; box: top, left, height and width of what it takes from
        its partner, of no pixel in mixup. The box is that of timm's `rand_bbox`.

        Raises:
            ValueError: B is odd.
        """
        B, (H, W) = len(samples), size
        if B % 2:
            raise ValueError(
                f"mixup of {B} images: they are no pairs; change train.global_batch_size to give each process an even number"
            )
        samples, stream = samples[::2], keys[:, Purpose.MIX].expand(B)[::2]
        cutmix = uniform(stream, samples) < per_sample(self.cutmix_prob, B // 2)
        distribution = per_sample(self.distribution, B // 2)
        share = self.quantiles[distribution, cutmix.long(), randint(stream, samples, LEVELS, draw=1)]
        y, x = randint(stream, samples, H, draw=2), randint(stream, samples, W, draw=3)
        height, width = ((n * (1 - share).sqrt()).long() for n in (H, W))
        top, bottom = ((y + part).clamp(0, H) for part in (-(height // 2), (height + 1) // 2))
        left, right = ((x + part).clamp(0, W) for part in (-(width // 2), (width + 1) // 2))
        box = torch.stack([top, left, bottom - top, right - left], 1) * cutmix[:, None]
        lam = torch.where(cutmix, 1 - (box[:, 2] * box[:, 3]).double() / (H * W), share)
        return materialize(lam.float()), materialize(torch.where(cutmix, 1.0, share).float()), materialize(box)


def partners_of(labels: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """The labels of the images that each image is mixed with."""
    return labels.view(-1, 2).flip(1).flatten()


def _cutmix_prob(options: AugmentConfig) -> float:
    """The share of the pairs that are for cutmix."""
    return options.mixup_switch_prob if options.mixup_alpha and options.cutmix_alpha else float(options.cutmix_alpha > 0)


def _quantiles(alpha: float) -> Tensor:
    """LEVELS equally likely values of Beta(alpha, alpha), float64; 1 for alpha 0, which stands for no mixing."""
    if not alpha:
        return torch.ones(LEVELS, dtype=torch.float64)
    from scipy.special import betaincinv  # noqa: PLC0415 - half a second that only this needs

    return torch.from_numpy(betaincinv(alpha, alpha, (np.arange(LEVELS) + 0.5) / LEVELS))
