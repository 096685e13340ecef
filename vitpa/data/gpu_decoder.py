"""Decoding on a GPU: nvJPEG (torchvision's) for JPEGs, a copy for raw pixels, and one kernel for the crops of all sizes.

Threads copy the stored bytes into pinned memory, of raw images only the rows of the crop. One more thread decodes, on a
stream of its own, beside the training. nvJPEG's allocations wait for all that the device has to do, so the host must not
run far ahead: a batch is handed over only when the device has finished the steps before the last STEPS_QUEUED.

Raw images are cropped as on the CPU (vitpa/kernels/resize.py). nvJPEG's pixels differ from those of FFCV's TurboJPEG: on crops
of 548 photos by 1.1 grey levels on the average, by more than 4 in 1.2 % of the values. It does not notice a JPEG cut short;
`vitpa prep --verify` does. On an H100 beside steps of 40 ms for 1,024 images raw pixels came at 23,800 images/s and cost
7 % of the training's speed; nvJPEG gave 8,000 to 12,000 images/s and more than halved it, for its allocations wait.

Axes: B batch, S img_size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io  # makes torch.ops.image
from torch import Tensor

from vitpa.data.batches import Batch, labels_of
from vitpa.data.beton import Beton, BetonError, Ints
from vitpa.data.crops import Crops

BATCHES_AHEAD = 2
STEPS_QUEUED = 1  # steps that the device may have to do still when the next batch is handed over
IMAGES_TOGETHER = 256  # that nvJPEG gets at a time
RGB = torchvision.io.ImageReadMode.RGB.value


@dataclass
class Stored:
    """The stored bytes of a batch in pinned memory, and where they are."""

    samples: Tensor  # (B,) int64
    crops: Crops
    is_jpeg: npt.NDArray[np.bool_]  # (B,)
    ends: Ints  # (B + 1,): image i has the bytes ends[i] to ends[i + 1] of `bytes`
    skipped: Ints  # (B,): bytes of the image that are left out at its beginning
    bytes: Tensor  # uint8
    parts: tuple[Tensor, ...]  # B views of them


@dataclass
class Slot:
    """Memory of one batch on the device, used again and again."""

    images: Tensor  # (room for B, 3, S, S) uint8
    numbers: Tensor  # (2, room for B) int64: samples and labels
    batch_size: int = 0
    ready: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))
    used: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


class GpuDecoder:
    """Decodes the images of one .beton on a CUDA device."""

    def __init__(self, beton: Beton, *, img_size: int, device: torch.device, workers: int):
        """`workers` threads read."""
        from vitpa.kernels.resize import resize  # noqa: PLC0415 - Triton is needed on a GPU only

        self.beton, self.img_size, self.workers, self.resize = beton, img_size, workers, resize
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device, priority=-1)  # its kernels are short
        self.free: list[Slot] = []
        self.turn = threading.Lock()  # an evaluation may go on beside a training epoch
        self.pixels = torch.empty(0, dtype=torch.uint8, device=self.device)  # of raw images
        self.held: deque[tuple[torch.cuda.Event, Any]] = deque()  # what the stream may be reading still

    def check(self) -> None:
        """Decode one image; raises whatever goes wrong."""
        first_jpeg = int(self.beton.is_jpeg.argmax())  # or 0
        size = np.full(1, self.img_size)
        height, width = (sides[[first_jpeg]] for sides in (self.beton.heights, self.beton.widths))
        whole = Crops(0 * size, 0 * size, width, height, size, size, 0 * size, 0 * size)
        for _ in self.batches([torch.tensor([first_jpeg])], lambda _: whole):
            torch.cuda.synchronize(self.device)

    def batches(self, indices: Iterable[Tensor], crops_of: Callable[[Tensor], Crops]) -> Generator[Batch, None, None]:
        """The crops that `crops_of` finds for each of `indices` (B,), in order, BATCHES_AHEAD batches ahead.

        A batch may be used, on the stream that is current, until the next one is asked for.

        Raises:
            BetonError: an image cannot be decoded.
        """
        readers = ThreadPoolExecutor(self.workers, thread_name_prefix="decode-read")
        decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        waiting: deque[Future[Slot]] = deque()
        steps: deque[torch.cuda.Event] = deque()
        slots = [self._slot() for _ in range(BATCHES_AHEAD + 1)]
        spare = deque(slots)

        def hand_over() -> Generator[Batch, None, None]:
            while len(steps) > STEPS_QUEUED:
                steps.popleft().synchronize()
            slot = waiting.popleft().result()
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
            samples, labels = slot.numbers[:, : slot.batch_size]
            try:
                yield Batch(slot.images[: slot.batch_size], samples, labels)
            finally:
                slot.used.record(torch.cuda.current_stream(self.device))
            steps.append(slot.used)
            spare.append(slot)

        try:
            for samples in indices:
                located = readers.submit(self._locate, samples, crops_of)
                parts = np.array_split(np.arange(len(samples)), self.workers)
                reads = [readers.submit(self._read, located, rows) for rows in parts if len(rows)]
                waiting.append(decoder.submit(self._decode, located, reads, spare.popleft()))
                if len(waiting) > BATCHES_AHEAD:
                    yield from hand_over()
            while waiting:
                yield from hand_over()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            decoder.shutdown(cancel_futures=True)
            readers.shutdown()
            self.free += slots  # whoever takes one waits for its event first

    def _slot(self) -> Slot:
        if self.free:
            return self.free.pop()
        with torch.cuda.stream(self.stream):
            images = torch.empty(0, 3, self.img_size, self.img_size, dtype=torch.uint8, device=self.device)
            return Slot(images, torch.empty(2, 0, dtype=torch.int64, device=self.device))

    def _locate(self, samples: Tensor, crops_of: Callable[[Tensor], Crops]) -> Stored:
        """What is to be read of `samples` (B,), and memory for it."""
        beton, index, crops = self.beton, samples.numpy(), crops_of(samples)
        is_jpeg = beton.is_jpeg[index] & (index >= 0)
        row_bytes = 3 * beton.widths[index]
        skipped = np.where(is_jpeg, 0, crops.top * row_bytes)
        sizes = np.where(is_jpeg, beton.sizes[index], crops.height * row_bytes)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        with torch.cuda.device(self.device):
            memory = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=True)
        return Stored(samples, crops, is_jpeg, ends, skipped, memory, memory.split(sizes.tolist()))

    def _read(self, located: Future[Stored], rows: Ints) -> None:
        stored = located.result()
        out, ends = stored.bytes.numpy(), stored.ends
        where = zip(stored.samples[rows].tolist(), stored.skipped[rows].tolist(), ends[rows].tolist(), strict=True)
        for (sample, skipped, begin), end in zip(where, ends[rows + 1].tolist(), strict=True):
            if end > begin:
                out[begin:end] = self.beton.stored(sample)[skipped : skipped + end - begin]

    def _decode(self, located: Future[Stored], reads: list[Future[None]], slot: Slot) -> Slot:
        for read in reads:
            read.result()
        stored = located.result()
        B = len(stored.samples)
        with self.turn, torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.used)
            if len(slot.images) < B:
                slot.used.synchronize()
                self.stream.synchronize()
                slot.images = slot.images.new_empty(B, *slot.images.shape[1:])
                slot.numbers = slot.numbers.new_empty(2, B)
            for rows in np.array_split(np.arange(B), -(-B // IMAGES_TOGETHER)) if B else ():
                self._crop(stored, rows, slot.images[rows[0] : rows[-1] + 1])
            numbers = torch.stack([stored.samples, labels_of(self.beton.labels, stored.samples)]).pin_memory()
            slot.numbers[:, :B].copy_(numbers, non_blocking=True)
            slot.ready.record(self.stream)
        slot.batch_size = B
        return slot

    def _crop(self, stored: Stored, rows: Ints, out: Tensor) -> None:
        """Decode the images `rows` (n,) of a batch and put their crops into `out` (n, 3, S, S)."""
        # torchvision's nvJPEG writes on a stream of its own, which does not wait for ours: nothing that ours may be reading
        # still can go back to the allocator before
        while len(self.held) > 1:
            self.held.popleft()[0].synchronize()
        ours = rows[stored.is_jpeg[rows]]
        decoded = self._decode_jpegs(stored, ours)
        first, last = int(stored.ends[rows[0]]), int(stored.ends[rows[-1] + 1])
        if len(ours) < len(rows):
            if self.pixels.numel() < last - first:
                self.stream.synchronize()
                self.pixels = self.pixels.new_empty((last - first) * 5 // 4)
            self.pixels[: last - first].copy_(stored.bytes[first:last], non_blocking=True)
        bases = self.pixels.data_ptr() - first + stored.ends[rows]
        bases[stored.is_jpeg[rows]] = [image.data_ptr() for image in decoded]
        samples = stored.samples.numpy()[rows]
        plan = plan_of(
            Crops(*(each[rows] for each in stored.crops)),
            bases,
            stored.is_jpeg[rows],
            self.beton.heights[samples],
            self.beton.widths[samples],
        )
        on_device = plan.pin_memory().to(self.device, non_blocking=True)
        self.resize(on_device, out)
        done = torch.cuda.Event(blocking=True)
        done.record(self.stream)
        self.held.append((done, (decoded, on_device)))

    def _decode_jpegs(self, stored: Stored, rows: Ints) -> list[Tensor]:
        """The decoded images `rows` (n,) of a batch, (3, H, W) uint8 each, of their own sizes."""
        if not len(rows):
            return []
        samples = stored.samples.numpy()[rows]
        jpegs = [stored.parts[row] for row in rows.tolist()]
        try:
            decoded: list[Tensor] = torch.ops.image.decode_jpegs_cuda(jpegs, RGB, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            for sample in samples.tolist():
                self.beton.read_image(sample)  # raises if it is this one
            reason = str(error).partition("\n")[0]
            raise BetonError(
                f"{self.beton.path}: nvJPEG cannot decode one of the samples {', '.join(map(str, samples.tolist()))} "
                f"({reason}); set runtime.decoder=cpu"
            ) from error
        sizes = self.beton.heights[samples].tolist(), self.beton.widths[samples].tolist()
        for image, sample, *size in zip(decoded, samples.tolist(), *sizes, strict=True):
            if image.shape != (3, *size):
                raise self.beton.undecodable(sample)
        return decoded


def plan_of(crops: Crops, bases: Ints, planar: npt.NDArray[np.bool_], heights: Ints, widths: Ints) -> Tensor:
    """The plan (B, 10) int64 for `vitpa.kernels.resize` of images that lie at `bases` (B,).

    Where `planar` an image is whole, (3, H, W) of the sizes given; else it is the rows of its crop, (crop's height, W, 3).
    """
    row = np.where(planar, widths, 3 * widths)
    column = np.where(planar, 1, 3)
    channel = np.where(planar, heights * widths, 1)
    first = bases + np.where(planar, crops.top * row, 0) + crops.left * column
    size = (crops.height, crops.width, crops.to_height, crops.to_width, crops.window_top, crops.window_left)
    return torch.from_numpy(np.stack([first, row, column, channel, *size], axis=1))


def why_not_gpu(beton: Beton, *, img_size: int, device: torch.device) -> str:
    """Why the images of `beton` cannot be decoded on `device`, in a line; empty if one of them could be."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        GpuDecoder(beton, img_size=img_size, device=device, workers=1).check()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no nvJPEG, no Triton, no C compiler, a GPU that is too old: any of theirs
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""
