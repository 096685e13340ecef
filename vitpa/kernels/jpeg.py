"""Baseline JPEGs decoded on the GPU: the pixels of libjpeg (and so of Pillow), to the bit.

Huffman codes can only be read one after the other: an image takes one thread of a GPU some 20 ms, whatever the others do.
So rows of MCUs are cut into segments, where each of these begins is found once and kept, and from then on a thread reads one
segment, and only those that are wanted. What follows is done for all blocks in parallel: the inverse cosine transform
(libjpeg's jidctint.c: a product with integers, rounded twice), the chroma interpolated to full size (jdsample.c, "fancy
upsampling") and RGB (jdcolor.c). Format: ITU-T T.81; what of it: vitpa/data/decode/jpeg_headers.py.

Axes: J images. A block has 8 x 8 samples; an MCU has 6 blocks, 4 of Y for 16 x 16 pixels, one of Cb and one of Cr.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNSTUFF_BYTES = 4096  # at a time
LANES = 32  # images or segments of a program: a warp
BURST = 64  # codes of each, until it is asked whether all are done
ROWS = 256  # of blocks, a program
PIXELS = 1024  # a program


@triton.jit
def _unstuff_kernel(plan, stored, words, bits, PLAN: tl.constexpr, BYTES: tl.constexpr):
    image = tl.program_id(0)
    at = plan + image * PLAN
    source, size = stored + tl.load(at), tl.load(at + 1).to(tl.int32)
    target = words + tl.load(at + 2) * 4
    kept = 0
    markers = 0
    for begin in range(0, size, BYTES):
        index = begin + tl.arange(0, BYTES)
        inside = index < size
        byte = tl.load(source + index, mask=inside, other=1)
        before = tl.load(source + index - 1, mask=inside & (index > 0), other=0)
        keep = (inside & ((before != 255) | (byte != 0))).to(tl.int32)
        markers += tl.sum((inside & (before == 255) & (byte != 0)).to(tl.int32))
        position = kept + tl.cumsum(keep) - keep
        # the first byte of a word comes last: read as little-endian, the first bit of the four bytes is the highest one
        tl.store(target + (position ^ 3), byte, mask=keep > 0)
        kept += tl.sum(keep)
    tl.store(bits + image, tl.where(markers > 0, -1, kept * 8))


@triton.jit
def _code(words, bit, table, active, SHORT_BITS: tl.constexpr):
    """The code at `bit`: its length (0: there is none), its symbol, and the value in the bits that follow it."""
    LONG_BITS: tl.constexpr = 16 - SHORT_BITS
    LONG: tl.constexpr = 0x4000
    high = tl.load(words + (bit >> 5), mask=active, other=0).to(tl.uint32, bitcast=True)
    low = tl.load(words + (bit >> 5) + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
    shift = (bit & 31).to(tl.uint32)
    window = (high << shift) | ((low >> 1) >> (31 - shift))
    entry = tl.load(table + (window >> (32 - SHORT_BITS)).to(tl.int32), mask=active, other=0).to(tl.int32)
    is_long = entry >= LONG
    rest = (window >> (32 - SHORT_BITS - LONG_BITS)).to(tl.int32) & ((1 << LONG_BITS) - 1)
    longer = (1 << SHORT_BITS) + ((entry & (LONG - 1)) << LONG_BITS) + rest
    entry = tl.where(is_long, tl.load(table + longer, mask=active & is_long, other=0).to(tl.int32), entry)
    length, size = entry >> 8, entry & 15
    value = (((window << length.to(tl.uint32)) >> 1) >> (31 - size).to(tl.uint32)).to(tl.int32)
    value = tl.where(value < ((1 << size) >> 1), value - (1 << size) + 1, value)
    return length, entry & 255, value


@triton.jit
def _find_segments_kernel(
    plan, words, bits, codes, entries, damaged, J,
    PLAN: tl.constexpr, TABLE: tl.constexpr, SHORT_BITS: tl.constexpr, SEGMENT: tl.constexpr,
    LANES: tl.constexpr, BURST: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = image < J
    at = plan + image * PLAN
    end = tl.load(bits + image, mask=there, other=0)
    words += tl.load(at + 2, mask=there, other=0)
    codes += tl.load(at + 3, mask=there, other=0).to(tl.int32) * (4 * TABLE)
    columns, rows = tl.load(at + 4, mask=there, other=0).to(tl.int32), tl.load(at + 5, mask=there, other=0).to(tl.int32)
    entries += tl.load(at + 17, mask=there, other=0)
    in_row = tl.cdiv(columns, SEGMENT)

    bit = tl.zeros((LANES,), tl.int32)
    row, column, block = bit, bit, bit  # MCU, and block in it
    position = bit  # of the next coefficient in the block, in zigzag order; that of 0 is called DC, the others AC
    dc_y, dc_b, dc_r = bit, bit, bit  # of the block before
    active = there & (end >= 0)
    bad = end < 0
    while tl.max(active.to(tl.int32), 0) > 0:
        for _ in range(BURST):
            begins = active & (column % SEGMENT == 0) & (block == 0) & (position == 0)
            # 28 bits, and 12 of each DC
            entry = bit.to(tl.int64) | ((dc_y & 4095).to(tl.int64) << 28) | ((dc_b & 4095).to(tl.int64) << 40)
            tl.store(entries + row * in_row + column // SEGMENT, entry | (dc_r.to(tl.int64) << 52), mask=begins)
            is_dc = position == 0
            table = codes + (2 * (block >= 4).to(tl.int32) + tl.where(is_dc, 0, 1)) * TABLE
            length, symbol, value = _code(words, bit, table, active, SHORT_BITS)
            zeros, size = symbol >> 4, symbol & 15
            bit += tl.where(active, length + size, 0)
            target = position + zeros
            wrong = (length == 0) | (bit > end) | (target > 63)
            wrong |= tl.where(is_dc, (zeros > 0) | (size > 11), (size == 0) & (zeros > 0) & (zeros < 15))
            bad |= active & wrong
            active &= ~wrong

            update = active & is_dc
            dc_y += tl.where(update & (block < 4), value, 0)
            dc_b += tl.where(update & (block == 4), value, 0)
            dc_r += tl.where(update & (block == 5), value, 0)
            wrong = (dc_y >> 11 != dc_y >> 31) | (dc_b >> 11 != dc_b >> 31) | (dc_r >> 11 != dc_r >> 31)
            bad |= active & wrong
            active &= ~wrong
            position = tl.where(~is_dc & (symbol == 0), 64, target + 1)
            block = tl.where(active & (position > 63), block + 1, block)
            position = tl.where(position > 63, 0, position)
            column = tl.where(block == 6, column + 1, column)
            block = tl.where(block == 6, 0, block)
            row = tl.where(column == columns, row + 1, row)
            column = tl.where(column == columns, 0, column)
            active &= row < rows
    # behind the last block there are fewer than 8 bits
    bad |= (row == rows) & (end - bit >= 8)
    tl.store(damaged + image, bad.to(tl.int32), mask=there)


@triton.jit
def _read_segments_kernel(
    plan, jobs, words, bits, codes, factors, entries, coefficients, damaged, num_jobs,
    PLAN: tl.constexpr, TABLE: tl.constexpr, SHORT_BITS: tl.constexpr, SEGMENT: tl.constexpr,
    LANES: tl.constexpr, BURST: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = job < num_jobs
    active = there
    image, segment = tl.load(jobs + 2 * job, mask=active, other=0), tl.load(jobs + 2 * job + 1, mask=active, other=0)
    at = plan + image * PLAN
    end = tl.load(bits + image, mask=active, other=0)
    words += tl.load(at + 2, mask=active, other=0)
    kind = tl.load(at + 3, mask=active, other=0).to(tl.int32)
    codes += kind * (4 * TABLE)
    factors += kind * 128
    columns, rows = tl.load(at + 4, mask=active, other=1).to(tl.int32), tl.load(at + 5, mask=active, other=0).to(tl.int32)
    top = tl.load(at + 6, mask=active, other=0).to(tl.int32)
    left, right = tl.load(at + 8, mask=active, other=0).to(tl.int32), tl.load(at + 9, mask=active, other=0).to(tl.int32)
    in_row = tl.cdiv(columns, SEGMENT)
    row, column = segment // in_row, segment % in_row * SEGMENT
    coefficients += (tl.load(at + 10, mask=active, other=0) + (row - top) * (right - left) * 6) * 64
    segment_end = tl.minimum(columns, column + SEGMENT)
    right = tl.minimum(right, segment_end)
    entries += tl.load(at + 17, mask=active, other=0) + segment
    entry = tl.load(entries, mask=active, other=0)
    bit, dc_y = (entry & ((1 << 28) - 1)).to(tl.int32), ((entry << 24) >> 52).to(tl.int32)
    dc_b, dc_r = ((entry << 12) >> 52).to(tl.int32), (entry >> 52).to(tl.int32)

    block = tl.zeros((LANES,), tl.int32)
    position = block
    bad = active & (bit > end)  # found in other bytes than these
    active &= ~bad
    while tl.max(active.to(tl.int32), 0) > 0:
        for _ in range(BURST):
            is_dc = position == 0
            chroma = (block >= 4).to(tl.int32)
            table = codes + (2 * chroma + tl.where(is_dc, 0, 1)) * TABLE
            length, symbol, value = _code(words, bit, table, active, SHORT_BITS)
            size = symbol & 15
            target = position + (symbol >> 4)
            bit += length + size
            wrong = (length == 0) | (bit > end) | (target > 63)
            bad |= active & wrong
            active &= ~wrong

            before = tl.where(block < 4, dc_y, tl.where(block == 4, dc_b, dc_r))
            value += tl.where(is_dc, before, 0)
            dc_y = tl.where(is_dc & (block < 4), value, dc_y)
            dc_b = tl.where(is_dc & (block == 4), value, dc_b)
            dc_r = tl.where(is_dc & (block == 5), value, dc_r)
            wanted = active & (column >= left) & (is_dc | (size > 0))
            factor = tl.load(factors + chroma * 64 + target, mask=wanted, other=0)
            index = ((column - left) * 6 + block) * 64 + (factor >> 16)
            tl.store(coefficients + index, (value * (factor & 0xFFFF)).to(tl.int16), mask=wanted)

            position = tl.where(~is_dc & (symbol == 0), 64, target + 1)
            block += (position > 63).to(tl.int32)
            position = tl.where(position > 63, 0, position)
            column += (block == 6).to(tl.int32)
            block = tl.where(block == 6, 0, block)
            active &= column < right

    # what was read to its end ends where the next segment begins, or the image
    whole = there & (right == segment_end)
    follows = whole & (segment + 1 < rows * in_row)
    after = bit.to(tl.int64) | ((dc_y & 4095).to(tl.int64) << 28) | ((dc_b & 4095).to(tl.int64) << 40)
    bad |= follows & (tl.load(entries + 1, mask=follows, other=0) != (after | (dc_r.to(tl.int64) << 52)))
    bad |= whole & ~follows & (end - bit >= 8)
    tl.store(damaged + image, 1, mask=bad)


@triton.jit
def _idct_kernel(coefficients, matrix, samples, num_rows, ROWS: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of a row of a block
    eight = tl.arange(0, 8)
    there = (number < num_rows)[:, None]
    block = coefficients + ((number >> 3) * 64)[:, None] + eight[None, :]
    weights = tl.load(matrix + (number & 7)[:, None] * 8 + eight[None, :])
    result = tl.full((ROWS, 8), 1 << 17, tl.int32)
    for k in tl.static_range(8):
        frequency = tl.load(block + k * 8, mask=there, other=0).to(tl.int32)  # column k of the block
        along = (tl.sum(frequency * weights, 1) + (1 << 10)) >> 11
        result += along[:, None] * tl.load(matrix + eight * 8 + k)[None, :]
    result = tl.minimum(tl.maximum((result >> 18) + 128, 0), 255)
    tl.store(samples + (number * 8)[:, None] + eight[None, :], result.to(tl.uint8), mask=there)


@triton.jit
def _chroma(samples, near, far, this, other, columns, even):
    """A chroma sample at full size: of the four around it, weighted 9 : 3 : 3 : 1."""
    near_row = samples + (near >> 3) * (columns * 384) + (near & 7) * 8
    far_row = samples + (far >> 3) * (columns * 384) + (far & 7) * 8
    this_column, other_column = (this >> 3) * 384 + (this & 7), (other >> 3) * 384 + (other & 7)
    a = 3 * tl.load(near_row + this_column).to(tl.int32) + tl.load(far_row + this_column).to(tl.int32)
    b = 3 * tl.load(near_row + other_column).to(tl.int32) + tl.load(far_row + other_column).to(tl.int32)
    return ((3 * a + b + tl.where(even, 8, 7)) >> 4) - 128


@triton.jit
def _rgb_kernel(plan, samples, rgb, tiles, PLAN: tl.constexpr, PIXELS: tl.constexpr):
    at = plan + tl.program_id(0) // tiles * PLAN
    first = tl.program_id(0) % tiles * PIXELS
    top, left = tl.load(at + 6).to(tl.int32), tl.load(at + 8).to(tl.int32)  # MCUs
    columns = tl.load(at + 9).to(tl.int32) - left
    samples += tl.load(at + 10) * 64
    height, width = tl.load(at + 11).to(tl.int32), tl.load(at + 12).to(tl.int32)
    crop_top, crop_left = tl.load(at + 13).to(tl.int32), tl.load(at + 14).to(tl.int32)
    crop_height, crop_width = tl.load(at + 15).to(tl.int32), tl.load(at + 16).to(tl.int32)
    rgb += tl.load(at + 18)
    pixel = first + tl.arange(0, PIXELS)
    there = pixel < crop_height * crop_width
    inside = tl.where(there, pixel, 0)
    y, x = crop_top + inside // tl.maximum(crop_width, 1), crop_left + inside % tl.maximum(crop_width, 1)

    if first < crop_height * crop_width:
        last_row, last_column = (height + 1) // 2 - 1, (width + 1) // 2 - 1
        near, this = y >> 1, x >> 1
        far = tl.minimum(tl.maximum(near - 1 + 2 * (y & 1), 0), last_row) - 8 * top
        other = tl.minimum(tl.maximum(this - 1 + 2 * (x & 1), 0), last_column) - 8 * left
        narrow = last_column < 2  # there libjpeg repeats samples
        far, other = tl.where(narrow, near - 8 * top, far), tl.where(narrow, this - 8 * left, other)
        near, this, even = near - 8 * top, this - 8 * left, (x & 1) == 0
        y, x = y - 16 * top, x - 16 * left
        block = ((y >> 4) * columns + (x >> 4)) * 6 + ((y >> 3) & 1) * 2 + ((x >> 3) & 1)
        luma = tl.load(samples + block * 64 + (y & 7) * 8 + (x & 7)).to(tl.int32)
        b = _chroma(samples + 256, near, far, this, other, columns, even)
        r = _chroma(samples + 320, near, far, this, other, columns, even)
        HALF: tl.constexpr = 1 << 15
        red = luma + ((91881 * r + HALF) >> 16)
        green = luma + ((-22554 * b - 46802 * r + HALF) >> 16)
        blue = luma + ((116130 * b + HALF) >> 16)
        area = crop_height * crop_width
        tl.store(rgb + pixel, tl.minimum(tl.maximum(red, 0), 255).to(tl.uint8), mask=there)
        tl.store(rgb + area + pixel, tl.minimum(tl.maximum(green, 0), 255).to(tl.uint8), mask=there)
        tl.store(rgb + 2 * area + pixel, tl.minimum(tl.maximum(blue, 0), 255).to(tl.uint8), mask=there)


def idct_matrix() -> Tensor:
    """The product that jidctint.c computes before it rounds: (8 samples, 8 frequencies) int32, times 2^13."""
    x = torch.eye(8, dtype=torch.int64).unbind()  # x[k]: what comes of frequency k alone
    z1 = (x[2] + x[6]) * 4433
    tmp2, tmp3 = z1 - x[6] * 15137, z1 + x[2] * 6270
    tmp0, tmp1 = (x[0] + x[4]) * 8192, (x[0] - x[4]) * 8192
    even = [tmp0 + tmp3, tmp1 + tmp2, tmp1 - tmp2, tmp0 - tmp3]
    z5 = (x[7] + x[3] + x[5] + x[1]) * 9633
    z1, z2 = (x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995
    z3, z4 = (x[7] + x[3]) * -16069 + z5, (x[5] + x[1]) * -3196 + z5
    odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3]
    first = [e + o for e, o in zip(even, odd, strict=True)]
    last = [e - o for e, o in zip(even, odd, strict=True)]
    return torch.stack(first + last[::-1]).int()


def unstuff(plan: Tensor, stored: Tensor, words: Tensor, bits: Tensor) -> None:
    """Take out the zeros that follow bytes of ones.

    Args:
        plan: (J, P) int64 on the device of all the others: `vitpa.data.decode.jpeg_headers.Plan.table`.
        stored: uint8: the bytes of all images.
        words: (W,) int32, to be filled: the codes, their first bit the highest one of a word.
        bits: (J,) int32, to be filled: how many there are; -1 where there are markers among the codes.
    """
    kernel: Any = _unstuff_kernel
    kernel[(len(plan),)](plan, stored, words.view(torch.uint8), bits, plan.shape[1], UNSTUFF_BYTES, num_warps=4)


def find_segments(
    plan: Tensor,
    words: Tensor,
    bits: Tensor,
    codes: Tensor,
    entries: Tensor,
    damaged: Tensor,
    *,
    short_bits: int,
    segment: int,
) -> None:
    """Find where each segment begins: all codes before it must be read for that, one after the other.

    Args:
        plan: As above.
        words: From `unstuff`.
        bits: From `unstuff`.
        codes: (headers, 2, 2, T) int16: `vitpa.data.decode.jpeg_headers.Header.codes` of each kind of header.
        entries: (segments,) int64, of the J images to be filled: first bit, and DC of Y, Cb and Cr in the block before.
        damaged: (J,) int32, to be filled: 1 where the codes cannot be read, or do not end where they should.
        short_bits: How many bits of a code are looked up first in `codes`.
        segment: MCUs of a segment.
    """
    J = len(plan)
    kernel: Any = _find_segments_kernel
    sizes = plan.shape[1], codes.shape[-1], short_bits, segment, LANES, BURST
    kernel[(triton.cdiv(J, LANES),)](plan, words, bits, codes, entries, damaged, J, *sizes, num_warps=1)


def read_segments(
    plan: Tensor,
    jobs: Tensor,
    words: Tensor,
    bits: Tensor,
    codes: Tensor,
    factors: Tensor,
    entries: Tensor,
    coefficients: Tensor,
    damaged: Tensor,
    *,
    short_bits: int,
    segment: int,
) -> None:
    """Read segments, all at the same time.

    Args:
        plan: As above.
        jobs: (n, 2) int32: image, and which of its segments.
        words: From `unstuff`.
        bits: From `unstuff`.
        codes: As above.
        factors: (headers, 2, 64) int32: `vitpa.data.decode.jpeg_headers.Header.factors`.
        entries: From `find_segments`.
        coefficients: (blocks, 64) int16, zeros; the coefficients of the wanted blocks are put there, dequantised, by column.
        damaged: (J,) int32, zeros; 1 is put where codes cannot be read, or a segment does not end where the next one begins:
            the entries were found in other bytes than these.
        short_bits: As above.
        segment: As above.
    """
    num_jobs = len(jobs)
    kernel: Any = _read_segments_kernel
    sizes = plan.shape[1], codes.shape[-1], short_bits, segment, LANES, BURST
    grid = (triton.cdiv(num_jobs, LANES),)
    kernel[grid](plan, jobs, words, bits, codes, factors, entries, coefficients, damaged, num_jobs, *sizes, num_warps=1)


def to_samples(coefficients: Tensor, matrix: Tensor, samples: Tensor) -> None:
    """The inverse cosine transform: `samples` (blocks, 64) uint8, row by row, of `coefficients` (blocks, 64) int16."""
    kernel: Any = _idct_kernel
    num_rows = 8 * len(coefficients)
    kernel[(triton.cdiv(num_rows, ROWS),)](coefficients, matrix, samples, num_rows, ROWS, num_warps=8)


def to_rgb(plan: Tensor, samples: Tensor, rgb: Tensor, *, most_pixels: int) -> None:
    """The pixels of the crops.

    Args:
        plan: As above.
        samples: (blocks, 64) uint8, from `to_samples`.
        rgb: uint8, to be filled: (3, height, width) of each crop, one after the other.
        most_pixels: Of one crop.
    """
    kernel: Any = _rgb_kernel
    tiles = triton.cdiv(most_pixels, PIXELS)
    kernel[(tiles * len(plan),)](plan, samples, rgb, tiles, plan.shape[1], PIXELS, num_warps=4)
