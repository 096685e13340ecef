"""Augmentation of whole batches: crop, flip, policy, erasing and cutout against slow references, and who decides the draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import functional as tvf

from tests.support.augmentation import CIFAR10, pictures, random_images
from vitpa.config import AugmentConfig
from vitpa.data.augment import pipeline
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.rng import Purpose, key, randint, random_bits, uniform

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "policy": "autoaugment_cifar10",
    "color_jitter": (0.3, 0.3, 0.3),
    "erase_prob": 0.5,
    "cutout_px": 6,
}
BARE: dict[str, Any] = {"crop": "none", "hflip": False}


def augmentation(*, img_size: int = 32, **options: Any) -> Augmentation:
    return Augmentation([AugmentConfig.model_validate(options)], CIFAR10, img_size=img_size, device=CPU)


def test_the_keys_of_an_epoch_are_those_of_each_seed_and_purpose() -> None:
    keys = epoch_keys([3, 0, 2**31 - 1], 7)
    assert (keys.dtype, keys.shape, keys.device) == (torch.int64, (3, max(Purpose) + 1), CPU)
    assert keys[:, 0].tolist() == [0, 0, 0]
    for row, seed in zip(keys.tolist(), (3, 0, 2**31 - 1), strict=True):
        assert row[1:] == [key(seed, purpose, 7) for purpose in Purpose]


def test_no_purpose_takes_the_number_of_another() -> None:
    # the streams of runs that are done already depend on these
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "INIT": 1, "ORDER": 2, "CROP": 3, "FLIP": 4, "DROP_PATH": 5, "POLICY": 6, "ERASE": 7, "CUTOUT": 8, "MIX": 9,
        "ERASE_NOISE": 10, "SHUFFLE_BUFFER": 11, "BLOCKS": 12, "HOLDOUT": 13, "COLOR_JITTER": 14,
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "autoaugment_svhn", "randaugment", "randaugment_timm"])
def test_crop_then_flip_then_policy_then_jitter(policy: str) -> None:
    images, samples, keys = random_images(50), torch.arange(900, 950), epoch_keys([4], 2)
    whole = augmentation(policy=policy, crop_padding_px=3, color_jitter=(0.4, 0.4, 0.4))
    expected = pipeline.padded_crop(images, samples, padding=3, stream=key(4, Purpose.CROP, 2))
    expected = pipeline.horizontal_flip(expected, samples, stream=key(4, Purpose.FLIP, 2))
    if whole.policy is not None:
        expected = whole.policy(expected, samples, torch.tensor([key(4, Purpose.POLICY, 2)]))
    assert whole.jitter is not None
    expected = whole.jitter(expected, samples, torch.tensor([key(4, Purpose.COLOR_JITTER, 2)]))
    got = whole.uint8(images, samples, keys)
    assert got.dtype == torch.uint8
    assert torch.equal(got, expected)
    assert torch.equal(whole(images, samples, keys), whole.normalize(expected))


def test_nothing_asked_for_is_normalisation_alone() -> None:
    images, bare = random_images(8), augmentation(**BARE)
    samples, keys = torch.arange(8), epoch_keys([0], 0)
    assert torch.equal(bare.uint8(images, samples, keys), images)
    assert torch.equal(bare(images, samples, keys), bare.normalize(images))


def test_a_sample_is_augmented_alike_in_any_batch_beside_other_seeds_and_epochs() -> None:
    images, samples, whole = random_images(60), torch.arange(60) % 20, augmentation(**EVERYTHING)
    images[20:40] = images[40:] = images[:20]
    keys = torch.cat([epoch_keys([1, 2], 5), epoch_keys([1], 6)]).repeat_interleave(20, 0)
    together = whole(images, samples, keys)
    for part in range(3):
        rows = slice(20 * part, 20 * part + 20)
        assert torch.equal(whole(images[rows], samples[rows], keys[20 * part][None]), together[rows])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(images[order], samples[order], keys[order]), together[order])
    one_by_one = [whole(images[i : i + 1], samples[i : i + 1], keys[i : i + 1]) for i in range(60)]
    assert torch.equal(torch.cat(one_by_one), together)
    for part in (1, 2):  # another seed, another epoch
        alike = (together[:20] == together[20 * part : 20 * part + 20]).flatten(1).all(1)
        assert not alike.any()


def test_padded_crop_equals_torchvision_image_by_image() -> None:
    images = torch.randint(0, 256, (20, 3, 10, 12), dtype=torch.uint8)
    samples, stream = torch.arange(100, 120), key(5, Purpose.CROP, 4)
    got = pipeline.padded_crop(images, samples, padding=3, stream=stream)
    for image, sample, cropped in zip(images, samples, got, strict=True):
        top, left = (int(randint(stream, sample[None], 7, draw=draw)) for draw in (0, 1))
        assert torch.equal(cropped, tvf.crop(tvf.pad(image, [3]), top, left, 10, 12))


def test_crops_reach_every_place_equally() -> None:
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).expand(90_000, 1, 4, 4)
    cropped = pipeline.padded_crop(images, torch.arange(90_000), padding=1, stream=key(0, Purpose.CROP, 0))
    counts = torch.unique(cropped.flatten(1), dim=0, return_counts=True)[1]
    assert len(counts) == 9
    assert (counts - 10_000).abs().max() < 500


def test_flip_mirrors_half_of_the_images_chosen_per_sample_and_epoch() -> None:
    images = torch.randint(0, 256, (4000, 3, 4, 4), dtype=torch.uint8)
    samples = torch.arange(4000)
    stream, other = key(0, Purpose.FLIP, 0), key(0, Purpose.FLIP, 1)
    flipped = pipeline.horizontal_flip(images, samples, stream=stream)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert abs(mirrored.float().mean().item() - 0.5) < 0.04
    assert torch.equal(pipeline.horizontal_flip(images[100:], samples[100:], stream=stream), flipped[100:])
    assert not torch.equal(pipeline.horizontal_flip(images, samples, stream=other), flipped)


def test_normalize_equals_torchvision() -> None:
    images = random_images(5)
    expected = tvf.normalize(images.float() / 255, list(CIFAR10.mean), list(CIFAR10.std))
    torch.testing.assert_close(augmentation().normalize(images), expected)


def rectangle(zeros: Tensor) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of the zero pixels of an image of ones (3, H, W), which must be a rectangle."""
    rows, columns = ((zeros[0] == 0).any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    top, left, height, width = rows[0], columns[0], len(rows), len(columns)
    assert torch.equal(tvf.erase(torch.ones_like(zeros), top, left, height, width, torch.zeros(())), zeros)
    return top, left, height, width


def slow_box(stream: int, sample: int, options: AugmentConfig, H: int, W: int) -> tuple[int, int, int, int] | None:  # noqa: N803
    """torchvision's RandomErasing.get_params in Python's numbers, with our draws."""
    draws = [float(uniform(stream, torch.tensor(sample), draw=draw)) for draw in range(41)]
    if draws[0] >= options.erase_prob:
        return None
    for area_draw, ratio_draw, top_draw, left_draw in (draws[i : i + 4] for i in range(1, 41, 4)):
        low, high = options.erase_scale
        area = H * W * (low + area_draw * (high - low))
        low, high = (math.log(bound) for bound in options.erase_ratio)
        ratio = math.exp(low + ratio_draw * (high - low))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < H and width < W:
            top, left = int(top_draw * (H - height + 1)), int(left_draw * (W - width + 1))
            return (top, left, height, width) if height and width else None
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"erase_prob": 0.5},
        {"erase_prob": 1.0, "erase_scale": (0.5, 1.0), "erase_ratio": (0.1, 8.0)},  # many tries, and none that fits
        {"erase_prob": 1.0, "erase_scale": (0.001, 0.01)},  # nothing left after rounding
    ],
)
def test_erasing_equals_the_slow_rule(options: dict[str, Any]) -> None:
    config, stream = AugmentConfig.model_validate(options), key(3, Purpose.ERASE, 4)
    samples, ones = torch.arange(70, 270), torch.ones(200, 3, 20, 14)
    erased = pipeline.random_erase(ones, samples, pipeline.Erasing.of([config], CPU), stream=stream)
    found = [rectangle(image) for image in erased]
    assert found == [slow_box(stream, sample, config, 20, 14) for sample in samples.tolist()]
    assert 0 < found.count(None) < 200
    assert torch.equal(ones, torch.ones(200, 3, 20, 14))


def test_erased_areas_ratios_and_places_are_spread_as_asked() -> None:
    n, size = 40_000, 1000
    erasing = pipeline.Erasing.of(
        [AugmentConfig(erase_prob=0.25, erase_scale=(0.02, 0.3))], CPU
    )  # of these all fit: sqrt(0.3 * 3.3) < 1
    boxes = pipeline.erased_boxes(torch.arange(n), erasing, size=(size, size), stream=key(0, Purpose.ERASE, 0))
    top, left, height, width = (values.double() for values in boxes)
    erased = height > 0
    assert abs(erased.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    top, left, height, width = (values[erased] for values in (top, left, height, width))
    area = (height * width / size**2 - 0.02) / (0.3 - 0.02)
    ratio = ((height / width).log() - math.log(0.3)) / (math.log(3.3) - math.log(0.3))
    spread = {"area": area, "ratio": ratio, "top": top / (size - height + 1), "left": left / (size - width + 1)}
    for name, values in spread.items():
        counts = torch.histc(values.clamp(0, 1 - 1e-9), 20, 0, 1)
        expected = len(values) / 20
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert chi2 < 19 + 5 * math.sqrt(2 * 19), name
    correlation = torch.corrcoef(torch.stack(list(spread.values()))) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(len(area))


@pytest.mark.parametrize("side", [1, 5, 8, 20])
def test_cutout_equals_a_slow_loop(side: int) -> None:
    stream, samples = key(1, Purpose.CUTOUT, 0), torch.arange(100)
    got = pipeline.cutout(torch.ones(100, 3, 12, 20), samples, side=side, stream=stream)
    for sample, image in zip(samples, got, strict=True):
        y, x = (int(randint(stream, sample[None], bound, draw=draw)) for draw, bound in enumerate((12, 20)))
        expected = torch.ones(3, 12, 20)
        for row in range(y - side // 2, y - side // 2 + side):
            for column in range(x - side // 2, x - side // 2 + side):
                if 0 <= row < 12 and 0 <= column < 20:
                    expected[:, row, column] = 0
        assert torch.equal(image, expected)


def test_centres_of_cutouts_reach_every_pixel_equally() -> None:
    n = 48_000
    got = pipeline.cutout(torch.ones(n, 1, 4, 6), torch.arange(n), side=1, stream=key(0, Purpose.CUTOUT, 0))
    expected = n / 24
    chi2 = (((got == 0).sum(0) - expected) ** 2 / expected).sum().item()
    assert chi2 < 23 + 5 * math.sqrt(2 * 23)


def test_erasing_and_cutout_leave_the_mean_colour_in_the_normalised_image() -> None:
    images, samples, keys = random_images(40), torch.arange(40), epoch_keys([2], 3)
    whole = augmentation(**BARE, erase_prob=0.5, cutout_px=8)
    ones = pipeline.random_erase(torch.ones(40, 3, 32, 32), samples, whole.erasing, stream=key(2, Purpose.ERASE, 3))
    mask = pipeline.cutout(ones, samples, side=8, stream=key(2, Purpose.CUTOUT, 3))
    assert torch.equal(whole(images, samples, keys), torch.where(mask == 1, whole.normalize(images), 0.0))
    assert torch.equal(whole.uint8(images, samples, keys), images)


def test_noise_is_in_the_erased_rectangles_alone_and_the_same_in_any_batch() -> None:
    images, samples, keys = random_images(200), torch.arange(200), epoch_keys([2], 3)
    const, pixel = (augmentation(**BARE, erase_prob=0.5, erase_mode=mode) for mode in ("const", "pixel"))
    got, normalised = pixel(images, samples, keys), pixel.normalize(images)
    top, left, height, width = pipeline.erased_boxes(samples, const.erasing, size=(32, 32), stream=key(2, Purpose.ERASE, 3))
    for i in range(200):
        box = torch.zeros(32, 32, dtype=torch.bool)
        box[top[i] : top[i] + height[i], left[i] : left[i] + width[i]] = True
        assert torch.equal(got[i, :, ~box], normalised[i, :, ~box])
        assert (got[i, :, box] != normalised[i, :, box]).all()
    assert torch.equal(pixel(images[50:], samples[50:], keys), got[50:])
    erased = height > 0
    assert not (pixel(images, samples, epoch_keys([2], 4)) == got)[erased].flatten(1).all(1).any()


@pytest.mark.parametrize("options", [{}, {"erase_prob": 0.5}, {"erase_prob": 0.5, "erase_mode": "pixel", "cutout_px": 5}])
def test_mixed_is_augmented_and_then_mixed(options: dict[str, Any]) -> None:
    images, samples, labels, keys = random_images(20), torch.arange(20), torch.arange(100, 120), epoch_keys([2], 3)
    whole = augmentation(mixup_alpha=0.8, cutmix_alpha=1.0, **options)
    assert augmentation(**options).mixup is None
    assert whole.mixup is not None
    expected = whole.mixup(whole(images, samples, keys), labels, samples, keys)
    for got, part in zip(whole.mixed(images, labels, samples, keys), expected, strict=True):
        assert torch.equal(got, part)


def test_noise_is_standard_normal_and_independent() -> None:
    normals = augmentation(erase_mode="pixel").normals
    words = random_bits(key(0, Purpose.ERASE_NOISE, 0), torch.arange(100))
    got = pipeline.noise(words, normals, (100, 3, 40, 50)).double()
    assert got.shape == (100, 3, 40, 50)
    assert stats.kstest(got.flatten().numpy(), "norm").statistic < 2 / math.sqrt(got.numel())
    shifted = [got.roll(1, dim) for dim in range(4)] + [got.roll(1, 0).roll(-1, 3)]
    assert all(abs((got * other).mean().item()) < 5 / math.sqrt(got.numel()) for other in shifted)
    slow = int(random_bits(int(words[7]), torch.tensor(3 * 50 + 11))) >> 32 & 0xFFFF
    assert got[7, 2, 3, 11] == stats.norm.ppf((slow + 0.5) / 2**16).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {**EVERYTHING, "policy": "none"},
        {**EVERYTHING, "policy": "none", "erase_mode": "pixel", "permute_block_px": 4},
        {"policy": "autoaugment_svhn"},
    ],
)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    images, samples = pictures(16).repeat(4, 1, 1, 1), torch.arange(44)
    keys, whole = epoch_keys([5, 6], 1).repeat_interleave(22, 0), augmentation(img_size=16, **options)
    if whole.policy is None:
        got = torch.compile(whole, fullgraph=True, dynamic=False)(images, samples, keys)
        torch.testing.assert_close(got, whole(images, samples, keys), rtol=0, atol=1e-6)
    else:
        got = torch.compile(whole.uint8, fullgraph=True, dynamic=False)(images, samples, keys)
        assert torch.equal(got, whole.uint8(images, samples, keys))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("policy", ["none", "autoaugment_cifar10", "randaugment", "randaugment_timm"])
def test_a_gpu_augments_as_the_cpu_does_in_a_cuda_graph_too(policy: str) -> None:
    images, samples = random_images(640), torch.arange(640)
    keys = epoch_keys([5, 6], 1).repeat_interleave(320, 0)
    config = AugmentConfig.model_validate({**EVERYTHING, "policy": policy, "permute_block_px": 4})
    on_cpu, on_gpu = (Augmentation([config], CIFAR10, img_size=32, device=torch.device(name)) for name in ("cpu", "cuda"))
    inputs = [tensor.cuda() for tensor in (images, samples, keys)]
    compiled = torch.compile(on_gpu, fullgraph=True, dynamic=False)
    without = Augmentation([config], CIFAR10, img_size=32, device=torch.device("cuda"), torch_operations=["policy", "erase"])
    assert not without.erases_by_kernel and on_gpu.erases_by_kernel
    torch.testing.assert_close(without(*inputs).cpu(), on_cpu(images, samples, keys), rtol=0, atol=1e-6)
    for function in (on_gpu.uint8, torch.compile(on_gpu.uint8, fullgraph=True, dynamic=False)):
        assert torch.equal(function(*inputs).cpu(), on_cpu.uint8(images, samples, keys))
    for function in (on_gpu, compiled):
        torch.testing.assert_close(function(*inputs).cpu(), on_cpu(images, samples, keys), rtol=0, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(*inputs)
    inputs[1].add_(1000)  # the same graph, other samples
    graph.replay()
    torch.testing.assert_close(out.cpu(), on_cpu(images, samples + 1000, keys), rtol=0, atol=1e-6)
