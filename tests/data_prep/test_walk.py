"""What `vitpa prep` takes for an image of a source folder: links, hidden and system folders, names, special files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import PrepError
from data_prep.prep import Options, prepare
from data_prep.sources import Split, has_small_images, load_splits
from tests.support.shared_writer import _one_writer, writer
from vitpa.data.beton import Beton
from vitpa.data.manifest import Manifest, beton_path, manifest_path

__all__ = ["_one_writer", "writer"]  # one process writes for all tests of this file


def picture(path: Path, seed: int = 0, side_px: int = 20) -> None:
    """A picture of 20 px unless another side is given, so that conversions here are of raw pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An ImageFolder of two pictures in each of two classes."""
    folder = tmp_path / "source"
    for number, path in enumerate(
        f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in "01"
    ):
        picture(folder / path, number)
    return folder


def splits(source: Path) -> tuple[Split, ...]:
    return load_splits("pets", source, source)


def names(split: Split) -> list[str]:
    return [split.describe(index) for index in range(len(split))]


def refusal(source: Path) -> str:
    with pytest.raises(PrepError) as caught:
        splits(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- links to folders


@pytest.mark.parametrize(
    ("link", "target", "named"),
    [
        ("train/cat/up", "..", "a link back up to {source}/train"),
        ("train/cat/up", "../..", "a link back up to {source}"),
        ("train/cat/up", "/", "a link back up to /"),
        ("train/cat/self", ".", "a link back up to {source}/train/cat"),
        ("train/cat/deep/up", "..", "a link back up to {source}/train/cat"),
        ("train/kitty", ".", "a link back up to {source}/train"),
        ("train/kitty", "cat", "the same folder as {source}/train/cat; its images would be in both train/cat and train/kitty"),
        (
            "train/cat/more",
            "../dog",
            "the same folder as {source}/train/dog; its images would be in both train/dog and train/cat",
        ),
        (
            "val/cat/more",
            "../../train/cat",
            "the same folder as {source}/train/cat; its images would be in both train/cat and val",
        ),
        ("train/dog/all", "../../val", "the same folder as {source}/val"),
    ],
)
def test_a_link_back_up_or_into_another_class_is_an_error(link: str, target: str, named: str, source: Path) -> None:
    path = source / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    message = refusal(source)
    assert message.startswith(f"{path}: {named.format(source=source)}") and "remove" in message


def test_a_link_up_stops_the_command(source: Path, tmp_path: Path) -> None:
    """As at 89b4f68 it was taken: 328 images of 8."""
    (source / "train/cat/up").symlink_to("..")
    with pytest.raises(PrepError, match="up: a link back up to"):
        prepare(Options("pets", source=source, out=tmp_path / "out"), print)
    assert not (tmp_path / "out" / "pets").exists()


def test_train_and_val_may_not_be_one_folder(source: Path) -> None:
    shutil.rmtree(source / "val")
    (source / "val").symlink_to("train")
    assert refusal(source).startswith(f"{source}/val: the same folder as {source}/train")


def test_a_link_to_a_folder_elsewhere_is_followed(source: Path, tmp_path: Path) -> None:
    """Of a class, of a part of one, of a split; whatever lies above it."""
    for name in ("a", "sub/b"):
        picture(tmp_path / f"pool/{name}.png", 9)
    (source / "train/cat/more").symlink_to(tmp_path / "pool")
    shutil.move(source / "train/dog", tmp_path / "dogs")
    (source / "train/dog").symlink_to("../../dogs")
    shutil.move(source / "val", tmp_path / "elsewhere")
    (source / "val").symlink_to(tmp_path / "elsewhere")
    train, val = splits(source)
    assert names(train) == [
        *(f"train/cat/{name}.png" for name in ("0", "1", "more/a", "more/sub/b")),
        *(f"train/dog/{name}.png" for name in ("0", "1")),
    ]
    assert train.class_counts() == (4, 2) and val.class_counts() == (2, 2)
    assert train.notes() == ()


def test_every_folder_is_walked_once(source: Path, tmp_path: Path) -> None:
    """Links of one class to one folder, and to a folder within another: its images are counted once, and it is said."""
    picture(tmp_path / "pool/sub/a.png")
    for name, target in (("x", "pool"), ("y", "pool"), ("z", "pool/sub")):
        (source / "train/cat" / name).symlink_to(tmp_path / target)
    train, _ = splits(source)
    assert names(train)[:3] == ["train/cat/0.png", "train/cat/1.png", "train/cat/x/sub/a.png"]
    assert train.class_counts() == (3, 2)
    assert train.notes() == ("left out: 2 links to folders of the same class (train/cat/y, train/cat/z)",)
    (source / "train/dog/x").symlink_to(tmp_path / "pool/sub")
    assert f"the same folder as {source}/train/cat/x/sub; its images would be in both" in refusal(source)


def test_a_link_loop_outside_is_found(source: Path, tmp_path: Path) -> None:
    picture(tmp_path / "pool/a.png")
    (tmp_path / "pool/back").symlink_to(source / "train/dog")
    (source / "train/cat/more").symlink_to(tmp_path / "pool")
    assert f"{source}/train/cat/more/back: the same folder as {source}/train/dog" in refusal(source)


@pytest.mark.parametrize("place", ["train/bird", "train/cat/more", "val/dog/more.v2"])
def test_a_link_to_a_folder_that_is_gone(place: str, source: Path) -> None:
    (source / place).symlink_to("/nowhere/there")
    assert refusal(source).startswith(f"{source / place}: a link to /nowhere/there, where there is nothing")


# ---- links to files


def test_links_to_images_are_followed_and_said_if_a_file_is_there_twice(source: Path, tmp_path: Path) -> None:
    picture(tmp_path / "pool/a.png", 9)
    (source / "train/cat/a.png").symlink_to(tmp_path / "pool/a.png")
    train, val = splits(source)
    assert train.class_counts() == (3, 2) and not train.notes() and not val.notes()
    (source / "train/cat/b.png").hardlink_to(tmp_path / "pool/a.png")
    (source / "train/dog/0b.png").symlink_to("0.png")
    (source / "val/dog/2.png").symlink_to("../../train/cat/1.png")
    (source / "val/cat/2.png").symlink_to("../dog/0.png")
    train, val = splits(source)
    assert train.notes() == ("listed more than once, by links: 2 (train/cat/b.png is train/cat/a.png)",)
    assert val.notes() == (
        "listed more than once, by links: 1 (val/dog/0.png is val/cat/2.png)",
        "in more than one class, by links: 1 (val/dog/0.png is val/cat/2.png)",
        "also in train, by links: 1 (val/dog/2.png is train/cat/1.png)",
    )


def test_links_to_nothing_are_named(source: Path, tmp_path: Path) -> None:
    (source / "train/cat/2.png").symlink_to("gone.png")
    (source / "train/cat/3.png").symlink_to("3.png")
    with pytest.raises(PrepError) as caught:
        prepare(Options("pets", source=source, out=tmp_path / "out"), print)
    message = str(caught.value)
    assert message.startswith("2 of 6 images of pets/train are corrupt")
    assert "train/cat/2.png: a symbolic link to gone.png, where there is nothing" in message
    assert "train/cat/3.png: a symbolic link that leads to itself" in message


# ---- hidden and system folders, special files

SYSTEM_FOLDERS = (
    *(".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".Trash-1000", "#recycle", ".snapshot"),
    *("System Volume Information", ".git", "@Recycle", ".thumbnails", "#snapshot", "__pycache__"),
)
SYSTEM_FILES = ("._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs000000.png", ".0.png.swp")


def test_hidden_and_system_folders_are_left_out_at_every_depth(source: Path, tmp_path: Path) -> None:
    for where in ("train", "train/cat", "train/cat/deep/deeper", "val/dog"):
        for name in SYSTEM_FOLDERS:
            picture(source / where / name / "0.png")
        for name in SYSTEM_FILES:
            (source / where / name).write_bytes(b"")
    picture(source / "train/cat/deep/deeper/2.png")
    said: list[str] = []
    assert prepare(Options("pets", source=source, out=tmp_path / "out", verify=True), said.append)
    manifest = Manifest.read(manifest_path(beton_path(tmp_path / "out", "pets", "train")))
    assert manifest.class_names == ("cat", "dog") and manifest.class_counts == (3, 2)
    folders, files = 3 * len(SYSTEM_FOLDERS), 3 * len(SYSTEM_FILES)
    assert manifest.left_out == {"hidden or system folders": folders, "hidden or system files": files}
    named = "#recycle, #snapshot, $RECYCLE.BIN, .Trash-1000, .git ..."
    line = f"pets/train: left out: {folders} hidden or system folders ({named}), {files} hidden or system files"
    assert line in said
    assert manifest.notes == tuple(
        text.removeprefix("pets/train: ") for text in said if text.startswith("pets/train: left out")
    )
    assert any(text.startswith(f"pets/val: left out: {len(SYSTEM_FOLDERS)} hidden or system folders") for text in said)


def test_a_source_below_a_hidden_folder_is_no_hidden_one(source: Path, tmp_path: Path) -> None:
    shutil.move(source, tmp_path / ".cache")
    train, _ = splits(tmp_path / ".cache")
    assert len(train) == 4 and not train.notes()


def special_files(folder: Path) -> dict[str, Callable[[Path], object]]:
    def make_socket(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))

    return {
        "pipe.png": os.mkfifo,
        "socket.png": make_socket,
        "zero.png": lambda path: path.symlink_to("/dev/zero"),
        "to_pipe.jpg": lambda path: path.symlink_to("pipe.png"),
    }


@pytest.mark.timeout(60)
def test_pipes_sockets_and_devices_are_left_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source / "train/cat")  # a socket's path is short
    for name, make in special_files(source).items():
        make(source / "train/cat" / name)
    train, _ = splits(source)
    assert len(train) == 4
    assert train.notes() == (
        "left out: 4 pipes, sockets or devices (train/cat/pipe.png, train/cat/socket.png, train/cat/to_pipe.jpg, "
        "train/cat/zero.png)",
    )
    photo = (source / "train/dog/0.png", source / "val/dog/0.png")
    for path, name in zip(photo, ("pipe.png", "socket.png"), strict=True):  # after the walk
        path.unlink()
        (source / "train/cat" / name).rename(path)
    with pytest.raises(Exception, match="not a regular file"):
        train.photo(2)
    assert not has_small_images(splits(source)[:0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all folders")
def test_a_folder_that_cannot_be_read_is_an_error(source: Path) -> None:
    (source / "train/cat/deep").mkdir(mode=0)
    with pytest.raises(PermissionError, match="deep"):
        splits(source)


# ---- names of classes


def test_twins_by_unicode_form(source: Path) -> None:
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for split, name in (("train", one), ("train", two), ("val", one), ("val", two)):
        picture(source / split / name / "0.png")
    assert "('cafe\\u0301') and café ('caf\\xe9') are one name, written in two ways" in refusal(source)
    shutil.rmtree(source / "train" / two)
    shutil.rmtree(source / "val" / one)
    message = refusal(source)
    assert "only one of them has caf" in message and "('cafe\\u0301')" in message and "('caf\\xe9')" in message
    assert "differ only in case, spaces or Unicode form" in message


def test_twins_by_case_are_said(source: Path) -> None:
    for split in ("train", "val"):
        picture(source / split / "Cat" / "0.png")
    train, _ = splits(source)
    assert train.class_names == ("Cat", "cat", "dog")
    assert train.notes() == ("the class names Cat and cat differ only in case, spaces or Unicode form",)
    shutil.rmtree(source / "train/Cat")
    shutil.rmtree(source / "val/cat")
    assert "only one of them has Cat, cat; the class names Cat and cat differ only in case" in refusal(source)


def test_names_that_are_not_utf8(source: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in (b"caf\xe9", b"new\nline"):
            picture(Path(os.fsdecode(os.fsencode(source / split) + b"/" + name + b"/0.png")))
    assert prepare(Options("pets", source=source, out=tmp_path / "out", verify=True), lambda line: None)
    with Beton.open(beton_path(tmp_path / "out", "pets", "train")) as beton:
        assert "caf\\xe9" in beton.manifest.class_names and len(beton) == 6
    for split in ("train", "val"):
        picture(source / split / "caf\\xe9" / "0.png")
    assert "are one name, written in two ways" in refusal(source)


def test_control_characters_of_names_are_shown_and_not_sent(source: Path, tmp_path: Path) -> None:
    (source / "train/cat/a\nb\x1b[2J.png").write_bytes(b"corrupt")
    with pytest.raises(PrepError) as caught:
        prepare(Options("pets", source=source, out=tmp_path / "out"), print)
    assert str(caught.value).splitlines()[1:] == ["  train/cat/a\\nb\\x1b[2J.png: not an image of a known kind"]
    (source / "train/up\x1b").symlink_to("..")
    assert refusal(source).startswith(f"{source}/train/up\\x1b: a link back up to")


# ---- what is small


def test_a_folder_of_small_images_is_stored_as_raw_pixels(source: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(source / split / name / "big.png", 3, 32)
    assert prepare(Options("pets", source=source, out=tmp_path / "out", verify=True), lambda line: None)
    with Beton.open(beton_path(tmp_path / "out", "pets", "train")) as beton:
        assert not beton.is_jpeg.any()
        images = beton.manifest.images
        assert (images.jpeg_share, images.jpeg_quality, images.resize, images.size_px) == (0, None, "none", None)
        with Image.open(source / "train/cat/1.png") as image:
            np.testing.assert_array_equal(beton.read_image(1), np.asarray(image))
    assert prepare(Options("pets", source=source, out=tmp_path / "out"), lambda line: None)  # nothing to do


def test_a_manifest_from_before_there_were_notes_is_read(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (source / "train/cat/Thumbs.db").write_bytes(b"")
    options = Options("pets", source=source, out=tmp_path / "out")
    assert prepare(options, said.append)
    for split in ("train", "val"):
        path = manifest_path(beton_path(tmp_path / "out", "pets", split))
        document = json.loads(path.read_text())
        del document["left_out"], document["notes"], document["images"]["white_level"]
        path.write_text(json.dumps(document))
        assert Manifest.read(path).notes == ()
    assert prepare(replace(options, verify=True), said.append)
    assert any("up to date" in line for line in said) and "pets/val: verified: content hash, 4 labels, 4 of 4 images" in said


def test_what_is_small(source: Path) -> None:
    assert has_small_images(splits(source))
    picture(source / "val/dog/2.png", 0, 32)
    (source / "train/cat/2.png").write_bytes(b"corrupt")
    assert has_small_images(splits(source))
    picture(source / "val/dog/2.png", 0, 33)
    assert not has_small_images(splits(source))


def test_jpeg_quality_of_small_images_needs_a_share(source: Path, tmp_path: Path) -> None:
    options = Options("pets", source=source, out=tmp_path / "out", jpeg_quality=80)
    with pytest.raises(PrepError, match=r"no meaning for raw pixels \(no image is larger than 32 px\); give --jpeg-share too"):
        prepare(options, print)


# ---- a source that changes, and where the output goes


def test_a_source_that_changes_while_it_is_read(source: Path) -> None:
    train, _ = splits(source)
    picture(source / "train/cat/1.png", 77, 21)
    with pytest.raises(OSError, match="changed while it was read; start again"):
        train.photo(1)


def test_output_among_the_class_folders(source: Path, tmp_path: Path) -> None:
    for dataset, out in (("pets", source / "train"), ("train", source), ("pets", source / "val/cat")):
        with pytest.raises(PrepError, match=r"within the source's (train|val)/, whose class folders are read; give another"):
            prepare(Options(dataset, source=source, out=out), print)
    assert {path.name for path in (source / "train").iterdir()} == {"cat", "dog"}
    assert prepare(Options("pets", source=source, out=source), lambda line: None)
    assert prepare(Options("pets", source=source, out=source), lambda line: None)
