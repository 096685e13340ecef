"""Content attention softmax(q k^T / sqrt(d)) v of a few tokens: one program per image and head.

All of an image's tokens fit into registers, so nothing is tiled. As in FlashAttention (Dao et al., NeurIPS 2022,
algorithms 1 and 4), the forward pass keeps no probabilities but the logarithm of each row's sum, and the backward pass
recomputes them from it.

Axes: M images, N = 1 + P tokens (class token first), H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS_FORWARD = 4  # four warps of 16 rows each: what a Hopper matrix instruction of 64 rows wants
NUM_WARPS_BACKWARD = 4
MAX_REGISTERS_BACKWARD: int | None = 128  # a thread's: four programs a multiprocessor instead of the three of 142
LOG2_E = 1.4426950408889634


def unfit(tokens: int, head_dim: int) -> str:
    """Why the kernel does not take these sizes; empty if it does."""
    if tokens - 1 not in (16, 32, 64):
        return f"attention kernel: {tokens - 1} patches, not 16, 32 or 64"
    if head_dim not in (16, 32, 64):
        return f"attention kernel: head_dim {head_dim}, not 16, 32 or 64"
    return ""


# Names in the kernels: p_i for patches, c for the class token; so s_pc are the scores of the patches' queries and the class
# token's key. Class tiles have 16 rows (as queries) or columns (as keys), of which only the first counts.


@triton.jit
def _forward_kernel(qkv, out, lse, scale_log2, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    m = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    D: tl.constexpr = H * d
    token = 1 + tl.arange(0, P)[:, None]
    padded = tl.arange(0, 16)[:, None]
    column = tl.arange(0, d)[None, :]
    first = (padded == 0) & (column >= 0)
    first_key = (tl.arange(0, 16) == 0)[None, :]
    q_at = qkv + m * ((1 + P) * 3 * D) + h * d
    out_at = out + m * ((1 + P) * D) + h * d
    lse_at = lse + (m * H + h) * (1 + P)
    q = tl.load(q_at + token * (3 * D) + column)
    k = tl.load(q_at + D + token * (3 * D) + column)
    v = tl.load(q_at + 2 * D + token * (3 * D) + column)
    q_c = tl.load(q_at + padded * (3 * D) + column, mask=first, other=0.0)
    k_c = tl.load(q_at + D + padded * (3 * D) + column, mask=first, other=0.0)
    v_c = tl.load(q_at + 2 * D + padded * (3 * D) + column, mask=first, other=0.0)

    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s_pc = tl.where(first_key, tl.dot(q, tl.trans(k_c), input_precision="ieee"), float("-inf"))
    highest = tl.maximum(tl.max(s, 1), tl.max(s_pc, 1)) * scale_log2
    p = tl.exp2(s * scale_log2 - highest[:, None])
    p_pc = tl.exp2(s_pc * scale_log2 - highest[:, None])
    total = tl.sum(p, 1) + tl.sum(p_pc, 1)
    o = tl.dot(p_pc.to(q.dtype), v_c, acc=tl.dot(p.to(q.dtype), v, input_precision="ieee"), input_precision="ieee")
    tl.store(out_at + token * D + column, (o * (1.0 / total)[:, None]).to(q.dtype))
    tl.store(lse_at + 1 + tl.arange(0, P), highest + tl.log2(total))

    s = tl.dot(q_c, tl.trans(k), input_precision="ieee")
    s_cc = tl.where(first_key, tl.dot(q_c, tl.trans(k_c), input_precision="ieee"), float("-inf"))
    highest = tl.maximum(tl.max(s, 1), tl.max(s_cc, 1)) * scale_log2
    p = tl.exp2(s * scale_log2 - highest[:, None])
    p_cc = tl.exp2(s_cc * scale_log2 - highest[:, None])
    total = tl.sum(p, 1) + tl.sum(p_cc, 1)
    o = tl.dot(p_cc.to(q.dtype), v_c, acc=tl.dot(p.to(q.dtype), v, input_precision="ieee"), input_precision="ieee")
    tl.store(out_at + padded * D + column, (o * (1.0 / total)[:, None]).to(q.dtype), mask=first)
    tl.store(lse_at + tl.arange(0, 16), highest + tl.log2(total), mask=tl.arange(0, 16) == 0)


@triton.jit
def _backward_kernel(qkv, dout, lse, dqkv, scale, scale_log2, H: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    m = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    D: tl.constexpr = H * d
    token = 1 + tl.arange(0, P)[:, None]
    padded = tl.arange(0, 16)[:, None]
    column = tl.arange(0, d)[None, :]
    first = (padded == 0) & (column >= 0)
    first_key = (tl.arange(0, 16) == 0)[None, :]
    q_at = qkv + m * ((1 + P) * 3 * D) + h * d
    dq_at = dqkv + m * ((1 + P) * 3 * D) + h * d
    do_at = dout + m * ((1 + P) * D) + h * d
    lse_at = lse + (m * H + h) * (1 + P)
    q = tl.load(q_at + token * (3 * D) + column)
    k = tl.load(q_at + D + token * (3 * D) + column)
    v = tl.load(q_at + 2 * D + token * (3 * D) + column)
    do = tl.load(do_at + token * D + column)
    q_c = tl.load(q_at + padded * (3 * D) + column, mask=first, other=0.0)
    k_c = tl.load(q_at + D + padded * (3 * D) + column, mask=first, other=0.0)
    v_c = tl.load(q_at + 2 * D + padded * (3 * D) + column, mask=first, other=0.0)
    do_c = tl.load(do_at + padded * D + column, mask=first, other=0.0)
    lse_p = tl.load(lse_at + 1 + tl.arange(0, P))
    lse_c = tl.load(lse_at + tl.arange(0, 16), mask=tl.arange(0, 16) == 0, other=float("inf"))  # p of the other rows: 0

    # The class token's query: its row of p and of ds, rounded to what the matrix units take.
    p_cp = tl.exp2(tl.dot(q_c, tl.trans(k), input_precision="ieee") * scale_log2 - lse_c[:, None])
    p_cc = tl.exp2(tl.dot(q_c, tl.trans(k_c), input_precision="ieee") * scale_log2 - lse_c[:, None])
    p_cc = tl.where(first_key, p_cc, 0.0)
    dp_cp = tl.dot(do_c, tl.trans(v), input_precision="ieee")
    dp_cc = tl.dot(do_c, tl.trans(v_c), input_precision="ieee")
    delta = tl.sum(p_cp * dp_cp, 1) + tl.sum(p_cc * dp_cc, 1)
    ds_cp = (p_cp * (dp_cp - delta[:, None])).to(q.dtype)
    ds_cc = (p_cc * (dp_cc - delta[:, None])).to(q.dtype)
    p_cp = p_cp.to(q.dtype)
    p_cc = p_cc.to(q.dtype)
    dq_c = tl.dot(ds_cc, k_c, acc=tl.dot(ds_cp, k, input_precision="ieee"), input_precision="ieee")
    tl.store(dq_at + padded * (3 * D) + column, (dq_c * scale).to(q.dtype), mask=first)
    dk_c = tl.dot(tl.trans(ds_cc), q_c, input_precision="ieee")
    dv_c = tl.dot(tl.trans(p_cc), do_c, input_precision="ieee")

    # The patches' queries.
    p_pc = tl.exp2(tl.dot(q, tl.trans(k_c), input_precision="ieee") * scale_log2 - lse_p[:, None])
    p_pc = tl.where(first_key, p_pc, 0.0)
    dp_pc = tl.dot(do, tl.trans(v_c), input_precision="ieee")
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_p[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    delta = tl.sum(p * dp, 1) + tl.sum(p_pc * dp_pc, 1)
    dv = tl.dot(tl.trans(p.to(q.dtype)), do, input_precision="ieee")
    dv = tl.dot(tl.trans(p_cp), do_c, acc=dv, input_precision="ieee")
    tl.store(dq_at + 2 * D + token * (3 * D) + column, dv.to(q.dtype))
    dv_c = tl.dot(tl.trans(p_pc.to(q.dtype)), do, acc=dv_c, input_precision="ieee")
    tl.store(dq_at + 2 * D + padded * (3 * D) + column, dv_c.to(q.dtype), mask=first)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    ds_pc = (p_pc * (dp_pc - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds_pc, k_c, acc=tl.dot(ds, k, input_precision="ieee"), input_precision="ieee")
    tl.store(dq_at + token * (3 * D) + column, (dq * scale).to(q.dtype))
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    dk = tl.dot(tl.trans(ds_cp), q_c, acc=dk, input_precision="ieee")
    tl.store(dq_at + D + token * (3 * D) + column, (dk * scale).to(q.dtype))
    dk_c = tl.dot(tl.trans(ds_pc), q, acc=dk_c, input_precision="ieee")
    tl.store(dq_at + D + padded * (3 * D) + column, (dk_c * scale).to(q.dtype), mask=first)


@torch.library.custom_op("vitpa::attention", mutates_args=())
def _forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    qkv = qkv.contiguous()
    out = torch.empty(M, N, H * d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(M, H, N, dtype=torch.float32, device=qkv.device)
    kernel: Any = _forward_kernel
    kernel[(M * H,)](qkv, out, lse, d**-0.5 * LOG2_E, H, N - 1, d, num_warps=NUM_WARPS_FORWARD)
    return out, lse


@_forward.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    return qkv.new_empty(M, N, H * d), qkv.new_empty(M, H, N, dtype=torch.float32)


@torch.library.custom_op("vitpa::attention_backward", mutates_args=())
def _backward(qkv: Tensor, dout: Tensor, lse: Tensor) -> Tensor:
    M, N, _, H, d = qkv.shape
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    kernel: Any = _backward_kernel
    scale = d**-0.5
    small = d <= 32 and qkv.dtype == torch.bfloat16  # what is larger would only spill
    kernel[(M * H,)](
        qkv, dout, lse, dqkv, scale, scale * LOG2_E, H, N - 1, d,
        num_warps=NUM_WARPS_BACKWARD, maxnreg=MAX_REGISTERS_BACKWARD if small else None,
    )  # fmt: skip
    return dqkv


@_backward.register_fake
def _(qkv: Tensor, dout: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _dlse: Tensor) -> Tensor:
    qkv, lse = ctx.saved_tensors
    dqkv: Tensor = _backward(qkv, dout, lse)
    return dqkv


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor) -> Tensor:
    """Attend within each image: qkv (M, N, 3, H, d) in float32 or bfloat16 -> (M, N, H * d).

    Probabilities are rounded to the type of qkv where they are multiplied, as are their gradients; sums are float32.
    """
    out: Tensor = _forward(qkv)[0]
    return out
