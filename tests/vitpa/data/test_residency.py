"""Which images may stay on the device, and so which seeds train together: every setting that decides it."""

from __future__ import annotations

import pytest

from vitpa.config import RunConfig
from vitpa.config_file import load_config, parse_config, shipped_configs
from vitpa.data.residency import replicas_unsupported_reason, streaming_setting

STREAMING = ["augment.crop=random_resized", "augment.eval_crop_pct=0.875", "train.order=quasi_random", "runtime.loader=stream"]


def configured(*overrides: str) -> RunConfig:
    return parse_config({"dataset": "cifar10"}, "test", overrides)


@pytest.mark.parametrize("setting", STREAMING)
def test_the_setting_is_named(setting: str) -> None:
    assert streaming_setting(configured(setting)) == setting
    assert streaming_setting(configured(setting), [(32, 32), (32, 32)]) == setting


@pytest.mark.parametrize(
    ("loader", "sizes", "expected"),
    [
        ("auto", [], None),
        ("auto", [(32, 32), (32, 32)], None),
        ("auto", [(32, 32), (32, 48)], "model.img_size=32"),
        ("auto", [None, (32, 32)], "model.img_size=32"),
        ("resident", [None, (16, 16)], None),  # as the user says; reading them refuses what does not fit
        ("stream", [(32, 32)], "runtime.loader=stream"),
    ],
)
def test_images_of_another_size_are_streamed(loader: str, sizes: list[tuple[int, int] | None], expected: str | None) -> None:
    assert streaming_setting(configured(f"runtime.loader={loader}"), sizes) == expected


@pytest.mark.parametrize("setting", STREAMING[:2])
def test_whole_images_are_needed_whatever_the_loader(setting: str) -> None:
    assert streaming_setting(configured(setting, "runtime.loader=resident")) == setting


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "digits"])
def test_seeds_of_the_small_recipes_train_together(name: str) -> None:
    assert replicas_unsupported_reason(load_config(shipped_configs()[name])) is None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("augment.crop=random_resized", "augment.crop=random_resized"),
        ("augment.eval_crop_pct=0.875", "augment.eval_crop_pct=0.875"),
        ("train.order=quasi_random", "train.order=quasi_random"),
        ("runtime.loader=stream", "runtime.loader=stream"),
        ("model.kind=resnet18", "model.kind=resnet18"),
    ],
)
def test_the_reason_why_seeds_do_not_is_named(override: str, key: str) -> None:
    assert (replicas_unsupported_reason(configured(override)) or "").startswith(f"{key}: ")
