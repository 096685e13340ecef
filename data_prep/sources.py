"""Where raw samples come from: arrays in memory (digits, CIFAR, SVHN) or folders of photos (ImageNet, the user's own).

`source_sha256` is for noticing that a source has changed. In memory it is over class names, labels and pixels. For a
folder it is over the sorted lines (path relative to the split's folder, size in bytes, modification time in ns) of its
images: ImageNet's 150 GB are not read again to see that nothing is to be done.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_prep.images import read_photo
from vitpa.data.beton import Ints, Pixels
from vitpa.datasets import DATASETS, SPLITS, facts_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
PHOTO_SETS = ("imagenet",)


class PrepError(Exception):
    """A conversion that cannot be done: what, where and how to mend it; lists follow on lines of their own."""


@dataclass(frozen=True)
class Split(ABC):
    """The samples of one split, in the order in which they are written.

    Attributes:
        name: train or val.
        class_names: K names; label k is class_names[k].
        labels: (N,) int64.
        source: Where they come from, for people.
        source_sha256: Changes when the source does; see the module's first lines.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Ints
    source: str
    source_sha256: str

    @abstractmethod
    def pixels(self, index: int) -> Pixels:
        """One image as (H, W, 3) uint8 RGB.

        Raises:
            CorruptImageError: its content is not usable.
            OSError: it cannot be read at all.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """What to call a sample in a message and in the manifest's list of skipped ones."""

    @abstractmethod
    def keep(self, indices: Ints) -> Self:
        """The same split with these samples only."""

    def note(self) -> str:
        """What people should know of this split; empty if there is nothing."""
        return ""

    def without(self, names: Collection[str]) -> Self:
        """The same split without the samples that `describe` calls so."""
        if not names:
            return self
        return self.keep(np.array([i for i in range(len(self)) if self.describe(i) not in names], np.int64))

    def class_counts(self) -> tuple[int, ...]:
        """Number of samples of each class."""
        return tuple(np.bincount(self.labels, minlength=len(self.class_names)).tolist())

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ArraySplit(Split):
    """Samples in memory: `images` is (N, H, W, 3) uint8 RGB."""

    images: Pixels

    def pixels(self, index: int) -> Pixels:
        """One image, (H, W, 3) uint8 RGB."""
        image: Pixels = self.images[index]
        return image

    def describe(self, index: int) -> str:
        """`train sample 17`."""
        return f"{self.name} sample {index}"

    def keep(self, indices: Ints) -> Self:
        """The same split with these samples only."""
        return replace(self, labels=self.labels[indices], images=self.images[indices])


@dataclass(frozen=True)
class FolderSplit(Split):
    """Photos in class folders: `paths` are relative to `folder`, sorted by class and then by path.

    Attributes:
        other_files: Of each file in them that is no image by its name the suffix.
        beside: Number of files beside the class folders.
    """

    folder: Path
    paths: tuple[str, ...]
    other_files: tuple[str, ...] = ()
    beside: int = 0

    def pixels(self, index: int) -> Pixels:
        """One photo, upright, (H, W, 3) uint8 RGB."""
        return read_photo(self.folder / self.paths[index])

    def describe(self, index: int) -> str:
        """`train/cats/1.jpg`; bytes of the name that are not UTF-8 are escaped."""
        return f"{self.name}/{_text(self.paths[index])}"

    def note(self) -> str:
        """`left out: 2 .gif, 1 .txt (not names of images), 1 beside the class folders`."""
        counts = sorted(Counter(self.other_files).items())
        parts = [f"{count:,} {_text(suffix) or 'without a suffix'}" for suffix, count in counts]
        if parts:
            parts[-1] += " (not names of images)"
        if self.beside:
            parts.append(f"{self.beside:,} beside the class folders")
        return f"left out: {', '.join(parts)}" if parts else ""

    def keep(self, indices: Ints) -> Self:
        """The same split with these photos only."""
        return replace(self, labels=self.labels[indices], paths=tuple(self.paths[i] for i in indices))


def is_photo_set(dataset: str) -> bool:
    """Whether a data set is an ImageFolder of photos, rather than small images in memory."""
    return dataset in PHOTO_SETS or dataset not in DATASETS


def load_splits(dataset: str, source: Path | None, download_dir: Path) -> tuple[Split, ...]:
    """The train and val splits of a data set.

    Args:
        dataset: A name of vitpa.datasets, or any other for an ImageFolder at `source`.
        source: The folder with the raw data; None to download it, where that is possible.
        download_dir: Where downloads go.

    Raises:
        PrepError: unknown, missing or unusable source.
    """
    if is_photo_set(dataset):
        if source is None:
            raise PrepError(_source_needed(dataset))
        splits = _image_folder(source)
    elif dataset == "digits":
        if source is not None:
            raise PrepError("digits come with scikit-learn: leave --source out")
        splits = _digits()
    else:
        splits = tuple(_torchvision(dataset, split, source, download_dir) for split in SPLITS)
    num_classes, found = facts_of(dataset).num_classes, len(splits[0].class_names)
    if num_classes not in (None, found):
        raise PrepError(f"{source}: {found} classes where {dataset} has {num_classes}; give a subset another name")
    return splits


def _source_needed(dataset: str) -> str:
    if dataset in DATASETS:
        return f"{dataset} cannot be downloaded: pass --source DIR, a folder with train/ and val/ of one folder per class"
    near = difflib.get_close_matches(dataset, DATASETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known ones: {', '.join(DATASETS)}."
    return f"{dataset} is not a known data set: {hint} For an ImageFolder of your own pass --source DIR"


def _array_split(dataset: str, split: str, class_names: Sequence[str], labels: Any, images: Pixels) -> ArraySplit:
    labels = np.asarray(labels, np.int64)
    digest = hashlib.sha256(json.dumps([list(class_names), images.shape]).encode())
    digest.update(labels.tobytes())
    digest.update(np.ascontiguousarray(images).data)
    return ArraySplit(split, tuple(class_names), labels, facts_of(dataset).source, digest.hexdigest(), images)


def _digits() -> tuple[Split, ...]:
    """1,437 train and 360 val digits: sorted by class, every fifth is a val sample. Grey 0..16 becomes 0..255."""
    import sklearn.datasets  # noqa: PLC0415  # a second of import that other data sets do not need

    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[:, :, :, None], 3, axis=3)  # N, 8, 8, 3
    by_class = np.argsort(digits.target, kind="stable")
    val = np.sort(by_class[::5])
    train = np.setdiff1d(by_class, val)
    names = [str(name) for name in digits.target_names]
    return tuple(
        _array_split("digits", split, names, digits.target[indices], images[indices])
        for split, indices in zip(SPLITS, (train, val), strict=True)
    )


def _torchvision(dataset: str, split: str, source: Path | None, download_dir: Path) -> Split:
    import torchvision.datasets as tv  # noqa: PLC0415  # imports torch: seconds that other data sets do not need

    root, download = (source, False) if source is not None else (download_dir, True)
    try:
        if dataset == "svhn":
            raw = tv.SVHN(root, "train" if split == "train" else "test", download=download)
            return _array_split(
                dataset, split, [str(k) for k in range(10)], raw.labels, np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))
            )
        raw = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[dataset](root, split == "train", download=download)
        return _array_split(dataset, split, raw.classes, raw.targets, raw.data)
    except (OSError, RuntimeError) as error:  # torchvision: not found, wrong checksum, no network
        reason = " ".join(str(error).split())
        if download:
            raise PrepError(
                f"{dataset} could not be downloaded to {root}: {reason}; download it elsewhere and pass --source DIR, "
                f"a folder with {_LAYOUTS[dataset]}"
            ) from error
        raise PrepError(f"{root}: no intact {dataset} there ({reason}); expected {_LAYOUTS[dataset]}") from error


_LAYOUTS = {
    "cifar10": "cifar-10-batches-py/",
    "cifar100": "cifar-100-python/",
    "svhn": "train_32x32.mat and test_32x32.mat",
}


def _image_folder(root: Path) -> tuple[Split, ...]:
    for split in SPLITS:
        if not (root / split).is_dir():
            raise PrepError(f"{root / split}: no such folder; --source must be a folder with train/ and val/")
    class_names = {split: _class_names(root / split) for split in SPLITS}
    different = sorted(set(class_names["train"]) ^ set(class_names["val"]))
    if different:
        raise PrepError(
            f"{root}: train/ and val/ must have the same class folders; only one of them has "
            f"{', '.join(different[:5])}{' ...' if len(different) > 5 else ''}"
        )
    return tuple(_folder_split(root, split, class_names[split]) for split in SPLITS)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise PrepError(f"{folder}: no class folders in it; the images must lie in one folder per class")
    return names


def _folder_split(root: Path, split: str, class_names: tuple[str, ...]) -> FolderSplit:
    folder = root / split
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    digest = hashlib.sha256()
    for label, name in enumerate(class_names):
        files = _files_below(folder / name)
        found = sorted(path for path in files if path.name.lower().endswith(IMAGE_SUFFIXES))
        others += [path.suffix.lower() for path in files if not path.name.lower().endswith(IMAGE_SUFFIXES)]
        if not found:
            raise PrepError(f"{folder / name}: no images in this class folder (looked for {' '.join(IMAGE_SUFFIXES)})")
        for path in found:
            status = path.stat() if path.exists() else path.lstat()  # a link to nothing is reported as corrupt, with its name
            relative = str(path.relative_to(folder))
            digest.update(os.fsencode(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n"))
            paths.append(relative)
            labels.append(label)
    names = tuple(map(_text, class_names))
    source, source_sha256 = _text(str(root.resolve())), digest.hexdigest()
    beside = sum(entry.is_file() and not entry.name.startswith(".") for entry in folder.iterdir())
    array = np.array(labels, np.int64)
    return FolderSplit(split, names, array, source, source_sha256, folder, tuple(paths), tuple(others), beside)


def _files_below(folder: Path) -> list[Path]:
    walk = os.walk(folder, followlinks=True)
    return [Path(parent) / name for parent, _, names in walk for name in names if not name.startswith(".")]


def _text(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
