"""Decoding on a GPU: the CPU's threads only copy stored bytes into pinned memory, of raw images only the crop's rows.

From the places where its segments begin the kernels (vitpa/kernels/jpeg.py) read all of a JPEG at the same time. To find these
takes a pass over all codes of all JPEGs, once: a file keeps them for later starts (segment_file.py). Damage is found by that
pass, and in each batch, since segments end where the next ones begin. Then one kernel (vitpa/kernels/resize.py) crops images
of all sizes. The pixels are those of Pillow, and so of torchvision's transforms, to the bit. JPEGs of a kind that the
kernels cannot decode (FFCV writes none) are decoded by the threads.

Each batch in the making has a stream and memory of its own. Nothing is allocated once the memory is large enough: an
allocation waits for all that the device has to do.

Axes: B batch, J JPEGs of it that the device decodes, S height and width of what comes out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitpa.data.augment.crop_boxes import Crops
from vitpa.data.beton import Beton
from vitpa.data.decode.jpeg_headers import (
    BLOCK,
    LONGEST,
    SEGMENT,
    SHORT_BITS,
    TABLE,
    Headers,
    Plan,
    num_segments,
    plan_of,
    read_header,
)
from vitpa.data.decode.segment_file import Segments
from vitpa.data.manifest import Ints
from vitpa.data.prefetch import read_ahead
from vitpa.data.sampler import Batch, labels_of

BATCHES_AHEAD = 3
SEARCH = 1024  # images at a time
SEARCH_BYTES = 256 << 20  # of which so many are read ahead
MAX_READERS = 4  # threads; they copy faster than a GPU trains, and more of them only wait for Python
MAX_HEADERS = 16  # kinds; 29 kB of tables each


@dataclass
class Stored:
    """The stored bytes of a batch in pinned memory, and where they are."""

    samples: Tensor  # (B,) int64
    crops: Crops
    is_jpeg: npt.NDArray[np.bool_]  # (B,)
    by_threads: npt.NDArray[np.bool_]  # (B,) whether the device cannot decode it: of these there are no bytes here
    begins: Ints  # (B,): where in the file each image's bytes begin: of a JPEG all, else whole rows of pixels
    ends: Ints  # (B + 1,): image i has the bytes ends[i] to ends[i + 1] of `bytes`
    bytes: Tensor  # uint8
    decoded: dict[int, Tensor] = field(default_factory=dict)  # (crop's height, crop's width, 3), by threads


class Slot:
    """Stream and memory of one batch, used again and again: it grows until it is large enough for all."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device, priority=-1)  # its kernels are short, or small
        with torch.cuda.stream(self.stream):
            self.pixels = torch.empty(0, dtype=torch.uint8, device=device)  # of what comes out, images of any one size
            self.numbers = torch.empty(0, 2, dtype=torch.int64, device=device)  # samples and labels
            self.bits, self.damaged = (torch.empty(0, dtype=torch.int32, device=device) for _ in range(2))  # J
            self.stored, self.rgb = (torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2))
            self.words, self.weights = (torch.empty(0, dtype=torch.int32, device=device) for _ in range(2))
            self.coefficients = torch.empty(0, BLOCK, dtype=torch.int16, device=device)
            self.samples = torch.empty(0, BLOCK, dtype=torch.uint8, device=device)
        self.pinned = torch.empty(0, dtype=torch.uint8)
        self.was_damaged = torch.empty(0, dtype=torch.int32)  # pinned
        self.batch: Stored | None = None
        self.images = self.pixels  # (B, 3, S, S): the batch, in `pixels`
        self.jpegs: Ints = np.empty(0, np.int64)  # (J,) which of the batch
        self.ready, self.used = (torch.cuda.Event(blocking=True) for _ in range(2))

    def ensure_capacity(self, memory: Tensor, length: int) -> Tensor:
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

    def __init__(self, beton: Beton, *, device: torch.device, workers: int):
        """`workers` threads read, MAX_READERS at most."""
        from vitpa.kernels import jpeg, resize  # noqa: PLC0415 - Triton is needed on a GPU only

        self.beton, self.jpeg, self.resize = beton, jpeg, resize
        self.workers = min(workers, MAX_READERS)
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.free: list[Slot] = []
        self.headers = Headers(MAX_HEADERS)
        self.turn = threading.Lock()  # an evaluation may go on beside a training epoch
        self.num_headers = 0  # whose tables are on the device
        # of each sample, once it is known:
        self.is_known = ~beton.is_jpeg
        self.header = np.full(len(beton), -1)  # which kind; -1 where the device does not decode
        segments = np.where(beton.is_jpeg, num_segments(beton.heights, beton.widths), 0)
        self.first_segment = np.cumsum(segments) - segments
        self.entries = torch.empty(int(segments.sum()), dtype=torch.int64, device=self.device).zero_()  # where segments begin
        self.codes = torch.empty(MAX_HEADERS, 2, 2, TABLE, dtype=torch.int16, device=self.device)
        self.factors = torch.empty(MAX_HEADERS, 2, BLOCK, dtype=torch.int32, device=self.device)
        self.matrix = torch.empty(8, 8, dtype=torch.int32, device=self.device).copy_(jpeg.idct_matrix())
        torch.cuda.current_stream(self.device).synchronize()  # slots have streams of their own

    def check(self, img_size: int) -> None:
        """Decode one image to `img_size` pixels; raises whatever goes wrong."""
        first_jpeg = torch.tensor([int(self.beton.is_jpeg.argmax())])  # or 0
        if self.beton.is_jpeg.any():
            self.find_segments(first_jpeg)
        crops = self._whole(first_jpeg)._replace(to_width=np.full(1, img_size), to_height=np.full(1, img_size))
        for _ in self._batches([first_jpeg], lambda _: crops, img_size):
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Find where the segments of all images begin, if that has not been done.

        Raises:
            BetonError: an image cannot be decoded.
        """
        if not self.is_known.all():
            self.find_segments(torch.from_numpy(np.flatnonzero(~self.is_known)))

    def segments(self) -> Segments:
        """What `prepare` has found."""
        kinds = [kind.before + bytes(4) + kind.after for kind in self.headers.known]
        heads = np.frombuffer(b"".join(kind.ljust(LONGEST, b"\0") for kind in kinds), np.uint8).reshape(-1, LONGEST)
        return Segments(self.entries.cpu().numpy(), self.header.astype(np.int8), heads)

    def use_segments(self, segments: Segments) -> bool:
        """Take over what another decoder of the same images has found; False if its headers are not such as this one reads.

        To be called before anything is decoded.
        """
        kinds = [read_header(head.tobytes()) for head in segments.kinds]
        known = [kind for kind in kinds if kind is not None]
        if len(known) < len(kinds) or len(known) > MAX_HEADERS:
            return False
        assert not self.headers.known
        self.headers.known += known
        self.header[:] = segments.header
        self.entries.copy_(torch.from_numpy(segments.entries))
        torch.cuda.current_stream(self.device).synchronize()  # slots have streams of their own
        self.is_known[:] = True
        return True

    def find_segments(self, samples: Tensor) -> None:
        """Find where the segments of these samples (n,) begin, and which kinds of headers they have.

        Raises:
            BetonError: an image cannot be decoded.
        """
        samples = samples[np.argsort(self.beton.offsets[samples.numpy()])]  # in the file's order
        windows = np.full(len(self.beton), -1)
        windows[samples.numpy()] = np.cumsum(self.beton.sizes[samples.numpy()]) // SEARCH_BYTES
        with ExitStack() as stack:
            steps = read_ahead(samples.split(SEARCH), self.beton, windows, batch_size=SEARCH, start_step=0, share=(0, 1))
            parts = stack.enter_context(closing(steps))
            slots = stack.enter_context(closing(self._ahead(parts, self._whole, self._read_unknown, self._find_segments)))
            for slot in slots:
                self.is_known[self._finished(slot).samples.numpy()] = True

    def _finished(self, slot: Slot) -> Stored:
        """The batch of a slot, when the device has done it.

        Raises:
            BetonError: a JPEG in it is damaged.
        """
        slot.ready.synchronize()
        assert slot.batch is not None
        damaged = slot.was_damaged[: len(slot.jpegs)].numpy() > 0
        if damaged.any():
            raise self.beton.undecodable(int(slot.batch.samples[slot.jpegs[damaged.argmax()]]))
        return slot.batch

    def batches(
        self, indices: Iterable[Tensor], crops_of: Callable[[Tensor], Crops], img_size: int
    ) -> Generator[Batch, None, None]:
        """The crops of `img_size` that `crops_of` finds for each of `indices` (B,), in order, BATCHES_AHEAD batches ahead.

        A batch may be used, on the stream that is current, until the next one is asked for.

        Raises:
            BetonError: an image cannot be decoded, of whatever batch.
        """
        self.prepare()
        with closing(self._batches(indices, crops_of, img_size)) as batches:
            yield from batches

    def _batches(
        self, indices: Iterable[Tensor], crops_of: Callable[[Tensor], Crops], img_size: int
    ) -> Generator[Batch, None, None]:
        """The same, of samples that are known."""
        decode = partial(self._decode, img_size=img_size)
        with closing(self._ahead(indices, crops_of, self._read, decode)) as slots:
            for slot in slots:
                B = len(self._finished(slot).samples)
                torch.cuda.current_stream(self.device).wait_event(slot.ready)
                yield Batch(slot.images, *slot.numbers[:B].unbind(1))

    def _ahead(
        self,
        indices: Iterable[Tensor],
        crops_of: Callable[[Tensor], Crops],
        read: Callable[[Future[Stored], Ints], None],
        decode: Callable[[Future[Stored], list[Future[None]], Slot], Slot],
    ) -> Generator[Slot, None, None]:
        """The slots of batches on which threads do `read` and `decode`, in the order of `indices`, BATCHES_AHEAD ahead."""
        readers = ThreadPoolExecutor(self.workers, thread_name_prefix="decode-read")
        decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        waiting: deque[Future[Slot]] = deque()
        slots = [self.free.pop() if self.free else Slot(self.device) for _ in range(BATCHES_AHEAD + 1)]
        spare = deque(slots)

        def hand_over() -> Generator[Slot, None, None]:
            slot = waiting.popleft().result()
            try:
                yield slot
            finally:
                slot.used.record(torch.cuda.current_stream(self.device))
            spare.append(slot)

        try:
            for samples in indices:
                slot = spare.popleft()
                located = readers.submit(self._locate, samples, crops_of, slot)
                parts = np.array_split(np.arange(len(samples)), self.workers)
                reads = [readers.submit(read, located, rows) for rows in parts if len(rows)]
                waiting.append(decoder.submit(decode, located, reads, slot))
                if len(waiting) > BATCHES_AHEAD:
                    yield from hand_over()
            while waiting:
                yield from hand_over()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            decoder.shutdown(cancel_futures=True)
            readers.shutdown()
            self.free += slots  # whoever takes one waits for its event first

    def _whole(self, samples: Tensor) -> Crops:
        """All of the images of `samples` (B,)."""
        heights, widths = (sides[samples.numpy()] for sides in (self.beton.heights, self.beton.widths))
        return Crops(0 * widths, 0 * widths, widths, heights, widths, heights, 0 * widths, 0 * widths)

    def _locate(self, samples: Tensor, crops_of: Callable[[Tensor], Crops], slot: Slot) -> Stored:
        """What is to be read of `samples` (B,), and memory for it."""
        beton, index, crops = self.beton, samples.numpy(), crops_of(samples)
        is_jpeg = beton.is_jpeg[index] & (index >= 0)
        by_threads = is_jpeg & self.is_known[index] & (self.header[index] < 0)
        line = 3 * beton.widths[index]  # bytes
        sizes = np.where(is_jpeg, beton.sizes[index], line * crops.height)
        sizes[by_threads] = 0
        begins = beton.offsets[index] + np.where(is_jpeg, 0, line * crops.top)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        slot.ready.synchronize()  # nothing is read from its memory any more, should the last loop have been left early
        with torch.cuda.device(self.device):
            slot.pinned = slot.ensure_capacity(slot.pinned, int(ends[-1]))
        return Stored(samples, crops, is_jpeg, by_threads, begins, ends, slot.pinned[: ends[-1]])

    def _read(self, located: Future[Stored], rows: Ints) -> None:
        """Copy the bytes of `rows` (n,) of a batch, consecutive ones, or decode the images where the device cannot."""
        batch = located.result()
        first, last = int(rows[0]), int(rows[-1]) + 1
        begin, end = int(batch.ends[first]), int(batch.ends[last])
        self.beton.copy(batch.begins[first:last], np.diff(batch.ends[first : last + 1]), batch.bytes[begin:end].numpy())
        crops = batch.crops
        for row in rows[batch.by_threads[rows]].tolist():
            top, left, height, width = (int(x[row]) for x in (crops.top, crops.left, crops.height, crops.width))
            pixels = self.beton.read_image(int(batch.samples[row]))[top : top + height, left : left + width]
            batch.decoded[row] = torch.from_numpy(pixels.copy())

    def _read_unknown(self, located: Future[Stored], rows: Ints) -> None:
        """The same of JPEGs, and find out what their headers are."""
        self._read(located, rows)
        batch = located.result()
        out, samples, ends = batch.bytes.numpy(), batch.samples.numpy()[rows], batch.ends.tolist()
        sizes = (each[rows].tolist() for each in (batch.crops.height, batch.crops.width))
        for row, sample, height, width in zip(rows.tolist(), samples.tolist(), *sizes, strict=True):
            header = self.headers.find(out[ends[row] : ends[row + 1]], height, width)
            if header is not None:
                self.header[sample] = header

    def _find_segments(self, located: Future[Stored], reads: list[Future[None]], slot: Slot) -> Slot:
        """Let the device find where the segments of JPEGs begin, when their bytes are there."""
        batch = self._read_by(located, reads)
        with self.turn, torch.cuda.stream(slot.stream):
            plan, table = self._unstuff(batch, slot)
            J = len(plan.table)
            if J:
                self.jpeg.find_segments(
                    table,
                    slot.words,
                    slot.bits,
                    self.codes,
                    self.entries,
                    slot.damaged,
                    short_bits=SHORT_BITS,
                    segment=SEGMENT,
                )
                slot.was_damaged[:J].copy_(slot.damaged[:J], non_blocking=True)
            slot.ready.record(slot.stream)
        return slot

    def _decode(self, located: Future[Stored], reads: list[Future[None]], slot: Slot, *, img_size: int) -> Slot:
        """Let the device decode a batch into its slot, when its bytes are there."""
        batch = self._read_by(located, reads)
        B, S = len(batch.samples), img_size
        with self.turn, torch.cuda.stream(slot.stream):
            slot.stream.wait_event(slot.used)
            slot.pixels, slot.numbers = slot.ensure_capacity(slot.pixels, B * 3 * S * S), slot.ensure_capacity(slot.numbers, B)
            slot.images = slot.pixels[: B * 3 * S * S].view(B, 3, S, S)
            plan, table = self._unstuff(batch, slot)
            self._decode_jpegs(plan, table, slot)
            first = batch.ends[:-1] + slot.stored.data_ptr() + 3 * batch.crops.left  # address of the first byte of each crop
            first[slot.jpegs] = slot.rgb.data_ptr() + plan.table[:, -1]
            widths = self.beton.widths[batch.samples.numpy()]  # of what is there of an image
            decoded = [(row, pixels.to(self.device)) for row, pixels in batch.decoded.items()]
            for row, pixels in decoded:
                first[row], widths[row] = pixels.data_ptr(), pixels.shape[1]
            is_planar = np.zeros(B, np.bool_)
            is_planar[slot.jpegs] = True
            on_device = resize_plan(batch.crops, first, widths, is_planar).pin_memory().to(self.device, non_blocking=True)
            crops = batch.crops
            taps = most_taps(crops.height, crops.width, crops.to_height, crops.to_width)
            slot.weights = slot.ensure_capacity(slot.weights, self.resize.room(B, S, taps))
            self.resize.resize(on_device, slot.weights, slot.images, taps=taps)
            numbers = torch.stack([batch.samples, labels_of(self.beton.labels, batch.samples)], 1).pin_memory()
            slot.numbers[:B].copy_(numbers, non_blocking=True)
            slot.ready.record(slot.stream)
        return slot

    def _read_by(self, located: Future[Stored], reads: list[Future[None]]) -> Stored:
        """The batch, when it has been read."""
        for read in reads:
            read.result()
        return located.result()

    def _unstuff(self, batch: Stored, slot: Slot) -> tuple[Plan, Tensor]:
        """Bring the bytes of a batch to its slot, and have JPEGs unstuffed; the plan for them, and its table on the device."""
        slot.batch = batch
        slot.stored = slot.ensure_capacity(slot.stored, len(batch.bytes))
        slot.stored[: len(batch.bytes)].copy_(batch.bytes, non_blocking=True)
        index = batch.samples.numpy()
        slot.jpegs = np.flatnonzero(batch.is_jpeg & (self.header[index] >= 0))
        samples = index[slot.jpegs]
        header_bytes = np.array([kind.size for kind in self.headers.known], np.int64)
        begins = batch.ends[slot.jpegs] + header_bytes[self.header[samples]]
        plan = plan_of(
            begins,
            batch.ends[slot.jpegs + 1] - begins - 2,  # the last two mark the end
            self.header[samples],
            self.first_segment[samples],
            Crops(*(each[slot.jpegs] for each in batch.crops)),
            heights=self.beton.heights[samples],
            widths=self.beton.widths[samples],
        )
        while self.num_headers < len(self.headers.known):  # hardly ever
            kind = self.headers.known[self.num_headers]
            self.codes[self.num_headers], self.factors[self.num_headers] = map(torch.from_numpy, (kind.codes, kind.factors))
            slot.stream.synchronize()  # other slots use them, too
            self.num_headers += 1
        table = torch.from_numpy(plan.table).pin_memory().to(self.device, non_blocking=True)
        J = len(plan.table)
        slot.bits, slot.words = slot.ensure_capacity(slot.bits, J), slot.ensure_capacity(slot.words, plan.words)
        slot.damaged, slot.was_damaged = slot.ensure_capacity(slot.damaged, J), slot.ensure_capacity(slot.was_damaged, J)
        if J:
            self.jpeg.unstuff(table, slot.stored, slot.words, slot.bits)
        return plan, table

    def _decode_jpegs(self, plan: Plan, table: Tensor, slot: Slot) -> None:
        """Decode the JPEGs of the slot into its `rgb`."""
        slot.rgb = slot.ensure_capacity(slot.rgb, plan.pixel_bytes)
        slot.coefficients = slot.ensure_capacity(slot.coefficients, plan.blocks)
        slot.samples = slot.ensure_capacity(slot.samples, plan.blocks)
        if not plan.blocks:
            return
        jobs = torch.from_numpy(plan.jobs).pin_memory().to(self.device, non_blocking=True)
        coefficients, damaged = slot.coefficients[: plan.blocks], slot.damaged[: len(plan.table)]
        coefficients.zero_()
        damaged.zero_()
        known = self.codes, self.factors, self.entries
        self.jpeg.read_segments(
            table, jobs, slot.words, slot.bits, *known, coefficients, damaged, short_bits=SHORT_BITS, segment=SEGMENT
        )
        slot.was_damaged[: len(damaged)].copy_(damaged, non_blocking=True)
        self.jpeg.to_samples(coefficients, self.matrix, slot.samples)
        self.jpeg.to_rgb(table, slot.samples, slot.rgb, most_pixels=plan.most_pixels)


def resize_plan(crops: Crops, first: Ints, widths: Ints, planar: npt.NDArray[np.bool_]) -> Tensor:
    """The plan (B, 10) int64 for `vitpa.kernels.resize` of crops whose first byte lies at `first` (B,).

    Where `planar` they lie there as (3, height, width), else as (height, width, 3) in rows of `widths` (B,) pixels.
    """
    row, column = np.where(planar, crops.width, 3 * widths), np.where(planar, 1, 3)
    channel = np.where(planar, crops.height * crops.width, 1)
    size = (crops.height, crops.width, crops.to_height, crops.to_width, crops.window_top, crops.window_left)
    return torch.from_numpy(np.stack([first, row, column, channel, *size], axis=1))


def most_taps(height: Ints, width: Ints, to_height: Ints, to_width: Ints) -> int:
    """`taps` for `vitpa.kernels.resize` of regions of these sizes (B,), resized to those."""
    sizes, to = np.concatenate([height, width]), np.concatenate([to_height, to_width])
    return int((-(-2 * np.maximum(sizes, to) // to)).max(initial=2)) + 1


def gpu_unsupported_reason(beton: Beton, *, img_size: int, device: torch.device) -> str | None:
    """Why the images of `beton` cannot be decoded on `device`, in a line; None if one of them could be."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        decoder = GpuDecoder(beton, device=device, workers=1)
        decoder.check(img_size)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old: any of theirs
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if beton.is_jpeg.any() and not decoder.headers.known:
        return f"the first JPEG of {beton.path} is not a baseline JPEG in 4:2:0, as FFCV writes them"
    return None
