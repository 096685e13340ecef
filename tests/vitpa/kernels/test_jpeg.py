"""JPEGs: their headers, and the kernels that decode them against Pillow, by Triton's interpreter and on a GPU.

Run as a program (with TRITON_INTERPRET=1, which counts only before Triton is imported), it prints what differs as JSON.
"""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.interpreter import report_of
from vitpa.data.augment.crop_boxes import Crops
from vitpa.data.decode.jpeg_headers import (
    BLOCK,
    IS_LONG,
    LONG_BITS,
    SEGMENT,
    SHORT_BITS,
    ZIGZAG,
    Headers,
    code_table,
    num_segments,
    plan_of,
    read_header,
)
from vitpa.data.manifest import Pixels
from vitpa.kernels import jpeg as kernels


def picture(rng: np.random.Generator, height: int, width: int, noise: int) -> Pixels:
    """Colourful and smooth, with some noise."""
    coarse = rng.integers(0, 256, (2 + height // 16, 2 + width // 16, 3), np.uint8)
    smooth = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    pixels: Pixels = np.clip(smooth + rng.integers(-noise, noise + 1, smooth.shape), 0, 255).astype(np.uint8)
    return pixels


def encoded(pixels: Pixels, **options: Any) -> Pixels:
    """A baseline JPEG of `pixels`, 4:2:0 unless `options` (Pillow's) say otherwise."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"subsampling": 2, **options})
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(
    jpegs: list[Pixels], sizes: list[tuple[int, int]], crops: Crops, device: str, later: list[Pixels] | None = None
) -> tuple[list[Pixels], list[int], list[int]]:
    """The crops (height, width, 3) of JPEGs of these heights and widths, and which were found damaged: at first, when read.

    When they are read they have become `later`, with as many bytes.
    """
    headers = Headers(len(jpegs))
    heights, widths = np.array(sizes).T
    kinds = [headers.find(each, *size) for each, size in zip(jpegs, sizes, strict=True)]
    assert None not in kinds
    in_header = np.array([headers.known[kind].size for kind in kinds if kind is not None])
    lengths = np.array([len(each) for each in jpegs])
    begins = np.cumsum(lengths) - lengths + in_header
    segments = num_segments(heights, widths)
    first_segments = np.cumsum(segments) - segments
    plan = plan_of(begins, lengths - in_header - 2, np.array(kinds), first_segments, crops, heights=heights, widths=widths)

    def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype, device=device)

    table, jobs = torch.from_numpy(plan.table).to(device), torch.from_numpy(plan.jobs).to(device)
    stored = torch.from_numpy(np.concatenate(jpegs)).to(device)
    entries = room(int(segments.sum()), dtype=torch.int64)
    codes = torch.from_numpy(np.stack([each.codes for each in headers.known])).to(device)
    factors = torch.from_numpy(np.stack([each.factors for each in headers.known])).to(device)
    words, bits, damaged, damaged_later = (room(count, dtype=torch.int32) for count in (plan.words, *[len(jpegs)] * 3))
    samples, rgb = room(plan.blocks, BLOCK, dtype=torch.uint8), room(plan.pixel_bytes, dtype=torch.uint8)
    coefficients = room(plan.blocks, BLOCK, dtype=torch.int16).zero_()
    kernels.unstuff(table, stored, words, bits)
    kernels.find_segments(table, words, bits, codes, entries, damaged, short_bits=SHORT_BITS, segment=SEGMENT)
    if later is not None:
        stored = torch.from_numpy(np.concatenate(later)).to(device)
        kernels.unstuff(table, stored, words, bits)
    known = codes, factors, entries
    damaged_later.zero_()
    kernels.read_segments(
        table, jobs, words, bits, *known, coefficients, damaged_later, short_bits=SHORT_BITS, segment=SEGMENT
    )
    kernels.to_samples(coefficients, kernels.idct_matrix().to(device), samples)
    kernels.to_rgb(table, samples, rgb, most_pixels=plan.most_pixels)
    pixels = []
    for first, height, width in zip(plan.table[:, -1].tolist(), crops.height.tolist(), crops.width.tolist(), strict=True):
        planar = rgb[first : first + 3 * height * width].view(3, height, width)
        pixels.append(planar.permute(1, 2, 0).cpu().numpy())
    return pixels, damaged.tolist(), damaged_later.tolist()


def crop_of(rng: np.random.Generator, height: int, width: int) -> tuple[int, ...]:
    """One of the fields of `Crops`; every third is the whole image."""
    if rng.integers(3) == 0:
        return 0, 0, width, height, 8, 8, 0, 0
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return left, top, int(rng.integers(1, width - left + 1)), int(rng.integers(1, height - top + 1)), 8, 8, 0, 0


def differences(device: str, longest: int, count: int) -> list[int]:
    """The largest difference of each image to Pillow, in grey levels; -1 if it was found damaged. The first image is wide."""
    rng = np.random.default_rng()
    jpegs, sizes, crops, expected = [], [], [], []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(1, longest + 1, 2))
        options = {"quality": int(rng.integers(5, 101)), "optimize": bool(number % 2)}
        if not number:  # two rows of two segments; few codes, since interpreting takes long
            height, width, options["quality"] = 20, 140, 20
        jpegs.append(encoded(picture(rng, height, width, noise=(2, 40)[number % 2]), **options))
        sizes.append((height, width))
        crops.append(crop_of(rng, height, width))
        left, top, crop_width, crop_height = crops[-1][:4]
        with Image.open(io.BytesIO(jpegs[-1].tobytes())) as image:
            expected.append(np.array(image)[top : top + crop_height, left : left + crop_width])
    found, *damaged = decoded(jpegs, sizes, Crops(*np.array(crops).T), device)
    return [
        -1 if any(bad) else int(np.abs(got.astype(np.int64) - wanted).max())
        for got, wanted, *bad in zip(found, expected, *damaged, strict=True)
    ]


def test_segments_that_a_crop_needs_are_read() -> None:
    crops = Crops(*np.array([[125, 20, 20, 20, 8, 8, 0, 0], [200, 0, 8, 1, 8, 8, 0, 0]]).T)
    same = np.full(2, 300)  # 3 segments in each of 19 rows
    plan = plan_of(0 * same, same, 0 * same, 0 * same, crops, heights=same, widths=same)
    assert plan.table[:, 6:10].tolist() == [[1, 3, 7, 10], [0, 1, 12, 14]]
    assert plan.jobs.tolist() == [[0, 3], [0, 4], [0, 6], [0, 7], [1, 1]]
    assert num_segments(same, same).tolist() == [57, 57]


def whole(jpegs: list[Pixels], height: int, width: int) -> Crops:
    """All of images of one size."""
    return Crops(*np.array([[0, 0, width, height, 8, 8, 0, 0]] * len(jpegs)).T)


def damages(device: str, height: int, width: int) -> list[int]:
    """Which of these are found damaged: whole, cut short, with bytes too many, with a marker inside, all ones; whole again."""
    jpeg = encoded(picture(np.random.default_rng(), height, width, noise=5), quality=90)
    header = read_header(jpeg.tobytes())
    assert header is not None
    end, marker, ones = jpeg[-2:], jpeg.copy(), jpeg.copy()
    middle = (header.size + len(jpeg)) // 2
    marker[middle : middle + 2] = (0xFF, 0xD0)
    ones[header.size : -2 : 2], ones[header.size + 1 : -2 : 2] = 0xFF, 0
    cut, longer = np.concatenate([jpeg[:middle], end]), np.concatenate([jpeg[:-2], np.zeros(4, np.uint8), end])
    jpegs = [jpeg, cut, longer, marker, ones, jpeg]
    return decoded(jpegs, [(height, width)] * len(jpegs), whole(jpegs, height, width), device)[1]


def later_damages(device: str, height: int, width: int) -> list[int]:
    """Which are found damaged that have changed since it was found where their segments begin.

    They are: as they were, with zeros from the middle on, with a marker inside, all ones, codes of an image more grey, codes
    that end too soon; again as they were.
    """
    jpeg = encoded(picture(np.random.default_rng(), height, width, noise=5), quality=90)
    header = read_header(jpeg.tobytes())
    assert header is not None
    zeros, marker, ones, grey, short = (jpeg.copy() for _ in range(5))
    middle = (header.size + len(jpeg)) // 2
    zeros[middle:-2] = 0
    marker[middle : middle + 2] = (0xFF, 0xD0)
    ones[header.size : -2 : 2], ones[header.size + 1 : -2 : 2] = 0xFF, 0
    codes = encoded(np.full((height, width, 3), 99, np.uint8), quality=90)[header.size : -2]
    grey[header.size : -2] = np.resize(codes, len(jpeg) - 2 - header.size)
    short[middle:-2] = np.resize(np.array([0xFF, 0], np.uint8), len(jpeg) - 2 - middle)
    jpegs = [jpeg] * 7
    later = [jpeg, zeros, marker, ones, grey, short, jpeg]
    return decoded(jpegs, [(height, width)] * 7, whole(jpegs, height, width), device, later)[2]


def main() -> None:
    torch.set_num_threads(1)
    report = {"differences": differences("cpu", 28, 12), "damages": damages("cpu", 17, 20)}
    json.dump({**report, "later": later_damages("cpu", 17, 20)}, sys.stdout)


@pytest.mark.slow
def test_pixels_are_pillows_to_the_bit_and_damage_is_seen() -> None:
    later = [0, 1, 1, 1, 1, 1, 0]
    report = {"differences": [0] * 12, "damages": [0, 1, 1, 1, 1, 0], "later": later}
    assert report_of("tests.vitpa.kernels.test_jpeg") == report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("longest", [40, 300, 900])
def test_gpu_pixels_are_pillows_to_the_bit(longest: int) -> None:
    assert differences("cuda", longest, 100) == [0] * 100
    assert damages("cuda", longest, longest) == [0, 1, 1, 1, 1, 0]
    assert later_damages("cuda", longest, longest) == [0, 1, 1, 1, 1, 1, 0]


def test_codes_are_those_of_the_standard() -> None:
    # T.81, table K.3: DC of luma
    table = code_table(bytes([0, 1, 5, 1, 1, 1, 1, 1, 1] + [0] * 7), bytes(range(12)))
    codes = ["00", "010", "011", "100", "101", "110", "1110", "11110", "111110", "1111110", "11111110", "111111110"]
    for symbol, code in enumerate(codes):
        first = int(code.ljust(SHORT_BITS, "0"), 2)
        assert set(table[first : first + 2 ** (SHORT_BITS - len(code))].tolist()) == {256 * len(code) + symbol}
    assert table[2**SHORT_BITS - 1] == 0  # all ones is no code


def test_long_codes_are_found_by_way_of_a_second_table() -> None:
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 16]
    counts = bytes(lengths.count(length) for length in range(1, 17))
    table = code_table(counts, bytes(range(1, 15)))
    code, found = 0, []
    for before, length in zip([0, *lengths], lengths, strict=False):
        code = (code + (before > 0)) << (length - before)
        bits = format(code, f"0{length}b").ljust(16, "1")
        entry = int(table[int(bits[:SHORT_BITS], 2)])
        if entry >= IS_LONG:
            entry = int(table[2**SHORT_BITS + ((entry - IS_LONG) << LONG_BITS) + int(bits[SHORT_BITS:], 2)])
        found.append((entry >> 8, entry & 255))
    assert found == [(length, symbol) for symbol, length in enumerate(lengths, start=1)]


def test_an_impossible_code_has_no_entries() -> None:
    assert not code_table(bytes([3] + [0] * 15), bytes(3)).any()
    assert not code_table(bytes([0] * 11 + [255, 255, 0, 0, 0]), bytes(510)).any()


def test_threads_that_meet_a_kind_of_header_first_add_it_once() -> None:
    jpeg, headers = encoded(picture(np.random.default_rng(), 20, 20, 9)), Headers(16)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: headers.find(jpeg, 20, 20), range(64))) == {0}
    assert len(headers.known) == 1


def test_the_inverse_transform_is_the_cosine_transforms() -> None:
    frequency, sample = np.meshgrid(np.arange(8), np.arange(8))
    exact = np.cos((2 * sample + 1) * frequency * np.pi / 16) * np.where(frequency, 2**0.5, 1)
    assert np.abs(kernels.idct_matrix().numpy() / 2**13 - exact).max() < 2e-4


def test_coefficients_go_along_diagonals() -> None:
    assert ZIGZAG[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
    assert sorted(ZIGZAG.tolist()) == list(range(64))
    # turned round, it is the same way back
    assert (63 - ZIGZAG[::-1]).tolist() == ZIGZAG.tolist()


def test_one_kind_of_header_is_read_once_for_all_sizes() -> None:
    rng, headers = np.random.default_rng(), Headers(2)
    for height, width in ((5, 8), (70, 3), (256, 300)):
        assert headers.find(encoded(picture(rng, height, width, 0), quality=90), height, width) == 0
    assert headers.find(encoded(picture(rng, 9, 9, 0), quality=50), 9, 9) == 1
    assert headers.find(encoded(picture(rng, 9, 9, 0), quality=40), 9, 9) is None  # a third kind
    assert headers.find(encoded(picture(rng, 9, 9, 0), quality=50), 9, 9) == 1
    assert len(headers.known) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 1},
        {"subsampling": 0, "keep_rgb": True},
    ],
)
def test_other_jpegs_are_left_to_the_cpu(options: dict[str, Any]) -> None:
    jpeg = encoded(picture(np.random.default_rng(), 40, 40, 9), **options)
    assert Headers(1).find(jpeg, 40, 40) is None


def test_grey_and_inverted_jpegs_are_left_to_the_cpu() -> None:
    pixels = picture(np.random.default_rng(), 40, 40, 9)
    for mode in ("L", "CMYK"):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, "JPEG")
        assert Headers(1).find(np.frombuffer(file.getvalue(), np.uint8), 40, 40) is None


def test_what_is_no_whole_jpeg_of_its_size_is_left_to_the_cpu() -> None:
    jpeg = encoded(picture(np.random.default_rng(), 40, 50, 9))
    headers = Headers(1)
    for wrong in (jpeg[:-2], jpeg[:300], jpeg[:0], np.zeros_like(jpeg), np.concatenate([jpeg, jpeg[:5]])):
        assert headers.find(wrong, 40, 50) is None
    assert headers.find(jpeg, 40, 51) is None
    assert headers.find(jpeg, 40, 50) == 0


def test_all_chroma_that_a_crop_needs_is_decoded() -> None:
    """With one row more above and below, which interpolation takes in; and no MCU more than that."""
    crops = Crops(*np.array([[0, 0, 1, 1, 8, 8, 0, 0], [16, 32, 16, 16, 8, 8, 0, 0], [18, 34, 12, 12, 8, 8, 0, 0]]).T)
    same = np.full(3, 100)
    plan = plan_of(0 * same, same, 0 * same, 7 * np.arange(3), crops, heights=same, widths=same)
    assert plan.table[:, 6:10].tolist() == [[0, 1, 0, 1], [1, 4, 0, 3], [2, 3, 1, 2]]
    assert plan.table[:, 10].tolist() == [0, 6, 60] and plan.blocks == 66
    assert plan.jobs.tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 2]]  # an MCU row has one segment
    assert plan.table[:, 17].tolist() == [0, 7, 14]
    assert plan.table[:, 18].tolist() == [0, 3, 771] and plan.pixel_bytes == 1203 and plan.most_pixels == 256


if __name__ == "__main__":
    main()
