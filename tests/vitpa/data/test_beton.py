"""The .beton reader: equal to FFCV's own loader, and a clear refusal of everything that is not whole."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.prep
from data_prep.prep import Options, prepare
from data_prep.write import Writer
from tests.support.betons import raw_sample, write_data
from vitpa.data.beton import ALLOCATION, FIELD, HEADER, SAMPLE, Beton, BetonFile
from vitpa.data.manifest import BetonError, ImageSettings, Manifest, beton_path, manifest_path
from vitpa.datasets import facts_of

FFCV_REFERENCE = """
import json, sys
import numpy as np
import ffcv.types as types
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
out, *betons = sys.argv[1:]
arrays = {}
for number, beton in enumerate(betons):
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(beton, batch_size=100, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    arrays[f"images{number}"] = np.concatenate([images for images, _ in batches])
    arrays[f"labels{number}"] = np.concatenate([labels for _, labels in batches]).reshape(-1)
np.savez(out, **arrays)
dtypes = [types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE]
dtypes.append(types.get_metadata_type([RGBImageField(), IntField()]))
print(json.dumps([str(dtype) for dtype in dtypes] + [types.CURRENT_VERSION]))
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`digits` as raw pixels, and `noise`: 40 + 40 JPEGs of 56x40 px, which are larger than what is kept raw."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(40):
            coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            path = folder / "source" / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((56, 40), Image.Resampling.BICUBIC).save(path)
    with Writer() as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep.prep, "Writer", lambda: nullcontext(writer))  # one for both: importing FFCV takes 5 s
        assert prepare(Options("digits", out=folder), print)
        assert prepare(Options("noise", source=folder / "source", out=folder, max_side_px=64), print)
    return folder


@pytest.fixture
def digits(data_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of digits/train.beton that may be damaged."""
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    yield beton_path(tmp_path, "digits", "train")
    shutil.rmtree(tmp_path / "digits")


def test_digits_are_what_scikit_learn_ships(data_dir: Path) -> None:
    import sklearn.datasets

    expected = sklearn.datasets.load_digits()
    found = []
    for split, num_samples in (("train", 1437), ("val", 360)):
        with Beton.open(beton_path(data_dir, "digits", split), "digits", split) as beton:
            assert len(beton) == beton.manifest.num_samples == num_samples
            assert beton.image_size_px == (8, 8)
            assert beton.labels.dtype == np.int64 and not beton.is_jpeg.any()
            images = np.stack([beton.read_image(index) for index in range(len(beton))])
            assert (images == images[..., :1]).all()
            found += [(label, image.tobytes()) for label, image in zip(beton.labels.tolist(), images[..., 0], strict=True)]
            share = np.bincount(beton.labels) / np.bincount(expected.target)
            assert np.abs(share - num_samples / 1797).max() < 0.01  # stratified
            if split == "train":
                facts = facts_of("digits")
                np.testing.assert_allclose((images / 255).mean((0, 1, 2)), facts.mean, atol=5e-5)
                np.testing.assert_allclose((images / 255).std((0, 1, 2)), facts.std, atol=5e-5)
    grey = np.rint(expected.images * 255 / 16).astype(np.uint8)
    wanted = [(label, image.tobytes()) for label, image in zip(expected.target.tolist(), grey, strict=True)]
    assert sorted(found) == sorted(wanted)


@pytest.mark.slow
def test_pixels_labels_and_tables_are_those_of_ffcv(data_dir: Path, tmp_path: Path) -> None:
    betons = [beton_path(data_dir, "digits", "train"), beton_path(data_dir, "noise", "train")]
    arguments = [sys.executable, "-c", FFCV_REFERENCE, str(tmp_path / "ffcv.npz"), *map(str, betons)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [*map(str, (HEADER, FIELD, ALLOCATION, SAMPLE)), 2]
    reference = np.load(tmp_path / "ffcv.npz")
    for number, path in enumerate(betons):
        with Beton.open(path) as beton:
            assert beton.is_jpeg.all() == (number == 1)
            np.testing.assert_array_equal(beton.labels, reference[f"labels{number}"])
            for index, wanted in enumerate(reference[f"images{number}"]):
                np.testing.assert_array_equal(beton.read_image(index), wanted)


def test_many_threads_read_the_same_pixels(data_dir: Path) -> None:
    with Beton.open(beton_path(data_dir, "noise", "train")) as beton:
        one_by_one = [beton.read_image(index).tobytes() for index in range(len(beton))]
        start = threading.Barrier(8)

        def read_all(_: int) -> list[bytes]:
            start.wait()
            return [beton.read_image(index).tobytes() for index in range(len(beton))]

        with ThreadPoolExecutor(8) as pool:
            assert all(found == one_by_one for found in pool.map(read_all, range(8)))


def test_reading_into_an_array(data_dir: Path) -> None:
    with Beton.open(beton_path(data_dir, "noise", "val")) as beton:
        batch = np.zeros((2, 40, 56, 3), np.uint8)
        assert beton.read_image(3, out=batch[1]) is not None
        np.testing.assert_array_equal(batch[1], beton.read_image(3))
        assert not batch[0].any()
        for wrong in (np.zeros((56, 40, 3), np.uint8), np.zeros((40, 56, 3)), np.zeros((56, 40, 3), np.uint8).swapaxes(0, 1)):
            with pytest.raises(ValueError, match="C-contiguous uint8 array"):
                beton.read_image(3, out=wrong)  # type: ignore[arg-type]  # the float one
        for index in (-1, 40):
            with pytest.raises(BetonError, match=f"there is no sample {index}, only 0 to 39"):
                beton.read_image(index)
    with pytest.raises(BetonError, match="after it was closed"):
        beton.read_image(0)


def test_copying_pieces(data_dir: Path) -> None:
    with Beton.open(beton_path(data_dir, "noise", "val")) as beton:
        begins, sizes = beton.offsets[[5, 5, 0]] + np.array([0, 10, 3]), np.array([40, 0, 7])
        out = np.full(50, 77, np.uint8)
        beton.copy(begins, sizes, out[1:48])
        assert out.tolist() == [77, *beton.stored(5)[:40], *beton.stored(0)[3:10], 77, 77]
        beton.copy(begins[:0], sizes[:0], out[:0])
    with pytest.raises(BetonError, match="after it was closed"):
        beton.copy(begins, sizes, out[:47])


def test_content_hash_is_over_the_samples(digits: Path) -> None:
    with Beton.open(digits) as beton:
        progress: list[int] = []
        assert beton.content_sha256(progress.append) == beton.manifest.beton_sha256
        assert sum(progress) == len(beton)
    flip_byte(digits, digits.stat().st_size - 1437 * ALLOCATION.itemsize - 1)  # the padding of the last page
    with Beton.open(digits) as beton:
        assert beton.content_sha256() == beton.manifest.beton_sha256
    flip_byte(digits, 1 << 21)  # the first pixel
    with Beton.open(digits) as beton:
        assert beton.content_sha256() != beton.manifest.beton_sha256


@pytest.mark.parametrize(
    ("keep_bytes", "message"),
    [
        (0, "too short for a .beton file"),
        (10, "too short for a .beton file"),
        (HEADER.itemsize, "it was cut or changed within its header"),
        (HEADER.itemsize + 1000, "it was cut or changed within its header"),
        (HEADER.itemsize + 2 * FIELD.itemsize + 100, "it was cut or changed"),
        (1 << 21, "it was cut or changed"),
        ((1 << 21) + 1000, "it was cut or changed"),
        (-1437 * ALLOCATION.itemsize, "it was cut or changed"),
        (-1000, "it was cut or changed"),
        (-1, "it was cut or changed"),
    ],
)
def test_truncated(digits: Path, keep_bytes: int, message: str) -> None:
    size = digits.stat().st_size
    with digits.open("rb+") as file:
        file.truncate(keep_bytes if keep_bytes >= 0 else size + keep_bytes)
    with pytest.raises(BetonError, match=message) as caught:
        Beton.open(digits)
    assert "make it with `vitpa prep digits --force`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"\x01", "not a .beton file of FFCV's format 2"),  # version
        (2, b"\x03", "3 fields instead of 2"),
        (4, b"\x01", "not a .beton file"),  # page size
        (8, struct.pack("<Q", 1436), "it was cut or changed"),  # number of samples
        (8, struct.pack("<Q", 1 << 60), "it was cut or changed"),
        (16, struct.pack("<Q", 0), "its writing was not finished"),  # what a killed writer leaves
        (16, struct.pack("<Q", 1 << 63), "it was cut or changed"),
        (HEADER.itemsize, b"\x05", "images and labels, in this order"),  # type of the first field
        (HEADER.itemsize + 1, b"I", "images and labels, in this order"),  # its name
        (HEADER.itemsize + 2 * FIELD.itemsize, b"\x07", "sample 0 of its table"),  # storage mode
        (HEADER.itemsize + 2 * FIELD.itemsize + 24 * 5 + 1, b"\x09", "sample 5 of its table"),  # width
        (HEADER.itemsize + 2 * FIELD.itemsize + 24 * 5 + 5, struct.pack("<Q", 1 << 63), "allocation table"),  # pointer
        (HEADER.itemsize + 2 * FIELD.itemsize + 24 * 5 + 16, struct.pack("<q", 10), "labels are not those"),
        (HEADER.itemsize + 2 * FIELD.itemsize + 24 * 5 + 16, struct.pack("<q", -1), "labels are not those"),
        (HEADER.itemsize + 2 * FIELD.itemsize + 24 * 5 + 16, struct.pack("<q", 1 << 40), "labels are not those"),
        (-24, struct.pack("<Q", 3), "allocation table"),  # sample
        (-8, struct.pack("<Q", 1 << 62), "sample 1436 of its table"),  # size
    ],
)
def test_changed_tables(digits: Path, offset: int, value: bytes, message: str) -> None:
    overwrite(digits, offset, value)
    with pytest.raises(BetonError, match=message):
        Beton.open(digits)


def test_pointer_outside_of_the_file(digits: Path) -> None:
    """Table and sample agree on a place that is not there."""
    for place in ((1 << 63) - 10, 1 << 63, 0, 1 << 30):
        overwrite(digits, HEADER.itemsize + 2 * FIELD.itemsize + 5, struct.pack("<Q", place))
        overwrite(digits, -1437 * 24 + 8, struct.pack("<Q", place))
        with pytest.raises(BetonError, match="sample 0 of its table is impossible"):
            Beton.open(digits)


def test_zeroed_jpeg_is_reported(data_dir: Path, tmp_path: Path) -> None:
    """FFCV's loader would return the pixels of an earlier image."""
    shutil.copytree(data_dir / "noise", tmp_path / "noise")
    path = beton_path(tmp_path, "noise", "train")
    with BetonFile(path) as file:
        offset, size = int(file.offsets[7]), int(file.sizes[7])
    overwrite(path, offset, bytes(size))
    with Beton.open(path) as beton:
        beton.read_image(6)
        with pytest.raises(BetonError, match="JPEG of sample 7 cannot be decoded"):
            beton.read_image(7)


def test_manifest_must_be_there_and_agree(digits: Path) -> None:
    manifest = manifest_path(digits)
    shutil.copy(digits.with_name("val.json"), manifest)
    with pytest.raises(BetonError, match=r"1437 samples in .* where its manifest says 360"):
        Beton.open(digits)
    with pytest.raises(BetonError, match="holds the split val, not train"):
        Beton.open(digits, "digits", "train")
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(BetonError, match=r"train\.json: not a manifest: the file: Invalid JSON"):
        Beton.open(digits)
    manifest.write_text("{}")
    with pytest.raises(BetonError, match="not a manifest: dataset: Field required"):
        Beton.open(digits)
    manifest.unlink()
    with pytest.raises(BetonError, match=r"no manifest beside the \.beton, it was not finished"):
        Beton.open(digits)


def test_manifest_that_contradicts_itself(digits: Path) -> None:
    document = json.loads(manifest_path(digits).read_text())
    manifest_path(digits).write_text(json.dumps({**document, "num_samples": 1438}))
    with pytest.raises(BetonError, match="class_counts add up to 1437, num_samples is 1438"):
        Manifest.read(manifest_path(digits))
    document["class_names"].pop()
    manifest_path(digits).write_text(json.dumps(document))
    with pytest.raises(BetonError, match="9 class_names but 10 class_counts"):
        Manifest.read(manifest_path(digits))


def test_another_data_set(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "noise", tmp_path / "cifar10")
    with pytest.raises(BetonError, match="holds the data set noise, not cifar10; make it with `vitpa prep cifar10 --force`"):
        Beton.open(beton_path(tmp_path, "cifar10", "val"), "cifar10", "val")


def test_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match=r"train.beton: no such file; make it with `vitpa prep cifar10`$"):
        Beton.open(beton_path(tmp_path, "cifar10", "train"))
    with pytest.raises(BetonError, match=r"`vitpa prep cifar1O --source DIR` .*did you mean cifar10\?"):
        Beton.open(beton_path(tmp_path, "cifar1O", "train"))
    with pytest.raises(BetonError, match=r"`vitpa prep zebras --source DIR` .*known data sets: digits, cifar10"):
        Beton.open(beton_path(tmp_path, "zebras", "train"))


@pytest.mark.parametrize(
    "document",
    [
        {"resize": "none", "size_px": 5, "jpeg_share": 0.0, "jpeg_quality": None},
        {"resize": "short_side", "size_px": None, "jpeg_share": 0.0, "jpeg_quality": None},
        {"resize": "none", "size_px": None, "jpeg_share": 0.0, "jpeg_quality": 90},
        {"resize": "none", "size_px": None, "jpeg_share": 0.5, "jpeg_quality": None},
    ],
)
def test_settings_that_contradict_themselves(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="belongs to"):
        ImageSettings.model_validate(document)


def test_opening_does_not_import_ffcv(data_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vitpa.data.beton import Beton\n"
        f"Beton.open(Path({str(beton_path(data_dir, 'noise', 'val'))!r})).read_image(0)\n"
        "print({'ffcv', 'torch', 'numba', 'cv2'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def overwrite(path: Path, offset: int, value: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset, 0 if offset >= 0 else 2)
        file.write(value)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        old = file.read(1)[0]
    overwrite(path, offset, bytes([old ^ 0xFF]))


@pytest.mark.parametrize("times", [1, 2])
def test_one_that_is_replaced_while_it_is_opened_is_not_paired_with_the_new_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once: the new one is opened. Again and again: it is refused."""
    samples = [raw_sample(4, 4, value, label=value % 2) for value in range(4)]
    others = [raw_sample(4, 4, 9 + value, label=value % 2) for value in range(4)]
    path, new = beton_path(tmp_path, "noise", "train"), beton_path(tmp_path / "new", "noise", "train")
    write_data(tmp_path, samples, "noise", ["train"])
    read, left = Manifest.read, times

    def replaced(manifest: Path, dir_fd: int | None = None) -> Manifest:
        nonlocal left
        if left:
            left -= 1
            write_data(tmp_path / "new", others, "noise", ["train"])
            manifest_path(path).unlink()
            new.replace(path)
            manifest_path(new).replace(manifest_path(path))
        return read(manifest, dir_fd)

    monkeypatch.setattr(Manifest, "read", replaced)
    if times > 1:
        with pytest.raises(BetonError, match="was made again while it was opened; start again"):
            Beton.open(path)
        return
    with Beton.open(path) as beton:
        assert beton.content_sha256() == beton.manifest.beton_sha256
