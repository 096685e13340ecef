"""May a run's images stay on the device, whole and as they are stored? From the configuration alone; torch-free.

Where they may not, they are streamed: decoded when a step needs them. Replicas are ViTs on images that stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

from vitpa.config import RunConfig


def streaming_setting(config: RunConfig, image_sizes_px: Iterable[tuple[int, int] | None] = ()) -> str | None:
    """The setting because of which a run's images are streamed; None if they stay on the device, provided that they fit.

    Args:
        config: The run's.
        image_sizes_px: Height and width of the images of each split, None where they differ; left out, they are the model's.
    """
    size = config.model.img_size
    if config.augment.crop == "random_resized":
        return "augment.crop=random_resized"
    if config.augment.eval_crop_pct != 1:
        return f"augment.eval_crop_pct={config.augment.eval_crop_pct}"
    if config.train.order == "quasi_random":  # an order that depends on how much fits on the device would change the numbers
        return "train.order=quasi_random"
    if config.runtime.loader == "stream":
        return "runtime.loader=stream"
    if config.runtime.loader == "auto" and any(found != (size, size) for found in image_sizes_px):
        return f"model.img_size={size}"
    return None


def replicas_unsupported_reason(config: RunConfig) -> str | None:
    """Why seeds of this configuration cannot train in one step; None if they can."""
    if config.model.kind != "vit":
        return f"model.kind={config.model.kind}: replicas are ViTs"
    setting = streaming_setting(config)
    return None if setting is None else f"{setting}: replicas take whole images that stay on the device"
