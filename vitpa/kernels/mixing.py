"""Positional mixing: every image's tokens times one attention matrix per replica and head.

A program holds the matrix of its head and goes through a chunk of images. The backward pass reads the values and the
gradient once for both of its results; the gradient of the matrix is summed over the chunk in registers, then over chunks.

Axes: R replicas, B images of each, N = 1 + P tokens (class token first), H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from vitpa.kernels.partials import sum_partials

# Images a program (its chunk), its warps: the best of a sweep on an H200 at 640 images and at 128, of 12 heads and 65 tokens.
# A long chunk pays for reading the matrix and writes few partial sums of its gradient; a short one is there to fill the GPU.
MANY_IMAGES = 512
FORWARD_MANY, FORWARD_FEW = (16, 4), (4, 2)
BACKWARD_MANY, BACKWARD_FEW = (32, 4), (16, 4)
NUM_STAGES = 3  # images whose loads are under way at a time


def unsupported_reason(tokens: int, head_dim: int) -> str | None:
    """Why the kernel does not take these sizes; None if it does."""
    if tokens - 1 not in (16, 32, 64):
        return f"mixing kernel: {tokens - 1} patches, not 16, 32 or 64"
    if head_dim not in (16, 32, 64):
        return f"mixing kernel: head_dim {head_dim}, not 16, 32 or 64"
    return None


# Class tiles have 16 rows or columns, of which only the first counts: a_cp is the class token's row of the matrix, a_pc its
# column, x_c and g_c its values and gradient.


@triton.jit
def _mixing_forward_kernel(attention, v, out, B, chunk, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    N: tl.constexpr = 1 + P
    D: tl.constexpr = H * d
    head = tl.program_id(0).to(tl.int64)
    first_image = tl.program_id(1) * chunk
    patch = tl.arange(0, P)
    padded = tl.arange(0, 16)
    column = tl.arange(0, d)[None, :]
    first = (padded == 0)[:, None] & (column >= 0)
    kind = v.dtype.element_ty
    at = attention + head * (N * N)
    a = tl.load(at + (1 + patch)[:, None] * N + 1 + patch[None, :]).to(kind)
    a_cp = tl.load(at + padded[:, None] * N + 1 + patch[None, :], mask=(padded == 0)[:, None], other=0.0).to(kind)
    a_pc = tl.load(at + (1 + patch)[:, None] * N + padded[None, :], mask=(padded == 0)[None, :], other=0.0).to(kind)
    a_cc = tl.load(at)
    offset = ((head // H) * B + first_image) * (N * D) + (head % H) * d
    patches = offset + (1 + patch)[:, None] * D + column
    class_token = offset + padded[:, None] * D + column
    for _ in range(tl.minimum(chunk, B - first_image)):
        x = tl.load(v + patches)
        x_c = tl.load(v + class_token, mask=first, other=0.0)
        o = tl.dot(a_pc, x_c, acc=tl.dot(a, x, input_precision="ieee"), input_precision="ieee")
        o_c = tl.dot(a_cp, x, input_precision="ieee") + a_cc * x_c.to(tl.float32)
        tl.store(out + patches, o.to(kind))
        tl.store(out + class_token, o_c.to(kind), mask=first)
        patches += N * D
        class_token += N * D


@triton.jit
def _mixing_backward_kernel(attention, v, dout, dv, parts, B, chunk, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    N: tl.constexpr = 1 + P
    D: tl.constexpr = H * d
    head = tl.program_id(0).to(tl.int64)
    first_image = tl.program_id(1) * chunk
    patch = tl.arange(0, P)
    padded = tl.arange(0, 16)
    column = tl.arange(0, d)[None, :]
    first = (padded == 0)[:, None] & (column >= 0)
    kind = v.dtype.element_ty
    at = attention + head * (N * N)
    a = tl.load(at + (1 + patch)[:, None] * N + 1 + patch[None, :]).to(kind)
    a_cp = tl.load(at + padded[:, None] * N + 1 + patch[None, :], mask=(padded == 0)[:, None], other=0.0).to(kind)
    a_pc = tl.load(at + (1 + patch)[:, None] * N + padded[None, :], mask=(padded == 0)[None, :], other=0.0).to(kind)
    a_cc = tl.load(at)
    da = tl.zeros((P, P), tl.float32)
    da_cp = tl.zeros((16, P), tl.float32)
    da_pc = tl.zeros((P, 16), tl.float32)
    da_cc = tl.zeros((16, d), tl.float32)
    offset = ((head // H) * B + first_image) * (N * D) + (head % H) * d
    patches = offset + (1 + patch)[:, None] * D + column
    class_token = offset + padded[:, None] * D + column
    for _ in range(tl.minimum(chunk, B - first_image)):
        x = tl.load(v + patches)
        g = tl.load(dout + patches)
        x_c = tl.load(v + class_token, mask=first, other=0.0)
        g_c = tl.load(dout + class_token, mask=first, other=0.0)
        dx = tl.dot(tl.trans(a_cp), g_c, acc=tl.dot(tl.trans(a), g, input_precision="ieee"), input_precision="ieee")
        dx_c = tl.dot(tl.trans(a_pc), g, input_precision="ieee") + a_cc * g_c.to(tl.float32)
        tl.store(dv + patches, dx.to(kind))
        tl.store(dv + class_token, dx_c.to(kind), mask=first)
        da = tl.dot(g, tl.trans(x), acc=da, input_precision="ieee")
        da_cp = tl.dot(g_c, tl.trans(x), acc=da_cp, input_precision="ieee")
        da_pc = tl.dot(g, tl.trans(x_c), acc=da_pc, input_precision="ieee")
        da_cc += g_c.to(tl.float32) * x_c.to(tl.float32)
        patches += N * D
        class_token += N * D
    to = parts + (head * tl.num_programs(1) + tl.program_id(1)) * (N * N)
    tl.store(to + (1 + patch)[:, None] * N + 1 + patch[None, :], da)
    tl.store(to + padded[:, None] * N + 1 + patch[None, :], da_cp, mask=(padded == 0)[:, None])
    tl.store(to + (1 + patch)[:, None] * N + padded[None, :], da_pc, mask=(padded == 0)[None, :])
    tl.store(to, tl.sum(tl.sum(da_cc, 1), 0))


@torch.library.custom_op("vitpa::mix", mutates_args=())
def _forward(attention: Tensor, v: Tensor) -> Tensor:
    R, B, N, H, d = v.shape
    attention, v = attention.contiguous(), v.contiguous()
    out = torch.empty(R, B, N, H * d, dtype=v.dtype, device=v.device)
    kernel: Any = _mixing_forward_kernel
    chunk, warps = FORWARD_MANY if R * B >= MANY_IMAGES else FORWARD_FEW
    grid = (R * H, triton.cdiv(B, chunk))
    kernel[grid](attention, v, out, B, chunk, H, N - 1, d, num_warps=warps, num_stages=NUM_STAGES)
    return out


@_forward.register_fake
def _(attention: Tensor, v: Tensor) -> Tensor:
    R, B, N, H, d = v.shape
    return v.new_empty(R, B, N, H * d)


@torch.library.custom_op("vitpa::mix_backward", mutates_args=())
def _backward(attention: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    R, B, N, H, d = v.shape
    attention, v, dout = attention.contiguous(), v.contiguous(), dout.contiguous()
    dv = torch.empty_like(v)
    chunk, warps = BACKWARD_MANY if R * B >= MANY_IMAGES else BACKWARD_FEW
    chunks = triton.cdiv(B, chunk)
    parts = torch.empty(R * H, chunks, N * N, dtype=torch.float32, device=v.device)
    kernel: Any = _mixing_backward_kernel
    grid = (R * H, chunks)
    kernel[grid](attention, v, dout, dv, parts, B, chunk, H, N - 1, d, num_warps=warps, num_stages=NUM_STAGES)
    return sum_partials(parts).view(R, H, N, N), dv


@_backward.register_fake
def _(attention: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    return attention.new_empty(attention.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    attention, v = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor] = _backward(attention, v, dout)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)


def mix(attention: Float32[Tensor, "R H N N"], v: Float[Tensor, "R B N H d"]) -> Float[Tensor, "R B N H*d"]:
    """Mix the tokens of all images.

    The matrix is rounded to the type of v (float32 or bfloat16) where it is multiplied; sums are float32, and so is the
    matrix's gradient. A bias of v need not be added before: rows that sum to 1 let it through unchanged.
    """
    out: Tensor = _forward(attention, v)
    return out
