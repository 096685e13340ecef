"""Content attention softmax((q + b) k^T / sqrt(d)) v of up to 256 tokens, in tiles, in place in the layout of the tokens.

As in FlashAttention (Dao et al., NeurIPS 2022; Dao, ICLR 2024), the forward pass goes over tiles of keys with a running
softmax and keeps the logarithm of each row's sum. A program of the backward pass does one head of one image: it holds all
keys and values and the sums of their gradients, and goes once over tiles of queries, so that everything is read once and no
score is computed twice. Scores are transposed there, a row for each key: only their gradient must then go through shared
memory, for the queries' gradient.

Axes: R replicas, B batch, M = R * B images, N tokens, H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from vitpa.kernels.partials import sum_partials

FORWARD = (64, 64, 4, 3)  # queries of a tile, keys of a tile, warps, stages: 195 us, the best of a sweep as below
# By the bytes of a number: queries of a tile, warps, stages. bfloat16: 525 us at 1,024 images on an H100, the best of a sweep;
# 2 stages 599. float32: with 32 queries 254,208 bytes of shared memory at head_dim 64, and an H100 has 232,448.
BACKWARD = {2: (32, 8, 3), 4: (16, 8, 2)}
MAX_TOKENS = 256  # the keys, the values and their gradients fit into one program
SHARED_MEMORY = 2**17  # bytes that a program may need: as large GPUs have for one, from the A100 on
LOG2_E = 1.4426950408889634  # exp2 is one instruction, exp is not


def unsupported_reason(tokens: int, head_dim: int, shared_memory: int) -> str | None:
    """Why the kernel does not take these sizes on a GPU whose multiprocessors share so many bytes; None if it does."""
    if shared_memory < SHARED_MEMORY:
        return f"tiled attention kernel: {shared_memory} bytes of shared memory in a multiprocessor, not {SHARED_MEMORY}"
    if not 2 <= tokens <= MAX_TOKENS:
        return f"tiled attention kernel: {tokens} tokens, not within 2 and {MAX_TOKENS}"
    if head_dim not in (16, 32, 64):
        return f"tiled attention kernel: head_dim {head_dim}, not 16, 32 or 64"
    return None


@triton.jit
def _dot(x, y, acc=None):
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit
def _tiled_attention_forward_kernel(
    qkv, q_bias, out, lse, B, scale_log2,
    N: tl.constexpr, H: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    tiles: tl.constexpr = (N + ROWS - 1) // ROWS
    h = tl.program_id(0) // tiles % H
    m = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    r = tl.program_id(0) // (tiles * H) // B
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    line = tl.arange(0, d)
    inside = (row < N)[:, None] & (line >= 0)[None, :]
    bias = tl.load(q_bias + r * D + h * d + line)
    q_at = qkv + m * (N * 3 * D) + h * d
    q = tl.load(q_at + row[:, None] * (3 * D) + line[None, :], mask=inside, other=0.0)
    q = (q.to(tl.float32) + bias[None, :]).to(kind)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, d), tl.float32)
    for start in range(0, N, COLUMNS):
        token = start + tl.arange(0, COLUMNS)
        at = q_at + token[:, None] * (3 * D) + line[None, :]
        k = tl.load(at + D, mask=(token < N)[:, None], other=0.0)
        v = tl.load(at + 2 * D, mask=(token < N)[:, None], other=0.0)
        s = _dot(q, tl.trans(k)) * scale_log2 + tl.where(token < N, 0.0, float("-inf"))[None, :]
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(p, 1)
        o = _dot(p.to(kind), v, acc=o * shrunk[:, None])
        highest = higher
    o = o * (1.0 / total)[:, None]
    tl.store(out + m * (N * D) + h * d + row[:, None] * D + line[None, :], o.to(kind), mask=inside)
    tl.store(lse + (m * H + h) * N + row, highest + tl.log2(total), mask=row < N)


@triton.jit
def _tiled_attention_backward_kernel(
    qkv, q_bias, out, dout, lse, dqkv, parts, B, scale, scale_log2,
    N: tl.constexpr, H: tl.constexpr, d: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    h = tl.program_id(0) % H
    m = (tl.program_id(0) // H).to(tl.int64)
    r = tl.program_id(0) // H // B
    key = tl.arange(0, KEYS)
    line = tl.arange(0, d)
    inside = (key < N)[:, None] & (line >= 0)[None, :]
    bias = tl.load(q_bias + r * D + h * d + line)
    q_at = qkv + m * (N * 3 * D) + h * d
    dq_at = dqkv + m * (N * 3 * D) + h * d
    o_at = out + m * (N * D) + h * d
    do_at = dout + m * (N * D) + h * d
    lse_at = lse + (m * H + h) * N
    keys = key[:, None] * (3 * D) + line[None, :]
    k = tl.load(q_at + D + keys, mask=inside, other=0.0)
    v = tl.load(q_at + 2 * D + keys, mask=inside, other=0.0)
    dk = tl.zeros((KEYS, d), tl.float32)
    dv = tl.zeros((KEYS, d), tl.float32)
    dbias = tl.zeros((d, ROWS), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None]
        q = tl.load(q_at + row[:, None] * (3 * D) + line[None, :], mask=mask, other=0.0)
        do = tl.load(do_at + row[:, None] * D + line[None, :], mask=mask, other=0.0)
        o = tl.load(o_at + row[:, None] * D + line[None, :], mask=mask, other=0.0)
        lse_row = tl.load(lse_at + row, mask=row < N, other=float("inf"))  # p of rows beyond the last: 0
        q = (q.to(tl.float32) + bias[None, :]).to(kind)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        p = tl.exp2(_dot(k, tl.trans(q)) * scale_log2 - lse_row[None, :])
        p = tl.where((key < N)[:, None], p, 0.0)
        ds = (p * (_dot(v, tl.trans(do)) - delta[None, :])).to(kind)
        dv = _dot(p.to(kind), do, acc=dv)
        dk = _dot(ds, q, acc=dk)
        dq = _dot(tl.trans(k), ds) * scale
        tl.store(dq_at + row[None, :] * (3 * D) + line[:, None], dq.to(kind), mask=(row < N)[None, :])
        dbias += dq
    tl.store(dq_at + D + keys, (dk * scale).to(kind), mask=inside)
    tl.store(dq_at + 2 * D + keys, dv.to(kind), mask=inside)
    tl.store(parts + m * D + h * d + line, tl.sum(dbias, 1))


@torch.library.custom_op("vitpa::tiled_attention", mutates_args=())
def _forward(qkv: Tensor, q_bias: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    R = q_bias.shape[0]
    qkv, q_bias = qkv.contiguous(), q_bias.contiguous()
    out = torch.empty(M, N, H * d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(M, H, N, dtype=torch.float32, device=qkv.device)
    rows, columns, warps, stages = FORWARD
    kernel: Any = _tiled_attention_forward_kernel
    kernel[(triton.cdiv(N, rows) * H * M,)](
        qkv, q_bias, out, lse, M // R, d**-0.5 * LOG2_E, N, H, d, rows, columns, num_warps=warps, num_stages=stages
    )
    return out, lse


@_forward.register_fake
def _(qkv: Tensor, q_bias: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    return qkv.new_empty(M, N, H * d), qkv.new_empty(M, H, N, dtype=torch.float32)


@torch.library.custom_op("vitpa::tiled_attention_backward", mutates_args=())
def _backward(qkv: Tensor, q_bias: Tensor, out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    R = q_bias.shape[0]
    qkv, q_bias, dout = qkv.contiguous(), q_bias.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    parts = torch.empty(R, M // R, H * d, dtype=torch.float32, device=qkv.device)
    rows, warps, stages = BACKWARD[qkv.element_size()]
    scale = d**-0.5
    kernel: Any = _tiled_attention_backward_kernel
    kernel[(H * M,)](
        qkv, q_bias, out, dout, lse, dqkv, parts, M // R, scale, scale * LOG2_E,
        N, H, d, max(64, triton.next_power_of_2(N)), rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dqkv, sum_partials(parts)


@_backward.register_fake
def _(qkv: Tensor, q_bias: Tensor, out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), q_bias.new_empty(q_bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor]:
    qkv, q_bias, out, lse = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor] = _backward(qkv, q_bias, out, dout, lse)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)


def tiled_attention(qkv: Float[Tensor, "M N 3 H d"], q_bias: Float32[Tensor, "R H*d"]) -> Float[Tensor, "M N H*d"]:
    """Attend within each image; qkv in float32 or bfloat16.

    As `vitpa.kernels.attention.attention`, for any number of tokens up to `MAX_TOKENS`.
    """
    out: Tensor = _forward(qkv, q_bias)[0]
    return out
