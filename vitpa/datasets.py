"""Facts about each data set: a table, no code that reads data.

`mean` and `std` are per channel (R, G, B) of the training pixels scaled to [0, 1]. Data sets that are not in the table are
ImageFolders of the user's own: they are normalised with ImageNet's statistics and their classes come from the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "val")


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set before any file is read.

    `image_size_px` is None where images differ in size; `num_classes`, `num_train` and `num_val` are None where only the
    manifest can tell.
    """

    name: str
    num_classes: int | None
    image_size_px: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_train: int | None
    num_val: int | None
    source: str


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_DIGITS = "scikit-learn's load_digits: UCI Optical Recognition of Handwritten Digits, 1,797 grey 8x8 images"
_CIFAR = "Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html"
_SVHN = "Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/ (cropped digits, without the extra set)"
_IMAGENET = "ILSVRC 2012, https://www.image-net.org/ (train/ and val/ with one folder per class)"
_TABLE = (
    DatasetFacts("digits", 10, 8, (0.3058,) * 3, (0.3761,) * 3, 1437, 360, _DIGITS),
    DatasetFacts("cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 50_000, 10_000, _CIFAR),
    DatasetFacts("cifar100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 50_000, 10_000, _CIFAR),
    DatasetFacts("svhn", 10, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 73_257, 26_032, _SVHN),
    DatasetFacts("imagenet", 1000, None, _IMAGENET_MEAN, _IMAGENET_STD, 1_281_167, 50_000, _IMAGENET),
)
DATASETS = {facts.name: facts for facts in _TABLE}


def num_held_out(count: int, share: float) -> int:
    """How many of a class's `count` images `train.holdout=share` holds out: at least one, and not all."""
    return 0 if not share or count < 2 else min(count - 1, max(1, round(share * count)))


def facts_of(dataset: str) -> DatasetFacts:
    """The facts of `dataset`; for a name that is not in the table, the facts of a user's own ImageFolder."""
    known = DATASETS.get(dataset)
    if known is not None:
        return known
    return DatasetFacts(dataset, None, None, _IMAGENET_MEAN, _IMAGENET_STD, None, None, "the user's own ImageFolder")
