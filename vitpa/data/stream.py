"""Large data sets: images decoded from the .beton when they are needed, a few batches ahead of the training.

Crops are torchvision's RandomResizedCrop (training) and Resize + CenterCrop (evaluation), with parameters from our
counter-based generator: the same for a (seed, epoch, sample) whatever decodes them, in however many threads or processes.
Here is the decoder for the CPU; vitpa/data/decode/gpu.py has that for a GPU. FFCV's own loader is not used:
its crops ignore seeds and its threads hang on errors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpa.config import AugmentConfig
from vitpa.data.augment import crop_boxes
from vitpa.data.augment.crop_boxes import Crops
from vitpa.data.beton import Beton
from vitpa.data.decode.gpu import GpuDecoder
from vitpa.data.manifest import Pixels
from vitpa.data.rng import Purpose, key
from vitpa.data.sampler import Batch, labels_of

BATCHES_AHEAD = 3


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
        decoder: Literal["cpu", "gpu"] = "cpu",
    ):
        """`img_size` is that of an evaluation, and of training images unless `train_batches` is told another one.

        `workers` is the number of threads that decode, or for a GPU read; `decoder` "gpu" needs a CUDA `device`.
        """
        self.beton, self.options = beton, options
        self.img_size, self.seed, self.device = img_size, seed, device
        make = GpuDecoder if decoder == "gpu" else CpuDecoder
        self.decoder = make(beton, device=device, workers=workers)

    def train_batches(
        self, indices: Iterable[Tensor], epoch: int, img_size: int | None = None
    ) -> Generator[Batch, None, None]:
        """A batch for each int64 tensor of sample indices (B,) on the CPU, as `epoch` crops them, of `img_size` pixels.

        A batch is to be used before the next one is asked for: its memory is used again.

        Raises:
            BetonError: an image cannot be decoded.
        """
        size = img_size or self.img_size
        crops_of = partial(self.train_crops, epoch=epoch, img_size=size)
        with closing(self.decoder.batches(indices, crops_of, size)) as batches:
            yield from batches  # Python 3.12 leaves it open otherwise

    def eval_batches(self, indices: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """The same for an evaluation; index -1 gives a black image with the label -1."""
        with closing(self.decoder.batches(indices, self.eval_crops, self.img_size)) as batches:
            yield from batches

    def train_crops(self, samples: Tensor, epoch: int, img_size: int) -> Crops:
        """What epoch `epoch` sees of `samples` (B,), with `img_size` pixels; a crop's place does not depend on that."""
        if self.options.crop != "random_resized":
            assert img_size == self.img_size  # whole images have one size
            return self.eval_crops(samples)
        streams = [key(self.seed, Purpose.CROP, epoch, sample) for sample in samples.tolist()]
        heights, widths = self.beton.heights[samples.numpy()], self.beton.widths[samples.numpy()]
        return crop_boxes.random_resized(torch.tensor(streams, dtype=torch.int64), heights, widths, self.options, img_size)

    def eval_crops(self, samples: Tensor) -> Crops:
        """What an evaluation sees of `samples` (B,)."""
        there = samples.numpy() >= 0
        heights, widths = (there * sides[samples.numpy()] for sides in (self.beton.heights, self.beton.widths))
        return crop_boxes.central(heights, widths, self.options, self.img_size)


class CpuDecoder:
    """FFCV's TurboJPEG and Pillow's resampling in threads.

    Raw images come out as of torchvision's transforms of PIL images, to the bit. FFCV's fast cosine transform differs from
    Pillow's by 0.97 grey levels on the average, 9 at most (crops of 548 photos, quality 90).
    """

    def __init__(self, beton: Beton, *, device: torch.device, workers: int):
        self.beton, self.device, self.workers = beton, device, workers
        self.buffers = threading.local()  # .pixels: where a thread decodes, again and again

    def batches(
        self, indices: Iterable[Tensor], crops_of: Callable[[Tensor], Crops], img_size: int
    ) -> Generator[Batch, None, None]:
        """The crops of `img_size` that `crops_of` finds for each of `indices` (B,), in order, BATCHES_AHEAD batches ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            waiting: deque[tuple[Tensor, Tensor, list[Future[None]]]] = deque()
            try:
                for samples in indices:
                    shape = (len(samples), img_size, img_size, 3)
                    images = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                    parts = np.array_split(np.arange(len(samples)), self.workers)
                    work = [
                        pool.submit(self._decode, samples[rows[0] : rows[-1] + 1], crops_of, images[rows[0] :].numpy())
                        for rows in parts
                        if len(rows)
                    ]
                    waiting.append((samples, images, work))
                    if len(waiting) > BATCHES_AHEAD:
                        yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _finished(self, samples: Tensor, images: Tensor, work: list[Future[None]]) -> Batch:
        for part in work:
            part.result()
        labels = labels_of(self.beton.labels, samples)
        images, samples, labels = (x.to(self.device, non_blocking=True) for x in (images, samples, labels))
        return Batch(images.permute(0, 3, 1, 2), samples, labels)

    def _decode(self, samples: Tensor, crops_of: Callable[[Tensor], Crops], out: Pixels) -> None:
        """Decode and crop `samples` (n,) into the first n of `out` (., S, S, 3)."""
        rows = zip(samples.tolist(), *(field.tolist() for field in crops_of(samples)), strict=True)
        for row, (index, left, top, width, height, to_width, to_height, window_left, window_top) in enumerate(rows):
            if index < 0:
                continue
            region = self._pixels(index)[top : top + height, left : left + width]
            image = Image.fromarray(region).resize((to_width, to_height), Image.Resampling.BILINEAR)
            window = (window_left, window_top, window_left + out.shape[2], window_top + out.shape[1])
            out[row] = np.asarray(image if image.size == out.shape[1:3] else image.crop(window))

    def _pixels(self, index: int) -> Pixels:
        """An image (H, W, 3); a JPEG is decoded to memory of this thread, since fresh memory costs a page fault per 4 kB."""
        shape = int(self.beton.heights[index]), int(self.beton.widths[index]), 3
        if not self.beton.is_jpeg[index]:
            return self.beton.stored(index).reshape(shape)
        size = shape[0] * shape[1] * shape[2]
        memory: Pixels = getattr(self.buffers, "pixels", np.empty(0, np.uint8))
        if memory.size < size:
            self.buffers.pixels = memory = np.empty(size, np.uint8)
        return self.beton.read_image(index, memory[:size].reshape(shape))
