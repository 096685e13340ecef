"""Colour jitter of whole batches against torchvision's functions, image by image, and the spread of what is drawn."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import factorial

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter as TorchvisionJitter
from torchvision.transforms import functional as tvf

from tests.support.augmentation import CPU, pictures, random_images
from vitpa.data.augment.color_jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColorJitter, turned
from vitpa.data.rng import Purpose, key

STREAM = torch.tensor([key(3, Purpose.COLOR_JITTER, 1)])
SLOW = {
    BRIGHTNESS: tvf.adjust_brightness,
    CONTRAST: tvf.adjust_contrast,
    SATURATION: tvf.adjust_saturation,
    HUE: tvf.adjust_hue,
}
STRENGTHS = [(0.3, 0.3, 0.3), (0.4, 0.0, 0.8, 0.0), (0.0, 2.0, 0.0, 0.5), (0.3, 0.3, 0.3, 0.1), (0.0, 0.0, 0.0, 0.2)]


def slow(jitter: ColorJitter, images: Tensor, samples: Tensor, stream: Tensor = STREAM) -> Tensor:
    """torchvision's functions with the same factors, in the same order."""
    out = []
    for before, kinds, factors in zip(images, *jitter.draws(samples, stream), strict=True):
        image = before
        for kind, factor in zip(kinds.tolist(), factors.tolist(), strict=True):
            image = SLOW[kind](image, factor)
        out.append(image)
    return torch.stack(out)


@pytest.mark.parametrize("size", [16, 31, 32])
@pytest.mark.parametrize("strengths", STRENGTHS)
def test_it_equals_torchvision_image_by_image(strengths: tuple[float, ...], size: int) -> None:
    images, jitter = pictures(size).repeat(6, 1, 1, 1), ColorJitter(strengths, device=CPU)
    samples = torch.arange(1000, 1000 + len(images))
    got = jitter(images, samples, STREAM)
    assert got.dtype == torch.uint8
    assert torch.equal(got, slow(jitter, images, samples))
    assert not torch.equal(got, images)


def test_every_colour_is_turned_as_torchvision_does() -> None:
    values = torch.tensor([*range(0, 256, 12), 254, 255])
    colours = torch.cartesian_prod(values, values, values).T.to(torch.uint8)[None]  # 1, 3, P
    for share in (-0.5, -0.31, 0.0, 0.07, 0.5):
        expected = tvf.adjust_hue(colours[:, :, None], share)[:, :, 0]
        assert torch.equal(turned(colours, torch.tensor([share])), expected)


@pytest.mark.parametrize("strengths", [(0.3, 1.5, 0.0), (0.3, 0.4, 0.5, 0.1)])
def test_factors_are_uniform_in_torchvisions_ranges_and_orders_equally_likely(strengths: tuple[float, ...]) -> None:
    theirs = TorchvisionJitter(*strengths)
    ranges = dict(enumerate([theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]))
    n = 40_000
    orders, factors = ColorJitter(strengths, device=CPU).draws(torch.arange(n), STREAM)
    kinds = sorted(kind for kind, range_ in ranges.items() if range_ is not None)
    counts = Counter(map(tuple, orders.tolist()))
    assert set(counts) == set(permutations(kinds))
    assert all(abs(count / n - 1 / factorial(len(kinds))) < 0.01 for count in counts.values())
    for kind in kinds:
        low, high = ranges[kind]
        its = factors[orders == kind]
        assert len(its) == n
        assert stats.kstest((its.numpy() - low) / (high - low), "uniform").statistic < 2 / n**0.5


def test_a_sample_is_changed_alike_in_any_batch_beside_other_seeds_and_epochs() -> None:
    images, samples, jitter = random_images(30), torch.arange(30) % 10, ColorJitter((0.4, 0.4, 0.4, 0.1), device=CPU)
    images[10:20] = images[20:] = images[:10]
    streams = torch.tensor([key(seed, Purpose.COLOR_JITTER, epoch) for seed, epoch in ((1, 5), (2, 5), (1, 6))])
    together = jitter(images, samples, streams.repeat_interleave(10))
    for part in range(3):
        rows = slice(10 * part, 10 * part + 10)
        assert torch.equal(jitter(images[rows], samples[rows], streams[part : part + 1]), together[rows])
    for part in (1, 2):
        assert not (together[:10] == together[10 * part : 10 * part + 10]).flatten(1).all(1).any()


@pytest.mark.slow
@pytest.mark.parametrize("strengths", [STRENGTHS[0], STRENGTHS[3]])
def test_compiled_equals_eager_but_for_a_level_of_hue(strengths: tuple[float, ...]) -> None:
    images, jitter = pictures(31).repeat(4, 1, 1, 1), ColorJitter(strengths, device=CPU)
    samples = torch.arange(len(images))
    compiled = torch.compile(jitter.__call__, fullgraph=True, dynamic=False)
    assert_alike(compiled(images, samples, STREAM), jitter(images, samples, STREAM), jitter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("strengths", STRENGTHS)
def test_a_gpu_changes_colours_as_the_cpu_does_in_a_cuda_graph_too(strengths: tuple[float, ...]) -> None:
    images, samples = random_images(640), torch.arange(640)
    on_cpu, on_gpu = (ColorJitter(strengths, device=torch.device(name)) for name in ("cpu", "cuda"))
    inputs = [tensor.cuda() for tensor in (images, samples, STREAM)]
    compiled = torch.compile(on_gpu.__call__, fullgraph=True, dynamic=False)
    for function in (on_gpu, compiled):
        assert_alike(function(*inputs).cpu(), on_cpu(images, samples, STREAM), on_cpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(*inputs)
    inputs[1].add_(1000)  # the same graph, other samples
    graph.replay()
    assert_alike(out.cpu(), on_cpu(images, samples + 1000, STREAM), on_cpu)


def assert_alike(got: Tensor, expected: Tensor, jitter: ColorJitter) -> None:
    """Equal, but for a level in a few places where hue is turned: what follows may double it."""
    if not jitter.hue:
        assert torch.equal(got, expected)
        return
    apart = (got.int() - expected.int()).abs()
    assert (apart > 0).float().mean() < 0.01
    assert apart.max() <= (1 if jitter.num_kinds == 1 else 4)
