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


def swiglu_dgrad(
    dout: Tensor, weights: list[Tensor], pre: Tensor, probs: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dout [R, H], weights E x [H, F]: `swiglu_backward` of the product's gradient."""
    return swiglu_backward(grouped_dgrad(dout, weights, ends), pre, probs, ends)


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
