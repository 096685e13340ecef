"""Other ways to get random crops of a .beton's JPEGs to a device: FFCV's loader, torchvision's and NVIDIA's decoders.

Each gives uint8 batches (B, 3, S, S) on the device, epoch after epoch, by RandomResizedCrop with antialiasing, or in FFCV's
case by its own. Axes: B batch, S img_size.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import import_module
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from vitpa.config import RunConfig
from vitpa.data.augment.crop_boxes import random_resized
from vitpa.data.beton import Beton
from vitpa.data.manifest import Pixels

Rival = Literal["ffcv", "torchvision", "nvimagecodec"]
Decode = Callable[[Sequence[Pixels]], list[Tensor]]  # the JPEGs of a batch: each becomes (3, H, W) uint8 RGB on the device
COMPARED = 64  # photos whose pixels are compared with Pillow's


class RivalLoader:
    """Batches of random crops, and what there is to say of them."""

    def __init__(self, batches: Callable[[], Generator[Tensor, None, None]], notes: Sequence[str] = ()) -> None:
        self.batches, self.notes = batches, tuple(notes)


def rival_loader(rival: Rival, beton: Beton, config: RunConfig, device: torch.device, workers: int) -> RivalLoader | str:
    """A loader of `beton`'s images in batches of train.global_batch_size; why it cannot be had here, if it cannot.

    `workers` are FFCV's threads; the others decode on the device, or where there is no GPU in this thread.
    """
    if rival == "ffcv":
        return _ffcv(beton, config, device, workers)
    decode = _torchvision(device) if rival == "torchvision" else _nvimagecodec(device)
    if isinstance(decode, str):
        return decode
    return RivalLoader(lambda: _batches(decode, beton, config), [difference(decode, beton)])


def _batches(decode: Decode, beton: Beton, config: RunConfig) -> Generator[Tensor, None, None]:
    """Each image is decoded whole, cropped and resized by itself, as torchvision's transforms would."""
    size, images_per_batch = config.model.img_size, config.train.global_batch_size
    for samples in _random_batches(len(beton), images_per_batch):
        images = decode([beton.stored(index) for index in samples.tolist()])
        heights, widths = beton.heights[samples.numpy()], beton.widths[samples.numpy()]
        crops = random_resized(torch.randint(2**62, (len(samples),)), heights, widths, config.augment, size)
        boxes = zip(*(side.tolist() for side in crops[:4]), strict=True)
        yield torch.stack(
            [
                F.interpolate(
                    image[None, :, top : top + height, left : left + width], (size, size), mode="bilinear", antialias=True
                )[0]
                for image, (left, top, width, height) in zip(images, boxes, strict=True)
            ]
        )


def _random_batches(num_images: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(num_images).split(size)[: num_images // size]


def _torchvision(device: torch.device) -> Decode:
    """torchvision.io.decode_jpeg: nvJPEG on a GPU, else libjpeg-turbo."""
    from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415 - half a second

    def decode(jpegs: Sequence[Pixels]) -> list[Tensor]:
        stored = [torch.from_numpy(jpeg.copy()) for jpeg in jpegs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 points to TorchCodec
            if device.type == "cpu":
                return [decode_jpeg(each, mode=ImageReadMode.RGB) for each in stored]
            images: list[Tensor] = decode_jpeg(stored, mode=ImageReadMode.RGB, device=device)
        return images

    return decode


def _nvimagecodec(device: torch.device) -> Decode | str:
    """nvImageCodec with all of its back ends."""
    if device.type == "cpu":
        return "nvImageCodec: there is no GPU"
    try:
        nvimgcodec = import_module("nvidia.nvimgcodec")
    except ImportError:
        return "nvImageCodec is not installed: pip install nvidia-nvimgcodec-cu13"
    decoder = nvimgcodec.Decoder(device_id=device.index or 0)

    def decode(jpegs: Sequence[Pixels]) -> list[Tensor]:
        return [from_dlpack(image).permute(2, 0, 1) for image in decoder.decode([jpeg.tobytes() for jpeg in jpegs])]

    return decode


def _ffcv(beton: Beton, config: RunConfig, device: torch.device, workers: int) -> RivalLoader | str:
    """FFCV's Loader with its RandomResizedCrop, as in its ImageNet example; it compiles itself first."""
    try:
        from ffcv.fields.basics import IntDecoder  # noqa: PLC0415 - may not be there, and needs numba
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder  # noqa: PLC0415
        from ffcv.loader import Loader, OrderOption  # noqa: PLC0415
        from ffcv.transforms import Squeeze, ToDevice, ToTensor, ToTorchImage  # noqa: PLC0415
    except ImportError as error:
        return f"FFCV's loader: {error}"
    size, options = config.model.img_size, config.augment
    crop = RandomResizedCropRGBImageDecoder((size, size), options.crop_scale, options.crop_ratio)
    to_device = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    loader = Loader(
        str(beton.path),
        batch_size=config.train.global_batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [crop, ToTensor(), *to_device, ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(), *to_device],
        },
    )

    def batches() -> Generator[Tensor, None, None]:
        while True:
            for images, *_ in loader:
                yield images

    return RivalLoader(batches)


def difference(decode: Decode, beton: Beton) -> str:
    """How far whole decoded photos are from Pillow's, in grey levels."""
    stored = [beton.stored(index) for index in range(min(COMPARED, len(beton)))]
    errors = []
    for image, jpeg in zip(decode(stored), stored, strict=True):
        pillow = np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")).astype(np.int16)
        errors.append(np.abs(image.permute(1, 2, 0).cpu().numpy().astype(np.int16) - pillow).ravel())
    apart = np.concatenate(errors)
    return f"pixels differ from Pillow's by {apart.mean():.2f} grey levels, {apart.max()} at most"
