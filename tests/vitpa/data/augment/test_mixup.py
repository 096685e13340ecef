"""Mixup and cutmix of neighbours: against timm's own functions, and by the distributions they should have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timms
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.augment.mixup import LEVELS, Mixup
from vitpa.data.augment.pipeline import epoch_keys
from vitpa.data.rng import Purpose, key, randint, uniform

CPU = torch.device("cpu")
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def make(**options: Any) -> Mixup:
    return Mixup([AugmentConfig.model_validate({**BOTH, **options})], device=CPU)


def batch(n: int, height: int = 12, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and indices of samples."""
    return torch.randn(n, 3, height, width), torch.randint(0, 1000, (n,)), torch.randint(0, 10**6, (n,))


@pytest.mark.parametrize("size", [(12, 12), (9, 16), (32, 32)])
def test_pairs_are_mixed_as_timm_does(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    mixup, (images, labels, samples), keys = make(), batch(200, *size), epoch_keys([3], 4)
    before = images.clone()
    mixed, partners, weights = mixup(images, labels, samples, keys)
    assert torch.equal(images, before)
    assert (mixed.dtype, weights.dtype, weights.shape) == (torch.float32, torch.float32, (200,))
    stream = key(3, Purpose.MIX, 4)
    boxes = mixup.draws(samples, keys, size=size)[2]
    cutmixes = uniform(stream, samples[::2]) < 0.5
    assert 20 < cutmixes.sum() < 80
    assert not boxes[~cutmixes].any()
    for pair, cutmix in enumerate(cutmixes.tolist()):
        i, j, first = 2 * pair, 2 * pair + 1, samples[2 * pair]
        share = mixup.quantiles[0, int(cutmix), randint(stream, first, LEVELS, draw=1)].item()
        centre = [int(randint(stream, first, length, draw=draw)) for draw, length in zip((2, 3), size, strict=True)]
        monkeypatch.setattr(np.random, "randint", lambda *_, size, places=centre: places.pop(0))
        theirs = timms.Mixup(**BOTH, mode="pair", num_classes=1000)
        monkeypatch.setattr(theirs, "_params_per_elem", lambda n, drawn=(share, cutmix): [np.array([x] * n) for x in drawn])
        expected = images[[i, j]].clone()
        lam = theirs._mix_pair(expected)
        if cutmix:
            assert torch.equal(mixed[[i, j]], expected)
        else:
            torch.testing.assert_close(mixed[[i, j]], expected)
        assert weights[i] == weights[j] == pytest.approx(lam[0].item(), abs=1e-6)
        assert (partners[i], partners[j]) == (labels[j], labels[i])


def test_a_pair_is_mixed_alike_in_any_batch_beside_other_seeds_and_epochs() -> None:
    mixup, (images, labels, samples) = make(), batch(40)
    images, labels, samples = images.repeat(3, 1, 1, 1), labels.repeat(3), samples.repeat(3)
    keys = torch.cat([epoch_keys([1, 2], 5), epoch_keys([1], 6)]).repeat_interleave(40, 0)
    together = mixup(images, labels, samples, keys)
    for first in range(0, 120, 2):
        rows = slice(first, first + 2)
        alone = mixup(images[rows], labels[rows], samples[rows], keys[rows][:1])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
    for part in (1, 2):
        same = together[2][:40] == together[2][40 * part : 40 * part + 40]  # two boxes may be of one size by chance
        assert same.float().mean() < 0.3


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 3.0])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_are_of_the_beta_distribution(name: str, alpha: float) -> None:
    other = {"mixup": "cutmix", "cutmix": "mixup"}[name]
    mixup, n = make(**{f"{name}_alpha": alpha, f"{other}_alpha": 0.0}), 100_000
    beta = stats.beta(alpha, alpha).cdf
    table = mixup.quantiles[0, int(name == "cutmix")]
    assert stats.kstest(table.numpy(), beta).statistic < 1 / LEVELS
    size = (10_000, 10_000)  # so large that a box's rounding does not show
    lam, weight, box = mixup.draws(torch.arange(2 * n), epoch_keys([1], 0), size=size)
    top, left, height, width = box.unbind(1)
    assert not box.any() if name == "mixup" else (weight == 1).all()
    if name == "mixup":
        assert torch.equal(lam, weight)
        assert stats.kstest(lam.numpy(), beta).statistic < 2 / math.sqrt(n)
    else:  # those that no border cuts off
        assert torch.allclose(lam.double(), 1 - (height * width).double() / 1e8, atol=1e-6)
        whole = (top > 0) & (left > 0) & (top + height < 10_000) & (left + width < 10_000)
        assert ((height - width).abs()[whole] <= 1).all()
        places = (top / (10_000 - height))[whole].numpy()
        assert stats.kstest(places, "uniform").statistic < 2 / math.sqrt(len(places))


def test_cutmix_and_mixup_are_chosen_as_often_as_asked() -> None:
    n = 40_000
    for prob in (0.0, 0.3, 0.5, 1.0):
        weight = make(mixup_switch_prob=prob).draws(torch.arange(2 * n), epoch_keys([0], 0), size=(8, 8))[1]
        chosen = weight == 1
        assert abs(chosen.double().mean() - prob) <= 5 * math.sqrt(prob * (1 - prob) / n)


def test_the_loss_of_both_labels_is_that_of_timms_soft_target() -> None:
    images, labels, samples = batch(16)
    _, partners, lam = make()(images, labels, samples, epoch_keys([0], 0))
    logits = torch.randn(16, 1000, dtype=torch.float64)
    losses = [torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1, reduction="none") for y in (labels, partners)]
    ours = lam * losses[0] + (1 - lam) * losses[1]
    soft = [timms.one_hot(y, 1000, on_value=0.9 + 0.1 / 1000, off_value=0.1 / 1000) for y in (labels, partners)]
    target = soft[0] * lam[:, None] + soft[1] * (1 - lam[:, None])
    torch.testing.assert_close(ours, -(target * logits.log_softmax(1)).sum(1), rtol=1e-6, atol=0)


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixup of 3 images: they are no pairs; change train\.global_batch_size"):
        make()(*batch(3), epoch_keys([0], 0))


def test_images_keep_their_type() -> None:
    images, labels, samples = batch(8)
    assert make()(images.bfloat16(), labels, samples, epoch_keys([0], 0))[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    mixup, inputs = make(), (*batch(64), epoch_keys([0], 0))
    compiled = torch.compile(mixup, fullgraph=True, dynamic=False)
    for got, expected in zip(compiled(*inputs), mixup(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_mixes_as_the_cpu_does_in_a_cuda_graph_too() -> None:
    mixup, (images, labels, samples), keys = make(), batch(256, 32, 32), epoch_keys([0], 0)
    there = Mixup([AugmentConfig.model_validate(BOTH)], device=torch.device("cuda"))
    inputs = [tensor.cuda() for tensor in (images, labels, samples, keys)]
    compiled = torch.compile(there, fullgraph=True, dynamic=False)
    for function in (there, compiled):
        for got, expected in zip(function(*inputs), mixup(images, labels, samples, keys), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(*inputs)
    inputs[2].add_(1000)
    graph.replay()
    for got, expected in zip(out, mixup(images, labels, samples + 1000, keys), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-6)
