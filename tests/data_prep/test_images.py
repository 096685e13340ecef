"""Images that are damaged, unfinished, deep or odd: `vitpa prep` names them, or takes exactly what they hold."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_prep.images import CorruptImageError, load_photo, photo_size
from data_prep.integrity import checked_jpeg
from tests.support.image_files import FULL, chunk, decoded, deep_file, encoded, photo, png, read, read_photo, reason
from vitpa.data.decode.cpu import jpeg_decompressor

JPEGS = {
    "baseline": encoded(photo(), "JPEG", quality=85),
    "progressive": encoded(photo(), "JPEG", quality=85, progressive=True),
    "restarts": encoded(photo(), "JPEG", quality=85, restart_marker_rows=1),
    "444": encoded(photo(), "JPEG", quality=95, subsampling=0, optimize=True),
    "grey": encoded(photo().convert("L"), "JPEG", quality=85),
    "cmyk": encoded(photo().convert("CMYK"), "JPEG", quality=85),
    "with a thumbnail": encoded(photo(), "JPEG", exif=b"Exif\0\0" + encoded(photo(16, 16), "JPEG")),
    "of 1 x 1": encoded(photo(1, 1), "JPEG"),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_is_taken_with_and_without_its_last_marker(kind: str, tmp_path: Path) -> None:
    data = JPEGS[kind]
    assert data.endswith(b"\xff\xd9")
    for whole in (data, data[:-1], data[:-2], data + b"padding", data + data):
        np.testing.assert_array_equal(read(whole, tmp_path), decoded(data))


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "of 1 x 1"])
def test_a_damaged_jpeg_is_corrupt(kind: str, tmp_path: Path) -> None:
    """Zeros in its middle, a part that is missing, and cut at any place, with and without an end put to it."""
    data = JPEGS[kind]
    middle = len(data) // 2
    assert reason(data[:middle] + bytes(600) + data[middle + 600 :], tmp_path)
    assert reason(data[:middle] + data[middle + 300 :], tmp_path)
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        cut = data[: int(len(data) * share)]
        assert "image file is truncated" in reason(cut, tmp_path)
        assert reason(cut + b"\xff\xd9", tmp_path)
        assert reason(cut + bytes(len(data) - len(cut)), tmp_path)  # a download that was not finished


def test_a_progressive_jpeg_without_its_last_scans_is_corrupt(tmp_path: Path) -> None:
    data = JPEGS["progressive"]
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for at in scans[1:]:
        tables = data.rfind(b"\xff\xc4", 0, at)
        cut = data[: tables if tables > scans[0] else at] + b"\xff\xd9"
        decoded(cut)  # a coarse picture, of which libjpeg warns of nothing
        assert reason(cut, tmp_path) == "cut between two of its scans"


def test_what_no_pixel_depends_on_is_no_damage(tmp_path: Path) -> None:
    data = bytearray(JPEGS["baseline"])
    data[data.index(b"JFIF\0") + 5] = 7  # a revision of JFIF that libjpeg does not know, and warns of
    np.testing.assert_array_equal(read(bytes(data), tmp_path), decoded(JPEGS["baseline"]))


@pytest.mark.fuzz
@given(kind=st.sampled_from(["baseline", "progressive", "restarts", "grey", "cmyk"]), drawn=st.data())
def test_a_mutated_jpeg_is_named_or_decodes_without_a_warning(
    kind: str, drawn: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference is another decoder and its own count of warnings: libjpeg's, by way of TurboJPEG at full size."""
    data = bytearray(JPEGS[kind])
    for _ in range(drawn.draw(st.integers(1, 4))):
        at = drawn.draw(st.integers(0, len(data) - 1))
        match drawn.draw(st.sampled_from(["flip", "zero", "cut", "marker", "insert", "end"])):
            case "flip":
                data[at] ^= 1 << drawn.draw(st.integers(0, 7))
            case "zero":
                data[at : at + drawn.draw(st.integers(1, 600))] = bytes(min(600, len(data) - at))
            case "cut":
                del data[at : at + drawn.draw(st.integers(1, 200))]
            case "marker":
                data[at : at + 2] = bytes([0xFF, drawn.draw(st.integers(0, 255))])
            case "insert":
                data[at:at] = drawn.draw(st.binary(min_size=1, max_size=8))
            case "end":
                del data[max(at, 4) :]
    mutated = bytes(data) or b"\0"
    path = tmp_path_factory.mktemp("fuzz") / "photo.jpg"
    path.write_bytes(mutated)
    try:
        pixels = read_photo(path)
    except CorruptImageError:
        return
    if mutated.startswith(b"\xff\xd8\xff"):
        assert warnings_of(mutated) == ""
        np.testing.assert_array_equal(pixels, decoded(checked_jpeg(mutated)[0]))


def warnings_of(data: bytes) -> str:
    """The first warning of a decoder at full size; empty if there is none, or one of JFIF's revision."""
    with Image.open(io.BytesIO(data)) as image:
        (width, height), cmyk = image.size, image.mode == "CMYK"
    whole = np.frombuffer(checked_jpeg(data)[0], np.uint8)
    out = np.empty((height, width, 4), np.uint8)
    with jpeg_decompressor() as (library, decoder):
        place = whole.ctypes.data, whole.size, out.ctypes.data
        code = library.tjDecompress2(decoder, *place, width, 0, height, 11 if cmyk else 0, 0)
        text = library.tjGetErrorStr2(decoder).decode() if code else ""
    return "" if "JFIF revision" in text else text


# ---- PNG and others


def test_a_flipped_bit_in_a_png_is_corrupt(tmp_path: Path) -> None:
    data = encoded(photo(), "PNG")
    np.testing.assert_array_equal(read(data, tmp_path), np.asarray(photo()))
    generator = np.random.default_rng(0)
    for at in generator.integers(16, len(data) - 12, 100).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(generator.integers(8))
        assert reason(bytes(damaged), tmp_path)
    at = data.index(b"IDAT") + 500
    rest = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert reason(rest, tmp_path) == "wrong checksum of a chunk IDAT"


def test_a_png_without_its_last_chunk_is_whole(tmp_path: Path) -> None:
    data = encoded(photo(), "PNG")
    for missing in (4, 11, 12):
        np.testing.assert_array_equal(read(data[:-missing], tmp_path), np.asarray(photo()))
    for missing in (13, 17, 2000):
        assert reason(data[:-missing], tmp_path) == "cut within a chunk IDAT"


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_png_with_long_texts_is_whole(where: str, tmp_path: Path) -> None:
    """Longer than Pillow reads, compressed or not; an orientation among them counts."""
    long = b"x" * (2 << 20)
    texts = (
        chunk(b"tEXt", b"parameters\0" + long),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(long)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(long)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(long)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(long)),
    )
    data = encoded(photo(), "PNG")
    at = 33 if where == "before" else len(data) - 12
    np.testing.assert_array_equal(read(data[:at] + b"".join(texts) + data[at:], tmp_path), np.asarray(photo()))
    assert photo_size(tmp_path / "photo") == (160, 120)


def test_an_orientation_in_a_text_of_a_png_counts(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=True)
    turned = np.rot90(np.asarray(photo()), -1)
    np.testing.assert_array_equal(read(encoded(photo(), "PNG", pnginfo=texts), tmp_path), turned)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_a_file_that_is_cut_is_corrupt_or_whole(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = encoded(photo(), kind, **options)
    whole, outcomes = read(data, tmp_path), Counter[str]()
    for size in np.linspace(1, len(data) - 1, 60).astype(int).tolist():
        try:
            np.testing.assert_array_equal(read(data[:size], tmp_path), whole)
        except CorruptImageError:
            outcomes["corrupt"] += 1
    assert outcomes["corrupt"] >= 58


def test_damage_of_a_jpeg_within_a_tiff_is_named(tmp_path: Path) -> None:
    data = encoded(photo(), "TIFF", compression="jpeg")
    np.testing.assert_array_equal(read(data, tmp_path), decoded(data))
    middle = len(data) // 2
    assert "Corrupt JPEG data" in reason(data[:middle] + bytes(600) + data[middle + 600 :], tmp_path)
    for kind in ("L", "CMYK"):
        whole = encoded(photo().convert(kind), "TIFF", compression="jpeg")
        np.testing.assert_array_equal(read(whole, tmp_path), decoded(whole))


def test_a_jpeg_of_12_bits_is_named(tmp_path: Path) -> None:
    data = bytearray(JPEGS["baseline"])
    data[data.index(b"\xff\xc0") + 4] = 12
    assert reason(bytes(data), tmp_path) == "a JPEG of 12 bits, which is not supported; save it with 8"


def test_other_formats_start_no_program(tmp_path: Path) -> None:
    """Ghostscript reads EPS, and Pillow starts it; a file's content need not be what its name says."""
    assert reason(encoded(photo(), "EPS"), tmp_path) == "not an image of a known kind"
    np.testing.assert_array_equal(read(encoded(photo(), "PNG"), tmp_path), np.asarray(photo()))  # named `photo`


def test_more_pixels_than_are_decoded(tmp_path: Path) -> None:
    data = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b"")
    assert "more than 178,956,970 pixels, the most that are decoded; make it smaller" in reason(
        b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b""), tmp_path
    )
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(CorruptImageError, match="2,147,483,648 bytes, more than any image has"):
        read_photo(tmp_path / "sparse.png")


def test_more_frames_are_noticed(tmp_path: Path) -> None:
    frames = [photo(seed=1), photo(seed=2)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        path = tmp_path / f"moving.{kind}"
        path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        moving = load_photo(path)
        assert moving.more_frames
        if kind != "GIF":
            np.testing.assert_array_equal(moving.pixels, np.asarray(frames[0]))
        path.write_bytes(encoded(frames[0], kind, **options))
        assert not load_photo(path).more_frames


# ---- 16 bits


DEEP_KINDS = ("grey png", "grey tif", "grey pgm", "rgb png", "rgb tif", "rgb ppm", "la png", "rgba png")


def test_full_range_of_14_bits_is_named_too(tmp_path: Path) -> None:
    values = np.full_like(FULL, (1 << 14) - 1)
    assert "to 16,383, where white is 65,535: nearly black; give --white-level 16383" in reason(
        deep_file("grey png", values), tmp_path
    )


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_full_range_is_exact_and_low_range_is_named(kind: str, tmp_path: Path) -> None:
    wanted = np.rint(FULL / 257).astype(np.uint8)
    grey = kind.startswith(("grey", "la"))
    wanted = np.repeat(wanted[..., :1], 3, axis=2) if grey else wanted[..., :3]
    np.testing.assert_array_equal(read(deep_file(kind, FULL), tmp_path), wanted)
    for bits in (8, 10, 12, 14):
        low = (FULL >> (16 - bits)).astype(np.uint16)
        data = deep_file(kind, low)
        top = int(low[..., 0].max() if grey else low[..., :3].max())
        said = reason(data, tmp_path)
        assert f"to {top:,}, where white is 65,535: nearly black; give --white-level {(1 << bits) - 1}" in said
        assert "or --white-level 65535 if it is so dark" in said
        scaled = np.rint(low / ((1 << bits) - 1) * 255).astype(np.uint8)
        scaled = np.repeat(scaled[..., :1], 3, axis=2) if grey else scaled[..., :3]
        np.testing.assert_array_equal(read(data, tmp_path, (1 << bits) - 1), scaled)
        dark = load_photo(tmp_path / "photo", 65535)
        assert dark.pixels.max() <= 64 and dark.value_range is not None and dark.value_range[1:] == (top, 65535)
    assert "where --white-level says 4,095" in reason(deep_file(kind, FULL), tmp_path, 4095)
    assert read(deep_file(kind, np.zeros_like(FULL)), tmp_path).max() == 0  # black by any white


def test_deep_transparent_parts_become_white(tmp_path: Path) -> None:
    alpha = FULL[..., 3:] / 65535
    wanted = np.rint(FULL[..., :3] / 257 * alpha + 255 * (1 - alpha))
    assert np.abs(read(png(FULL, 6), tmp_path) - wanted).max() <= 1
    one = FULL[5, 7]
    found = read(png(FULL[..., :3], 2, chunk(b"tRNS", struct.pack(">HHH", *one[:3].tolist()))), tmp_path)
    hit = (FULL[..., :3] == one[:3]).all(axis=2)
    assert (found[hit] == 255).all() and (found[~hit] == np.rint(FULL[..., :3] / 257)[~hit]).all()
    found = read(png(FULL[..., :1], 0, chunk(b"tRNS", struct.pack(">H", int(one[0])))), tmp_path)
    hit = FULL[..., 0] == one[0]
    assert (found[hit] == 255).all() and (found[~hit, 0] == np.rint(FULL[..., 0] / 257)[~hit]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight = np.rint(FULL[..., :3] / 257).astype(np.uint8)
    upright = read(encoded(Image.fromarray(eight), "PNG", exif=exif), tmp_path)
    tag = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    np.testing.assert_array_equal(read(png(FULL[..., :3], 2, tag), tmp_path), upright)
    np.testing.assert_array_equal(read(png(FULL[..., :1], 0, tag), tmp_path)[..., 0], upright[..., 0])
    np.testing.assert_array_equal(
        read(encoded(Image.fromarray(FULL[..., 0]), "TIFF", exif=exif), tmp_path)[..., 0], upright[..., 0]
    )


def tiff(values: Any, bits: int, photometric: int, signed: bool = False) -> bytes:
    """A little-endian grey TIFF by hand: one strip, no compression."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        body = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
        data = body.astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    if signed:
        tags[339] = 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_tiffs_that_say_what_is_white(tmp_path: Path) -> None:
    grey = FULL[..., 0]
    twelve = read(tiff(grey >> 4, 12, 1), tmp_path)
    np.testing.assert_array_equal(twelve[..., 0], np.rint((grey >> 4) / 4095 * 255))
    inverted = read(tiff(grey, 16, 0), tmp_path)
    np.testing.assert_array_equal(inverted[..., 0], np.rint((65535 - grey.astype(int)) / 257))
    assert "values from -5 to 32,767: below 0" in reason(
        tiff(np.linspace(-5, 32767, 12, dtype=np.int16)[None], 16, 1, True), tmp_path
    )
    assert "beyond 16 bits (0 to 1,048,576)" in reason(
        encoded(Image.fromarray(np.array([[0, 1 << 20]], np.int32)), "TIFF"), tmp_path
    )
    wide = read(encoded(Image.fromarray(np.array([[0, 1 << 20]], np.int32)), "TIFF"), tmp_path, 1 << 20)
    assert wide[..., 0].tolist() == [[0, 255]]
