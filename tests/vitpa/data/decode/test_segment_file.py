"""The file with the places of segments: what was written is read, by those whom it concerns, and nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.betons import jpeg_sample, raw_sample, write_data
from vitpa.data.beton import Beton
from vitpa.data.decode.jpeg_headers import LONGEST, num_segments
from vitpa.data.decode.segment_file import SegmentFile, Segments
from vitpa.data.manifest import manifest_path


@pytest.fixture
def beton(tmp_path: Path) -> Beton:
    samples = [jpeg_sample(40, 300, 0), raw_sample(48, 48, 2, label=1), jpeg_sample(17, 16, 1)]
    return Beton.open(write_data(tmp_path / "data", samples))


def segments_of(beton: Beton) -> Segments:
    """Any, of the right shapes."""
    rng, count = np.random.default_rng(), int(num_segments(beton.heights, beton.widths)[beton.is_jpeg].sum())
    entries = rng.integers(-(2**63), 2**63, count)
    header = rng.integers(-1, 2, len(beton)).astype(np.int8)
    return Segments(entries, header, rng.integers(0, 256, (2, LONGEST)).astype(np.uint8))


def assert_equal(found: Segments | None, expected: Segments) -> None:
    assert found is not None
    for name in ("entries", "header", "kinds"):
        got, wanted = getattr(found, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert np.array_equal(got, wanted)


def test_what_was_written_is_read(beton: Beton, tmp_path: Path) -> None:
    file, segments = SegmentFile(tmp_path / "root" / "made", beton), segments_of(beton)
    assert file.read() is None
    file.write(segments)
    assert_equal(file.read(), segments)
    assert file.path.stat().st_size == 8 * (3 * 3 + 2) + 3 + 2 * LONGEST + 32
    other = segments_of(beton)
    file.write(replace(other, kinds=other.kinds[:0]))
    assert_equal(file.read(), replace(other, kinds=other.kinds[:0]))


def test_a_copy_of_the_data_has_the_same_file_and_other_data_another(beton: Beton, tmp_path: Path) -> None:
    shutil.copytree(beton.path.parent, tmp_path / "copy" / "made")
    file = SegmentFile(tmp_path, beton)
    assert SegmentFile(tmp_path, Beton.open(tmp_path / "copy" / "made" / "train.beton")).path == file.path
    others = [beton.part(np.array([0, 2])), beton.part(np.array([0, 1])), Beton.open(beton.path.with_name("val.beton"))]
    beton.manifest = beton.manifest.model_copy(update={"beton_sha256": "1" * 64})
    paths = {SegmentFile(tmp_path, each).path for each in [beton, *others]}
    assert len(paths) == 4
    assert file.path not in paths


def test_a_file_of_other_data_is_not_believed_whatever_its_name(beton: Beton, tmp_path: Path) -> None:
    file = SegmentFile(tmp_path, beton)
    file.write(segments_of(beton))
    document = manifest_path(beton.path).read_text()
    manifest_path(beton.path).write_text(document.replace(beton.manifest.beton_sha256, "1" * 64))
    other = SegmentFile(tmp_path, Beton.open(beton.path))
    file.path.rename(other.path)
    assert other.read() is None


def test_any_damage_is_noticed(beton: Beton, tmp_path: Path) -> None:
    file = SegmentFile(tmp_path, beton)
    file.write(segments_of(beton))
    whole = file.path.read_bytes()
    for size in (0, 31, 32, 100, len(whole) - LONGEST, len(whole) - 1):
        file.path.write_bytes(whole[:size])
        assert file.read() is None
    file.path.write_bytes(whole + bytes(LONGEST))
    assert file.read() is None
    for at in (0, 90, 5000, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 4
        file.path.write_bytes(changed)
        assert file.read() is None


def test_what_is_no_file_is_an_error_and_not_waited_for(beton: Beton, tmp_path: Path) -> None:
    file = SegmentFile(tmp_path, beton)
    os.mkfifo(file.path)
    with pytest.raises(OSError, match="not a regular file"):
        file.read()
