"""The definitions of the `torch.ops.zeda` operators over rows sorted by expert: loops over groups, any float type.

These run on the CPU. `ends` is int32 [E], the inclusive end of each group; ends that decrease give an empty group, ends
past the rows stop there. Rows past the last end belong to no group: outputs hold zeros there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spans(ends: Tensor, rows: int) -> list[tuple[int, int]]:
    """First row and end of each group."""
    last, found = 0, []
    for end in ends.tolist():
        begin = min(max(last, 0), rows)
        found.append((begin, max(begin, min(end, rows))))
        last = end
    return found


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def grouped_mm(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    """x [R, K], weights E x [N, K] -> [R, N]: x w_e^T for the rows of group e."""
    out = x.new_zeros(x.shape[0], weights[0].shape[0])
    for weight, (begin, end) in zip(weights, spans(ends, x.shape[0])):
        out[begin:end] = x[begin:end] @ weight.T
    return out


def grouped_dgrad(dy: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    """dy [R, N], weights E x [N, K] -> dx [R, K]."""
    out = dy.new_zeros(dy.shape[0], weights[0].shape[1])
    for weight, (begin, end) in zip(weights, spans(ends, dy.shape[0])):
        out[begin:end] = dy[begin:end] @ weight
    return out


def grouped_wgrad_(outputs: list[Tensor], dy: Tensor, x: Tensor, ends: Tensor, accumulate: bool) -> None:
    """outputs E x [N, K] (+)= dy_e^T x_e. A group without rows adds nothing; without `accumulate` it becomes zero."""
    for out, (begin, end) in zip(outputs, spans(ends, x.shape[0])):
        product = dy[begin:end].to(out.dtype).T @ x[begin:end].to(out.dtype)
        if accumulate:
            out += product
        else:
            out.copy_(product)


def swiglu(pre: Tensor, probs: Tensor | None, ends: Tensor) -> Tensor:
    """pre [R, 2F], gate first, probs [R] -> [R, F]: silu(gate) * up * prob."""
    acted, _, _ = _acted(pre, probs)
    return _cut(acted.to(pre.dtype), ends)


def moe_fc1(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, H], weights E x [2F, H], gate rows first -> pre [R, 2F], act [R, F] = silu(gate) * up * prob."""
    pre = grouped_mm(x, weights, ends)
    return pre, swiglu(pre, probs, ends)


def moe_act(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> Tensor:
    """The act of `moe_fc1` alone, where no gradient needs pre."""
    return moe_fc1(x, weights, probs, ends)[1]


def swiglu_backward(
    dact: Tensor, pre: Tensor, probs: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dact [R, F] -> dpre [R, 2F], act [R, F] (computed again), dprobs [R] in the wide type."""
    kind = wide(pre.dtype)
    acted, silu, prob = _acted(pre, probs)
    gate, up = pre.to(kind).chunk(2, dim=-1)
    grown, grad = torch.sigmoid(gate), dact.to(kind)
    dgate = grad * prob * up * (grown + silu * (1 - grown))
    dpre = torch.cat((dgate, grad * prob * silu), dim=-1).to(pre.dtype)
    dprobs = _cut(grad * silu * up, ends).sum(-1)
    return _cut(dpre, ends), _cut(acted.to(pre.dtype), ends), dprobs


def _acted(pre: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    gate, up = pre.to(wide(pre.dtype)).chunk(2, dim=-1)
    silu, prob = F.silu(gate), 1.0 if probs is None else probs.to(gate.dtype)[:, None]
    return silu * up * prob, silu, prob


def _cut(values: Tensor, ends: Tensor) -> Tensor:
    """Zeros past the last group, even where the row holds NaN."""
    owned = torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    found = spans(ends, values.shape[0])
    owned[: found[-1][1] if found else 0] = True
    return torch.where(owned[:, None], values, 0)


def sort_slots(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [T, K] -> row_map [T, K] int32, ends [num_experts] int32.

    Slots of one expert take consecutive rows, in the order of slots. Other ids than 0..num_experts-1 (zero experts,
    dropped slots) take none: row -1.
    """
    flat = ids.flatten().long()
    real = (flat >= 0) & (flat < num_experts)
    order = torch.argsort(torch.where(real, flat, num_experts), stable=True)[: int(real.sum())]
    row_map = torch.full_like(flat, -1, dtype=torch.int32)
    row_map[order] = torch.arange(order.numel(), dtype=torch.int32, device=ids.device)
    counts = torch.bincount(flat[real], minlength=num_experts)
    return row_map.view(ids.shape), counts.cumsum(0).to(torch.int32)


def scatter_rows(x: Tensor, row_map: Tensor, rows: int) -> Tensor:
    """x [T, H], row_map [T, K] -> [rows, H]: row row_map[t, k] is x[t], all others zero."""
    out = x.new_zeros(rows, x.shape[1])
    kept = row_map >= 0
    out[row_map[kept].long()] = x[kept.nonzero()[:, 0]]
    return out


def combine(y: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    """y [R, H], row_map [T, K], probs [T, K] -> [T, H]: sum over k of probs[t, k] * y[row_map[t, k]]."""
    kind = wide(y.dtype)
    out = torch.zeros(row_map.shape[0], y.shape[1], dtype=kind, device=y.device)
    for k in range(row_map.shape[1]):
        kept = row_map[:, k] >= 0
        picked = y[row_map[kept, k].long()].to(kind)
        out[kept] += picked if probs is None else probs[kept, k].to(kind)[:, None] * picked
    return out.to(y.dtype)


def combine_backward(dout: Tensor, y: Tensor, row_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """dout [T, H] -> dy [R, H], dprobs [T, K] in the wide type."""
    kind = wide(y.dtype)
    dy, dprobs = torch.zeros_like(y), torch.zeros(row_map.shape, dtype=kind, device=y.device)
    for k in range(row_map.shape[1]):
        kept = row_map[:, k] >= 0
        picked, grad = row_map[kept, k].long(), dout[kept].to(kind)
        dy[picked] = (probs[kept, k].to(kind)[:, None] * grad).to(y.dtype)
        dprobs[kept, k] = (grad * y[picked].to(kind)).sum(-1)
    return dy, dprobs
