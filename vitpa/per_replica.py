"""Settings of replicas that share a step: one value where all have the same, else a tensor with each one's own.

One value stays a constant of the step. So replicas that are equal are as fast as if their settings could not differ, and the
same to the bit.

Axes: R replicas, S samples of all of them in one batch, as many of each, in the order of the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

Setting = float | Tensor  # of all replicas, or (R,)
CPU = torch.device("cpu")
T = TypeVar("T")
V = TypeVar("V", bound=float | Tensor)


def setting(values: Sequence[float], device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Setting:
    """The setting with these values, one of each replica."""
    first = values[0]
    return first if all(value == first for value in values) else torch.tensor(values, dtype=dtype).to(device)


def numbered(values: Sequence[T], device: torch.device) -> tuple[list[T], int | Tensor]:
    """The different ones among the replicas' values, and which of them each has: a number (0), or (R,) int64."""
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different, 0
    return different, torch.tensor([different.index(value) for value in values]).to(device)


def per_sample(value: V, num_samples: int, ndim: int = 1) -> V:
    """A setting for a batch of so many samples: as it is, or (S,) with 1s up to `ndim` dimensions."""
    if not isinstance(value, Tensor):
        return value
    return cast(V, value.repeat_interleave(num_samples // len(value)).view(-1, *[1] * (ndim - 1)))
