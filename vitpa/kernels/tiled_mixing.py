"""Positional mixing of more tokens than `mixing` takes: products in tiles, in place in the layout of the tokens.

Per head the whole batch is one product of the matrix (N, N) and the values (N, B * d), whose columns are gathered from the
images as they lie in memory, so that nothing is transposed or copied. The matrix's gradient is a product over B * d: each
program sums a tile of it over a chunk of images, and chunks are summed after that. Matrices are rounded once, into rows that
begin where 16 bytes do, as loads of a whole tile want it.

Axes: R replicas, B images of each, N tokens, S >= N padded tokens, H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from vitpa.kernels.partials import sum_partials

PAD = 128  # tokens are padded to a multiple of it; tiles of tokens are at most so large
# The best of a sweep on an H100 at 1,024 images, 3 heads, 197 tokens, head_dim 64, bfloat16: 89 us for a product, 75 us for
# the matrix's gradient.
MIX = (128, 64, 128, 8, 3)  # tokens of a tile, tokens of a step of the sum, columns (d of each image), warps, stages
GRADIENT = (128, 8, 4)  # tokens of a tile (of both axes), warps, stages
GRADIENT_PROGRAMS = 132  # as many chunks of images as make so many: one for each multiprocessor; with two 83 us


def unsupported_reason(head_dim: int) -> str | None:
    """Why the kernel does not take this size; None if it does."""
    if head_dim not in (16, 32, 64):
        return f"tiled mixing kernel: head_dim {head_dim}, not 16, 32 or 64"
    return None


@triton.jit
def _tiled_mixing_pad_kernel(attention, padded, N, S: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    a = tl.load(attention + head * N * N + row * N + column, mask=(row < N) & (column < N), other=0.0)
    tl.store(padded + head * S * S + row * S + column, a.to(padded.dtype.element_ty), mask=column < S)


@triton.jit
def _tiled_mixing_kernel(
    padded, v, out, B, N: tl.constexpr, S: tl.constexpr, H: tl.constexpr, d: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * d
    IMAGES: tl.constexpr = COLUMNS // d
    tiles: tl.constexpr = (N + ROWS - 1) // ROWS
    head = tl.program_id(1)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    image = tl.program_id(0) // tiles * IMAGES + column // d
    offset = (head // H * B + image).to(tl.int64) * (N * D) + head % H * d + column % d
    at = padded + head.to(tl.int64) * (S * S)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, N, INNER):
        token = start + tl.arange(0, INNER)
        x = tl.load(v + offset[None, :] + token[:, None] * D, mask=(token < N)[:, None] & (image < B)[None, :], other=0.0)
        if TRANSPOSED:
            a = tl.trans(tl.load(at + token[:, None] * S + row[None, :]))
        else:
            a = tl.load(at + row[:, None] * S + token[None, :])
        acc = tl.dot(a, x, acc=acc, input_precision="ieee")
    mask = (row < N)[:, None] & (image < B)[None, :]
    tl.store(out + offset[None, :] + row[:, None] * D, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tiled_mixing_gradient_kernel(
    v, dout, parts, B, chunk, N: tl.constexpr, H: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr
):
    D: tl.constexpr = H * d
    tiles: tl.constexpr = (N + ROWS - 1) // ROWS
    head = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * chunk
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    line = tl.arange(0, d)[None, :]
    offset = (head // H * B + first) * (N * D) + head % H * d
    g_at = dout + offset + row[:, None] * D + line
    x_at = v + offset + column[:, None] * D + line
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    for _ in range(tl.minimum(chunk, B - first)):
        g = tl.load(g_at, mask=(row < N)[:, None], other=0.0)
        x = tl.load(x_at, mask=(column < N)[:, None], other=0.0)
        acc = tl.dot(g, tl.trans(x), acc=acc, input_precision="ieee")
        g_at += N * D
        x_at += N * D
    to = parts + (head * tl.num_programs(1) + tl.program_id(1)) * (N * N)
    tl.store(to + row[:, None] * N + column[None, :], acc, mask=(row < N)[:, None] & (column < N)[None, :])


def _product(padded: Tensor, v: Tensor, *, transposed: bool) -> Tensor:
    """The padded matrices (R * H, S, S), or the transposed ones, times v (R, B, N, H, d): in the shape of v."""
    R, B, N, H, d = v.shape
    out = torch.empty_like(v)
    rows, inner, columns, warps, stages = MIX
    grid = (triton.cdiv(N, rows) * triton.cdiv(B * d, columns), R * H)
    kernel: Any = _tiled_mixing_kernel
    kernel[grid](
        padded, v, out, B, N, padded.shape[1], H, d, transposed, rows, inner, columns, num_warps=warps, num_stages=stages
    )
    return out


def _gradient(v: Tensor, dout: Tensor) -> Tensor:
    """The matrices' gradient (R, H, N, N)."""
    R, B, N, H, d = v.shape
    rows, warps, stages = GRADIENT
    tiles = triton.cdiv(N, rows) ** 2
    chunk = min(B, triton.cdiv(B * tiles * R * H, GRADIENT_PROGRAMS))
    chunks = triton.cdiv(B, chunk)
    parts = torch.empty(R * H, chunks, N * N, dtype=torch.float32, device=v.device)
    kernel: Any = _tiled_mixing_gradient_kernel
    kernel[(tiles, chunks, R * H)](v, dout, parts, B, chunk, N, H, d, rows, num_warps=warps, num_stages=stages)
    return sum_partials(parts).view(R, H, N, N)


@torch.library.custom_op("vitpa::tiled_mix", mutates_args=())
def _forward(attention: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    R, B, N, H, d = v.shape
    attention, v = attention.contiguous(), v.contiguous()
    S = triton.cdiv(N, PAD) * PAD
    padded = torch.empty(R * H, S, S, dtype=v.dtype, device=v.device)
    kernel: Any = _tiled_mixing_pad_kernel
    kernel[(S, R * H)](attention, padded, N, S, triton.next_power_of_2(S))
    return _product(padded, v, transposed=False).view(R, B, N, H * d), padded


@_forward.register_fake
def _(attention: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    R, B, N, H, d = v.shape
    S = (N + PAD - 1) // PAD * PAD
    return v.new_empty(R, B, N, H * d), v.new_empty(R * H, S, S)


@torch.library.custom_op("vitpa::tiled_mix_backward", mutates_args=())
def _backward(padded: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    v, dout = v.contiguous(), dout.contiguous()
    return _gradient(v, dout), _product(padded, dout.view(v.shape), transposed=True)


@_backward.register_fake
def _(padded: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    R, _, N, H, _ = v.shape
    return v.new_empty(R, H, N, N, dtype=torch.float32), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _dpadded: Tensor) -> tuple[Tensor, Tensor]:
    padded, v = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor] = _backward(padded, v, dout)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)


def tiled_mix(attention: Float32[Tensor, "R H N N"], v: Float[Tensor, "R B N H d"]) -> Float[Tensor, "R B N H*d"]:
    """Mix the tokens of all images.

    As `vitpa.kernels.mixing.mix` for any number of tokens: the matrix is rounded to the type of v (float32 or bfloat16) where
    it is multiplied; sums are float32, and so is the matrix's gradient.
    """
    out: Tensor = _forward(attention, v)[0]
    return out
