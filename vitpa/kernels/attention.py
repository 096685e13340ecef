"""Content attention softmax((q + b) k^T / sqrt(d)) v of a few tokens: a program goes through a chunk of images of one head.

All of an image's tokens fit into registers, so nothing is tiled. As in FlashAttention (Dao et al., NeurIPS 2022,
algorithms 1 and 4), the forward pass keeps no probabilities but the logarithm of each row's sum, and the backward pass
recomputes them from it. Only the queries have a bias: one of the keys would add the same to all scores of a row, and one of
the values would pass to the output unchanged.

Axes: R replicas, B batch, M = R * B images, N = 1 + P tokens (class token first), H heads, d head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitpa.kernels.partials import sum_partials

NUM_WARPS_FORWARD = 4  # four warps of 16 rows each: what a Hopper matrix instruction of 64 rows wants
CHUNK_FORWARD = 1  # images a program
NUM_STAGES_FORWARD = 2  # images whose loads are under way at a time
MAX_REGISTERS_FORWARD: int | None = None
_CLASS_TILES_FORWARD = False  # the class token as a tile of 16 rows, or as vectors
NUM_WARPS_BACKWARD = 4
CHUNK_BACKWARD = 1
NUM_STAGES_BACKWARD = 2
MAX_REGISTERS_BACKWARD: int | None = 128  # a thread's: four programs a multiprocessor instead of the three of 142
_CLASS_TILES_BACKWARD = True
_TRANSPOSED_BACKWARD = True  # scores with a row for each key: one tile is transposed instead of two, but `out` is read
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
def _biased(q, bias, B):
    if B > 0:  # always: a branch keeps the compiler from adding once more for each layout that a product wants q in
        q = (q.to(tl.float32) + bias).to(q.dtype)
    return q


@triton.jit
def _forward_kernel(
    qkv, q_bias, out, lse, B, scale_log2,
    H: tl.constexpr, P: tl.constexpr, d: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    r = tl.program_id(1) // chunks
    first_image = tl.program_id(1) % chunks * CHUNK
    images = 1 if CHUNK == 1 else tl.minimum(CHUNK, B - first_image)
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    patch = 1 + tl.arange(0, P)
    token = patch[:, None]
    padded = tl.arange(0, 16)[:, None]
    line = tl.arange(0, d)
    column = line[None, :]
    first = (padded == 0) & (column >= 0)
    first_key = (tl.arange(0, 16) == 0)[None, :]
    bias = tl.load(q_bias + r * D + h * d + line)
    m = (r * B + first_image).to(tl.int64)
    q_at = qkv + m * ((1 + P) * 3 * D) + h * d
    out_at = out + m * ((1 + P) * D) + h * d
    lse_at = lse + (m * H + h) * (1 + P)
    for _ in range(images):
        q = _biased(tl.load(q_at + token * (3 * D) + column), bias[None, :], B)
        k = tl.load(q_at + D + token * (3 * D) + column)
        v = tl.load(q_at + 2 * D + token * (3 * D) + column)
        if TILES:
            q_c = tl.load(q_at + padded * (3 * D) + column, mask=first, other=0.0)
            q_c = _biased(q_c, bias[None, :], B)
            k_c = tl.load(q_at + D + padded * (3 * D) + column, mask=first, other=0.0)
            v_c = tl.load(q_at + 2 * D + padded * (3 * D) + column, mask=first, other=0.0)

            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s_pc = tl.where(first_key, tl.dot(q, tl.trans(k_c), input_precision="ieee"), float("-inf"))
            highest = tl.maximum(tl.max(s, 1), tl.max(s_pc, 1)) * scale_log2
            p = tl.exp2(s * scale_log2 - highest[:, None])
            p_pc = tl.exp2(s_pc * scale_log2 - highest[:, None])
            total = tl.sum(p, 1) + tl.sum(p_pc, 1)
            o = tl.dot(p.to(kind), v, input_precision="ieee")
            o = tl.dot(p_pc.to(kind), v_c, acc=o, input_precision="ieee")
            tl.store(out_at + token * D + column, (o * (1.0 / total)[:, None]).to(kind))
            tl.store(lse_at + patch, highest + tl.log2(total))

            s = tl.dot(q_c, tl.trans(k), input_precision="ieee")
            s_cc = tl.where(first_key, tl.dot(q_c, tl.trans(k_c), input_precision="ieee"), float("-inf"))
            highest = tl.maximum(tl.max(s, 1), tl.max(s_cc, 1)) * scale_log2
            p = tl.exp2(s * scale_log2 - highest[:, None])
            p_cc = tl.exp2(s_cc * scale_log2 - highest[:, None])
            total = tl.sum(p, 1) + tl.sum(p_cc, 1)
            o = tl.dot(p.to(kind), v, input_precision="ieee")
            o = tl.dot(p_cc.to(kind), v_c, acc=o, input_precision="ieee")
            tl.store(out_at + padded * D + column, (o * (1.0 / total)[:, None]).to(kind), mask=first)
            tl.store(lse_at + tl.arange(0, 16), highest + tl.log2(total), mask=tl.arange(0, 16) == 0)
        else:
            q_c = _biased(tl.load(q_at + line), bias, B).to(tl.float32)
            k_c = tl.load(q_at + D + line).to(tl.float32)
            v_c = tl.load(q_at + 2 * D + line).to(tl.float32)

            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s_pc = tl.sum(q.to(tl.float32) * k_c[None, :], 1)
            highest = tl.maximum(tl.max(s, 1), s_pc) * scale_log2
            p = tl.exp2(s * scale_log2 - highest[:, None])
            p_pc = tl.exp2(s_pc * scale_log2 - highest)
            total = tl.sum(p, 1) + p_pc
            o = tl.dot(p.to(kind), v, input_precision="ieee") + p_pc[:, None] * v_c[None, :]
            tl.store(out_at + token * D + column, (o * (1.0 / total)[:, None]).to(kind))
            tl.store(lse_at + patch, highest + tl.log2(total))

            s_cp = tl.sum(k.to(tl.float32) * q_c[None, :], 1)
            s_cc = tl.sum(q_c * k_c, 0)
            highest_c = tl.maximum(tl.max(s_cp, 0), s_cc) * scale_log2
            p_cp = tl.exp2(s_cp * scale_log2 - highest_c)
            p_cc = tl.exp2(s_cc * scale_log2 - highest_c)
            total_c = tl.sum(p_cp, 0) + p_cc
            o_c = tl.sum(p_cp[:, None] * v.to(tl.float32), 0) + p_cc * v_c
            tl.store(out_at + line, (o_c * (1.0 / total_c)).to(kind))
            tl.store(lse_at, highest_c + tl.log2(total_c))
        q_at += (1 + P) * 3 * D
        out_at += (1 + P) * D
        lse_at += H * (1 + P)


@triton.jit
def _backward_kernel(
    qkv, q_bias, dout, lse, dqkv, parts, B, scale, scale_log2,
    H: tl.constexpr, P: tl.constexpr, d: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    r = tl.program_id(1) // chunks
    first_image = tl.program_id(1) % chunks * CHUNK
    images = 1 if CHUNK == 1 else tl.minimum(CHUNK, B - first_image)
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    patch = 1 + tl.arange(0, P)
    token = patch[:, None]
    padded = tl.arange(0, 16)[:, None]
    line = tl.arange(0, d)
    column = line[None, :]
    first = (padded == 0) & (column >= 0)
    first_key = (tl.arange(0, 16) == 0)[None, :]
    bias = tl.load(q_bias + r * D + h * d + line)
    m = (r * B + first_image).to(tl.int64)
    q_at = qkv + m * ((1 + P) * 3 * D) + h * d
    dq_at = dqkv + m * ((1 + P) * 3 * D) + h * d
    do_at = dout + m * ((1 + P) * D) + h * d
    lse_at = lse + (m * H + h) * (1 + P)
    ones = tl.full((16, P), 1.0, tl.float32).to(kind)
    dbias = tl.zeros((16, d), tl.float32)  # of which the first row counts
    for _ in range(images):
        q = _biased(tl.load(q_at + token * (3 * D) + column), bias[None, :], B)
        k = tl.load(q_at + D + token * (3 * D) + column)
        v = tl.load(q_at + 2 * D + token * (3 * D) + column)
        do = tl.load(do_at + token * D + column)
        lse_p = tl.load(lse_at + patch)
        if TILES:
            q_c = tl.load(q_at + padded * (3 * D) + column, mask=first, other=0.0)
            q_c = _biased(q_c, bias[None, :], B)
            k_c = tl.load(q_at + D + padded * (3 * D) + column, mask=first, other=0.0)
            v_c = tl.load(q_at + 2 * D + padded * (3 * D) + column, mask=first, other=0.0)
            do_c = tl.load(do_at + padded * D + column, mask=first, other=0.0)
            one = tl.arange(0, 16) == 0
            lse_c = tl.load(lse_at + tl.arange(0, 16), mask=one, other=float("inf"))  # p of the other rows: 0

            # The class token's query: its row of p and of ds, rounded to what the matrix units take.
            p_cp = tl.exp2(tl.dot(q_c, tl.trans(k), input_precision="ieee") * scale_log2 - lse_c[:, None])
            p_cc = tl.exp2(tl.dot(q_c, tl.trans(k_c), input_precision="ieee") * scale_log2 - lse_c[:, None])
            p_cc = tl.where(first_key, p_cc, 0.0)
            dp_cp = tl.dot(do_c, tl.trans(v), input_precision="ieee")
            dp_cc = tl.dot(do_c, tl.trans(v_c), input_precision="ieee")
            delta = tl.sum(p_cp * dp_cp, 1) + tl.sum(p_cc * dp_cc, 1)
            ds_cp = (p_cp * (dp_cp - delta[:, None])).to(kind)
            ds_cc = (p_cc * (dp_cc - delta[:, None])).to(kind)
            p_cp = p_cp.to(kind)
            p_cc = p_cc.to(kind)
            dq_c = tl.dot(ds_cc, k_c, acc=tl.dot(ds_cp, k, input_precision="ieee"), input_precision="ieee") * scale
            tl.store(dq_at + padded * (3 * D) + column, dq_c.to(kind), mask=first)
            dk_c = tl.dot(tl.trans(ds_cc), q_c, input_precision="ieee")
            dv_c = tl.dot(tl.trans(p_cc), do_c, input_precision="ieee")

            # The patches' queries.
            p_pc = tl.exp2(tl.dot(q, tl.trans(k_c), input_precision="ieee") * scale_log2 - lse_p[:, None])
            p_pc = tl.where(first_key, p_pc, 0.0)
            dp_pc = tl.dot(do, tl.trans(v_c), input_precision="ieee")
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_p[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            delta_p = tl.sum(p * dp, 1) + tl.sum(p_pc * dp_pc, 1)
            dv = tl.dot(tl.trans(p.to(kind)), do, input_precision="ieee")
            dv = tl.dot(tl.trans(p_cp), do_c, acc=dv, input_precision="ieee")
            tl.store(dq_at + 2 * D + token * (3 * D) + column, dv.to(kind))
            dv_c = tl.dot(tl.trans(p_pc.to(kind)), do, acc=dv_c, input_precision="ieee")
            tl.store(dq_at + 2 * D + padded * (3 * D) + column, dv_c.to(kind), mask=first)
            ds = (p * (dp - delta_p[:, None])).to(kind)
            ds_pc = (p_pc * (dp_pc - delta_p[:, None])).to(kind)
            dq = tl.dot(ds_pc, k_c, acc=tl.dot(ds, k, input_precision="ieee"), input_precision="ieee") * scale
            dq = dq.to(kind)
            tl.store(dq_at + token * (3 * D) + column, dq)
            dbias = tl.dot(ones, dq, acc=dbias + dq_c, input_precision="ieee")
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            dk = tl.dot(tl.trans(ds_cp), q_c, acc=dk, input_precision="ieee")
            tl.store(dq_at + D + token * (3 * D) + column, (dk * scale).to(kind))
            dk_c = tl.dot(tl.trans(ds_pc), q, acc=dk_c, input_precision="ieee")
            tl.store(dq_at + D + padded * (3 * D) + column, (dk_c * scale).to(kind), mask=first)
        else:
            q_c = _biased(tl.load(q_at + line), bias, B).to(tl.float32)
            k_c = tl.load(q_at + D + line).to(tl.float32)
            v_c = tl.load(q_at + 2 * D + line).to(tl.float32)
            do_c = tl.load(do_at + line).to(tl.float32)
            lse_c = tl.load(lse_at)

            # The class token's query.
            p_cp = tl.exp2(tl.sum(k.to(tl.float32) * q_c[None, :], 1) * scale_log2 - lse_c)
            p_cc = tl.exp2(tl.sum(k_c * q_c, 0) * scale_log2 - lse_c)
            dp_cp = tl.sum(v.to(tl.float32) * do_c[None, :], 1)
            dp_cc = tl.sum(v_c * do_c, 0)
            delta_c = tl.sum(p_cp * dp_cp, 0) + p_cc * dp_cc
            ds_cp = p_cp * (dp_cp - delta_c)
            ds_cc = p_cc * (dp_cc - delta_c)
            dq_c = (tl.sum(ds_cp[:, None] * k.to(tl.float32), 0) + ds_cc * k_c) * scale
            tl.store(dq_at + line, dq_c.to(kind))

            # The patches' queries.
            p_pc = tl.exp2(tl.sum(q.to(tl.float32) * k_c[None, :], 1) * scale_log2 - lse_p)
            dp_pc = tl.sum(do.to(tl.float32) * v_c[None, :], 1)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_p[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            delta_p = tl.sum(p * dp, 1) + p_pc * dp_pc
            dv = tl.dot(tl.trans(p.to(kind)), do, input_precision="ieee") + p_cp[:, None] * do_c[None, :]
            tl.store(dq_at + 2 * D + token * (3 * D) + column, dv.to(kind))
            dv_c = tl.sum(p_pc[:, None] * do.to(tl.float32), 0) + p_cc * do_c
            tl.store(dq_at + 2 * D + line, dv_c.to(kind))
            ds = (p * (dp - delta_p[:, None])).to(kind)
            ds_pc = p_pc * (dp_pc - delta_p)
            dq = (tl.dot(ds, k, input_precision="ieee") + ds_pc[:, None] * k_c[None, :]) * scale
            dq = dq.to(kind)
            tl.store(dq_at + token * (3 * D) + column, dq)
            dbias = tl.dot(ones, dq, acc=dbias + dq_c[None, :], input_precision="ieee")
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") + ds_cp[:, None] * q_c[None, :]
            tl.store(dq_at + D + token * (3 * D) + column, (dk * scale).to(kind))
            dk_c = tl.sum(ds_pc[:, None] * q.to(tl.float32), 0) + ds_cc * q_c
            tl.store(dq_at + D + line, (dk_c * scale).to(kind))
        q_at += (1 + P) * 3 * D
        dq_at += (1 + P) * 3 * D
        do_at += (1 + P) * D
        lse_at += H * (1 + P)
    tl.store(parts + tl.program_id(1).to(tl.int64) * D + h * d + padded + column, dbias, mask=first)


@triton.jit
def _backward_transposed_kernel(
    qkv, q_bias, out, dout, lse, dqkv, parts, B, scale, scale_log2,
    H: tl.constexpr, P: tl.constexpr, d: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    r = tl.program_id(1) // chunks
    first_image = tl.program_id(1) % chunks * CHUNK
    images = 1 if CHUNK == 1 else tl.minimum(CHUNK, B - first_image)
    D: tl.constexpr = H * d
    kind: tl.constexpr = qkv.dtype.element_ty
    patch = 1 + tl.arange(0, P)
    token = patch[:, None]
    one = tl.arange(0, 16) == 0
    padded = tl.arange(0, 16)[:, None]
    line = tl.arange(0, d)
    column = line[None, :]
    first = (padded == 0) & (column >= 0)
    bias = tl.load(q_bias + r * D + h * d + line)
    m = (r * B + first_image).to(tl.int64)
    q_at = qkv + m * ((1 + P) * 3 * D) + h * d
    dq_at = dqkv + m * ((1 + P) * 3 * D) + h * d
    o_at = out + m * ((1 + P) * D) + h * d
    do_at = dout + m * ((1 + P) * D) + h * d
    lse_at = lse + (m * H + h) * (1 + P)
    ones = tl.full((16, P), 1.0, tl.float32).to(kind)
    dbias = tl.zeros((16, d), tl.float32)  # of which the first row counts
    for _ in range(images):
        k = tl.load(q_at + D + token * (3 * D) + column)
        q = _biased(tl.load(q_at + token * (3 * D) + column), bias[None, :], B)
        v = tl.load(q_at + 2 * D + token * (3 * D) + column)
        do = tl.load(do_at + token * D + column)
        o = tl.load(o_at + token * D + column)
        lse_p = tl.load(lse_at + patch)
        q_c = _biased(tl.load(q_at + padded * (3 * D) + column, mask=first, other=0.0), bias[None, :], B)
        k_c = tl.load(q_at + D + padded * (3 * D) + column, mask=first, other=0.0)
        v_c = tl.load(q_at + 2 * D + padded * (3 * D) + column, mask=first, other=0.0)
        do_c = tl.load(do_at + padded * D + column, mask=first, other=0.0)
        q_1 = _biased(tl.load(q_at + line), bias, B).to(tl.float32)
        k_1 = tl.load(q_at + D + line).to(tl.float32)
        v_1 = tl.load(q_at + 2 * D + line).to(tl.float32)
        do_1 = tl.load(do_at + line).to(tl.float32)
        o_1 = tl.load(o_at + line).to(tl.float32)
        lse_1 = tl.load(lse_at)

        # Scores are transposed: a row for each key.
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        delta_1 = tl.sum(do_1 * o_1, 0)
        p_11 = tl.exp2(tl.sum(q_1 * k_1, 0) * scale_log2 - lse_1)
        ds_11 = p_11 * (tl.sum(do_1 * v_1, 0) - delta_1)
        # The class token's query.
        lse_c = tl.where(one, lse_1, float("inf"))  # p of the other columns: 0
        p_pc = tl.exp2(tl.dot(k, tl.trans(q_c), input_precision="ieee") * scale_log2 - lse_c[None, :])
        ds_pc = (p_pc * (tl.dot(v, tl.trans(do_c), input_precision="ieee") - delta_1)).to(kind)
        p_pc = p_pc.to(kind)
        # The class token's key.
        p_cp = tl.exp2(tl.dot(k_c, tl.trans(q), input_precision="ieee") * scale_log2 - lse_p[None, :])
        p_cp = tl.where(one[:, None], p_cp, 0.0)
        ds_cp = (p_cp * (tl.dot(v_c, tl.trans(do), input_precision="ieee") - delta[None, :])).to(kind)
        p_cp = p_cp.to(kind)

        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse_p[None, :])
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(kind)
        dv = tl.dot(p.to(kind), do, input_precision="ieee")
        dv = tl.dot(p_pc, do_c, acc=dv, input_precision="ieee")
        tl.store(dq_at + 2 * D + token * (3 * D) + column, dv.to(kind))
        dv_c = tl.dot(p_cp, do, input_precision="ieee") + (p_11 * do_1)[None, :]
        tl.store(dq_at + 2 * D + padded * (3 * D) + column, dv_c.to(kind), mask=first)
        dk = tl.dot(ds, q, input_precision="ieee")
        dk = tl.dot(ds_pc, q_c, acc=dk, input_precision="ieee") * scale
        tl.store(dq_at + D + token * (3 * D) + column, dk.to(kind))
        dk_c = (tl.dot(ds_cp, q, input_precision="ieee") + (ds_11 * q_1)[None, :]) * scale
        tl.store(dq_at + D + padded * (3 * D) + column, dk_c.to(kind), mask=first)
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        dq = tl.dot(tl.trans(ds_cp), k_c, acc=dq, input_precision="ieee") * scale
        dq = dq.to(kind)
        tl.store(dq_at + token * (3 * D) + column, dq)
        dq_c = (tl.dot(tl.trans(ds_pc), k, input_precision="ieee") + (ds_11 * k_1)[None, :]) * scale
        tl.store(dq_at + padded * (3 * D) + column, dq_c.to(kind), mask=first)
        dbias = tl.dot(ones, dq, acc=dbias + dq_c, input_precision="ieee")
        q_at += (1 + P) * 3 * D
        dq_at += (1 + P) * 3 * D
        o_at += (1 + P) * D
        do_at += (1 + P) * D
        lse_at += H * (1 + P)
    tl.store(parts + tl.program_id(1).to(tl.int64) * D + h * d + padded + column, dbias, mask=first)


@torch.library.custom_op("vitpa::attention", mutates_args=())
def _forward(qkv: Tensor, q_bias: Tensor) -> tuple[Tensor, Tensor]:
    M, N, _, H, d = qkv.shape
    R = q_bias.shape[0]
    qkv, q_bias = qkv.contiguous(), q_bias.contiguous()
    out = torch.empty(M, N, H * d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(M, H, N, dtype=torch.float32, device=qkv.device)
    kernel: Any = _forward_kernel
    small = d <= 32 and qkv.dtype == torch.bfloat16  # what is larger would only spill
    grid = (H, R * triton.cdiv(M // R, CHUNK_FORWARD))
    kernel[grid](
        qkv, q_bias, out, lse, M // R, d**-0.5 * LOG2_E, H, N - 1, d, CHUNK_FORWARD, _CLASS_TILES_FORWARD,
        num_warps=NUM_WARPS_FORWARD, num_stages=NUM_STAGES_FORWARD, maxnreg=MAX_REGISTERS_FORWARD if small else None,
    )  # fmt: skip
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
    chunks = triton.cdiv(M // R, CHUNK_BACKWARD)
    parts = torch.empty(R, chunks, H * d, dtype=torch.float32, device=qkv.device)
    kernel: Any
    scale = d**-0.5
    small = d <= 32 and qkv.dtype == torch.bfloat16  # what is larger would only spill
    sizes = (M // R, scale, scale * LOG2_E, H, N - 1, d, CHUNK_BACKWARD)
    options: dict[str, int | None] = {"num_warps": NUM_WARPS_BACKWARD, "num_stages": NUM_STAGES_BACKWARD}
    options["maxnreg"] = MAX_REGISTERS_BACKWARD if small else None
    if _TRANSPOSED_BACKWARD:
        kernel = _backward_transposed_kernel
        kernel[(H, R * chunks)](qkv, q_bias, out, dout, lse, dqkv, parts, *sizes, **options)
    else:
        kernel = _backward_kernel
        kernel[(H, R * chunks)](qkv, q_bias, dout, lse, dqkv, parts, *sizes, _CLASS_TILES_BACKWARD, **options)
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


def attention(qkv: Tensor, q_bias: Tensor) -> Tensor:
    """Attend within each image: qkv (M, N, 3, H, d) in float32 or bfloat16, q_bias (R, H * d) float32 -> (M, N, H * d).

    The images of each replica follow one another; its bias is added to its queries. Probabilities are rounded to the type of
    qkv where they are multiplied, as are their gradients and the biased queries; sums are float32.
    """
    out: Tensor = _forward(qkv, q_bias)[0]
    return out
