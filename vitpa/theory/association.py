"""Whether attention finds which patches belong together: definition 2.2, all or nothing, and two finer measures of it.

Jelassi, Sander, Li 2022, definition 2.2; the share and the gap are ours. Axes: D patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Association:
    """How far a matrix of similarities tells which patches belong together.

    Attributes:
        complete: Whether for all patches i the C largest entries of row i are the patches of its set (definition 2.2).
        share: Of the patches for which that holds, in [0, 1].
        gap: The mean entry within sets, i itself apart, less the mean entry between sets.
    """

    complete: bool
    share: float
    gap: float


def association(similarity: Tensor, partition: Tensor) -> Association:
    """Measure `similarity` (D, D) against `partition` (D,), the set of each patch; sets are of one size.

    A patch counts as similar to itself, whatever its entry on the diagonal. If entries are equal, the set does not count as
    found: what would be picked among them is chance.

    Raises:
        ValueError: the sets are not all of one size.
    """
    same = partition[:, None] == partition[None, :]
    sizes = same.sum(1)
    if (sizes != sizes[0]).any():
        raise ValueError(f"sets of patches must be of one size, not of {sorted(set(sizes.tolist()))}")
    itself = torch.eye(len(partition), dtype=torch.bool)
    least_within = similarity.masked_fill(~same | itself, float("inf")).amin(1)
    most_between = similarity.masked_fill(same, float("-inf")).amax(1)
    found = least_within > most_between
    within, between = similarity[same & ~itself], similarity[~same]
    return Association(bool(found.all()), found.double().mean().item(), (within.mean() - between.mean()).item())
