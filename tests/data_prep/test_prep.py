"""`vitpa prep` on real files: every kind of photo, corrupt ones, repetition, verification, refusals."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

import data_prep.command
import data_prep.prep
from data_prep.errors import PrepError
from data_prep.images import CorruptImageError, shrink
from data_prep.lock import LOCK_NAME, locked
from data_prep.prep import Options, image_settings, page_bytes, prepare
from data_prep.progress import LINE_EVERY_S, progress_bar
from data_prep.sources import load_splits
from tests.support.image_files import read_photo
from tests.support.shared_writer import SharedWriter, _one_writer, writer
from vitpa.data.beton import FIELD, HEADER, SAMPLE, Beton
from vitpa.data.manifest import BetonError, ImageSettings, Manifest, beton_path, manifest_path
from vitpa.records import ProcessId
from vitpa.terminal import logged_lines

__all__ = ["_one_writer", "writer"]  # one process writes for all tests of this file

SMOOTH = ImageSettings(resize="none", size_px=None, jpeg_share=0.0, jpeg_quality=None)


def photo(seed: int = 0, width: int = 60, height: int = 40) -> Image.Image:
    """A smooth coloured picture in which every corner is different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageFolder: train/ and val/ with 6 JPEGs in each of two classes."""
    for split in ("train", "val"):
        for index in range(12):
            path = tmp_path / "source" / split / ("cats", "dogs")[index % 2] / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(index).save(path, quality=95)
    return tmp_path / "source"


def prep(*arguments: object) -> int:
    """Run `vitpa prep` in this process; its exit code."""
    parser = argparse.ArgumentParser(prog="vitpa")
    data_prep.command.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["prep", *map(str, arguments)])
    return int(options.run(options))


def pixels_of(path: Path) -> list[Any]:
    with Beton.open(path) as beton:
        return [beton.read_image(index) for index in range(len(beton))]


# ---- images


def test_every_mode_becomes_upright_rgb(tmp_path: Path) -> None:
    picture = photo()
    rgb = np.asarray(picture)
    grey = np.asarray(picture.convert("L"))
    ramp16 = (np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60)

    def saved(image: Image.Image, name: str, **options: Any) -> Any:
        image.save(tmp_path / name, **options)
        pixels = read_photo(tmp_path / name)
        assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
        return pixels

    np.testing.assert_array_equal(saved(picture, "rgb.png"), rgb)
    np.testing.assert_array_equal(saved(picture.convert("L"), "grey.png"), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(saved(Image.fromarray(ramp16), "grey16.png")[..., 1], np.rint(ramp16 / 257))
    np.testing.assert_array_equal(saved(Image.fromarray(ramp16), "grey16.tif")[..., 1], np.rint(ramp16 / 257))
    assert saved(picture.convert("1"), "bits.png").max() == 255
    assert np.abs(saved(picture.convert("CMYK"), "cmyk.jpg", quality=100).astype(int) - rgb).mean() < 3
    assert np.abs(saved(picture.convert("YCbCr"), "ycbcr.tif").astype(int) - rgb).mean() < 3
    palette = picture.quantize(64)
    np.testing.assert_array_equal(saved(palette, "palette.png"), np.asarray(palette.convert("RGB")))


def test_transparent_becomes_white(tmp_path: Path) -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    alpha = np.asarray(rgba)[..., 3:] / 255
    wanted = np.asarray(rgba)[..., :3] * alpha + 255 * (1 - alpha)
    rgba.save(tmp_path / "rgba.png")
    assert np.abs(read_photo(tmp_path / "rgba.png") - wanted).max() <= 1

    rgba.convert("LA").save(tmp_path / "la.png")
    grey = np.asarray(rgba.convert("LA"))[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(read_photo(tmp_path / "la.png") - grey).max() <= 1

    palette = photo().quantize(4)
    palette.save(tmp_path / "palette.png", transparency=2)
    pixels, transparent = read_photo(tmp_path / "palette.png"), np.asarray(palette) == 2
    assert transparent.any() and (pixels[transparent] == 255).all()
    np.testing.assert_array_equal(pixels[~transparent], np.asarray(palette.convert("RGB"))[~transparent])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = photo()
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # Image.Transpose
    stored = upright
    for method in undo:
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / "photo.png"), np.asarray(upright))


def test_unusable_images_say_why(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    photo().save(buffer, "JPEG")
    path = tmp_path / "photo.jpg"
    for data, reason in ((b"", "known kind"), (b"text", "known kind"), (buffer.getvalue()[:-400], "(?i)truncated")):
        path.write_bytes(data)
        with pytest.raises(CorruptImageError, match=reason):
            read_photo(path)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(CorruptImageError, match="floating-point pixels"):
        read_photo(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(CorruptImageError, match="beyond 16 bits"):
        read_photo(tmp_path / "wide.tif")
    with pytest.raises(FileNotFoundError):
        read_photo(tmp_path / "missing.jpg")


def test_shrink() -> None:
    pixels = np.asarray(photo(width=60, height=40))

    def size(resize: str, size_px: int) -> tuple[int, ...]:
        settings = SMOOTH.model_copy(update={"resize": resize, "size_px": size_px})
        return shrink(pixels, settings).shape

    assert size("short_side", 20) == (20, 30, 3)
    assert size("max_side", 20) == (13, 20, 3)
    assert size("max_side", 1) == (1, 1, 3)
    assert size("short_side", 40) == size("max_side", 100) == (40, 60, 3)
    assert shrink(pixels, SMOOTH) is pixels


# ---- conversion


def test_image_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "cats" / "notes.txt").write_text("not an image")
    for name in ("a.gif", "b.GIF"):  # what torchvision's ImageFolder passes over, too
        (folder / "train" / "dogs" / name).write_bytes(b"GIF89a")
    photo(98).save(folder / "train" / "beside.jpg")
    (folder / "train" / "cats" / ".hidden.jpg").write_text("not an image")
    (folder / "train" / "cats" / "deep").mkdir()
    photo(99, 30, 90).save(folder / "train" / "cats" / "deep" / "PHOTO.PNG")
    assert prep("pets", "--source", folder, "--out", tmp_path / "out", "--short-side-px", 20, "--workers", 2, "--verify") == 0
    out = capsys.readouterr().out
    assert "pets/train: 13 images of 2 classes" in out and "13 labels, 13 of 13 images" in out
    assert "pets/train: left out: 2 .gif, 1 .txt (not names of images), 1 beside the class folders\n" in out
    assert "pets/val: left out" not in out
    path = beton_path(tmp_path / "out", "pets", "train")
    with Beton.open(path, "pets", "train") as beton:
        assert beton.labels.tolist() == [0] * 7 + [1] * 6
        assert beton.image_size_px is None
        assert set(zip(beton.heights.tolist(), beton.widths.tolist(), strict=True)) == {(20, 30), (60, 20)}
        assert beton.is_jpeg.all()
        manifest = beton.manifest
        assert manifest.class_names == ("cats", "dogs") and manifest.class_counts == (7, 6)
        assert manifest.images == ImageSettings(resize="short_side", size_px=20, jpeg_share=1.0, jpeg_quality=90)
        assert manifest.skipped == () and manifest.file_size_bytes == path.stat().st_size
        assert manifest.tools.keys() == {"vitpa", "python", "ffcv", "numpy", "pillow", "opencv"}
    names = {entry.name for entry in (tmp_path / "out" / "pets").iterdir()}
    assert names == {"train.beton", "train.json", "val.beton", "val.json"}


def test_share_of_jpeg_is_repeatable_with_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    common = ("pets", "--source", folder, "--jpeg-share", 0.5, "--max-side-px", 50)
    assert prep(*common, "--out", tmp_path / "one", "--workers", 1, "--verify") == 0
    assert prep(*common, "--out", tmp_path / "two", "--workers", 2) == 0
    one, two = (Manifest.read(tmp_path / out / "pets" / "train.json") for out in ("one", "two"))
    assert one.beton_sha256 == two.beton_sha256
    with Beton.open(beton_path(tmp_path / "two", "pets", "train")) as beton:
        assert 0 < beton.is_jpeg.sum() < 12


def test_corrupt_images_are_listed_or_skipped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (folder / "train" / "cats" / "4.jpg").read_bytes()
    (folder / "train" / "cats" / "2.jpg").write_bytes(good[: len(good) // 2])
    (folder / "train" / "dogs" / "5.jpg").write_bytes(b"<html>")
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 1
    error = capsys.readouterr().err
    assert "vitpa prep: 2 of 12 images of pets/train are corrupt" in error and "--skip-corrupt" in error
    assert "  train/cats/2.jpg: OSError: image file is truncated" in error
    assert "  train/dogs/5.jpg: not an image of a known kind" in error
    assert not (tmp_path / "out" / "pets").exists()

    assert prep(*common, "--skip-corrupt", "--verify") == 0
    assert "10 images of 2 classes" in (out := capsys.readouterr().out) and "2 corrupt ones left out" in out
    with Beton.open(beton_path(tmp_path / "out", "pets", "train")) as beton:
        assert beton.manifest.skipped == ("train/cats/2.jpg", "train/dogs/5.jpg")
        assert beton.labels.tolist() == [0] * 5 + [1] * 5
    assert prep(*common, "--verify") == 0  # the skipped ones are not asked for again


def test_class_of_corrupt_images_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "val" / "dogs").iterdir():
        path.write_bytes(b"")
    assert prep("pets", "--source", folder, "--out", tmp_path / "out", "--skip-corrupt") == 1
    assert "pets/val: only corrupt images in class dogs" in capsys.readouterr().err
    assert not beton_path(tmp_path / "out", "pets", "val").exists()


def test_image_too_large_for_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (70_000, 3)).save(folder / "train" / "cats" / "wide.png")
    assert prep("pets", "--source", folder, "--out", tmp_path / "out") == 1
    assert "train/cats/wide.png: 70000x3 px is too large; bring it down with" in capsys.readouterr().err


def test_page_holds_usual_photos() -> None:
    for resize, size_px, expected in (
        ("short_side", 256, 1 << 23),
        ("max_side", 500, 1 << 21),
        ("max_side", 3000, 1 << 25),
        ("max_side", 100_000, 1 << 27),
    ):
        settings = SMOOTH.model_copy(update={"resize": resize, "size_px": size_px})
        assert page_bytes(settings) == expected
    assert page_bytes(SMOOTH) == 1 << 21


# ---- repetition


def test_repeating(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    path = beton_path(tmp_path / "out", "pets", "train")
    assert prep(*common) == 0
    before = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(data_prep.prep, "Writer", None)  # nothing may be written
        assert prep(*common) == 0
        assert "pets/train: 12 images in" in (out := capsys.readouterr().out) and "are up to date" in out

        for option, difference in (
            (("--max-side-px", 30), "resize short_side there, max_side asked for; size_px 256 there, 30 asked for"),
            (("--jpeg-quality", 50), "jpeg_quality 90 there, 50 asked for"),
            (("--jpeg-share", 0), "jpeg_share 1.0 there, 0.0 asked for"),
            (("--jpeg-quality", 50, "--verify"), "jpeg_quality 90 there, 50 asked for"),
        ):
            assert prep(*common, *option) == 1
            error = capsys.readouterr().err
            assert f"train.beton was made otherwise: {difference}" in error and "--force makes it again" in error

        photo(5).save(folder / "train" / "cats" / "new.jpg")
        assert prep(*common) == 1
        assert "the source has changed since" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    assert prep(*common, "--force", "--max-side-px", 30, "--verify") == 0
    with Beton.open(path) as beton:
        assert len(beton) == 13 and beton.manifest.images.size_px == 30
    assert prep(*common, "--verify") == 0  # the settings of what is there need not be repeated
    (folder / "train" / "cats" / "new.jpg").unlink()
    assert prep(*common, "--verify") == 1
    assert "NOT VERIFIED: 13 images of 2 classes, its source has 12 of 2" in capsys.readouterr().out


def test_interrupted_between_beton_and_manifest(folder: Path, tmp_path: Path) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 0
    path = beton_path(tmp_path / "out", "pets", "train")
    path.write_bytes(b"half")
    manifest_path(path).unlink()
    kept = tmp_path / "kept"
    kept.write_bytes(b"of another program")
    (path.parent / ".val.beton.part").symlink_to(kept)  # left by a killed run, or put there to have it written to
    (path.parent / ".train.beton.part").mkdir()
    assert prep(*common) == 0
    assert len(pixels_of(path)) == 12
    assert kept.read_bytes() == b"of another program"
    assert [path.name for path in path.parent.glob(".*")] == [".train.beton.part"]


def test_a_conversion_that_fails_in_val_leaves_both_splits_as_they_were(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "pets").iterdir()}
    photo(5).save(folder / "train" / "cats" / "new.jpg")
    (folder / "val" / "cats" / "new.jpg").write_bytes(b"no image")
    assert prep(*common, "--force") == 1
    assert "1 of 13 images of pets/val are corrupt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "pets").iterdir()} == before


def test_damaged_file_is_not_taken_for_done(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 0
    path = beton_path(tmp_path / "out", "pets", "val")
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 5)
    for arguments in (common, (*common, "--verify")):
        assert prep(*arguments) == 1
        assert "val.beton" in (error := capsys.readouterr().err) and "it was cut or changed" in error
    assert prep(*common, "--force") == 0
    assert len(pixels_of(path)) == 12


# ---- verification


def test_verify_says_that_the_source_has_changed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 0
    os.utime(folder / "train" / "cats" / "0.jpg", ns=(1, 1))
    capsys.readouterr()
    assert prep(*common) == 1
    assert prep(*common, "--verify") == 1
    told = capsys.readouterr().out
    assert "pets/train: NOT VERIFIED: equal are content hash, 12 labels, 12 of 12 images\n" in told
    assert "pets/train: NOT VERIFIED: names, sizes or times of files in the source have changed since" in told
    assert "pets/val: verified: content hash" in told
    assert "pets/train: 12 images" not in told and "train.beton are up to date" not in told


@pytest.fixture(scope="module")
def digits_dir(writer: SharedWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep.prep, "Writer", lambda: writer)
        assert prepare(Options("digits", out=out), print)
    return out


def test_verify_finds_a_flipped_byte(digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(digits_dir, tmp_path / "out")
    assert prep("digits", "--out", tmp_path / "out", "--verify") == 0
    assert "digits/train: verified: content hash, 1,437 labels, 1,437 of 1,437 images" in capsys.readouterr().out
    with beton_path(tmp_path / "out", "digits", "train").open("rb+") as file:
        file.seek((1 << 21) + 5)
        file.write(b"\x77")
    assert prep("digits", "--out", tmp_path / "out", "--verify") == 1
    out = capsys.readouterr().out
    assert "digits/train: NOT VERIFIED: the content hash is not the manifest's" in out
    assert "digits/train: NOT VERIFIED: train sample 0: its pixels differ from the source's" in out
    assert "digits/val: verified" in out


def test_verify_finds_exchanged_labels(digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two labels exchanged, so that the counts stay, and the manifest's hash made to fit."""
    shutil.copytree(digits_dir, tmp_path / "out")
    path = beton_path(tmp_path / "out", "digits", "val")
    with Beton.open(path) as beton:
        zero, one = beton.labels.tolist().index(0), beton.labels.tolist().index(1)
    with path.open("rb+") as file:
        for index, label in ((zero, 1), (one, 0)):
            file.seek(HEADER.itemsize + 2 * FIELD.itemsize + SAMPLE.itemsize * index + 16)
            file.write(struct.pack("<q", label))
    with Beton.open(path) as beton:
        changed = beton.manifest.model_copy(update={"beton_sha256": beton.content_sha256()})
    manifest_path(path).write_text(changed.model_dump_json())
    assert prep("digits", "--out", tmp_path / "out", "--verify") == 1
    out = capsys.readouterr().out
    assert f"NOT VERIFIED: val sample {zero}: label 1 where the source has 0" in out
    assert f"NOT VERIFIED: val sample {one}: label 0 where the source has 1" in out


def test_verify_finds_a_jpeg_of_another_photo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("pets", "--source", folder, "--out", tmp_path / "out", "--jpeg-quality", 30)
    assert prep(*common, "--verify") == 0  # low quality alone is no difference
    changed = folder / "train" / "cats" / "4.jpg"
    photo(77).save(changed, quality=95)
    assert prep(*common, "--verify") == 1
    assert "NOT VERIFIED: train/cats/4.jpg: " in (out := capsys.readouterr().out) and "more than 3.0" in out
    photo(4, 40, 60).save(changed)
    assert prep(*common, "--verify") == 1
    assert "train/cats/4.jpg: 60x40 px where the source gives 40x60" in capsys.readouterr().out
    changed.write_bytes(b"gone")
    assert prep(*common, "--verify") == 1
    assert "train/cats/4.jpg: the source image is corrupt" in capsys.readouterr().out


# ---- sources


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images per batch file; torchvision's own reading and checking, with the checksums of these files."""
    import torchvision.datasets as tv

    base = tmp_path / "source" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (6, 10, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, rows in zip(names, data, strict=True):
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(tv.CIFAR10, "train_list", [[name, md5(base / name)] for name in names[:5]])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [[names[5], md5(base / names[5])]])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": md5(base / "batches.meta")})

    assert prep("cifar10", "--source", tmp_path / "source", "--out", tmp_path / "out", "--verify") == 0
    with Beton.open(beton_path(tmp_path / "out", "cifar10", "train"), "cifar10", "train") as beton:
        assert beton.manifest.class_names == tuple(classes)
        assert beton.labels.tolist() == list(range(10)) * 5
        assert beton.image_size_px == (32, 32) and not beton.is_jpeg.any()
        np.testing.assert_array_equal(beton.read_image(13), data[1, 3].reshape(3, 32, 32).transpose(1, 2, 0))


def test_svhn_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the files the digit 0 has the label 10."""
    import scipy.io
    import torchvision.datasets as tv

    source = tmp_path / "source"
    source.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = np.array([*range(1, 11), *range(1, 11)], np.uint8)[:, None]
    split_list = {}
    for split in ("train", "test"):
        path = source / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": labels})
        split_list[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(tv.SVHN, "split_list", split_list)
    assert prep("svhn", "--source", source, "--out", tmp_path / "out", "--verify") == 0
    with Beton.open(beton_path(tmp_path / "out", "svhn", "val"), "svhn", "val") as beton:
        assert beton.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
        np.testing.assert_array_equal(beton.read_image(4), images[..., 4])


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert prep("cifar100", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "cifar100 could not be downloaded" in error and "no route to host" in error
    assert "pass --source DIR, a folder with cifar-100-python/" in error
    assert not (tmp_path / "out" / "cifar100").exists()


def refusal(folder: Path, tmp_path: Path, dataset: str = "pets") -> str:
    """The message with which an ImageFolder is refused."""
    with pytest.raises(PrepError) as caught:
        prepare(Options(dataset, source=folder, out=tmp_path / "out"), print)
    assert not (tmp_path / "out" / dataset).exists()
    return str(caught.value)


def test_unusable_folders(folder: Path, tmp_path: Path) -> None:
    assert "2 classes where imagenet has 1000; give a subset another name" in refusal(folder, tmp_path, "imagenet")
    (folder / "val" / "cows").mkdir()
    assert "only one of them has cows" in refusal(folder, tmp_path)
    (folder / "train" / "cows").mkdir()
    assert "train/cows: no images in this class folder (looked for .jpg" in refusal(folder, tmp_path)
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    (folder / "train" / "1.jpg").write_bytes(b"")
    assert "train: no class folders in it" in refusal(folder, tmp_path)
    shutil.rmtree(folder / "train")
    assert "train: no such folder; --source must be a folder with train/ and val/" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar1o"], "cifar1o is not a known data set: did you mean cifar10?"),
        (["zebras"], "known ones: digits, cifar10"),
        (["imagenet"], "imagenet cannot be downloaded: pass --source DIR"),
        (["Pets"], "'Pets' cannot name a data set"),
        (["raw"], "'raw' cannot name a data set"),
        (["digits", "--source", "."], "leave --source out"),
        (["digits", "--jpeg-quality", "90"], "give --jpeg-share too"),
        (["cifar10", "--source", "."], "no intact cifar10 there"),
    ],
)
def test_clear_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prep(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("vitpa prep: ") and message in error and error.count("\n") == 1
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["digits", "--workers", "0"],
        ["digits", "--jpeg-share", "2"],
        ["digits", "--jpeg-share", "x"],
        ["pets", "--jpeg-quality", "101"],
        ["pets", "--short-side-px", "1", "--max-side-px", "1"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        prep(*arguments)
    assert "usage: vitpa prep" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        prep("--help")
    assert "vitpa prep imagenet --source" in capsys.readouterr().out


def test_default_settings() -> None:
    photos = ImageSettings(resize="short_side", size_px=256, jpeg_share=1.0, jpeg_quality=90)
    assert image_settings(Options("imagenet")) == image_settings(Options("pets")) == photos
    assert image_settings(Options("cifar10")) == SMOOTH
    raw = image_settings(Options("pets", jpeg_share=0.0, max_side_px=400))
    assert raw == ImageSettings(resize="max_side", size_px=400, jpeg_share=0.0, jpeg_quality=None)


# ---- lock and progress


def test_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "digits"
    with locked(folder):
        with pytest.raises(PrepError, match=f"process {os.getpid()} is converting this data set"), locked(folder):
            pass
        assert (folder / LOCK_NAME).exists()
    assert not folder.exists()
    mine = ProcessId.mine()
    for holder, message in (
        ({**mine.model_dump(), "host": "elsewhere"}, f"process {mine.pid} on elsewhere, which cannot be seen from here"),
        ({}, "does not say who holds it"),
    ):
        folder.mkdir()
        (folder / LOCK_NAME).write_text(json.dumps(holder))
        with pytest.raises(PrepError, match=message), locked(folder):
            pass
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / LOCK_NAME).write_text(json.dumps({**mine.model_dump(), "start_ticks": 1}))  # the pid was used again
    with locked(folder):
        assert ProcessId.model_validate_json((folder / LOCK_NAME).read_text()) == mine
    folder.mkdir()
    (folder / LOCK_NAME).write_text(json.dumps({**mine.model_dump(), "start_ticks": 1}))
    (folder / f"{LOCK_NAME}.takeover.1").write_text(mine.model_dump_json())
    monkeypatch.setattr("data_prep.lock.GUARD_WAIT_S", 0.1)
    with pytest.raises(PrepError, match="another process is taking over the lock"), locked(folder):
        pass
    (folder / f"{LOCK_NAME}.takeover.1").write_text(json.dumps({**mine.model_dump(), "start_ticks": 1}))  # killed in it
    with locked(folder):
        assert ProcessId.model_validate_json((folder / LOCK_NAME).read_text()) == mine


def test_a_link_to_nothing_is_a_corrupt_photo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "cats" / "gone.jpg").symlink_to("/nowhere/gone.jpg")
    common = ("pets", "--source", folder, "--out", tmp_path / "out")
    assert prep(*common) == 1
    error = capsys.readouterr().err
    assert "1 of " in error and "train/cats/gone.jpg: a symbolic link to /nowhere/gone.jpg, where there is nothing" in error
    assert prep(*common, "--skip-corrupt") == 0


def test_progress_is_rare_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: clock.now)
    with logged_lines(), progress_bar("pets/train", 1000) as advance:
        clock.now += 1000  # until the work begins
        advance(0)
        for _ in range(10):
            clock.now += LINE_EVERY_S / 4
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "pets/train: 400 of 1,000, ETA 0.2 min",
        "pets/train: 800 of 1,000, ETA 0.1 min",
    ]


def test_beton_of_another_data_set_is_refused(digits_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_dir / "digits", tmp_path / "out" / "pets")
    with pytest.raises(BetonError, match="holds the data set digits, not pets"):
        Beton.open(beton_path(tmp_path / "out", "pets", "train"), "pets", "train")


def test_vanished_file_ends_the_conversion(folder: Path, tmp_path: Path, writer: SharedWriter) -> None:
    """It is not a corrupt image: --skip-corrupt must not leave photos out because a disk has gone."""
    splits = load_splits("pets", folder, tmp_path)
    (folder / "train" / "cats" / "2.jpg").unlink()
    options = Options("pets", source=folder, out=tmp_path / "out", skip_corrupt=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(PrepError, match=r"train\.beton failed: .*/2\.jpg: No such file or directory$"),
    ):
        patch.setattr(data_prep.prep, "load_splits", lambda *arguments: splits)
        prepare(options, print)
    assert not (tmp_path / "out" / "pets").exists()


# ---- where nothing can be written or printed


@pytest.fixture
def read_only(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """An output folder with `pets` converted, on a file system that was then mounted read-only."""
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", out], check=False, capture_output=True).returncode == 0
    try:
        assert prep("pets", "--source", folder, "--out", out) == 0
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        else:
            (out / "pets").chmod(0o555)
        yield out
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
        else:
            (out / "pets").chmod(0o755)


def test_verify_needs_no_write_access(read_only: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prep("pets", "--source", folder, "--out", read_only, "--verify") == 0
    assert "pets/val: verified" in capsys.readouterr().out
    assert prep("pets", "--source", folder, "--out", read_only) == 0
    assert prep("pets", "--source", folder, "--out", read_only, "--force") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("Read-only file system" in error or "Permission denied" in error)


def test_what_cannot_be_printed_stops_no_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoding without the letters of the path, a pipe that nobody reads, a full disk."""
    reader, unread = os.pipe()
    os.close(reader)
    places: list[tuple[int | Path, int]] = [(tmp_path / "text", 0), (unread, 0), (Path("/dev/full"), 1)]
    for number, (stdout, code) in enumerate(places):
        out = tmp_path / f"größer{number}"
        with monkeypatch.context() as patch, open(stdout, "w", encoding="ascii") as text:  # noqa: PTH123 - a descriptor, too
            patch.setattr("sys.stdout", text)
            assert prep("pets", "--source", folder, "--out", out) == code
        for split in ("train", "val"):
            assert len(Beton.open(beton_path(out, "pets", split), "pets", split)) == 12
    assert "gr\\xf6\\xdfer0/pets/val.beton" in (tmp_path / "text").read_text()
    assert capsys.readouterr().err.splitlines() == [
        "vitpa prep: all is done, but the report could not be printed: No space left on device"
    ]


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A conversion that was started with nohup survives its terminal."""

    def loses_its_terminal(*_: object) -> bool:
        signal.raise_signal(signal.SIGHUP)
        return True

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(data_prep.prep, "prepare", loses_its_terminal)
        assert prep("digits", "--out", tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
