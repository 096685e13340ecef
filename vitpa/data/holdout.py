"""A part of train that takes the place of val, so that a recipe is chosen without a look at the test images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, Ints
from vitpa.data.rng import Purpose, key, random_bits
from vitpa.datasets import num_held_out


def held_out(labels: Ints, share: float) -> npt.NDArray[np.bool_]:
    """Which samples are held out: (N,) bool, of each class the same share, at random, the same ones for every run.

    Args:
        labels: (N,) int64 of the train split.
        share: Of each class, 0 to 0.5, rounded to whole samples as `num_held_out` does it.
    """
    bits = random_bits(key(0, Purpose.HOLDOUT), torch.arange(len(labels))).numpy()
    order = np.lexsort((bits, labels))  # class by class, at random within it
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.array([num_held_out(int(count), share) for count in counts])
    chosen = np.zeros(len(labels), np.bool_)
    chosen[order] = rank < wanted[labels[order]]
    return chosen


def without_val(train: Beton, share: float) -> dict[str, Beton]:
    """`train` as two data sets: what is trained on, and as `val` what is held out.

    Raises:
        BetonError: a class has one image, which cannot be in both.
    """
    counts = train.manifest.class_counts
    if 1 in counts:
        name = train.manifest.class_names[counts.index(1)]
        raise BetonError(
            f"{train.path}: the class {name} has one image, of which no part can be held out; set train.holdout=0"
        )
    chosen = held_out(train.labels, share)
    return {"train": train.part(np.flatnonzero(~chosen)), "val": train.part(np.flatnonzero(chosen))}
