"""The conversion of a data set: from its source to a finished pair of files per split, or to nothing.

All splits are written to temporary names; then the old manifests go, the .beton files are renamed into place, and the new
manifests are written last. At every moment a split is whole or `Beton.open` refuses it, and what was there before stays until
all is written, so that no split of a new source is beside one of an old source.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import PrepError, shown
from data_prep.lock import locked
from data_prep.progress import progress_bar
from data_prep.sources import SMALL_PX, Split, has_small_images, is_photo_set, load_splits
from data_prep.verify import verify
from data_prep.write import Job, Seen, Writer, WriterError, Written
from vitpa.data.beton import Beton, BetonFile
from vitpa.data.manifest import BetonError, ImageSettings, Manifest, beton_path, manifest_path
from vitpa.datasets import SPLITS, facts_of
from vitpa.installation import VERSION as VITPA_VERSION
from vitpa.records import utc_now, write_json

NAME_PATTERN = r"[a-z0-9][a-z0-9_\-]*"  # RunConfig.dataset accepts the same
DOWNLOADS = "raw"  # folder of downloads in the output folder
PHOTO_SIDE_PX = 256
PHOTO_QUALITY = 90
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 27  # FFCV's least; two pages per worker in memory
LONGEST_RATIO = 32  # of a photo's sides, for which a page has room
LISTED = 100  # corrupt images, one to a line
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the data set's own default is meant."""

    dataset: str
    source: Path | None = None
    out: Path = Path("data")
    workers: int | None = None
    short_side_px: int | None = None
    max_side_px: int | None = None
    jpeg_share: float | None = None
    jpeg_quality: int | None = None
    white_level: int | None = None
    skip_corrupt: bool = False
    force: bool = False
    verify: bool = False


def prepare(options: Options, say: Callable[[str], None]) -> bool:
    """Convert what is not converted yet and, if asked to, verify all of it; `say` gets a line per split and step.

    Returns:
        False if the verification found a difference.

    Raises:
        PrepError: it cannot be done; nothing that looks finished is left by what was not.
        BetonError: an existing file is damaged.
        OSError: a file cannot be read or written.
    """
    if not re.fullmatch(NAME_PATTERN, options.dataset) or options.dataset == DOWNLOADS:
        raise PrepError(f"{options.dataset!r} cannot name a data set: a-z, 0-9, _ and - only, and not {DOWNLOADS!r}")
    image_settings(options)  # refuses what cannot be meant before anything is read
    folder = options.out / options.dataset
    _check_place(folder, options)
    with ExitStack() as stack:
        read_only = _lock(folder, stack)
        splits = load_splits(options.dataset, options.source, options.out / DOWNLOADS)
        settings = image_settings(options, is_photo_set(options.dataset) and has_small_images(splits))
        todo = [split for split in splits if options.force or _to_do(split, options, settings, say)]
        if todo and read_only:
            raise read_only
        if todo:
            with Writer() as writer:
                _convert(writer, todo, options, settings, say)
        if not options.verify:
            return True
        verified = [_verified(split, options, say) for split in splits]  # each is reported, also after a failure
        return all(verified)


def _check_place(folder: Path, options: Options) -> None:
    """Refuse to write among the class folders of the source, where what is written would be taken for a class."""
    if options.source is None or not is_photo_set(options.dataset):
        return
    for split in SPLITS:
        read = (options.source / split).resolve()
        if read in (folder.resolve(), *folder.resolve().parents):
            raise PrepError(f"{folder}: within the source's {split}/, whose class folders are read; give another --out")


def _lock(folder: Path, stack: ExitStack) -> OSError | None:
    """Lock the output folder and clear it of what a killed conversion left; the error if nothing can be written there."""
    try:
        stack.enter_context(locked(folder))
    except OSError as error:
        if error.errno not in READ_ONLY or not folder.is_dir():
            raise
        return error  # to look at what is there needs no lock
    for leftover in folder.glob(".*.part"):
        with suppress(PermissionError, IsADirectoryError):  # another user's, in a shared folder
            leftover.unlink()
    return None


def image_settings(options: Options, small_images: bool = False) -> ImageSettings:
    """The settings asked for: photos default to short side 256 px and JPEG of quality 90, small images to raw pixels."""
    folders = is_photo_set(options.dataset)
    photos = folders and not small_images
    if options.white_level is not None and not folders:
        raise PrepError(f"--white-level has no meaning for {options.dataset}, whose pixels have 8 bits")
    share = options.jpeg_share if options.jpeg_share is not None else float(photos)
    if share == 0 and options.jpeg_quality is not None:
        why = f" (no image is larger than {SMALL_PX} px)" if folders and options.jpeg_share is None else ""
        raise PrepError(f"--jpeg-quality has no meaning for raw pixels{why}; give --jpeg-share too")
    side_px = options.max_side_px or options.short_side_px or (PHOTO_SIDE_PX if photos else None)
    return ImageSettings(
        resize="max_side" if options.max_side_px else "short_side" if side_px else "none",
        size_px=side_px,
        jpeg_share=share,
        jpeg_quality=(options.jpeg_quality or PHOTO_QUALITY) if share else None,
        white_level=options.white_level,
    )


def page_bytes(settings: ImageSettings) -> int:
    """FFCV's page size, which bounds an image and pads the file: the power of two that holds any usual photo as pixels."""
    if settings.size_px is None:
        return MIN_PAGE_BYTES
    ratio = LONGEST_RATIO if settings.resize == "short_side" else 1
    image_bytes = 3 * settings.size_px**2 * ratio
    return min(max(1 << (image_bytes - 1).bit_length(), MIN_PAGE_BYTES), MAX_PAGE_BYTES)


def _to_do(split: Split, options: Options, settings: ImageSettings, say: Callable[[str], None]) -> bool:
    """Whether a split has to be converted: False if what is there was made from this source with these settings."""
    path = beton_path(options.out, options.dataset, split.name)
    if not path.exists() or not manifest_path(path).exists():
        return True
    with Beton.open(path, options.dataset, split.name) as beton:
        manifest = beton.manifest
    asked = (options.short_side_px, options.max_side_px, options.jpeg_share, options.jpeg_quality, options.white_level)
    differences = [
        f"{name} {getattr(manifest.images, name)} there, {getattr(settings, name)} asked for"
        for name in ImageSettings.model_fields
        if getattr(manifest.images, name) != getattr(settings, name)
    ]
    if options.verify and asked == (None,) * len(asked):
        differences = []  # to verify a file its settings need not be repeated
    if manifest.source_sha256 != split.source_sha256 and not options.verify:
        differences.append(f"the source has changed since {manifest.created_utc} (was {manifest.source}, now {split.source})")
    if differences:
        raise PrepError(f"{path} was made otherwise: {'; '.join(differences)}; --force makes it again")
    if manifest.source_sha256 == split.source_sha256:
        say(f"{options.dataset}/{split.name}: {manifest.num_samples:,} images in {path} are up to date")
    return False


def _convert(
    writer: Writer, splits: Sequence[Split], options: Options, settings: ImageSettings, say: Callable[[str], None]
) -> None:
    """Write the splits, all of them before one takes its place."""
    paths = [beton_path(options.out, options.dataset, split.name) for split in splits]
    parts = [path.with_name(f".{path.name}.{secrets.token_hex(8)}.part") for path in paths]
    try:
        manifests = [_written(writer, split, part, options, settings) for split, part in zip(splits, parts, strict=True)]
        for path in paths:
            manifest_path(path).unlink(missing_ok=True)
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    for path, manifest in zip(paths, manifests, strict=True):
        write_json(manifest_path(path), manifest.model_dump(mode="json"))
        _report(path, manifest, say)


def _written(writer: Writer, split: Split, part: Path, options: Options, settings: ImageSettings) -> Manifest:
    """Write a split to `part`; its manifest."""
    start = time.monotonic()
    kept, skipped, written = _write(writer, split, part, options, settings)
    with BetonFile(part) as file:
        if not np.array_equal(file.labels, kept.labels):
            raise PrepError(f"{part}: FFCV wrote other labels than it was given")
        with progress_bar(f"{options.dataset}/{split.name} checksum", len(file)) as advance:
            content_sha256 = file.content_sha256(advance)
    with part.open("rb+") as whole:
        os.fsync(whole.fileno())
    return Manifest(
        dataset=options.dataset,
        split=split.name,
        num_samples=len(kept),
        class_names=kept.class_names,
        class_counts=kept.class_counts(),
        images=settings,
        source=split.source,
        source_sha256=split.source_sha256,
        beton_sha256=content_sha256,
        file_size_bytes=part.stat().st_size,
        skipped=skipped,
        left_out=dict(kept.left_out),
        notes=(*kept.notes(), *_seen_notes(kept, written.seen)),
        tools={"vitpa": VITPA_VERSION, **written.tools},
        created_utc=utc_now(),
        duration_s=round(time.monotonic() - start, 1),
    )


def _report(path: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Say what a split that is in its place holds."""
    what, skipped = f"{manifest.dataset}/{manifest.split}", manifest.skipped
    say(
        f"{what}: {manifest.num_samples:,} images of {len(manifest.class_names)} classes -> {path} "
        f"({manifest.file_size_bytes / 2**20:,.0f} MiB, {manifest.duration_s} s)"
        + (f"; {len(skipped)} corrupt ones left out, listed in {manifest_path(path).name}" if skipped else "")
    )
    for note in manifest.notes:
        say(f"{what}: {note}")
    facts = facts_of(manifest.dataset)
    wanted = {"train": facts.num_train, "val": facts.num_val}[manifest.split]
    if wanted not in (None, manifest.num_samples):
        say(f"{what}: note that the full data set has {wanted:,} images")


def _write(
    writer: Writer, split: Split, part: Path, options: Options, settings: ImageSettings
) -> tuple[Split, tuple[str, ...], Written]:
    """Write a split to `part`, a second time without its corrupt images if they may be skipped."""
    corrupt = (written := _write_once(writer, split, part, options, settings)).corrupt
    if not corrupt:
        return split, (), written
    reasons = [f"  {split.describe(index)}: {shown(reason)}" for index, reason in sorted(corrupt.items())]
    if len(reasons) > LISTED:
        reasons[LISTED:] = [f"  and {len(reasons) - LISTED:,} more"]
    if not options.skip_corrupt:
        raise PrepError(
            f"{len(corrupt)} of {len(split)} images of {options.dataset}/{split.name} are corrupt or not usable; fix them, or "
            "leave them out with --skip-corrupt:\n" + "\n".join(reasons)
        )
    skipped = tuple(split.describe(index) for index in sorted(corrupt))
    kept = split.keep(np.setdiff1d(np.arange(len(split)), list(corrupt)))
    emptied = [name for name, count in zip(kept.class_names, kept.class_counts(), strict=True) if count == 0]
    if emptied:
        raise PrepError(f"{options.dataset}/{split.name}: only corrupt images in class {emptied[0]}:\n" + "\n".join(reasons))
    written = _write_once(writer, kept, part, options, settings)
    if written.corrupt:
        raise PrepError(f"{kept.describe(min(written.corrupt))}: became corrupt during the conversion; start again")
    return kept, skipped, written


def _seen_notes(split: Split, seen: Mapping[int, Seen]) -> list[str]:
    """What to say of images that are not stored as they are in their files."""
    notes = []
    animated = sorted(index for index, image in seen.items() if image.more_frames)
    if animated:
        names = ", ".join(map(split.describe, animated[:3])) + (" ..." if len(animated) > 3 else "")
        notes.append(f"{len(animated):,} with more frames or pages, of which only the first is taken ({names})")
    ranges = [image.value_range for image in seen.values() if image.value_range]
    if ranges:
        low, high = min(low for low, _, _ in ranges), max(high for _, high, _ in ranges)
        whites = " or ".join(f"{white:,}" for white in sorted({white for _, _, white in ranges}))
        notes.append(
            f"{len(ranges):,} of more than 8 bits, with values from {low:,} to {high:,}, scaled so that {whites} is white"
        )
    return notes


def _write_once(writer: Writer, split: Split, part: Path, options: Options, settings: ImageSettings) -> Written:
    photos = is_photo_set(options.dataset)
    cpus = len(os.sched_getaffinity(0)) if photos else 1  # small images are copied faster than workers start
    job = Job(
        split=split,
        path=part,
        settings=settings,
        workers=options.workers or min(cpus, len(split)),
        page_bytes=page_bytes(settings),
    )
    try:
        with progress_bar(f"{options.dataset}/{split.name}", len(split)) as advance:
            return writer.write(job, advance)
    except WriterError as error:
        raise PrepError(f"writing {beton_path(options.out, options.dataset, split.name)} failed: {error}") from error


def _verified(split: Split, options: Options, say: Callable[[str], None]) -> bool:
    path = beton_path(options.out, options.dataset, split.name)
    what = f"{options.dataset}/{split.name}"
    try:
        with Beton.open(path, options.dataset, split.name) as beton, progress_bar(f"{what} verifying", len(beton)) as advance:
            report = verify(beton, split, advance)
    except BetonError as error:
        say(f"{what}: NOT VERIFIED: {error}")
        return False
    changed = beton.manifest.source_sha256 != split.source_sha256
    for line in report.lines():
        say(f"{what}: {line}" if not (changed and report.ok) else f"{what}: NOT VERIFIED: equal are {line.partition(': ')[2]}")
    if changed:
        kind = "names, sizes or times of files" if is_photo_set(options.dataset) else "class names, labels or pixels"
        since = beton.manifest.created_utc
        say(f"{what}: NOT VERIFIED: {kind} in the source have changed since {since}; --force makes it again")
    return report.ok and not changed
