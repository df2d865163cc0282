"""A grouped GEMM in Triton, to compare with: one program per tile, which searches its group in the ends."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(x, w, out, ends, rows, experts, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    tile, column = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    # The tiles of group e follow those of the groups before it; the launch has room for a partial one in each.
    before, begin, expert, first, last = 0, 0, -1, 0, 0
    for e in range(experts):
        end = tl.load(ends + e)
        count = (end - begin + BM - 1) // BM
        if (tile >= before) & (tile < before + count):
            expert, first, last = e, begin + (tile - before) * BM, end
        before += count
        begin = end
    if expert >= 0:
        row = first + tl.arange(0, BM)
        inner = tl.arange(0, BK)
        at_x = x + row[:, None].to(tl.int64) * K + inner[None, :]
        at_w = w + expert.to(tl.int64) * N * K + column[None, :].to(tl.int64) * K + inner[:, None]
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            a = tl.load(at_x + k, mask=(row[:, None] < last) & (inner[None, :] + k < K), other=0.0)
            b = tl.load(at_w + k, mask=(column[None, :] < N) & (inner[:, None] + k < K), other=0.0)
            total += tl.dot(a, b)
        place = out + row[:, None].to(tl.int64) * N + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(row[:, None] < last) & (column[None, :] < N))


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [R, K], weights [E, N, K], ends int32 [E] -> [R, N]. Rows past the last end are not written."""
    rows, (experts, n, k) = x.shape[0], weights.shape
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    block = 128 if rows >= 128 * experts else 64
    grid = (triton.cdiv(rows, block) + experts, triton.cdiv(n, 128))
    _kernel[grid](x, weights, out, ends, rows, experts, n, k, block, 128, 64, num_warps=8, num_stages=4)
    return out
