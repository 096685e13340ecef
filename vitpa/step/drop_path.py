"""Stochastic depth: which branches of which images a training step leaves out (Huang et al. 2016, arXiv 1603.09382).

As timm's DropPath: a branch is left out with a probability that rises linearly with the depth of its block, for each image
by itself, and otherwise scaled so that its mean stays. Drawn from (seed, epoch, sample), so that it does not depend on the
number of processes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from vitpa.data.rng import materialize, uniform

BRANCHES = 2  # of a block: attention and MLP


def keep_probabilities(drop_path_rate: float, depth: int) -> Float[Tensor, " depth"]:
    """The probability that a branch stays, per block; that of the last block is 1 - drop_path_rate."""
    return 1 - torch.linspace(0, drop_path_rate, depth)


def branch_scales(
    samples: Int64[Tensor, " B"], stream: int | Int64[Tensor, " B"], keep: Float[Tensor, " depth"] | Float[Tensor, "depth B"]
) -> Float32[Tensor, "depth 2 B"]:
    """What each branch of each image is multiplied by: 0 or 1 / `keep`, the probability that it stays.

    `samples` are indices of the images in the data set, `stream` the key of the random numbers, or each image's own; so is
    `keep` of all images, or each image's own.
    """
    depth = len(keep)
    streams = stream[:, None] if isinstance(stream, Tensor) else stream
    draws = materialize(uniform(streams, samples[:, None], draw=torch.arange(depth * BRANCHES, device=samples.device)))
    keep = keep.to(samples.device).view(depth, 1, -1)
    draws = draws.T.reshape(depth, BRANCHES, len(samples))
    return torch.where(draws < keep, 1 / keep, 0.0).contiguous()  # once here, not before each use of a row
