"""What memory replicas take: against sums by hand."""

from __future__ import annotations

import pytest

from vitpa.config import RunConfig
from vitpa.config_file import load_config, parse_config, shipped_configs
from vitpa.models import build_model
from vitpa.step.fit import FIXED_GIB, GIB, MARGIN, memory_gib, num_parameters, state_bytes


def configured(*overrides: str) -> RunConfig:
    return parse_config({"dataset": "cifar10"}, "test", overrides)


def test_memory_by_hand() -> None:
    small = ["model.embed_dim=8", "model.num_heads=2", "model.depth=1", "model.mlp_ratio=2.0", "model.patch_size=16"]
    config = configured(*small)
    assert num_parameters(config) == 8 * 8 * 8 + 8 * (3 * 256 + 5 + 1000)
    activations = 1 * 5 * 8 * 13 * 2 * 128  # blocks x tokens x D x kept x bfloat16 x batch
    expected = 3 * (num_parameters(config) * 18 + activations) + 100 * 3 * 32 * 32
    assert memory_gib(config, 3, 100) == pytest.approx(MARGIN * (expected / GIB + FIXED_GIB))
    averaged = configured(*small, "train.ema_decay=0.999")
    more = memory_gib(averaged, 3, 100) - memory_gib(config, 3, 100)
    assert more == pytest.approx(MARGIN * 3 * num_parameters(config) * 6 / GIB)
    without_class_token = configured(
        "model.embed_dim=8", "model.num_heads=2", "model.depth=1", "model.patch_size=16", "model.global_pool=avg"
    )
    assert num_parameters(without_class_token) == 6 * 8 * 8 + 8 * (3 * 256 + 4 + 1000)


@pytest.mark.parametrize("attention", ["content", "positional"])
@pytest.mark.parametrize(("precision", "per_parameter"), [("float32", 16), ("bfloat16", 18)])
def test_state_bytes_are_a_bound_from_below(attention: str, precision: str, per_parameter: int) -> None:
    config = configured(f"model.attention={attention}", f"train.precision={precision}")
    parameters = sum(each.numel() for each in build_model(**dict(config.model), num_classes=10, seed=0).parameters())
    assert 0.98 * parameters * per_parameter < state_bytes(config) <= parameters * per_parameter


def test_five_replicas_of_the_papers_small_vit_fit_any_data_centre_gpu() -> None:
    config = load_config(shipped_configs()["cifar10"])
    parameters = num_parameters(config)
    assert 6.2e6 < parameters < 6.8e6
    assert 3 < memory_gib(config, 5, 50_000) < 16
    assert memory_gib(config, 5, 50_000) < memory_gib(config, 6, 50_000)
