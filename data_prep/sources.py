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
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_prep import walk
from data_prep.errors import PrepError, shown
from data_prep.images import Photo, load_photo, photo_size
from data_prep.walk import IMAGE_SUFFIXES, NAMED, Listing, same_files, walk_source
from vitpa.data.manifest import Ints, Pixels
from vitpa.datasets import DATASETS, SPLITS, facts_of

PHOTO_SETS = ("imagenet",)
SMALL_PX = 32  # images with no longer side are small: digits, CIFAR, SVHN


@dataclass(frozen=True)
class Split(ABC):
    """The samples of one split, in the order in which they are written."""

    name: str  # train or val
    class_names: tuple[str, ...]  # K names; label k is class_names[k]
    labels: Ints  # (N,) int64
    source: str  # where they come from, for people
    source_sha256: str  # changes when the source does; see the module's first lines

    @abstractmethod
    def photo(self, index: int, white_level: int | None = None) -> Photo:
        """One image; `white_level` as for `load_photo`.

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

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files and folders of each kind are not in it."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What people should know of it, in lines."""
        return ()

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

    def photo(self, index: int, white_level: int | None = None) -> Photo:
        """One image."""
        return Photo(self.images[index])

    def describe(self, index: int) -> str:
        """`train sample 17`."""
        return f"{self.name} sample {index}"

    def keep(self, indices: Ints) -> Self:
        """The same split with these samples only."""
        return replace(self, labels=self.labels[indices], images=self.images[indices])


@dataclass(frozen=True)
class FolderSplit(Split):
    """Photos in class folders: `paths` are relative to `folder`, sorted by class and then by path."""

    folder: Path
    paths: tuple[str, ...]
    # (N, 2) int64: size in bytes and modification time in ns that the files had; None if they are not checked
    stamps: Ints | None = None
    listing: Listing = field(default_factory=Listing)  # what else was found
    same: tuple[str, ...] = ()  # what is to be said of files that are there more than once, in lines

    def photo(self, index: int, white_level: int | None = None) -> Photo:
        """One photo, upright."""
        stamp = None if self.stamps is None else (int(self.stamps[index, 0]), int(self.stamps[index, 1]))
        return load_photo(self.folder / self.paths[index], white_level, stamp)

    def describe(self, index: int) -> str:
        """`train/cats/1.jpg`; bytes of the name that are not UTF-8 are escaped."""
        return f"{self.name}/{shown(self.paths[index])}"

    @property
    def left_out(self) -> Mapping[str, int]:
        """By suffix what is no image by its name, and what else the walk left out."""
        counts = self.listing.left_out
        kinds = [*sorted(counts.keys() - {*OTHER_KINDS}), *(kind for kind in OTHER_KINDS if kind in counts)]
        return {shown(kind): counts[kind] for kind in kinds}

    def notes(self) -> tuple[str, ...]:
        """`left out: 2 .gif, 1 .txt (not names of images), 1 beside the class folders`, and what `same` says."""
        lines = []
        for hidden in (False, True):
            found = [kind for kind in self.left_out if (kind in HIDDEN_KINDS) is hidden]
            parts = [_left_out(kind, self.left_out[kind], self.listing.examples.get(kind, ())) for kind in found]
            suffixes = sum(kind not in OTHER_KINDS for kind in found)
            if suffixes:
                parts[suffixes - 1] += " (not names of images)"
            if parts:
                lines.append(f"left out: {', '.join(parts)}")
        return (*lines, *self.same)

    def keep(self, indices: Ints) -> Self:
        """The same split with these photos only."""
        stamps = None if self.stamps is None else self.stamps[indices]
        return replace(self, labels=self.labels[indices], paths=tuple(self.paths[i] for i in indices), stamps=stamps)


HIDDEN_KINDS = {  # with what one of them is called
    walk.HIDDEN_FOLDERS: "hidden or system folder",
    walk.HIDDEN_FILES: "hidden or system file",
    walk.SPECIAL: "pipe, socket or device",
    walk.AGAIN: "link to a folder of the same class",
}
OTHER_KINDS = (walk.BESIDE, *HIDDEN_KINDS)  # beside suffixes; in the order in which they are said


def _left_out(kind: str, count: int, examples: Collection[str]) -> str:
    named = ", ".join(shown(name) for name in sorted(examples)[:NAMED]) + (" ..." if len(examples) > NAMED else "")
    kind = kind if count > 1 else HIDDEN_KINDS.get(kind, kind)
    return f"{count:,} {kind}" + (f" ({named})" if named else "")


def is_photo_set(dataset: str) -> bool:
    """Whether a data set is an ImageFolder of photos, rather than small images in memory."""
    return dataset in PHOTO_SETS or dataset not in DATASETS


def has_small_images(splits: Sequence[Split]) -> bool:
    """Whether no image is larger than SMALL_PX; the headers are read up to the first that is."""
    known = False
    for split in splits:
        if not isinstance(split, FolderSplit):
            return True
        for path in split.paths:
            size = photo_size(split.folder / path)
            if size is not None and max(size) > SMALL_PX:
                return False
            known = known or size is not None
    return known


def load_splits(dataset: str, source: Path | None, download_dir: Path) -> tuple[Split, ...]:
    """The train and val splits of a data set: one of vitpa.datasets, or any other name for an ImageFolder at `source`.

    Without `source`, the folder with the raw data, they are downloaded to `download_dir`, where that is possible.

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
    listings = walk_source(root, SPLITS)
    class_names = {split: tuple(sorted(listing.images)) for split, listing in listings.items()}
    for split, names in class_names.items():
        _check_class_names(root / split, names)
    different = sorted(set(class_names["train"]) ^ set(class_names["val"]))
    if different:
        raise PrepError(
            f"{root}: train/ and val/ must have the same class folders; only one of them has "
            f"{', '.join(map(_distinct, different[:5]))}{' ...' if len(different) > 5 else ''}"
            + (f"; {lookalikes}" if (lookalikes := _lookalikes(different)) else "")
        )
    same = _same_file_notes(same_files(listings))
    if lookalikes := _lookalikes(class_names["train"]):
        same["train"] += (lookalikes,)
    return tuple(_folder_split(root, split, listing, same[split]) for split, listing in listings.items())


def _check_class_names(folder: Path, names: tuple[str, ...]) -> None:
    if not names:
        raise PrepError(f"{folder}: no class folders in it; the images must lie in one folder per class")
    if twins := _twins(names, lambda name: unicodedata.normalize("NFC", name)):
        raise PrepError(
            f"{folder}: the class folders {twins} are one name, written in two ways; put their images into one of them"
        )


def _lookalikes(names: Sequence[str]) -> str:
    """What to say if some class names differ only in how they are written; empty if none do."""
    twins = _twins(names, lambda name: unicodedata.normalize("NFKC", name).casefold().strip())
    return f"the class names {twins} differ only in case, spaces or Unicode form" if twins else ""


def _twins(names: Sequence[str], plain: Callable[[str], str]) -> str:
    """The first two names that are the same when they are `plain`; empty if there are none."""
    first: dict[str, str] = {}
    for name in names:
        twin = first.setdefault(plain(shown(name)), name)
        if twin is not name:
            return f"{_distinct(twin)} and {_distinct(name)}"
    return ""


def _distinct(name: str) -> str:
    """A name as it is, if it is ASCII, else with all else escaped, in which alone two names may differ."""
    plain = name.isascii() and name.isprintable() and name == name.strip()
    return name if plain else f"{shown(name)} ({os.fsencode(name).decode('utf-8', 'surrogateescape')!a})"


def _same_file_notes(groups: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Of each split what to say of files that are listed more than once."""
    notes: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        own = [[path for path in group if path.startswith(f"{split}/")] for group in groups]
        kinds: dict[str, list[Sequence[str]]] = {
            "listed more than once": [paths for paths in own if len(paths) > 1],
            "in more than one class": [paths for paths in own if len({path.split("/")[1] for path in paths}) > 1],
            "also in train": [group for group, paths in zip(groups, own, strict=True) if 0 < len(paths) < len(group)],
        }
        if split == "train":
            del kinds["also in train"]
        notes[split] = tuple(
            f"{what}, by links: {len(same):,} ({shown(same[0][-1])} is {shown(same[0][0])})"
            for what, same in kinds.items()
            if same
        )
    return notes


def _folder_split(root: Path, split: str, listing: Listing, same: tuple[str, ...]) -> FolderSplit:
    folder = root / split
    class_names = sorted(listing.images)
    digest = hashlib.sha256()
    for name in class_names:
        if not listing.images[name]:
            raise PrepError(
                f"{folder / name}: no images in this class folder (looked for {' '.join(IMAGE_SUFFIXES)}, not hidden)"
            )
        for image in listing.images[name]:
            digest.update(os.fsencode(f"{image.path}\0{image.size_bytes}\0{image.mtime_ns}\n"))
    labels = np.repeat(np.arange(len(class_names)), [len(listing.images[name]) for name in class_names])
    images = [image for name in class_names for image in listing.images.pop(name)]
    stamps = np.empty((len(images), 2), np.int64)
    for column, attribute in enumerate(("size_bytes", "mtime_ns")):
        stamps[:, column] = np.fromiter(map(attrgetter(attribute), images), np.int64, len(images))
    return FolderSplit(
        split,
        tuple(map(shown, class_names)),
        labels.astype(np.int64),
        shown(str(root.resolve())),
        digest.hexdigest(),
        folder,
        tuple(image.path for image in images),
        stamps,
        listing,
        same,
    )
