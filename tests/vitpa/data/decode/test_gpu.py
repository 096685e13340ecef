"""Decoding on a GPU: on a pretended one its order, memory, errors and threads; on a real one pixels and streams too."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.prep import Options, prepare
from tests.conftest import quiet
from tests.support.betons import Sample, jpeg_of, jpeg_sample, write_data
from tests.support.resizing import slow_resize
from vitpa.arguments import ConfigError
from vitpa.config import AugmentConfig
from vitpa.config_file import parse_config
from vitpa.data.beton import Beton
from vitpa.data.decode import gpu
from vitpa.data.decode.gpu import GpuDecoder, gpu_unsupported_reason
from vitpa.data.decode.segment_file import SegmentFile
from vitpa.data.manifest import BetonError, Pixels, beton_path, manifest_path
from vitpa.data.open import choose_decoder, prepare_decoder
from vitpa.data.sampler import Batch
from vitpa.data.stream import CpuDecoder, StreamedImages
from vitpa.distributed import Group
from vitpa.terminal import logged_lines

CPU = torch.device("cpu")
OPTIONS = AugmentConfig(crop="random_resized", eval_crop_pct=0.875)
Decoder = Callable[[Beton], GpuDecoder]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class Stream:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.done = 0

    def wait_event(self, event: Stream) -> None: ...

    def record(self, stream: Stream) -> None:
        self.done += 1

    def synchronize(self) -> None: ...


class SlowJpeg:
    """What vitpa/kernels/jpeg.py does, by Pillow: all of it in the last of its functions. An image has one entry: its size."""

    def __init__(self, decoder: GpuDecoder) -> None:
        self.decoder = decoder

    def unstuff(self, plan: Tensor, stored: Tensor, words: Tensor, bits: Tensor) -> None:
        self.stored = stored

    def find_segments(self, plan: Tensor, *arguments: Any, **options: int) -> None:
        entries, damaged = arguments[-2:]
        for number, (begin, size, _, kind, *more) in enumerate(plan.tolist()):
            damaged[number] = bytes(64) in self.jpeg_of(begin, size, kind)  # Pillow takes no offence
            entries[more[-2]] = size

    def read_segments(self, plan: Tensor, *arguments: Any, **options: int) -> None:
        *_, entries, _, damaged = arguments
        for number, (begin, size, _, kind, *more) in enumerate(plan.tolist()):
            damaged[number] |= bytes(64) in self.jpeg_of(begin, size, kind) or int(entries[more[-2]]) != size

    def to_samples(self, coefficients: Tensor, matrix: Tensor, samples: Tensor) -> None: ...

    def to_rgb(self, plan: Tensor, samples: Tensor, rgb: Tensor, *, most_pixels: int) -> None:
        for begin, size, _, kind, *_, top, left, height, width, _, to in plan.tolist():
            pixels = np.array(Image.open(BytesIO(self.jpeg_of(begin, size, kind))))[top : top + height, left : left + width]
            rgb[to : to + 3 * height * width] = torch.from_numpy(pixels).permute(2, 0, 1).flatten()
            assert height * width <= most_pixels

    def jpeg_of(self, begin: int, size: int, kind: int) -> bytes:
        return self.stored[begin - self.decoder.headers.known[kind].size : begin + size + 2].numpy().tobytes()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Makes decoders whose device is the CPU and whose kernels are Pillow's functions."""
    empty = torch.empty
    for name, stand_in in (
        ("Stream", Stream),
        ("Event", Stream),
        ("stream", lambda _: nullcontext()),
        ("device", lambda _: nullcontext()),
        ("current_stream", Stream),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def on_the_cpu(*shape: Any, device: Any = None, pin_memory: bool = False, **more: Any) -> Tensor:
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)

    def make(beton: Beton) -> GpuDecoder:
        decoder = GpuDecoder(beton, device=torch.device("cuda:0"), workers=2)
        decoder.device = CPU
        monkeypatch.setattr(decoder, "resize", SimpleNamespace(resize=slow_resize, room=lambda *_: 0))
        monkeypatch.setattr(decoder, "jpeg", SlowJpeg(decoder))
        return decoder

    return make


class PillowDecoder(CpuDecoder):
    """As `CpuDecoder`, but by Pillow."""

    def _pixels(self, index: int) -> Pixels:
        if not self.beton.is_jpeg[index]:
            return self.beton.read_image(index)
        return np.array(Image.open(BytesIO(self.beton.stored(index).tobytes())))


def stream(beton: Beton, device: torch.device = CPU) -> StreamedImages:
    images = StreamedImages(beton, OPTIONS, img_size=32, seed=0, device=CPU, workers=2)
    images.decoder = PillowDecoder(beton, device=CPU, workers=2)
    if device != CPU:
        images.device, images.decoder = device, GpuDecoder(beton, device=device, workers=3)
    return images


@pytest.fixture(scope="module", params=[0.0, 0.5, 1.0])
def beton(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """12 images of different sizes: raw, half JPEGs, JPEGs."""
    source, out = next(photos.parent.glob("photos_source*")), tmp_path_factory.mktemp("share")
    assert prepare(Options(dataset="photos", source=source, out=out, short_side_px=48, jpeg_share=request.param), quiet)
    return Beton.open(beton_path(out, "photos", "train"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not decoders()


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def kept(batches: Iterator[Batch]) -> list[Batch]:
    return [Batch(*(each.clone().cpu() for each in batch)) for batch in batches]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """The same, to a grey level where Pillow goes along columns first."""
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got.samples, wanted.samples) and torch.equal(got.labels, wanted.labels)
        assert got.images.shape == wanted.images.shape
        difference = (got.images.int() - wanted.images.int()).abs().float()
        if difference.numel():
            assert difference.max() <= 1
            assert difference.mean() < 0.1


BATCHES = [
    torch.arange(12).flip(0)[:7],
    torch.tensor([3]),
    torch.arange(11),
    torch.arange(4),
    torch.arange(12),
    torch.arange(2),
]
EVAL = [torch.tensor([1, -1, 5]), torch.tensor([-1, -1]), torch.empty(0, dtype=torch.int64), torch.tensor([9])]


def check_batches(images: StreamedImages, reference: StreamedImages) -> None:
    for _ in range(2):  # with memory that is used again
        assert_same(kept(images.train_batches(BATCHES, 3)), kept(reference.train_batches(BATCHES, 3)))
        assert_same(kept(images.eval_batches(EVAL)), kept(reference.eval_batches(EVAL)))
    for size in (16, 40, 24):  # in memory that was used for others
        assert_same(kept(images.train_batches(BATCHES, 3, size)), kept(reference.train_batches(BATCHES, 3, size)))
    black = kept(images.eval_batches([torch.tensor([-1, 2])]))[0].images
    assert not black[0].any() and black[1].any()


def test_batches_are_those_of_the_cpu(pretended: Decoder, beton: Beton) -> None:
    images = stream(beton)
    images.decoder = pretended(beton)
    check_batches(images, stream(beton))


def test_a_part_of_a_file_is_decoded_as_by_the_cpu(pretended: Decoder, beton: Beton) -> None:
    part = beton.part(np.array([0, 2, 3, 7, 10]))
    images, reference = stream(part), stream(part)
    images.decoder = pretended(part)
    batches = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    assert_same(kept(images.train_batches(batches, 3)), kept(reference.train_batches(batches, 3)))
    whole = kept(stream(beton).eval_batches([torch.tensor([10, 0, 3])]))
    for got, wanted in zip(kept(images.eval_batches([torch.tensor([4, 0, 2])])), whole, strict=True):
        assert torch.equal(got.labels, wanted.labels)
        assert (got.images.int() - wanted.images.int()).abs().max() <= 1


def test_an_evaluation_within_an_epoch_disturbs_nothing(pretended: Decoder, beton: Beton) -> None:
    images = stream(beton)
    images.decoder = pretended(beton)
    found = []
    for batch in images.train_batches(BATCHES, 3):
        found.append(Batch(*(each.clone() for each in batch)))
        if len(found) == 2:
            assert len(kept(images.eval_batches(EVAL))) == len(EVAL)
    assert_same(found, kept(stream(beton).train_batches(BATCHES, 3)))


def test_memory_is_used_again_and_work_goes_ahead_but_not_far(pretended: Decoder, beton: Beton) -> None:
    images, asked = stream(beton), []
    images.decoder = decoder = pretended(beton)
    assert isinstance(decoder, GpuDecoder)

    def batches() -> Iterator[Tensor]:
        for number in range(12):
            asked.append(number)
            yield torch.tensor([number])

    places = set()
    for number, batch in enumerate(images.train_batches(batches(), 0)):
        assert len(asked) == min(12, number + gpu.BATCHES_AHEAD + 1)
        places.add(batch.images.data_ptr())
    assert len(places) == gpu.BATCHES_AHEAD + 1
    assert len(decoder.free) == gpu.BATCHES_AHEAD + 1


@pytest.mark.parametrize("late", [False, True])
def test_leaving_the_loop_leaves_no_thread(pretended: Decoder, beton: Beton, late: bool) -> None:
    images = stream(beton)
    images.decoder = decoder = pretended(beton)
    for _ in images.train_batches([torch.arange(12)] * 200, 0):
        if late:
            time.sleep(0.2)
        break
    assert not decoders()
    assert isinstance(decoder, GpuDecoder) and len(decoder.free) == gpu.BATCHES_AHEAD + 1
    assert len(kept(images.eval_batches(EVAL))) == len(EVAL)


def test_an_error_of_the_index_iterator_ends_the_loop(pretended: Decoder, beton: Beton) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.arange(4)
        raise RuntimeError("no more")

    images = stream(beton)
    images.decoder = pretended(beton)
    with pytest.raises(RuntimeError, match="no more"):
        list(images.train_batches(broken(), 0))
    with pytest.raises(IndexError):
        list(images.train_batches([torch.tensor([12])], 0))


@pytest.fixture
def cut(beton: Beton, tmp_path: Path) -> Beton:
    """The images, of which the last JPEG has zeros from its middle on but for its end."""
    if not beton.is_jpeg.any():
        pytest.skip("has no JPEGs")
    path = beton_path(tmp_path, "photos", "train")
    path.parent.mkdir()
    shutil.copy(beton.path, path)
    shutil.copy(manifest_path(beton.path), manifest_path(path))
    last = int(np.flatnonzero(beton.is_jpeg)[-1])
    size = int(beton.sizes[last])
    with path.open("r+b") as file:
        file.seek(int(beton.offsets[last]) + size // 2)
        file.write(bytes(size - size // 2 - 2))
    return Beton.open(path)


def check_cut(images: StreamedImages, cut: Beton) -> None:
    last = int(np.flatnonzero(cut.is_jpeg)[-1])
    said = rf"train\.beton: the JPEG of sample {last} cannot be decoded; .*vitpa prep photos"
    for _ in range(2):
        with pytest.raises(BetonError, match=said):
            next(images.train_batches([torch.arange(2)] * 9, 0))
    assert not decoders()


def check_damaged(images: StreamedImages, damaged: Beton) -> None:
    found, started_s = [], time.process_time()
    with pytest.raises(BetonError, match=r"train\.beton: the JPEG of sample 5 cannot be decoded; .*vitpa prep photos"):
        for batch in images.train_batches([*torch.arange(12).split(2), *[torch.arange(4)] * 50], 0):
            found.append(batch.labels.tolist())
    assert time.process_time() - started_s < 5
    assert found == [damaged.labels[:2].tolist(), damaged.labels[2:4].tolist()]
    assert not decoders()


def test_a_damaged_jpeg_is_named(pretended: Decoder, damaged: Beton) -> None:
    images = stream(damaged)
    images.decoder = pretended(damaged)
    check_damaged(images, damaged)


def test_a_jpeg_of_another_size_than_its_table_says_is_named(pretended: Decoder, tmp_path: Path) -> None:
    samples = [jpeg_sample(40, 56, 0), Sample(jpeg_of(40, 56, 1), 56, 56), jpeg_sample(48, 48, 2, label=1)]
    beton = Beton.open(write_data(tmp_path, samples))
    images = stream(beton)
    images.decoder = pretended(beton)
    for _ in range(2):
        with pytest.raises(BetonError, match=r"sample 1 cannot be decoded: it has 56 x 40 pixels, its table says 56 x 56"):
            list(images.eval_batches([torch.arange(3)]))
    assert not decoders()


def test_damaged_codes_are_found_before_the_first_batch(pretended: Decoder, cut: Beton) -> None:
    images = stream(cut)
    images.decoder = pretended(cut)
    check_cut(images, cut)


GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


@pytest.fixture
def jpegs(beton: Beton) -> Beton:
    if not beton.is_jpeg.any():
        pytest.skip("has no JPEGs")
    return beton


def with_file(images: StreamedImages, decoder: GpuDecoder, folder: Path, group: Group = GROUP) -> StreamedImages:
    """Images whose decoder is prepared as for a training."""
    images.decoder = decoder
    with logged_lines():
        prepare_decoder(decoder, folder, group)
    return images


def test_segments_are_looked_for_once_for_all_starts(
    pretended: Decoder, jpegs: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_batches(with_file(stream(jpegs), pretended(jpegs), tmp_path / "made"), stream(jpegs))
    assert capsys.readouterr().err.count("train.beton: its JPEGs are read once") == 1
    monkeypatch.setattr(GpuDecoder, "find_segments", None)
    check_batches(with_file(stream(jpegs), pretended(jpegs), tmp_path / "made"), stream(jpegs))
    assert not capsys.readouterr().err


def test_a_part_of_the_images_has_a_file_of_its_own(
    pretended: Decoder, jpegs: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = jpegs.part(np.array([0, 2, 3, 7, 10]))
    for each in (jpegs, part):
        with_file(stream(each), pretended(each), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(GpuDecoder, "find_segments", None)
    batches = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    images = with_file(stream(part), pretended(part), tmp_path)
    assert_same(kept(images.train_batches(batches, 3)), kept(stream(part).train_batches(batches, 3)))


def test_codes_damaged_since_segments_were_found_are_named_in_their_batch(
    pretended: Decoder, jpegs: Beton, cut: Beton, tmp_path: Path
) -> None:
    with_file(stream(jpegs), pretended(jpegs), tmp_path / "segments")
    images, last = with_file(stream(cut), pretended(cut), tmp_path / "segments"), int(np.flatnonzero(cut.is_jpeg)[-1])
    batches, found = [torch.tensor([0, 1]), torch.tensor([2, last]), torch.tensor([3])], []
    with pytest.raises(BetonError, match=rf"train\.beton: the JPEG of sample {last} cannot be decoded; .*vitpa prep photos"):
        for batch in images.train_batches(batches, 0):
            found.append(batch.labels.tolist())
    assert found == [cut.labels[:2].tolist()]


def test_a_file_that_cannot_be_used_is_made_again(
    pretended: Decoder, jpegs: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = SegmentFile(tmp_path, jpegs)
    with_file(stream(jpegs), pretended(jpegs), tmp_path)
    whole, found = file.path.read_bytes(), file.read()
    assert found is not None
    file.path.write_bytes(whole[:-1])
    with_file(stream(jpegs), pretended(jpegs), tmp_path)
    assert file.path.read_bytes() == whole
    file.write(replace(found, kinds=np.zeros_like(found.kinds)))  # as of a version that reads other headers
    with_file(stream(jpegs), pretended(jpegs), tmp_path)
    assert file.path.read_bytes() == whole
    assert capsys.readouterr().err.count("its JPEGs are read once") == 3


def test_without_a_folder_for_the_file_it_goes_on(
    pretended: Decoder, jpegs: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    images = with_file(stream(jpegs), pretended(jpegs), tmp_path / "taken")
    said = capsys.readouterr().err
    assert "cannot be read (Not a directory): it is made again" in said
    assert re.search(r"photos-train-\w{16}\.bin cannot be written \(.*\): the next start reads all JPEGs again", said)
    assert_same(kept(images.train_batches(BATCHES, 3)), kept(stream(jpegs).train_batches(BATCHES, 3)))


def test_the_main_process_alone_writes_and_speaks(
    pretended: Decoder, jpegs: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Group(rank=1, world_size=2, local_rank=1, local_world_size=2, device=CPU)
    with_file(stream(jpegs), pretended(jpegs), tmp_path / "made", other)
    assert not (tmp_path / "made").exists()
    assert not capsys.readouterr().err


def test_without_a_gpu_it_is_said(beton: Beton) -> None:
    assert gpu_unsupported_reason(beton, img_size=32, device=CPU) == "there is no GPU"
    if not torch.cuda.is_available():
        assert gpu_unsupported_reason(beton, img_size=32, device=torch.device("cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_where_the_gpu_cannot_decode_the_cpu_does_and_it_is_said(beton: Beton, capsys: pytest.CaptureFixture[str]) -> None:
    group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cuda:0"))
    for word, said in (("auto", 1), ("cpu", 0)):
        config = parse_config({"dataset": "photos", "runtime": {"decoder": word}}, "here")
        with logged_lines():
            assert choose_decoder(config, beton, group) == "cpu"
        assert capsys.readouterr().err.count("images are decoded on the CPU, since the GPU cannot do it: ") == said
    config = parse_config({"dataset": "photos", "runtime": {"decoder": "gpu"}}, "here")
    with pytest.raises(ConfigError, match=r"^runtime\.decoder=gpu: \w+: .*; set runtime\.decoder=cpu$"):
        choose_decoder(config, beton, group)


class TestOnGpu:
    """The same without pretending."""

    pytestmark = on_gpu

    def test_it_works_here(self, beton: Beton) -> None:
        assert gpu_unsupported_reason(beton, img_size=32, device=torch.device("cuda")) is None

    def test_batches_are_those_of_the_cpu(self, beton: Beton) -> None:
        check_batches(stream(beton, torch.device("cuda")), stream(beton))

    def test_no_batch_is_torn_though_the_device_is_busy(self, beton: Beton) -> None:
        images = stream(beton, torch.device("cuda"))
        batches = [torch.randint(12, (300,)) for _ in range(20)]
        expected = kept(images.train_batches(batches, 1))
        work = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        found = []
        for batch in images.train_batches(batches, 1):
            for _ in range(10):
                work = work @ work * 1e-3
            found.append(Batch(*(each.clone() for each in batch)))
        assert all(torch.equal(a.cpu(), b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))

    def test_a_damaged_jpeg_is_named(self, damaged: Beton) -> None:
        check_damaged(stream(damaged, torch.device("cuda")), damaged)

    def test_damaged_codes_are_found_before_the_first_batch(self, cut: Beton) -> None:
        check_cut(stream(cut, torch.device("cuda")), cut)

    def test_segments_come_from_a_file(
        self, jpegs: Beton, cut: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device, folder = torch.device("cuda"), tmp_path / "segments"
        group = replace(GROUP, device=device)
        for find_segments in (GpuDecoder.find_segments, None):
            monkeypatch.setattr(GpuDecoder, "find_segments", find_segments)
            decoder = GpuDecoder(jpegs, device=device, workers=2)
            check_batches(with_file(stream(jpegs, device), decoder, folder, group), stream(jpegs))
        images = with_file(stream(cut, device), GpuDecoder(cut, device=device, workers=2), folder, group)
        last = int(np.flatnonzero(cut.is_jpeg)[-1])
        with pytest.raises(BetonError, match=rf"the JPEG of sample {last} cannot be decoded"):
            list(images.eval_batches([torch.arange(12)]))
