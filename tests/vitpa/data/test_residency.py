"""Which images may stay on the device: every setting that decides it, alone and against the others."""

from __future__ import annotations

import pytest

from vitpa.config import RunConfig
from vitpa.config_file import parse_config
from vitpa.data.residency import streaming_setting

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
