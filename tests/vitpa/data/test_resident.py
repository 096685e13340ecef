"""Images on the device: the stored pixels, and nothing that the manifest does not vouch for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.betons import jpeg_sample, raw_sample, write_data
from vitpa.data.beton import Beton, BetonFile
from vitpa.data.manifest import BetonError, beton_path, manifest_path
from vitpa.data.resident import ResidentImages, decoded

CPU = torch.device("cpu")


def resident(beton: Beton, *, img_size: int = 8) -> ResidentImages:
    return ResidentImages(*decoded(beton, img_size), device=CPU)


@pytest.fixture(scope="module")
def val(digits: Path) -> Beton:
    """360 images of 8 x 8."""
    return Beton.open(beton_path(digits, "digits", "val"))


@pytest.fixture(scope="module")
def stored(val: Beton) -> Tensor:
    """The images one by one: (N, 3, 8, 8) uint8."""
    return torch.stack([torch.from_numpy(val.read_image(index).copy()).permute(2, 0, 1) for index in range(len(val))])


def test_pixels_and_labels_are_those_of_the_file(val: Beton, stored: Tensor) -> None:
    images = resident(val)
    assert torch.equal(images.images, stored)
    assert images.images.dtype == torch.uint8
    assert images.labels.tolist() == val.labels.tolist()
    assert images.labels.dtype == torch.int64


def test_where_some_are_jpegs_each_is_decoded(tmp_path: Path) -> None:
    with Beton.open(
        write_data(tmp_path, [raw_sample(16, 16), jpeg_sample(16, 16, 1, label=1), raw_sample(16, 16, 2)])
    ) as beton:
        expected = np.stack([beton.read_image(index) for index in range(3)])
        assert np.array_equal(resident(beton, img_size=16).images.permute(0, 2, 3, 1).numpy(), expected)


def test_raw_pixels_are_copied_together(val: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BetonFile, "read_image")
    assert len(resident(val).images) == len(val)


def test_content_that_is_not_what_the_manifest_says_is_refused(val: Beton, tmp_path: Path) -> None:
    path = tmp_path / "digits" / "val.beton"
    path.parent.mkdir()
    shutil.copy(val.path, path)
    shutil.copy(manifest_path(val.path), manifest_path(path))
    resident(Beton.open(path))
    with path.open("r+b") as file:
        file.seek(int(val.offsets[123]) + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    changed = Beton.open(path)  # everything but the pixels still agrees
    assert not np.array_equal(changed.read_image(123), val.read_image(123))
    with pytest.raises(BetonError, match=r"val\.beton: its content is not what its manifest says; .*`vitpa prep --force`"):
        resident(changed)


def test_images_of_another_size_are_refused(val: Beton, photos: Path) -> None:
    message = r"val\.beton: images of \(8, 8\) cannot stay .* at model\.img_size=16; set runtime\.loader=stream$"
    with pytest.raises(BetonError, match=message):
        resident(val, img_size=16)
    different = Beton.open(beton_path(photos, "photos", "val"))
    with pytest.raises(BetonError, match=r"images of different sizes cannot stay .*; set runtime\.loader=stream$"):
        resident(different)
