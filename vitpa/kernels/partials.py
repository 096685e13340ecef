"""The sum of partial results: the second half of every reduction over images or tokens, in a fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers a program holds at a time: 16 a thread
NUM_WARPS = 4
MAX_ROWS = 64  # with fewer columns than 32 a row's piece would be shorter than a memory transaction


@triton.jit
def _sum_kernel(parts, total, S, L, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, S, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < S)[:, None] & (column < L)[None, :]
        tile += tl.load(parts + group * S * L + row[:, None] * L + column[None, :], mask=mask, other=0.0)
    tl.store(total + group * L + column, tl.sum(tile, 0), mask=column < L)


def sum_partials(parts: Tensor) -> Tensor:
    """Sum partial results (groups, S, L) float32 over S -> (groups, L)."""
    groups, S, L = parts.shape
    total = torch.empty(groups, L, dtype=torch.float32, device=parts.device)
    rows = min(MAX_ROWS, triton.next_power_of_2(S))
    kernel: Any = _sum_kernel
    kernel[(triton.cdiv(L, TILE // rows), groups)](parts, total, S, L, rows, TILE // rows, num_warps=NUM_WARPS)
    return total
