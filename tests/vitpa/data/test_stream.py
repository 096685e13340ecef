"""Streamed images: torchvision's crops to the pixel, the same whatever the threads, and no thread left behind."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from tests.support.waiting import IDLE_S
from vitpa.config import AugmentConfig
from vitpa.data.augment import crop_boxes
from vitpa.data.augment.crop_boxes import Crops
from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, Ints, beton_path
from vitpa.data.rng import Purpose, key, uniform
from vitpa.data.sampler import Batch, eval_batches, train_batches
from vitpa.data.stream import StreamedImages

CPU = torch.device("cpu")
CROPS = AugmentConfig(crop="random_resized", hflip=False)
IMG_SIZE = 32


def stream(
    beton: Beton, options: AugmentConfig = CROPS, *, img_size: int = IMG_SIZE, seed: int = 0, workers: int = 2
) -> StreamedImages:
    return StreamedImages(beton, options, img_size=img_size, seed=seed, device=CPU, workers=workers)


def cropped(images: StreamedImages, samples: Tensor, epoch: int, img_size: int | None = None) -> Tensor:
    """What epoch `epoch` sees of `samples` (B,), before augmentation: (B, 3, H, W) uint8."""
    with closing(images.train_batches([samples], epoch, img_size)) as batches:
        return next(batches).images.clone()


@pytest.fixture(scope="module")
def train(photos: Path) -> Beton:
    """12 JPEGs of different sizes."""
    return Beton.open(beton_path(photos, "photos", "train"))


@pytest.fixture(scope="module")
def val(photos: Path) -> Beton:
    """7 JPEGs of different sizes."""
    return Beton.open(beton_path(photos, "photos", "val"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> None:
    assert not decoders()


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def close(iterator: Iterator[Batch]) -> None:
    """What happens when the loop over `iterator` is left."""
    assert isinstance(iterator, Generator)
    iterator.close()


def pil(beton: Beton, index: int) -> Image.Image:
    return Image.fromarray(beton.read_image(index))


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seen(photo: Image.Image, crop: Crops, row: int, img_size: int) -> Image.Image:
    """What row `row` of some crops shows of a photo."""
    left, top, width, height, to_width, to_height, x, y = (int(each[row]) for each in crop)
    region = photo.crop((left, top, left + width, top + height))
    return region.resize((to_width, to_height), Image.Resampling.BILINEAR).crop((x, y, x + img_size, y + img_size))


def boxes(options: AugmentConfig, heights: Ints, widths: Ints, epoch: int = 0) -> Tensor:
    """Left, top, width and height (N, 4) of the crops of images number 0 to N - 1 of these sizes, seed 0."""
    streams = torch.tensor([key(0, Purpose.CROP, epoch, index) for index in range(len(heights))])
    return torch.from_numpy(np.stack(crop_boxes.random_resized(streams, heights, widths, options, IMG_SIZE)[:4], axis=1))


def slow_crop_box(options: AugmentConfig, index: int, epoch: int, height: int, width: int) -> list[int]:
    """Left, top, width and height of one image's crop with seed 0, as torchvision's RandomResizedCrop is written."""
    (scale_low, scale_high), (ratio_low, ratio_high) = options.crop_scale, options.crop_ratio
    stream = key(0, Purpose.CROP, epoch, index)
    for area_draw, ratio_draw, top_draw, left_draw in uniform(stream, torch.arange(40)).view(10, 4).tolist():
        area = height * width * (scale_low + area_draw * (scale_high - scale_low))
        ratio = math.exp(math.log(ratio_low) + ratio_draw * (math.log(ratio_high) - math.log(ratio_low)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1)), w, h]
    w = min(width, max(1, round(height * ratio_high)))
    h = min(height, max(1, round(width / ratio_low)))
    return [(width - w) // 2, (height - h) // 2, w, h]


def by_sample(images: StreamedImages, batches: list[Tensor], epoch: int) -> dict[int, Tensor]:
    """What the training sees of each sample."""
    found: dict[int, Tensor] = {}
    for samples, batch in zip(batches, images.train_batches(batches, epoch), strict=True):
        assert batch.samples.tolist() == samples.tolist()
        assert batch.labels.tolist() == images.beton.labels[samples.numpy()].tolist()
        found |= dict(zip(samples.tolist(), batch.images, strict=True))
    return found


def assert_equal(got: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[sample], expected[sample]) for sample in got)


@pytest.mark.parametrize("img_size", [8, 32, 48])
def test_training_crops_equal_torchvisions(train: Beton, img_size: int) -> None:
    """Of whatever size, which need not be that of an evaluation."""
    images = stream(train)
    for epoch in range(3):
        got = cropped(images, torch.arange(len(train)), epoch, img_size)
        assert (got.dtype, got.shape) == (torch.uint8, (len(train), 3, img_size, img_size))
        for index in range(len(train)):
            photo = pil(train, index)
            left, top, w, h = slow_crop_box(CROPS, index, epoch, photo.height, photo.width)
            expected = tvf.resized_crop(photo, top, left, h, w, [img_size] * 2, InterpolationMode.BILINEAR, antialias=True)
            assert torch.equal(got[index], pixels(expected))


@pytest.mark.parametrize("img_size", [16, 31, 32, 47, 48])
@pytest.mark.parametrize("eval_crop_pct", [0.875, 0.9, 0.7, 1.0])
def test_evaluation_equals_torchvisions_resize_and_centre_crop(val: Beton, img_size: int, eval_crop_pct: float) -> None:
    images = stream(val, AugmentConfig(eval_crop_pct=eval_crop_pct), img_size=img_size)
    reference = transforms.Compose(
        [transforms.Resize(int(img_size / eval_crop_pct), antialias=True), transforms.CenterCrop(img_size)]
    )
    got, *more = images.eval_batches([torch.arange(len(val))])
    assert not more
    assert got.labels.tolist() == val.labels.tolist()
    assert got.samples.tolist() == list(range(len(val)))
    expected = torch.stack([pixels(reference(pil(val, index))) for index in range(len(val))])
    assert torch.equal(got.images, expected)


@pytest.mark.parametrize(
    ("width", "height"), [(48, 48), (49, 48), (48, 101), (101, 48), (333, 37), (37, 333), (5, 4), (31, 33)]
)
def test_centre_crops_of_all_shapes_equal_torchvisions(width: int, height: int) -> None:
    rng = np.random.default_rng(width)
    photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    for img_size, eval_crop_pct in ((32, 0.875), (33, 0.875), (31, 0.95), (7, 0.3)):
        crop = crop_boxes.central(np.array([height]), np.array([width]), AugmentConfig(eval_crop_pct=eval_crop_pct), img_size)
        reference = transforms.Resize(int(img_size / eval_crop_pct), antialias=True)
        expected = transforms.CenterCrop(img_size)(reference(photo))
        assert torch.equal(pixels(seen(photo, crop, 0, img_size)), pixels(expected))


def test_without_random_crops_training_sees_the_centre(train: Beton) -> None:
    samples = torch.arange(len(train))
    centre = cropped(stream(train, AugmentConfig(crop="none")), samples, 0)
    assert torch.equal(centre, torch.cat([batch.images for batch in stream(train).eval_batches([samples])]))


def test_crop_boxes_are_spread_as_torchvisions() -> None:
    height, width, n = 300, 400, 2000
    left, top, w, h = boxes(CROPS, np.full(n, height), np.full(n, width)).double().unbind(1)
    assert left.min() >= 0 and top.min() >= 0 and (left + w).max() <= width and (top + h).max() <= height
    area, ratio = w * h / (height * width), w / h
    assert 0.079 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35  # to within the rounding to pixels
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], [0.75, 4 / 3]) for _ in range(n)])
    t_top, t_left, t_h, t_w = theirs.double().unbind(1)
    t_area = t_w * t_h / (height * width)
    assert ks(area, t_area) < 1.95 / math.sqrt(n / 2)  # Kolmogorov and Smirnov's bound at 0.1 %
    assert ks(ratio.log(), (t_w / t_h).log()) < 1.95 / math.sqrt(n / 2)
    assert ks(left / (width - w + 1), t_left / (width - t_w + 1)) < 1.95 / math.sqrt(n / 2)
    assert ks(top / (height - h + 1), t_top / (height - t_h + 1)) < 1.95 / math.sqrt(n / 2)


def ks(a: Tensor, b: Tensor) -> float:
    """The largest distance between the two empirical distribution functions."""
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())


def test_scale_and_ratio_are_those_asked_for() -> None:
    quarter = AugmentConfig(crop="random_resized", crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    assert (boxes(quarter, np.full(50, 100), np.full(50, 100))[:, 2:] == 50).all()
    whole = AugmentConfig(crop="random_resized", crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert boxes(whole, np.array([64]), np.array([64])).tolist() == [[0, 0, 64, 64]]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (10, 1000, (0.9, 1.0), (0.75, 4 / 3)),
        (1000, 10, (0.9, 1.0), (0.75, 4 / 3)),
        (11, 997, (0.9, 1.0), (0.75, 4 / 3)),
        (997, 11, (0.9, 1.0), (0.75, 4 / 3)),
        (1, 500, (0.9, 1.0), (0.75, 4 / 3)),
        (500, 1, (0.9, 1.0), (0.75, 4 / 3)),
        (100, 110, (1.0, 1.0), (1.2, 1.3)),
        (100, 110, (1.0, 1.0), (0.5, 0.6)),
    ],
)
def test_where_no_box_fits_it_is_torchvisions_central_one(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    options = AugmentConfig(crop="random_resized", crop_scale=scale, crop_ratio=ratio)
    top, left, h, w = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    assert boxes(options, np.full(5, height), np.full(5, width)).tolist() == [[left, top, w, h]] * 5


def test_an_extreme_image_within_extreme_ratios_has_a_crop() -> None:
    options = AugmentConfig(crop="random_resized", crop_scale=(1.0, 1.0), crop_ratio=(0.05, 0.1))
    found = boxes(options, np.array([3, 1]), np.array([1000, 1])).tolist()
    for (left, top, w, h), (height, width) in zip(found, ((3, 1000), (1, 1)), strict=True):
        assert 0 <= left < left + w <= width and 0 <= top < top + h <= height


@pytest.mark.parametrize("options", [CROPS, CROPS.model_copy(update={"crop_scale": (0.6, 1.0), "crop_ratio": (0.2, 3.0)})])
def test_boxes_of_a_batch_are_those_of_its_images_one_by_one(train: Beton, options: AugmentConfig) -> None:
    rng = np.random.default_rng()
    heights, widths = rng.integers(1, 700, (2, 3000))
    found = boxes(options, heights, widths, epoch=7).tolist()
    sides = zip(heights.tolist(), widths.tolist(), strict=True)
    assert found == [slow_crop_box(options, index, 7, *size) for index, size in enumerate(sides)]
    crop = stream(train, options).train_crops(torch.arange(len(train)).flip(0), 7, IMG_SIZE)
    sizes = zip(train.heights.tolist(), train.widths.tolist(), strict=True)
    slow = [slow_crop_box(options, index, 7, *size) for index, size in enumerate(sizes)]
    assert np.stack(crop[:4], axis=1).tolist() == slow[::-1]


def test_the_batches_are_the_same_for_one_thread_and_four(train: Beton, val: Beton) -> None:
    options = AugmentConfig(crop="random_resized")
    batches = list(torch.arange(len(train)).flip(0).split(5))
    one, four = (list(stream(train, options, workers=workers).train_batches(batches, 2)) for workers in (1, 4))
    for batch, other in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    padded = list(eval_batches(num_samples=len(val), batch_size=3, rank=0, world_size=1))
    one, four = (list(stream(val, options, workers=workers).eval_batches(padded)) for workers in (1, 4))
    for batch, other in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def indices(*, start_step: int = 0, rank: int = 0, world_size: int = 1, accum_steps: int = 1) -> list[Tensor]:
    steps = train_batches(
        seed=0,
        epoch=4,
        num_samples=12,
        global_batch_size=4,
        accum_steps=accum_steps,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
    )
    return [micro for step in steps for micro in step]


def test_a_sample_looks_the_same_whatever_the_split_and_after_a_resume(train: Beton) -> None:
    images = stream(train, AugmentConfig(crop="random_resized"))
    whole = by_sample(images, indices(), 4)
    assert sorted(whole) == list(range(12))
    accumulated = by_sample(images, indices(accum_steps=2), 4)
    assert_equal(accumulated, whole)
    ranks = [by_sample(images, indices(rank=rank, world_size=2), 4) for rank in range(2)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert_equal(ranks[0] | ranks[1], whole)
    resumed = by_sample(images, indices(start_step=2), 4)
    last_step = indices()[2].tolist()
    assert_equal(resumed, {sample: whole[sample] for sample in last_step})


def test_epochs_and_seeds_differ(train: Beton) -> None:
    options = AugmentConfig(crop="random_resized")
    samples = torch.arange(len(train))
    views = [cropped(stream(train, options, seed=seed), samples, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    again = cropped(stream(train, options, seed=1), samples, 0)
    assert torch.equal(again, views[2])
    for index in range(len(train)):
        assert len({view[index].numpy().tobytes() for view in views}) == 4


def test_results_come_in_order_though_the_first_image_is_slow(train: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Beton.read_image
    order: list[int] = []
    overtaken = threading.Event()

    def slow_at_first(self: Beton, index: int, out: np.ndarray | None = None) -> np.ndarray:
        if index == 11:
            assert overtaken.wait(IDLE_S)
        order.append(index)
        overtaken.set()
        return read(self, index, out)

    monkeypatch.setattr(Beton, "read_image", slow_at_first)
    samples = [torch.tensor([index]) for index in (11, *range(8))]
    got = [batch.labels.tolist() for batch in stream(train, workers=3).train_batches(samples, 0)]
    assert got == [[int(train.labels[index])] for index in (11, *range(8))]
    assert order[0] != 11
    assert Counter(order) == Counter((11, *range(8)))


def test_batches_are_decoded_ahead_but_not_all_at_once(train: Beton) -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index in range(12):
            asked.append(index)
            yield torch.tensor([index])

    iterator = stream(train).train_batches(batches(), 0)
    next(iterator)
    assert 2 <= len(asked) <= 5
    close(iterator)
    assert not decoders()


def test_no_image_is_black_with_the_label_minus_one(val: Beton) -> None:
    (batch,) = stream(val).eval_batches([torch.tensor([6, -1, 0, -1])])
    assert batch.labels.tolist() == [val.labels[6], -1, val.labels[0], -1]
    assert batch.samples.tolist() == [6, -1, 0, -1]
    assert not batch.images[1].any() and not batch.images[3].any()
    assert batch.images[0].any() and batch.images[2].any()
    (batch,) = stream(val).eval_batches([torch.tensor([-1, -1])])  # a process may have nothing to do
    assert batch.labels.tolist() == [-1, -1] and not batch.images.any()


def test_no_batches_and_an_empty_one(val: Beton) -> None:
    assert list(stream(val).eval_batches([])) == []
    (batch,) = stream(val).eval_batches([torch.empty(0, dtype=torch.int64)])
    assert (batch.images.shape, batch.samples.shape, batch.labels.shape) == ((0, 3, IMG_SIZE, IMG_SIZE), (0,), (0,))


@pytest.mark.parametrize("workers", [1, 4])
def test_an_undecodable_image_ends_the_loop_promptly(damaged: Beton, workers: int) -> None:
    batches = [torch.arange(12).roll(-5 * turn) for turn in range(4000)]
    started_s = time.process_time()
    with pytest.raises(BetonError, match=r"train\.beton: the JPEG of sample 5 cannot be decoded; .*vitpa prep photos"):
        for _ in stream(damaged, workers=workers).train_batches(batches, 0):
            pass
    assert time.process_time() - started_s < 2  # all of them take 9 s of a CPU and more
    assert not decoders()


def test_whole_batches_before_an_undecodable_image_are_used(damaged: Beton) -> None:
    found = []
    with pytest.raises(BetonError, match="sample 5"):
        for batch in stream(damaged).train_batches(torch.arange(12).split(2), 0):
            found.append(batch.labels.tolist())
    assert found == [damaged.labels[:2].tolist(), damaged.labels[2:4].tolist()]
    assert not decoders()


def test_an_error_of_the_index_iterator_ends_the_loop(train: Beton) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.arange(4)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(stream(train).train_batches(broken(), 0))
    assert not decoders()


def test_leaving_the_loop_early_leaves_no_thread(train: Beton, val: Beton) -> None:
    batches = [torch.arange(12)] * 2000
    for iterator in (
        stream(train, workers=4).train_batches(batches, 0),
        stream(val, workers=4).eval_batches([torch.arange(7)] * 2000),
    ):
        next(iterator)
        assert decoders()
        started_s = time.process_time()
        close(iterator)
        assert time.process_time() - started_s < 2  # all of them take 10 s of a CPU and more
        assert not decoders()
    for _ in stream(train).train_batches(batches, 0):
        break
    assert not decoders()


def test_leaving_the_loop_early_decodes_nothing_more(train: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Beton.read_image
    asked: list[int] = []
    begun, left = threading.Event(), threading.Event()

    def blocked_at_second(self: Beton, index: int, out: np.ndarray | None = None) -> np.ndarray:
        asked.append(index)
        if index == 1:
            begun.set()
            assert left.wait(IDLE_S)
        return read(self, index, out)

    monkeypatch.setattr(Beton, "read_image", blocked_at_second)
    iterator = stream(train, workers=1).train_batches(torch.arange(12).split(1), 0)
    next(iterator)
    assert begun.wait(IDLE_S)
    timer = threading.Timer(0.2, left.set)
    timer.start()
    close(iterator)
    timer.join()
    assert asked == [0, 1]
