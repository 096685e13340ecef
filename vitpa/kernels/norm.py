"""The residual stream's addition and the layer norm after it, in one pass.

Axes: R replicas (each with parameters of its own, which may lie apart), M tokens of a replica, D embed_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from vitpa.kernels.partials import PROGRAMS, rows_apart, sum_partials, tokens_a_program

ROWS_FORWARD = 4  # tokens a program; with the warps, the best of a sweep on an H200 at 41,600 tokens of 384
NUM_WARPS_FORWARD = 4
# For so many tokens of all replicas or more, and embed_dim or less: tokens at a time, warps and most programs of the backward
# pass. Swept on an H100 at 100,864 tokens of 192 (70 us; as the line below 80), on an H200 at 41,600 and 8,320 of 384.
BACKWARD = {(2**16, 256): (2, 1, 2112), (2**15, 2048): (1, 1, PROGRAMS), (0, 2048): (4, 4, PROGRAMS)}


def unsupported_reason(embed_dim: int) -> str | None:
    """Why the kernel does not take this size; None if it does."""
    if not 16 <= embed_dim <= 2048:
        return f"norm kernel: embed_dim {embed_dim}, not within 16 and 2048: a row must fit into a program's registers"
    return None


@triton.jit
def _norm_forward_kernel(
    residual, branch, bias, scale, weight, norm_bias, total, normed, mean, rstd, M, tokens, eps,
    bias_stride, weight_stride, norm_bias_stride,
    SCALED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (token < M)[:, None] & inside[None, :]
    at = (r * M + token)[:, None] * D + column[None, :]
    x = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        added += tl.load(bias + r * bias_stride + column, mask=inside, other=0.0)[None, :]
        x += added * tl.load(scale + r * (M // tokens) + token // tokens, mask=token < M, other=0.0)[:, None]
    else:
        x += added
        x += tl.load(bias + r * bias_stride + column, mask=inside, other=0.0)[None, :]
    rounded = x.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=mask)
    x = rounded.to(tl.float32)  # the norm is of what is stored: the backward pass sees no more
    mu = tl.sum(x, 1) / D
    centred = tl.where(inside[None, :], x - mu[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(weight + r * weight_stride + column, mask=inside, other=0.0)
    b = tl.load(norm_bias + r * norm_bias_stride + column, mask=inside, other=0.0)
    y = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)
    tl.store(mean + r * M + token, mu, mask=token < M)
    tl.store(rstd + r * M + token, scale, mask=token < M)


@triton.jit
def _norm_backward_kernel(
    dnormed, dtotal, total, scale, weight, mean, rstd, dx, dbranch, parts, M, tokens, steps, weight_stride,
    SCALED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight + r * weight_stride + column, mask=inside, other=0.0)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)  # one sum per row of the tile: added up once, at the end
    sum_norm_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        token = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (token < M)[:, None] & inside[None, :]
        at = (r * M + token)[:, None] * D + column[None, :]
        x = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(mean + r * M + token, mask=token < M, other=0.0)
        inverse = tl.load(rstd + r * M + token, mask=token < M, other=0.0)
        x = (x - mu[:, None]) * inverse[:, None]  # where masked, g is 0, and so is inverse below the last token
        sum_weight += g * x
        sum_norm_bias += g
        g *= w[None, :]
        along = tl.sum(g * x, 1) / D
        g = (g - (tl.sum(g, 1) / D)[:, None] - x * along[:, None]) * inverse[:, None]
        g += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=mask)
        if SCALED:
            g *= tl.load(scale + r * (M // tokens) + token // tokens, mask=token < M, other=0.0)[:, None]
            tl.store(dbranch + at, g.to(dx.dtype.element_ty), mask=mask)
        sum_bias += g
    programs = tl.num_programs(0)
    to = parts + (r * programs + tl.program_id(0)) * D + column
    kind = tl.num_programs(1) * programs * D  # distance between the sums of two parameters
    tl.store(to, tl.sum(sum_weight, 0), mask=inside)
    tl.store(to + kind, tl.sum(sum_norm_bias, 0), mask=inside)
    tl.store(to + 2 * kind, tl.sum(sum_bias, 0), mask=inside)


@torch.library.custom_op("vitpa::add_norm", mutates_args=())
def _forward(
    residual: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, branch = residual.contiguous(), branch.contiguous()
    bias, weight, norm_bias = rows_apart(bias), rows_apart(weight), rows_apart(norm_bias)
    R, M, D = residual.shape
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    mean = torch.empty(R, M, dtype=torch.float32, device=residual.device)
    rstd = torch.empty_like(mean)
    scales, tokens = _per_image(scale, M)
    kernel: Any = _norm_forward_kernel
    kernel[(triton.cdiv(M, ROWS_FORWARD), R)](
        residual, branch, bias, bias if scales is None else scales, weight, norm_bias, total, normed, mean, rstd, M, tokens,
        eps,
        bias.stride(0), weight.stride(0), norm_bias.stride(0),
        scales is not None, D, triton.next_power_of_2(D), ROWS_FORWARD, num_warps=NUM_WARPS_FORWARD,
    )  # fmt: skip
    return total, normed, mean, rstd


def _per_image(scale: Tensor | None, M: int) -> tuple[Tensor | None, int]:
    """The scales (R, B) without gaps, and the number of tokens of an image, of which there are B in M tokens."""
    return (None, M) if scale is None else (scale.contiguous(), M // scale.shape[1])


@_forward.register_fake
def _(
    residual: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, M, D = residual.shape
    return (
        residual.new_empty(R, M, D),
        residual.new_empty(R, M, D),
        residual.new_empty(R, M, dtype=torch.float32),
        residual.new_empty(R, M, dtype=torch.float32),
    )


@torch.library.custom_op("vitpa::add_norm_backward", mutates_args=())
def _backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sum (R, M, D), of the branch (empty: the same), of weight, norm bias and bias (3, R, D)."""
    dnormed, dtotal, weight = dnormed.contiguous(), dtotal.contiguous(), rows_apart(weight)
    R, M, D = total.shape
    dx = torch.empty_like(total)
    dbranch = torch.empty_like(total) if scale is not None else total.new_empty(0)
    rows, warps, most = next(launch for (tokens, dim), launch in BACKWARD.items() if tokens <= R * M and dim >= D)
    block = triton.next_power_of_2(D)
    steps = triton.cdiv(tokens_a_program(R * M, most), rows)
    programs = triton.cdiv(M, steps * rows)
    parts = torch.empty(3 * R, programs, D, dtype=torch.float32, device=total.device)
    scales, tokens = _per_image(scale, M)
    kernel: Any = _norm_backward_kernel
    kernel[(programs, R)](
        dnormed, dtotal, total, mean if scales is None else scales, weight, mean, rstd, dx, dbranch, parts, M, tokens, steps,
        weight.stride(0),
        scales is not None, D, block, rows, num_warps=warps * max(1, block // 512),
    )  # fmt: skip
    return dx, dbranch, sum_partials(parts).view(3, R, D)


@_backward.register_fake
def _(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    R, M, D = total.shape
    dbranch = total.new_empty(0) if scale is None else total.new_empty(R, M, D)
    return total.new_empty(R, M, D), dbranch, weight.new_empty(3, R, D, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    total, _normed, mean, rstd = output
    ctx.save_for_backward(total, inputs[3], mean, rstd, inputs[6])
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dtotal: Tensor, dnormed: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd, scale = ctx.saved_tensors
    dx, dbranch, sums = _backward(dnormed, dtotal, total, weight, mean, rstd, scale)
    return dx, dx if scale is None else dbranch, sums[2], sums[0], sums[1], None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def add_norm(
    residual: Float[Tensor, "R M D"], branch: Float[Tensor, "R M D"], bias: Float32[Tensor, "R D"],
    weight: Float32[Tensor, "R D"], norm_bias: Float32[Tensor, "R D"], eps: float, scale: Float32[Tensor, "R B"] | None = None,
) -> tuple[Float[Tensor, "R M D"], Float[Tensor, "R M D"]]:  # fmt: skip
    """Add a branch and its bias to the residual stream, and norm the sum over the last axis: the sum and its norm.

    Both come in the type of residual and branch, float32 or bfloat16, and are computed in float32. `eps` is added to the
    variance, as in `torch.nn.LayerNorm`. `scale`, which has no gradient, multiplies the branch and bias of each image of
    M / B tokens; None for 1.
    """
    total, normed, _, _ = _forward(residual, branch, bias, weight, norm_bias, eps, scale)
    return total, normed
