"""Large data sets: images decoded from the .beton by a pool of threads, a few batches ahead of the training.

Crops are torchvision's RandomResizedCrop (training) and Resize + CenterCrop (evaluation), computed by the same Pillow
resampling, but with parameters from our counter-based generator: the same for a (seed, epoch, sample) whatever the
number of threads or processes. FFCV's own loader is not used: its crops ignore seeds and its threads hang on errors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.batches import Batch
from vitpa.data.beton import Beton
from vitpa.data.counter_rng import Purpose, key, uniform

BATCHES_AHEAD = 3
_CROP_TRIES = 10

Decode = Callable[[int], Image.Image]
Box = tuple[int, int, int, int]


class StreamedImages:
    """The images of one .beton, of any sizes, decoded when they are needed."""

    def __init__(
        self,
        beton: Beton,
        options: AugmentConfig,
        *,
        img_size: int,
        seed: int,
        device: torch.device,
        workers: int,
    ):
        self.beton, self.options = beton, options
        self.img_size, self.seed, self.device, self.workers = img_size, seed, device, workers

    def train_batches(self, indices: Iterable[Tensor], epoch: int) -> Generator[Batch, None, None]:
        """The batches of int64 tensors of sample indices (B,), as epoch `epoch` crops them: on the device.

        Raises:
            BetonError: an image cannot be decoded.
        """
        with closing(self._decoded(indices, lambda index: self._train_image(index, epoch))) as decoded:
            for samples, images in decoded:
                yield Batch(images, samples.to(self.device), self._labels(samples))

    def eval_batches(self, indices: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """The same with the crop of evaluation; index -1 gives a black image with the label -1."""
        with closing(self._decoded(indices, self._eval_image)) as decoded:  # Python 3.12 leaves it open otherwise
            for samples, images in decoded:
                labels = torch.where(samples.to(self.device) < 0, -1, self._labels(samples.clamp(min=0)))
                yield Batch(images, samples.to(self.device), labels)

    def _decoded(self, indices: Iterable[Tensor], decode: Decode) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Sample indices and decoded images (B, 3, H, W) uint8 on the device, in order, BATCHES_AHEAD batches ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            waiting: deque[tuple[Tensor, np.ndarray, list[Future[None]]]] = deque()

            def finish() -> tuple[Tensor, Tensor]:
                samples, images, futures = waiting.popleft()
                for future in futures:
                    future.result()
                return samples, torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)

            try:
                for samples in indices:
                    images = np.zeros((len(samples), self.img_size, self.img_size, 3), np.uint8)
                    chunks = np.array_split(np.arange(len(samples)), self.workers)
                    futures = [pool.submit(_decode_rows, decode, samples, images, rows) for rows in chunks if len(rows)]
                    waiting.append((samples, images, futures))
                    if len(waiting) > BATCHES_AHEAD:
                        yield finish()
                while waiting:
                    yield finish()
            finally:
                pool.shutdown(cancel_futures=True)

    def _train_image(self, index: int, epoch: int) -> Image.Image:
        height, width = int(self.beton.heights[index]), int(self.beton.widths[index])
        image = Image.fromarray(self.beton.read_image(index))
        if self.options.crop == "random_resized":
            left, top, right, bottom = self.crop_box(index, epoch, height, width)
            return image.crop((left, top, right, bottom)).resize((self.img_size, self.img_size), Image.Resampling.BILINEAR)
        return self._centre(image)

    def _eval_image(self, index: int) -> Image.Image:
        return self._centre(Image.fromarray(self.beton.read_image(index)))

    def _centre(self, image: Image.Image) -> Image.Image:
        """torchvision's Resize(img_size / eval_crop_pct) of the short side and CenterCrop(img_size)."""
        short = math.floor(self.img_size / self.options.eval_crop_pct)
        if image.width <= image.height:
            width, height = short, int(short * image.height / image.width)
        else:
            width, height = int(short * image.width / image.height), short
        left, top = round((width - self.img_size) / 2), round((height - self.img_size) / 2)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + self.img_size, top + self.img_size))

    def crop_box(self, index: int, epoch: int, height: int, width: int) -> Box:
        """The crop (left, top, right, bottom) of image `index` in `epoch`, by the rule of torchvision's RandomResizedCrop."""
        (scale_low, scale_high), (ratio_low, ratio_high) = self.options.crop_scale, self.options.crop_ratio
        stream = key(self.seed, Purpose.CROP, epoch, index)
        draws = uniform(stream, torch.arange(4 * _CROP_TRIES)).view(_CROP_TRIES, 4).tolist()
        for area_draw, ratio_draw, top_draw, left_draw in draws:
            area = height * width * (scale_low + area_draw * (scale_high - scale_low))
            ratio = math.exp(math.log(ratio_low) + ratio_draw * (math.log(ratio_high) - math.log(ratio_low)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * ratio_high)))  # no box fits: the largest central one within the ratios
        h = min(height, max(1, round(width / ratio_low)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _labels(self, samples: Tensor) -> Tensor:
        return torch.from_numpy(self.beton.labels[samples.numpy()]).to(self.device)


def _decode_rows(decode: Decode, samples: Tensor, images: np.ndarray, rows: np.ndarray) -> None:
    for row in rows:
        index = int(samples[row])
        if index >= 0:
            images[row] = np.asarray(decode(index))
