"""The sum of partial results: the second half of every reduction over images or tokens, in a fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

TILE = 2048  # numbers a program holds at a time: 16 a thread
NUM_WARPS = 4
MAX_ROWS = 64  # with fewer columns than 32 a row's piece would be shorter than a memory transaction
ONE_PASS = 512  # so many partial results are summed by one program for each column; more in two passes
MIN_TOKENS, PROGRAMS = 32, 4096  # a program's partial sums are less than a tenth of what it reads; 32 for each multiprocessor


def tokens_a_program(tokens: int, programs: int = PROGRAMS) -> int:
    """How many of all `tokens` one of about `programs` programs sums: few enough to fill a GPU, and no fewer than pays."""
    return max(MIN_TOKENS, (tokens + programs - 1) // programs)


def rows_apart(vectors: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
    """A vector for each replica, which may lie apart, as views into a larger buffer do; each contiguous."""
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


@triton.jit
def _sum_partials_kernel(parts, total, S, L, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * share
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, tl.minimum(first + share, S), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < tl.minimum(first + share, S))[:, None] & (column < L)[None, :]
        tile += tl.load(parts + (group * S + row[:, None]) * L + column[None, :], mask=mask, other=0.0)
    tl.store(total + (group * tl.num_programs(2) + tl.program_id(2)) * L + column, tl.sum(tile, 0), mask=column < L)


def sum_partials(parts: Float32[Tensor, "groups S L"]) -> Float32[Tensor, "groups L"]:
    """Sum partial results over S."""
    groups, S, L = parts.shape
    share = S if S <= ONE_PASS else triton.next_power_of_2(int(S**0.5))
    rows = min(MAX_ROWS, triton.next_power_of_2(share))
    shares = triton.cdiv(S, share)
    total = torch.empty(groups, shares, L, dtype=torch.float32, device=parts.device)
    kernel: Any = _sum_partials_kernel
    kernel[(triton.cdiv(L, TILE // rows), groups, shares)](parts, total, S, L, share, rows, TILE // rows, num_warps=NUM_WARPS)
    return total[:, 0] if shares == 1 else sum_partials(total)
