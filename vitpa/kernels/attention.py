"""Content attention softmax((q + b) k^T / sqrt(d)) v of a few tokens: a program does one head of one image.

All of an image's tokens fit into registers, so nothing is tiled. As in FlashAttention (Dao et al., NeurIPS 2022,
algorithms 1 and 4), the forward pass keeps no probabilities but the logarithm of each row's sum, and the backward pass
recomputes them from it. The forward kernel multiplies matrices for the patches and sums products of vectors for the class
token. The backward kernel takes the class token as a tile of 16 rows, and computes scores transposed, a row for each key:
only their gradient must then be turned round, for the queries' gradient, and not the probabilities as well. Only the queries
have a bias: one of the keys would add the same to all scores of a row, and one of the values would pass to the output
unchanged. Its gradient is summed over an image's tokens by the kernel, then over images.

Axes: R replicas, B batch, M = R * B images, N = 1 + P tokens (class token first), H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from vitpa.kernels.partials import sum_partials

# The best of a sweep on an H200 at 640 images, 12 heads, 65 tokens, head_dim 32, bfloat16: forward 84 us (class token as a
# tile: 88; four images a program: 103), backward 174 us (scores not transposed: 187).
NUM_WARPS = 4  # of 16 rows each, as a matrix instruction of 64 rows wants: forward with 2 warps 132 us, with 1 103
MAX_REGISTERS_BACKWARD = 128  # a thread's: four programs share a multiprocessor. With 112 180 us, without a limit 188
LOG2_E = 1.4426950408889634  # exp2 is one instruction, exp is not


def unsupported_reason(tokens: int, head_dim: int) -> str | None:
    """Why the kernel does not take these sizes; None if it does."""
    if tokens - 1 not in (16, 32, 64):
        return f"attention kernel: {tokens - 1} patches, not 16, 32 or 64"
    if head_dim not in (16, 32, 64):
        return f"attention kernel: head_dim {head_dim}, not 16, 32 or 64"
    return None


# Names in the kernels: c is the class token, p the patches. First the row, then the column: s_pc in the forward kernel are
# the scores of the patches' queries and the class token's key, p_pc in the backward kernel the probabilities of the patches'
# keys and the class token's query. x_c is a vector, x_c16 a tile of 16 rows (or columns) of which only the first counts.


@triton.jit
def _dot(x, y, acc=None):
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit
def _biased(q, bias, B):
    if B > 0:  # always: a branch keeps the compiler from adding once more for each layout that a product wants q in
        q = (q.to(tl.float32) + bias).to(q.dtype)
    return q


@triton.jit
def _attention_forward_kernel(qkv, q_bias, out, lse, B, scale_log2, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    N: tl.constexpr = 1 + P
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    h = tl.program_id(0) % H
    m = (tl.program_id(0) // H).to(tl.int64)
    r = tl.program_id(0) // H // B
    patch = 1 + tl.arange(0, P)
    line = tl.arange(0, d)
    patches = patch[:, None] * (3 * D) + line[None, :]
    bias = tl.load(q_bias + r * D + h * d + line)
    q_at = qkv + m * (N * 3 * D) + h * d
    out_at = out + m * (N * D) + h * d
    lse_at = lse + (m * H + h) * N
    q = _biased(tl.load(q_at + patches), bias[None, :], B)
    k = tl.load(q_at + D + patches)
    v = tl.load(q_at + 2 * D + patches)
    q_c = _biased(tl.load(q_at + line), bias, B).to(tl.float32)
    k_c = tl.load(q_at + D + line).to(tl.float32)
    v_c = tl.load(q_at + 2 * D + line).to(tl.float32)

    # The patches' queries.
    s = _dot(q, tl.trans(k))
    s_pc = tl.sum(q.to(tl.float32) * k_c[None, :], 1)
    highest = tl.maximum(tl.max(s, 1), s_pc) * scale_log2
    p = tl.exp2(s * scale_log2 - highest[:, None])
    p_pc = tl.exp2(s_pc * scale_log2 - highest)
    total = tl.sum(p, 1) + p_pc
    o = _dot(p.to(kind), v) + p_pc[:, None] * v_c[None, :]
    tl.store(out_at + patch[:, None] * D + line[None, :], (o * (1.0 / total)[:, None]).to(kind))
    tl.store(lse_at + patch, highest + tl.log2(total))

    # The class token's query.
    s_cp = tl.sum(k.to(tl.float32) * q_c[None, :], 1)
    s_cc = tl.sum(q_c * k_c, 0)
    highest_c = tl.maximum(tl.max(s_cp, 0), s_cc) * scale_log2
    p_cp = tl.exp2(s_cp * scale_log2 - highest_c)
    p_cc = tl.exp2(s_cc * scale_log2 - highest_c)
    total_c = tl.sum(p_cp, 0) + p_cc
    o_c = tl.sum(p_cp[:, None] * v.to(tl.float32), 0) + p_cc * v_c
    tl.store(out_at + line, (o_c * (1.0 / total_c)).to(kind))
    tl.store(lse_at, highest_c + tl.log2(total_c))


@triton.jit
def _attention_backward_kernel(
    qkv, q_bias, out, dout, lse, dqkv, parts, B, scale, scale_log2, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr
):
    N: tl.constexpr = 1 + P
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    h = tl.program_id(0) % H
    m = (tl.program_id(0) // H).to(tl.int64)
    r = tl.program_id(0) // H // B
    patch = 1 + tl.arange(0, P)
    padded = tl.arange(0, 16)
    line = tl.arange(0, d)
    column = line[None, :]
    first = (padded[:, None] == 0) & (column >= 0)
    patches, class16 = patch[:, None] * (3 * D) + column, padded[:, None] * (3 * D) + column  # in qkv and dqkv
    patches_out, class16_out = patch[:, None] * D + column, padded[:, None] * D + column  # in out and dout
    bias = tl.load(q_bias + r * D + h * d + line)
    q_at = qkv + m * (N * 3 * D) + h * d
    dq_at = dqkv + m * (N * 3 * D) + h * d
    o_at = out + m * (N * D) + h * d
    do_at = dout + m * (N * D) + h * d
    lse_at = lse + (m * H + h) * N
    k = tl.load(q_at + D + patches)
    q = _biased(tl.load(q_at + patches), bias[None, :], B)
    v = tl.load(q_at + 2 * D + patches)
    do = tl.load(do_at + patches_out)
    o = tl.load(o_at + patches_out)
    lse_p = tl.load(lse_at + patch)
    q_c16 = _biased(tl.load(q_at + class16, mask=first, other=0.0), bias[None, :], B)
    k_c16 = tl.load(q_at + D + class16, mask=first, other=0.0)
    v_c16 = tl.load(q_at + 2 * D + class16, mask=first, other=0.0)
    do_c16 = tl.load(do_at + class16_out, mask=first, other=0.0)
    q_c = _biased(tl.load(q_at + line), bias, B).to(tl.float32)
    k_c = tl.load(q_at + D + line).to(tl.float32)
    v_c = tl.load(q_at + 2 * D + line).to(tl.float32)
    do_c = tl.load(do_at + line).to(tl.float32)
    o_c = tl.load(o_at + line).to(tl.float32)
    lse_c = tl.load(lse_at)

    # Probabilities and the gradient of the scores, both with a row for each key.
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    delta_c = tl.sum(do_c * o_c, 0)
    p_cc = tl.exp2(tl.sum(q_c * k_c, 0) * scale_log2 - lse_c)
    ds_cc = p_cc * (tl.sum(do_c * v_c, 0) - delta_c)
    lse_c16 = tl.where(padded == 0, lse_c, float("inf"))  # p of the other columns: 0
    p_pc16 = tl.exp2(_dot(k, tl.trans(q_c16)) * scale_log2 - lse_c16[None, :])
    ds_pc16 = (p_pc16 * (_dot(v, tl.trans(do_c16)) - delta_c)).to(kind)
    p_pc16 = p_pc16.to(kind)
    p_c16p = tl.exp2(_dot(k_c16, tl.trans(q)) * scale_log2 - lse_p[None, :])
    p_c16p = tl.where((padded == 0)[:, None], p_c16p, 0.0)
    ds_c16p = (p_c16p * (_dot(v_c16, tl.trans(do)) - delta[None, :])).to(kind)
    p_c16p = p_c16p.to(kind)
    p = tl.exp2(_dot(k, tl.trans(q)) * scale_log2 - lse_p[None, :])
    ds = (p * (_dot(v, tl.trans(do)) - delta[None, :])).to(kind)

    # The gradients of values, keys, queries and the queries' bias.
    dv = _dot(p_pc16, do_c16, acc=_dot(p.to(kind), do))
    tl.store(dq_at + 2 * D + patches, dv.to(kind))
    dv_c16 = _dot(p_c16p, do) + (p_cc * do_c)[None, :]
    tl.store(dq_at + 2 * D + class16, dv_c16.to(kind), mask=first)
    dk = _dot(ds_pc16, q_c16, acc=_dot(ds, q)) * scale
    tl.store(dq_at + D + patches, dk.to(kind))
    dk_c16 = (_dot(ds_c16p, q) + (ds_cc * q_c)[None, :]) * scale
    tl.store(dq_at + D + class16, dk_c16.to(kind), mask=first)
    dq = (_dot(tl.trans(ds_c16p), k_c16, acc=_dot(tl.trans(ds), k)) * scale).to(kind)
    tl.store(dq_at + patches, dq)
    dq_c16 = (_dot(tl.trans(ds_pc16), k) + (ds_cc * k_c)[None, :]) * scale
    tl.store(dq_at + class16, dq_c16.to(kind), mask=first)
    # The sum of dq's rows, as a product: the first row of it counts.
    dbias = _dot(tl.full((16, P), 1.0, tl.float32).to(kind), dq, acc=dq_c16)
    tl.store(parts + m * D + h * d + padded[:, None] + column, dbias, mask=first)


@torch.library.custom_op("vitpa::attention", mutates_args=())
def _forward(qkv: Tensor, q_bias: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    R = q_bias.shape[0]
    qkv, q_bias = qkv.contiguous(), q_bias.contiguous()
    out = torch.empty(M, N, H * d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(M, H, N, dtype=torch.float32, device=qkv.device)
    kernel: Any = _attention_forward_kernel
    kernel[(H * M,)](qkv, q_bias, out, lse, M // R, d**-0.5 * LOG2_E, H, N - 1, d, num_warps=NUM_WARPS)
    return out, lse


@_forward.register_fake
def _(qkv: Tensor, q_bias: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    return qkv.new_empty(M, N, H * d), qkv.new_empty(M, H, N, dtype=torch.float32)


@torch.library.custom_op("vitpa::attention_backward", mutates_args=())
def _backward(qkv: Tensor, q_bias: Tensor, out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    R = q_bias.shape[0]
    qkv, q_bias, dout = qkv.contiguous(), q_bias.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    parts = torch.empty(R, M // R, H * d, dtype=torch.float32, device=qkv.device)
    small = d <= 32 and qkv.dtype == torch.bfloat16  # larger tiles do not fit into so few registers
    scale = d**-0.5
    kernel: Any = _attention_backward_kernel
    kernel[(H * M,)](
        qkv, q_bias, out, dout, lse, dqkv, parts, M // R, scale, scale * LOG2_E, H, N - 1, d,
        num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS_BACKWARD if small else None,
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


def attention(qkv: Float[Tensor, "M N 3 H d"], q_bias: Float32[Tensor, "R H*d"]) -> Float[Tensor, "M N H*d"]:
    """Attend within each image; qkv in float32 or bfloat16.

    The images of each replica follow one another; its bias is added to its queries. Probabilities are rounded to the type of
    qkv where they are multiplied, as are their gradients and the biased queries; sums are float32.
    """
    out: Tensor = _forward(qkv, q_bias)[0]
    return out
