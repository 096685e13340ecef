"""Images on the device: the stored pixels, the augmentation by itself, and nothing that the manifest does not vouch for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data import augment
from vitpa.data.augment import epoch_keys
from vitpa.data.batches import eval_batches
from vitpa.data.beton import Beton, BetonError, beton_path, manifest_path
from vitpa.data.counter_rng import Purpose, key
from vitpa.data.resident import ResidentImages, decoded
from vitpa.datasets import facts_of

CPU = torch.device("cpu")
DIGITS = facts_of("digits")
PLAIN = AugmentConfig(crop="none", hflip=False)


def resident(beton: Beton, options: AugmentConfig = PLAIN, *, img_size: int = 8, seed: int = 0) -> ResidentImages:
    return ResidentImages(*decoded(beton, img_size), DIGITS, options, seed=seed, device=CPU)


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


def test_training_without_augmentation_is_normalisation_alone(val: Beton, stored: Tensor) -> None:
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))
    seen = []
    data = resident(val)
    for samples, batch in zip(order.split(100), data.train_batches(order.split(100), 3), strict=True):
        images, labels = data.augmentation(batch.images, batch.samples, epoch_keys([0], 3)), batch.labels
        expected = (stored[samples].double() / 255 - DIGITS.mean[0]) / DIGITS.std[0]
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.double(), expected, atol=1e-5, rtol=1e-5)
        assert labels.tolist() == val.labels[samples.numpy()].tolist()
        seen.append(len(samples))
    assert seen == [100, 100, 100, 60]


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("crop", ["none", "padded"])
def test_augmentation_is_that_of_the_functions(val: Beton, stored: Tensor, crop: str, hflip: bool) -> None:
    options = AugmentConfig.model_validate({"crop": crop, "crop_padding_px": 2, "hflip": hflip})
    samples = torch.tensor([7, 300, 0, 7, 42])
    expected = stored[samples]
    if crop == "padded":
        expected = augment.padded_crop(expected, samples, padding=2, stream=key(5, Purpose.CROP, 9))
    if hflip:
        expected = augment.horizontal_flip(expected, samples, stream=key(5, Purpose.FLIP, 9))
    images = resident(val, options, seed=5)
    assert torch.equal(images.augmented(samples, 9), expected)
    (batch,) = images.train_batches([samples], 9)
    got = images.augmentation(batch.images, batch.samples, epoch_keys([5], 9))
    assert torch.equal(got, images.augmentation.normalize(expected))
    assert torch.equal(images.images, stored)  # the originals stay as they are


def test_epochs_and_seeds_differ_and_the_batch_does_not_matter(val: Beton) -> None:
    options = AugmentConfig(crop="padded", crop_padding_px=2)
    samples = torch.arange(50)
    first = resident(val, options).augmented(samples, 0)
    assert not torch.equal(resident(val, options).augmented(samples, 1), first)
    assert not torch.equal(resident(val, options, seed=1).augmented(samples, 0), first)
    one_by_one = [resident(val, options).augmented(sample, 0) for sample in samples.split(7)]
    assert torch.equal(torch.cat(one_by_one), first)


def test_evaluation_takes_every_image_once_and_none_of_the_padding(val: Beton, stored: Tensor) -> None:
    images = resident(val, AugmentConfig(crop="padded", hflip=True))  # neither is for evaluation
    batches = list(eval_batches(num_samples=len(val), batch_size=100, rank=0, world_size=1))
    found = list(images.eval_batches(batches))
    labels = torch.cat([batch.labels for batch in found])
    assert torch.equal(torch.cat([batch.samples for batch in found]), torch.cat(batches))
    real = labels >= 0
    assert labels[~real].tolist() == [-1] * 40
    assert labels[real].tolist() == val.labels.tolist()
    assert torch.equal(torch.cat([batch.images for batch in found])[real], stored)


def test_content_that_is_not_what_the_manifest_says_is_refused(val: Beton, tmp_path: Path) -> None:
    path = tmp_path / "digits" / "val.beton"
    path.parent.mkdir()
    shutil.copy(val.path, path)
    shutil.copy(manifest_path(val.path), manifest_path(path))
    resident(Beton.open(path))
    with path.open("r+b") as file:
        file.seek(int(val._offsets[123]) + 5)
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
