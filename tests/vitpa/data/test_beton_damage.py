""".beton files and JPEGs that are not what they say: an error that names file and sample, never memory of before."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.betons import TABLE_BEGIN, Sample, as_array, jpeg_of, jpeg_sample, raw_sample, write_beton, write_data
from vitpa.config import AugmentConfig
from vitpa.data.beton import MAX_PIXELS, MAX_PIXELS_PER_BYTE, Beton, BetonFile
from vitpa.data.decode.cpu import decode_jpeg, jpeg_size
from vitpa.data.decode.jpeg_headers import Headers
from vitpa.data.manifest import BetonError, Pixels, beton_path, manifest_path
from vitpa.data.resident import decoded
from vitpa.data.stream import StreamedImages

POISON = 77


def poisoned(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), POISON, np.uint8)


# --- the size that a table says


@pytest.mark.parametrize(("height", "width"), [(48, 56), (40, 57), (39, 56), (20, 28), (56, 40), (80, 112), (41, 55), (1, 1)])
def test_a_jpeg_of_another_size_is_not_decoded(height: int, width: int) -> None:
    jpeg = as_array(jpeg_of(40, 56))
    assert jpeg_size(jpeg) == (40, 56)
    assert decode_jpeg(jpeg, poisoned(40, 56))
    out = poisoned(height, width)
    assert not decode_jpeg(jpeg, out)
    assert (out == POISON).all()


@pytest.mark.parametrize("wrong", [(48, 56), (40, 64), (32, 56), (56, 40)])
def test_the_sample_whose_table_says_another_size_is_named(wrong: tuple[int, int], tmp_path: Path) -> None:
    samples = [jpeg_sample(40, 56, 0), Sample(jpeg_of(40, 56, 1), *wrong, label=1), jpeg_sample(40, 56, 2)]
    path = write_data(tmp_path, samples)
    sizes = rf"it has 56 x 40 pixels, its table says {wrong[1]} x {wrong[0]}; "
    said = rf"made/train\.beton: the JPEG of sample 1 cannot be decoded: {sizes}"
    with Beton.open(path) as beton:
        beton.read_image(0)
        for out in (None, poisoned(*wrong)):
            with pytest.raises(BetonError, match=said):
                beton.read_image(1, out)
        stream = StreamedImages(beton, AugmentConfig(), img_size=32, seed=0, device=torch.device("cpu"), workers=2)
        with pytest.raises(BetonError, match=said):
            list(stream.eval_batches([torch.arange(3)]))
        assert Headers(4).find(beton.stored(1), *wrong) is None  # the GPU leaves it to the CPU, which refuses it


def test_images_that_stay_on_the_device_are_checked_as_well(tmp_path: Path) -> None:
    path = write_data(tmp_path, [jpeg_sample(32, 32), Sample(jpeg_of(16, 16), 32, 32, label=1)])
    with Beton.open(path) as beton, pytest.raises(BetonError, match="sample 1 cannot be decoded: it has 16 x 16 pixels"):
        decoded(beton, 32)


# --- JPEGs


def zeros_in_the_middle(jpeg: bytes) -> bytes:
    middle = len(jpeg) // 2
    return jpeg[:middle] + bytes(600) + jpeg[middle + 600 :]


def of_twelve_bits(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 4] + b"\x0c" + jpeg[at + 5 :]


@pytest.mark.parametrize(
    "damage",
    [
        zeros_in_the_middle,
        of_twelve_bits,
        lambda jpeg: jpeg[:-2],
        lambda jpeg: jpeg[: len(jpeg) // 2],
        lambda jpeg: jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        lambda jpeg: jpeg[:300],
        lambda jpeg: jpeg[:2],
        lambda jpeg: b"",
        lambda jpeg: bytes(len(jpeg)),
        lambda jpeg: jpeg_of(100, 120, mode="CMYK"),
    ],
)
def test_what_the_decoder_complains_about_is_damaged(damage: Callable[[bytes], bytes]) -> None:
    jpeg = as_array(damage(jpeg_of(100, 120)))
    assert not decode_jpeg(jpeg, poisoned(100, 120))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "L"},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 3},
        {"optimize": 1},
    ],
)
def test_whole_jpegs_of_other_kinds_are_decoded_to_the_last_pixel(options: dict[str, object]) -> None:
    jpeg = as_array(jpeg_of(61, 75, **options))  # type: ignore[arg-type]
    assert all_written(jpeg, 61, 75)


def all_written(jpeg: Pixels, height: int, width: int) -> bool:
    """Whether a JPEG is decoded, and then the pixels do not depend on what was in memory before."""
    outs = [np.full((height, width, 3), fill, np.uint8) for fill in (0, POISON, 255)]
    results = [decode_jpeg(jpeg, out) for out in outs]
    assert len(set(results)) == 1
    assert not results[0] or all((out == outs[0]).all() for out in outs)
    return results[0]


def test_headers_that_libjpeg_refuses_are_left_to_it() -> None:
    """Each of these a kernel could have decoded with another table than the JPEG says, or beyond its end."""
    jpeg = jpeg_of(32, 32)
    frame, tables, codes = (jpeg.index(bytes([0xFF, marker])) for marker in (0xC0, 0xDB, 0xC4))
    assert Headers(1).find(as_array(jpeg), 32, 32) == 0
    whole_frame = jpeg[frame : frame + 19]
    table_of_16_bits = b"\xff\xdb" + struct.pack(">H", 2 + 129) + b"\x10" + bytes(128)
    for other in (
        jpeg[: frame + 9] + b"\x02" + jpeg[frame + 10 :],  # two components, with room for three
        jpeg[:frame] + whole_frame + jpeg[frame:],  # two frames
        jpeg[:frame] + table_of_16_bits + jpeg[frame:],
        jpeg[: tables + 4] + b"\x04" + jpeg[tables + 5 :],  # table number 4
        jpeg[: codes + 4] + b"\x25" + jpeg[codes + 5 :],
        jpeg[: codes + 32] + b"\x41" + jpeg[codes + 33 :],  # a DC coefficient of 65 bits
        jpeg[:codes] + b"\xff\xc4\x00\x05\x00\x01\x01" + jpeg[codes:],  # cut
    ):
        assert Headers(1).find(as_array(other), 32, 32) is None


# --- tables


def refused(path: Path) -> str:
    with pytest.raises(BetonError) as caught:
        BetonFile(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_that_claims_more_than_its_bytes_can_hold(tmp_path: Path) -> None:
    path, jpeg = tmp_path / "a.beton", jpeg_of(40, 40)
    for height, width in ((65535, 65535), (65535, 1000), (0, 40), (40, 0), (MAX_PIXELS_PER_BYTE, len(jpeg) + 1)):
        write_beton(path, [jpeg_sample(40, 40), Sample(jpeg, height, width)])
        said = f"sample 1 of its table is impossible ({width} x {height} pixels in {len(jpeg)} bytes)"
        assert said in refused(path)
    write_beton(path, [Sample(bytes(1 << 20), MAX_PIXELS // 10_000 + 1, 10_000)])
    assert "sample 0 of its table is impossible (10000 x 17896 pixels in 1048576 bytes)" in refused(path)
    for sample in (Sample(b"", 1, 1), Sample(b"", 0, 0, 1), Sample(bytes(299), 10, 10, 1), Sample(bytes(300), 10, 10, 2)):
        write_beton(path, [sample])
        assert "sample 0 of its table is impossible" in refused(path)


def test_what_is_claimed_takes_no_memory(tmp_path: Path) -> None:
    """A JPEG of a few bytes that can be as large as its table says is refused before there is memory for its pixels."""
    jpeg = jpeg_of(40, 40)
    data = jpeg + bytes(100_000)
    write_data(tmp_path, [Sample(data, 9000, 9000), jpeg_sample(40, 40, label=1)])
    code = f"""
import resource, sys
from pathlib import Path
from vitpa.data.beton import Beton, BetonError
beton = Beton.open(Path({str(beton_path(tmp_path, "made", "train"))!r}))
beton.read_image(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    beton.read_image(0)
except BetonError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    said, grown_kib = done.stdout.splitlines()
    assert "it has 40 x 40 pixels, its table says 9000 x 9000" in said
    assert int(grown_kib) < 20_000


def test_samples_that_lie_on_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    samples = [raw_sample(10, 10, seed) for seed in range(3)]
    write_beton(path, samples)
    size = path.stat().st_size
    with BetonFile(path) as file:
        place = struct.pack("<Q", int(file.offsets[0]) + 200)
    with path.open("r+b") as out:
        for at in (TABLE_BEGIN + 24 * 2 + 5, size - 24 + 8):  # in the sample and in the allocation table
            out.seek(at)
            out.write(place)
    assert "of its table is impossible" in refused(path)


# --- what is not a file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [fifo, folder, device, link_to_itself])
@pytest.mark.timeout(20)
def test_what_is_not_a_file_is_one_line(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = write_data(tmp_path, [raw_sample(8, 8)])
    for victim in (path, manifest_path(path)):
        kept = victim.rename(tmp_path / "kept")
        make(victim)
        with pytest.raises(BetonError, match=rf"{victim.name}: not a regular file; "):
            Beton.open(path)
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        kept.rename(victim)
    Beton.open(path).close()


# --- mutations


def read_all(path: Path) -> int:
    """How many samples can be read, of a file that may be anything; all else must be an error of ours."""
    try:
        beton = BetonFile(path)
    except BetonError as error:
        assert "\n" not in str(error)
        return 0
    count = 0
    with beton:
        for index in range(len(beton)):
            assert beton.heights[index] * beton.widths[index] <= MAX_PIXELS_PER_BYTE * max(1, beton.status.st_size)
            try:
                pixels = beton.read_image(index)
            except BetonError as error:
                assert f"sample {index}" in str(error)
                continue
            assert pixels.shape == (beton.heights[index], beton.widths[index], 3)
            if beton.is_jpeg[index]:
                assert all_written(beton.stored(index), *pixels.shape[:2])
            count += 1
    return count


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.beton"
    samples = [jpeg_sample(40, 56, seed, label=seed % 2) for seed in range(4)] + [raw_sample(9, 7, seed) for seed in range(3)]
    write_beton(path, samples)
    assert read_all(path) == 7
    return path


def words_of(path: Path) -> list[int]:
    """Where the numbers of a .beton begin: of its header, its fields, its samples and its allocation table."""
    with BetonFile(path) as file:
        count, size = len(file), file.status.st_size
    samples = [TABLE_BEGIN + 24 * index + at for index in range(count) for at in (0, 1, 3, 5, 16)]
    allocations = [size - 24 * count + 8 * word for word in range(3 * count)]
    return [0, 2, 4, 8, 16, 24, 25, 24 + 1041, *samples, *allocations]


NUMBERS = [0, 1, 2, 3, 7, 255, 256, 65535, 1 << 20, 1 << 21, 1 << 31, (1 << 32) - 1, 1 << 60, 1 << 63, (1 << 64) - 1]


@pytest.mark.fuzz
@given(st.data())
def test_mutated_files_are_read_or_refused(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.beton"
    shutil.copyfile(sound, path)
    words = words_of(sound)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(data.draw(st.integers(1, 3), "mutations")):
            width = data.draw(st.sampled_from([1, 2, 4, 8]), "bytes")
            at = data.draw(st.sampled_from(words) | st.integers(0, 2500) | st.integers((1 << 21), (1 << 21) + 8000), "at")
            value = data.draw(st.sampled_from(NUMBERS) | st.integers(0, (1 << 64) - 1), "value") % (1 << (8 * width))
            if at + width <= size:
                file.seek(at)
                file.write(value.to_bytes(width, "little"))
        if data.draw(st.integers(0, 4), "cut") == 0:
            file.truncate(data.draw(st.integers(0, size + 100), "to"))
    assert 0 <= read_all(path) <= 7


def mutated(jpeg: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """A JPEG in which pieces are replaced by others, of other lengths, too."""
    for place, length, piece in edits:
        at = place % (len(jpeg) + 1)
        jpeg = jpeg[:at] + piece + jpeg[at + length :]
    return jpeg


SOUND_JPEGS = [jpeg_of(24, 40), jpeg_of(24, 40, progressive=True), jpeg_of(24, 40, mode="L"), jpeg_of(24, 40, subsampling=0)]
MARKERS = st.binary(min_size=1, max_size=1).map(lambda kind: b"\xff" + kind)
EDITS = st.tuples(st.integers(0, 700) | st.integers(0, 1 << 16), st.integers(0, 4), st.binary(max_size=4) | MARKERS)


@pytest.mark.fuzz
@given(st.sampled_from(SOUND_JPEGS), st.lists(EDITS, min_size=1, max_size=4))
@example(SOUND_JPEGS[0], [])
def test_mutated_jpegs_are_decoded_wholly_or_refused(jpeg: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    stored = as_array(mutated(jpeg, edits))
    size = jpeg_size(stored)
    all_written(stored, 24, 40)
    if size is not None and size != (24, 40) and size[0] * size[1] < 1 << 22:
        all_written(stored, *size)
    kind = Headers(1).find(stored, 24, 40)
    assert kind is None or size == (24, 40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KiB
