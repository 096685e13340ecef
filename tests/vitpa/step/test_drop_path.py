"""Stochastic depth: the shares that are left out, and a network that leaves them out as timm's does."""

from __future__ import annotations

import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from tests.support.networks import SMALL, B, R, gradients_of, key_bias, networks, random_images, stacked
from vitpa.data.rng import Purpose, key
from vitpa.models import build_model
from vitpa.step.drop_path import BRANCHES, branch_scales, keep_probabilities

STREAM = key(1, Purpose.DROP_PATH, 4)


def test_the_probabilities_are_timms() -> None:
    model = build_model(attention="content", seed=0, **{**SMALL, "depth": 5, "drop_path_rate": 0.4})
    for block, keep in zip(model.blocks, keep_probabilities(0.4, 5).tolist(), strict=True):
        for branch in (block.drop_path1, block.drop_path2):
            assert (1 - branch.drop_prob if isinstance(branch, DropPath) else 1.0) == pytest.approx(keep)
            assert isinstance(branch, DropPath | nn.Identity)


def test_shares_and_scales() -> None:
    samples, keep = torch.arange(20_000), keep_probabilities(0.3, 4)
    scales = branch_scales(samples, STREAM, keep)
    assert scales.shape == (4, BRANCHES, 20_000)
    for block in range(4):
        for branch in range(BRANCHES):
            values = scales[block, branch]
            assert set(values.unique().tolist()) <= {0.0, float(1 / keep[block])}
            assert (values > 0).float().mean() == pytest.approx(float(keep[block]), abs=0.015)
            assert values.mean() == pytest.approx(1, abs=0.025)
    kept = (scales[1:] > 0).float().flatten(0, 1)  # branches decide independently
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.04


def test_it_depends_on_the_sample_and_its_stream_alone() -> None:
    keep, samples = keep_probabilities(0.5, 3), torch.tensor([5, 900, 3, 5])
    scales = branch_scales(samples, STREAM, keep)
    assert torch.equal(scales[:, :, 0], scales[:, :, 3])
    assert torch.equal(scales[:, :, [1]], branch_scales(samples[1:2], STREAM, keep))
    other = key(2, Purpose.DROP_PATH, 4)
    many = torch.arange(500)
    streams = torch.tensor([STREAM, other]).repeat_interleave(250)
    mixed = branch_scales(many, streams, keep)
    assert torch.equal(mixed[:, :, :250], branch_scales(many[:250], STREAM, keep))
    assert torch.equal(mixed[:, :, 250:], branch_scales(many[250:], other, keep))
    assert not torch.equal(mixed[:, :, 250:], branch_scales(many[250:], STREAM, keep))


class Scaled(nn.Module):
    """In the place of timm's DropPath: images multiplied by given factors (B,)."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[:, None, None]


@pytest.mark.parametrize("attention", ["content", "positional"])
def test_the_stacked_network_scales_branches_as_timms_blocks_do(attention: str) -> None:
    models, network = networks(attention)
    weights, images = stacked(models), random_images()
    samples = torch.arange(R * B)
    scales = branch_scales(samples, STREAM, keep_probabilities(0.6, SMALL["depth"])).double().view(-1, BRANCHES, R, B)
    assert 0 < torch.count_nonzero(scales == 0) < scales.numel() / 2
    logits = network(weights, {}, images, scales)
    for replica, model in enumerate(models):
        for index, block in enumerate(model.blocks):
            block.drop_path1, block.drop_path2 = (Scaled(scales[index, branch, replica]) for branch in range(BRANCHES))
    expected = torch.stack([model(batch) for model, batch in zip(models, images, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    gradients = gradients_of(logits, weights)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected * factors).sum().backward()
    for name, gradient in gradients.items():
        for replica, model in enumerate(models):
            reference = model.get_parameter(name).grad.clone()
            reference[key_bias(name)] = 0
            torch.testing.assert_close(gradient[replica], reference, rtol=1e-9, atol=1e-10, msg=name)
