"""Making .beton files of any samples, sound or not, byte by byte: FFCV's writer takes none that are not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vitpa.data.beton import ALLOCATION, FIELD, FIELDS, HEADER, JPEG, MIN_PAGE_BYTES, RAW, SAMPLE, VERSION, BetonFile
from vitpa.data.manifest import ImageSettings, Manifest, Pixels, beton_path, manifest_path
from vitpa.records import utc_now, write_json

TABLE_BEGIN = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


class Sample(NamedTuple):
    """One entry of the table, and its bytes."""

    data: bytes
    height: int
    width: int
    mode: int = JPEG
    label: int = 0


def jpeg_of(height: int, width: int, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of a colourful image, as Pillow writes it with `options`; 4:2:0 unless they say otherwise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (2 + height // 8, 2 + width // 8, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def jpeg_sample(height: int, width: int, seed: int = 0, *, label: int = 0, **options: Any) -> Sample:
    """A sample of such a JPEG."""
    return Sample(jpeg_of(height, width, seed, **options), height, width, label=label)


def raw_sample(height: int, width: int, seed: int = 0, *, label: int = 0) -> Sample:
    """A sample of pixels as they are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Sample(pixels.tobytes(), height, width, RAW, label)


def write_beton(path: Path, samples: Sequence[Sample]) -> None:
    """A .beton of these samples, all in one page, as FFCV's writer lays it out. Pages are sparse."""
    fields, table, allocations = (
        np.zeros(len(FIELDS), FIELD),
        np.zeros(len(samples), SAMPLE),
        np.zeros(len(samples), ALLOCATION),
    )
    for field, (type_id, name) in zip(fields, FIELDS, strict=True):
        field["type_id"], field["name"][: len(name)] = type_id, list(name.encode())
    data_begin = -(-(TABLE_BEGIN + table.nbytes) // MIN_PAGE_BYTES) * MIN_PAGE_BYTES
    at = data_begin
    for index, sample in enumerate(samples):
        table[index] = (sample.mode, sample.width, sample.height, at), sample.label
        allocations[index] = index, at, len(sample.data)
        at += len(sample.data)
    data_end = data_begin + max(1, -(-(at - data_begin) // MIN_PAGE_BYTES)) * MIN_PAGE_BYTES
    header = np.array([(VERSION, len(FIELDS), MIN_PAGE_BYTES, len(samples), data_end)], HEADER)
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + table.tobytes())
        file.seek(data_begin)
        file.write(b"".join(sample.data for sample in samples))
        file.seek(data_end)
        file.write(allocations.tobytes())


def write_data(
    folder: Path, samples: Sequence[Sample], dataset: str = "made", splits: Sequence[str] = ("train", "val")
) -> Path:
    """A data folder with these samples as splits, and their manifests; returns the first .beton."""
    labels = [sample.label for sample in samples]
    counts = np.bincount(labels, minlength=2).tolist()
    for split in splits:
        path = beton_path(folder, dataset, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beton(path, samples)
        try:
            with BetonFile(path) as file:
                content = file.content_sha256()
        except Exception:  # made to be damaged
            content = "0" * 64
        manifest = Manifest(
            dataset=dataset,
            split=split,
            num_samples=len(samples),
            class_names=tuple(f"class{number}" for number in range(len(counts))),
            class_counts=tuple(counts),
            images=ImageSettings(resize="none", size_px=None, jpeg_share=0.5, jpeg_quality=90),
            source="made",
            source_sha256="0" * 64,
            beton_sha256=content,
            file_size_bytes=path.stat().st_size,
            skipped=(),
            tools={},
            created_utc=utc_now(),
            duration_s=0.0,
        )
        write_json(manifest_path(path), manifest.model_dump(mode="json"))
    return beton_path(folder, dataset, splits[0])


def as_array(data: bytes) -> Pixels:
    """Bytes as `decode_jpeg` takes them."""
    return np.frombuffer(data, np.uint8)
