"""The arithmetic of trainings with several image sizes, against sums written out here."""

from __future__ import annotations

import pytest

from vitpa.config import RunConfig
from vitpa.config_file import load_config, shipped_configs
from vitpa.flops import full_size_epochs, gflop_per_image, size_share


def imagenet(*overrides: str) -> RunConfig:
    return load_config(shipped_configs()["imagenet"], overrides)


def test_a_smaller_image_has_the_arithmetic_of_its_patches() -> None:
    linear, pairs = (4 + 2 * 4) * 192**2, 2 * 192  # multiply-adds of a block per token, and per pair of tokens
    for side in (6, 10, 14):
        tokens = side**2 + 1
        expected = 6 * (12 * (tokens * linear + tokens**2 * pairs) + side**2 * 768 * 192) / 1e9
        assert gflop_per_image(imagenet(), 16 * side) == pytest.approx(expected)
    assert gflop_per_image(imagenet(), 224) == gflop_per_image(imagenet())


def test_epochs_count_by_their_arithmetic() -> None:
    config = imagenet("train.image_sizes=[[0,96],[100,160],[200,224]]")
    small, medium = (gflop_per_image(config, px) / gflop_per_image(config) for px in (96, 160))
    assert 0.1 < small < medium < 1
    for epochs, expected in (
        (0, 0),
        (50.5, 50.5 * small),
        (150, 100 * small + 50 * medium),
        (300, 100 * (small + medium + 1)),
    ):
        assert full_size_epochs(config, epochs) == pytest.approx(expected)
    assert [size_share(config, epoch) for epoch in (0, 99, 100, 299)] == pytest.approx([small, small, medium, 1])
    assert (full_size_epochs(imagenet(), 50.5), size_share(imagenet(), 3)) == (50.5, 1)
