"""Decoding on a GPU: the CPU's threads only copy stored bytes into pinned memory, of raw images only those of the crop.

Each batch in the making has a stream and memory of its own. Reading the codes of JPEGs (vitpa/kernels/jpeg.py) takes long and
little of the device, so several batches are decoded side by side, and beside the training. Nothing is allocated once
the memory is large enough: an allocation waits for all that the device has to do. Then one kernel (vitpa/kernels/resize.py)
crops images of all sizes. The pixels are those of Pillow, and so of torchvision's transforms, to the bit. JPEGs of a kind that
the kernels cannot decode (FFCV writes none) are decoded by the threads.

Axes: B batch, J JPEGs of it that the device decodes, S img_size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitpa.data.batches import Batch, labels_of
from vitpa.data.beton import Beton, Ints
from vitpa.data.crops import Crops
from vitpa.data.jpeg import BLOCK, SHORT_BITS, TABLE, Headers, Plan, plan_of

BATCHES_AHEAD = 2
MOST_HEADERS = 16  # kinds; 29 kB of tables each


@dataclass
class Stored:
    """The stored bytes of a batch in pinned memory, and where they are."""

    samples: Tensor  # (B,) int64
    crops: Crops
    is_jpeg: npt.NDArray[np.bool_]  # (B,)
    ends: Ints  # (B + 1,): image i has the bytes ends[i] to ends[i + 1] of `bytes`
    bytes: Tensor  # uint8
    headers: Ints  # (B,) which kind; -1 where the device does not decode
    header_bytes: Ints  # (B,)
    decoded: dict[int, Tensor] = field(default_factory=dict)  # (crop's height, crop's width, 3), by threads


class Slot:
    """Stream and memory of one batch, used again and again: it grows until it is large enough for all."""

    def __init__(self, device: torch.device, img_size: int):
        self.stream = torch.cuda.Stream(device, priority=-1)  # its kernels are short, or small
        with torch.cuda.stream(self.stream):
            self.images = torch.empty(0, 3, img_size, img_size, dtype=torch.uint8, device=device)
            self.numbers = torch.empty(0, 2, dtype=torch.int64, device=device)  # samples and labels
            self.bits, self.damaged = (torch.empty(0, dtype=torch.int32, device=device) for _ in range(2))  # J
            self.stored, self.rgb = (torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2))
            self.words = torch.empty(0, dtype=torch.int32, device=device)
            self.coefficients = torch.empty(0, BLOCK, dtype=torch.int16, device=device)
            self.samples = torch.empty(0, BLOCK, dtype=torch.uint8, device=device)
        self.pinned = torch.empty(0, dtype=torch.uint8)
        self.was_damaged = torch.empty(0, dtype=torch.int32)  # pinned
        self.batch: Stored | None = None
        self.rows: Ints = np.empty(0, np.int64)  # (J,) of the batch
        self.ready, self.used = (torch.cuda.Event(blocking=True) for _ in range(2))

    def with_room(self, memory: Tensor, length: int) -> Tensor:
        """`memory`, or a larger one of its kind with room for `length`: what the device may be doing with it ends first."""
        if len(memory) >= length:
            return memory
        self.used.synchronize()
        self.stream.synchronize()
        shape = length * 5 // 4, *memory.shape[1:]
        if memory.is_cuda:
            return memory.new_empty(shape)
        return torch.empty(shape, dtype=memory.dtype, pin_memory=True)


class GpuDecoder:
    """Decodes the images of one .beton on a CUDA device."""

    def __init__(self, beton: Beton, *, img_size: int, device: torch.device, workers: int):
        """`workers` threads read."""
        from vitpa.kernels import jpeg, resize  # noqa: PLC0415 - Triton is needed on a GPU only

        self.beton, self.img_size, self.workers, self.jpeg, self.resize = beton, img_size, workers, jpeg, resize.resize
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.free: list[Slot] = []
        self.headers = Headers(MOST_HEADERS)
        self.turn = threading.Lock()  # an evaluation may go on beside a training epoch
        self.num_headers = 0  # whose tables are on the device
        self.codes = torch.empty(MOST_HEADERS, 2, 2, TABLE, dtype=torch.int16, device=self.device)
        self.factors = torch.empty(MOST_HEADERS, 2, BLOCK, dtype=torch.int32, device=self.device)
        self.matrix = torch.empty(8, 8, dtype=torch.int32, device=self.device).copy_(jpeg.idct_matrix())
        torch.cuda.current_stream(self.device).synchronize()  # slots have streams of their own

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
        slots = [self.free.pop() if self.free else Slot(self.device, self.img_size) for _ in range(BATCHES_AHEAD + 1)]
        spare = deque(slots)

        def hand_over() -> Generator[Batch, None, None]:
            slot = waiting.popleft().result()
            batch = self._finished(slot)
            try:
                yield batch
            finally:
                slot.used.record(torch.cuda.current_stream(self.device))
            spare.append(slot)

        try:
            for samples in indices:
                slot = spare.popleft()
                located = readers.submit(self._locate, samples, crops_of, slot)
                parts = np.array_split(np.arange(len(samples)), self.workers)
                reads = [readers.submit(self._read, located, rows) for rows in parts if len(rows)]
                waiting.append(decoder.submit(self._decode, located, reads, slot))
                if len(waiting) > BATCHES_AHEAD:
                    yield from hand_over()
            while waiting:
                yield from hand_over()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            decoder.shutdown(cancel_futures=True)
            readers.shutdown()
            self.free += slots  # whoever takes one waits for its event first

    def _locate(self, samples: Tensor, crops_of: Callable[[Tensor], Crops], slot: Slot) -> Stored:
        """What is to be read of `samples` (B,), and memory for it."""
        beton, index, crops = self.beton, samples.numpy(), crops_of(samples)
        is_jpeg = beton.is_jpeg[index] & (index >= 0)
        sizes = np.where(is_jpeg, beton.sizes[index], 3 * crops.height * crops.width)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        slot.ready.synchronize()  # nothing is read from its memory any more, should the last loop have been left early
        with torch.cuda.device(self.device):
            slot.pinned = slot.with_room(slot.pinned, int(ends[-1]))
        none = np.full(len(index), -1)
        return Stored(samples, crops, is_jpeg, ends, slot.pinned[: ends[-1]], headers=none, header_bytes=0 * none)

    def _read(self, located: Future[Stored], rows: Ints) -> None:
        """Copy the bytes of `rows` (n,) of a batch."""
        batch = located.result()
        beton, out = self.beton, batch.bytes.numpy()
        samples, ends, jpegs, crops = batch.samples.tolist(), batch.ends.tolist(), batch.is_jpeg.tolist(), batch.crops
        for row in rows.tolist():
            sample, begin, end = samples[row], ends[row], ends[row + 1]
            if begin == end:
                continue
            top, left, height, width = (int(x[row]) for x in (crops.top, crops.left, crops.height, crops.width))
            crop = slice(top, top + height), slice(left, left + width)
            size = int(beton.heights[sample]), int(beton.widths[sample])
            stored = beton.stored(sample)
            if not jpegs[row]:
                out[begin:end].reshape(height, width, 3)[:] = stored.reshape(*size, 3)[crop]
                continue
            out[begin:end] = stored
            header = self.headers.find(out[begin:end], *size)
            if header is None:
                batch.decoded[row] = torch.from_numpy(beton.read_image(sample)[crop].copy())
            else:
                batch.headers[row], batch.header_bytes[row] = header, self.headers.known[header].size

    def _decode(self, located: Future[Stored], reads: list[Future[None]], slot: Slot) -> Slot:
        """Let the device decode a batch into its slot, when its bytes are there."""
        for read in reads:
            read.result()
        batch = located.result()
        B = len(batch.samples)
        with self.turn, torch.cuda.stream(slot.stream):
            slot.stream.wait_event(slot.used)
            slot.images, slot.numbers = slot.with_room(slot.images, B), slot.with_room(slot.numbers, B)
            slot.stored = slot.with_room(slot.stored, len(batch.bytes))
            slot.stored[: len(batch.bytes)].copy_(batch.bytes, non_blocking=True)
            first = batch.ends[:-1] + slot.stored.data_ptr()  # address of the first byte of each crop
            slot.rows = np.flatnonzero(batch.headers >= 0)
            plan = self._decode_jpegs(batch, slot)
            first[slot.rows] = slot.rgb.data_ptr() + plan.table[:, -1]
            decoded = [(row, pixels.to(self.device)) for row, pixels in batch.decoded.items()]
            for row, pixels in decoded:
                first[row] = pixels.data_ptr()
            on_device = resize_plan(batch.crops, first, batch.headers >= 0).pin_memory().to(self.device, non_blocking=True)
            self.resize(on_device, slot.images[:B])
            numbers = torch.stack([batch.samples, labels_of(self.beton.labels, batch.samples)], 1).pin_memory()
            slot.numbers[:B].copy_(numbers, non_blocking=True)
            slot.ready.record(slot.stream)
        slot.batch = batch
        return slot

    def _decode_jpegs(self, batch: Stored, slot: Slot) -> Plan:
        """Decode the rows of the slot; where their pixels come to lie in `slot.rgb` is said in the plan."""
        rows, room, kernels = slot.rows, slot.with_room, self.jpeg
        samples, skipped, J = batch.samples.numpy()[rows], batch.header_bytes[rows], len(rows)
        begins = batch.ends[rows] + skipped
        crops = Crops(*(each[rows] for each in batch.crops))
        plan = plan_of(
            begins,
            batch.ends[rows + 1] - begins - 2,  # the last two mark the end
            batch.headers[rows],
            crops,
            heights=self.beton.heights[samples],
            widths=self.beton.widths[samples],
        )
        if not J:
            return plan
        while self.num_headers < len(self.headers.known):  # hardly ever
            kind = self.headers.known[self.num_headers]
            self.codes[self.num_headers], self.factors[self.num_headers] = map(torch.from_numpy, (kind.codes, kind.factors))
            slot.stream.synchronize()  # other slots use them, too
            self.num_headers += 1
        slot.bits, slot.damaged, slot.was_damaged = (room(x, J) for x in (slot.bits, slot.damaged, slot.was_damaged))
        slot.words, slot.rgb = room(slot.words, plan.words), room(slot.rgb, plan.pixel_bytes)
        slot.coefficients, slot.samples = room(slot.coefficients, plan.blocks), room(slot.samples, plan.blocks)
        table = torch.from_numpy(plan.table).pin_memory().to(self.device, non_blocking=True)
        coefficients = slot.coefficients[: plan.blocks]
        coefficients.zero_()
        kernels.unstuff(table, slot.stored, slot.words, slot.bits)
        kernels.read_codes(
            table, slot.words, slot.bits, self.codes, self.factors, coefficients, slot.damaged, short_bits=SHORT_BITS
        )
        kernels.to_samples(coefficients, self.matrix, slot.samples)
        kernels.to_rgb(table, slot.samples, slot.rgb, most_pixels=plan.most_pixels)
        slot.was_damaged[:J].copy_(slot.damaged[:J], non_blocking=True)
        return plan

    def _finished(self, slot: Slot) -> Batch:
        """The batch of a slot, for the stream that is current."""
        slot.ready.synchronize()
        assert slot.batch is not None
        B, damaged = len(slot.batch.samples), slot.was_damaged[: len(slot.rows)].numpy() > 0
        if damaged.any():
            raise self.beton.undecodable(int(slot.batch.samples[slot.rows[damaged.argmax()]]))
        torch.cuda.current_stream(self.device).wait_event(slot.ready)
        return Batch(slot.images[:B], *slot.numbers[:B].unbind(1))


def resize_plan(crops: Crops, first: Ints, planar: npt.NDArray[np.bool_]) -> Tensor:
    """The plan (B, 10) int64 for `vitpa.kernels.resize` of crops whose first byte lies at `first` (B,).

    Where `planar` they lie there as (3, height, width), else as (height, width, 3).
    """
    row, column = np.where(planar, crops.width, 3 * crops.width), np.where(planar, 1, 3)
    channel = np.where(planar, crops.height * crops.width, 1)
    size = (crops.height, crops.width, crops.to_height, crops.to_width, crops.window_top, crops.window_left)
    return torch.from_numpy(np.stack([first, row, column, channel, *size], axis=1))


def why_not_gpu(beton: Beton, *, img_size: int, device: torch.device) -> str:
    """Why the images of `beton` cannot be decoded on `device`, in a line; empty if one of them could be."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        decoder = GpuDecoder(beton, img_size=img_size, device=device, workers=1)
        decoder.check()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old: any of theirs
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if beton.is_jpeg.any() and not decoder.headers.known:
        return f"the first JPEG of {beton.path} is not a baseline JPEG in 4:2:0, as FFCV writes them"
    return ""
