"""The one walk of a source folder, and its rules: what is an image, what is left out, where links may lead.

Every real folder is walked once, its identity being device and inode. A link to a folder elsewhere is walked as if it were
there; one to a folder that is walked anyway is passed over within a class and an error between two. Nothing is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.errors import PrepError, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
SYSTEM_NAMES = {  # beside all names that begin with a dot; in small letters
    *("__macosx", "__pycache__", "icon\r", "network trash folder", "temporary items"),  # macOS, Python
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "~snapshot"),  # storage servers
    "lost+found",
}
NAMED = 5  # at most, of each kind

HIDDEN_FILES, HIDDEN_FOLDERS = "hidden or system files", "hidden or system folders"
SPECIAL, BESIDE, AGAIN = "pipes, sockets or devices", "beside the class folders", "links to folders of the same class"
NO_SUFFIX = "without a suffix"

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class Found:
    """An image: where it is below its split's folder, and what stat says of it, or lstat of a link to nothing."""

    path: str
    size_bytes: int
    mtime_ns: int
    device: int
    inode: int


@dataclass
class Listing:
    """What a split's folder holds."""

    images: dict[str, list[Found]] = field(default_factory=dict)  # of each class, by the name of its folder
    left_out: Counter[str] = field(default_factory=Counter)  # how many of each kind of what is no image
    examples: dict[str, set[str]] = field(default_factory=dict)  # names of what was left out, for some kinds

    def leave_out(self, kind: str, name: str = "") -> None:
        """Count something that is no image."""
        self.left_out[kind] += 1
        if name:
            self.examples.setdefault(kind, set()).add(name)


def walk_source(root: Path, splits: Sequence[str]) -> Mapping[str, Listing]:
    """List `root`/SPLIT/CLASS/**/IMAGE, each class in the order of its paths.

    Raises:
        PrepError: a link leads back up, into another class or to nothing.
        OSError: a folder cannot be read.
    """
    walk = _Walk(root)
    for split in splits:
        walk.enter_split(split)
    walk.follow_links()
    for listing in walk.listings.values():
        for images in listing.images.values():
            images.sort(key=lambda image: image.path.split("/"))
    return walk.listings


@dataclass(frozen=True)
class _Place:
    """A class of a split, or none of it, and how its folder was reached."""

    split: str
    class_name: str
    path: str

    def __str__(self) -> str:
        return shown(f"{self.split}/{self.class_name}".rstrip("/"))


class _Walk:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.listings: dict[str, Listing] = {}
        self.entered: dict[Identity, _Place] = {}
        real = root.resolve()
        self.above = {_identity(folder.stat()): str(folder) for folder in (real, *real.parents)}
        self.links: list[_Place] = []
        self.dangling: list[str] = []

    def enter_split(self, split: str) -> None:
        """List the classes of a split, but for what is behind links."""
        listing = self.listings[split] = Listing()
        folder = str(self.root / split)
        self._enter(_Place(split, "", folder))
        for entry in _entries(folder):
            place = _Place(split, entry.name, entry.path)
            kind = self._sort(entry, listing)
            if kind == "dangling" and not is_image_name(entry.name):
                self.dangling.append(entry.path)
            elif kind in ("file", "dangling"):
                listing.leave_out(BESIDE)
            elif kind in ("folder", "link"):
                listing.images[entry.name] = []
                if kind == "folder":
                    self._walk(place)
                else:
                    self.links.append(place)

    def follow_links(self) -> None:
        """List what is behind links to folders, after all folders that are really there; refuse those to nothing."""
        while self.links:
            self._walk(self.links.pop(0))
        if self.dangling:  # they may stand for a folder
            link = self.dangling[0]
            first = f"{shown(link)}: a link to {shown(str(Path(link).readlink()))}, where there is nothing"
            more = f" (and {len(self.dangling) - 1} more such links)" if len(self.dangling) > 1 else ""
            raise PrepError(f"{first}{more}; if it stands for a folder, bring that back, else remove the link")

    def _walk(self, top: _Place) -> None:
        listing = self.listings[top.split]
        images = listing.images[top.class_name]
        start = len(str(self.root / top.split)) + 1
        folders = [top.path]
        while folders:
            folder = _Place(top.split, top.class_name, folders.pop())
            if not self._enter(folder):
                listing.leave_out(AGAIN, os.path.relpath(folder.path, self.root))
                continue
            for entry in _entries(folder.path):
                kind = self._sort(entry, listing)
                if kind == "folder":
                    folders.append(entry.path)
                elif kind == "link":
                    self.links.append(_Place(top.split, top.class_name, entry.path))
                elif kind in ("file", "dangling") and is_image_name(entry.name):
                    its = entry.stat(follow_symlinks=kind == "file")
                    images.append(Found(entry.path[start:], its.st_size, its.st_mtime_ns, its.st_dev, its.st_ino))
                elif kind == "dangling":
                    self.dangling.append(entry.path)
                elif kind == "file":
                    listing.leave_out(Path(entry.name).suffix.lower() or NO_SUFFIX)

    def _sort(self, entry: os.DirEntry[str], listing: Listing) -> str:
        """`file`, `folder`, `link` to a folder, `dangling` link, or nothing, as it is counted among what is left out."""
        if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_NAMES:
            folder = entry.is_dir(follow_symlinks=False)
            listing.leave_out(HIDDEN_FOLDERS if folder else HIDDEN_FILES, entry.name if folder else "")
            return ""
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) or not entry.is_symlink():
                raise
            return "dangling"
        if stat.S_ISDIR(mode):
            return "link" if entry.is_symlink() else "folder"
        if stat.S_ISREG(mode):
            return "file"
        listing.leave_out(SPECIAL, os.path.relpath(entry.path, self.root))
        return ""

    def _enter(self, place: _Place) -> bool:
        """Whether a folder is to be walked: not if the same class has it already.

        Raises:
            PrepError: it holds the source, or another class has it already.
        """
        identity = _identity(Path(place.path).stat())
        before = self.entered.setdefault(identity, place)
        above = self.above.get(identity) or (before.path if place.path.startswith(f"{before.path}/") else "")
        if above:
            raise PrepError(
                f"{shown(place.path)}: a link back up to {shown(above)}, whose images would be counted again; remove the link"
            )
        if (before.split, before.class_name) != (place.split, place.class_name):
            raise PrepError(
                f"{shown(place.path)}: the same folder as {shown(before.path)}; "
                f"its images would be in both {before} and {place}: "
                "remove one of the two"
            )
        return before is place


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def same_files(listings: Mapping[str, Listing]) -> list[list[str]]:
    """Files that are listed more than once, by links soft or hard: of each file its SPLIT/CLASS/paths."""
    images = [image for listing in listings.values() for found in listing.images.values() for image in found]
    inodes = np.fromiter((image.inode for image in images), np.uint64, len(images))
    _, number, counts = np.unique(inodes, return_inverse=True, return_counts=True)
    repeated = set(inodes[(counts[number] > 1) & (inodes > 0)].tolist())  # 0: a file system without inodes
    places: dict[Identity, list[str]] = {}
    for split, listing in listings.items() if repeated else ():
        for image in (image for found in listing.images.values() for image in found if image.inode in repeated):
            places.setdefault((image.device, image.inode), []).append(f"{split}/{image.path}")
    return [same for same in places.values() if len(same) > 1]


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
