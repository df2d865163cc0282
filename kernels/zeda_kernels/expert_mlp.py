"""Operators made of others: the whole expert MLP and its gradient.

Each takes as `rows` the module whose functions it is made of: `reference` or `cuda_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor


def over(rows: ModuleType, name: str) -> Callable:
    """The operator `name` made of the functions of `rows`."""
    return partial(globals()[name], rows)


def grouped_wgrad(rows: ModuleType, dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy [R, N], x [R, K] -> [E, N, K] in the wide type; zeros for groups without rows."""
    shape = (ends.shape[0], dy.shape[1], x.shape[1])
    out = torch.empty(shape, dtype=rows.wide(x.dtype), device=x.device)
    rows.grouped_wgrad_(list(out.unbind(0)), dy, x, ends, False)
    return out


def expert_mlp(
    rows: ModuleType, x: Tensor, probs: Tensor, ends: Tensor, fc1: list[Tensor], fc2: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """x [R, H], probs [R] -> out [R, H] = fc2_e(silu(gate) * up * prob), and pre [R, 2F], kept for the gradient."""
    pre, act = rows.moe_fc1(x, fc1, probs, ends)
    return rows.grouped_mm(act, fc2, ends), pre


def expert_mlp_forward(
    rows: ModuleType, x: Tensor, probs: Tensor, ends: Tensor, fc1: list[Tensor], fc2: list[Tensor]
) -> Tensor:
    """The out of `expert_mlp` alone: without a gradient to come, pre is not kept."""
    return rows.grouped_mm(rows.moe_act(x, fc1, probs, ends), fc2, ends)


def _inner(rows, dout, x, pre, probs, ends, fc1, fc2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dprobs, and what the gradients of the weights need: dpre, act."""
    dpre, act, dprobs = rows.swiglu_dgrad(dout, fc2, pre, probs, ends)
    return rows.grouped_dgrad(dpre, fc1, ends), dprobs, dpre, act


def expert_mlp_backward(
    rows: ModuleType, dout: Tensor, x: Tensor, pre: Tensor, probs: Tensor, ends: Tensor, fc1, fc2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [R, H], dprobs [R], dfc1 [E, 2F, H], dfc2 [E, H, F], all but dx in the wide type."""
    dx, dprobs, dpre, act = _inner(rows, dout, x, pre, probs, ends, fc1, fc2)
    return dx, dprobs, grouped_wgrad(rows, dpre, x, ends), grouped_wgrad(rows, dout, act, ends)


def expert_mlp_backward_(
    rows: ModuleType, dout, x, pre, probs, ends, fc1, fc2, main_fc1: list[Tensor], main_fc2: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same, with the gradients of the weights added to E float32 matrices each; no matrices: not computed."""
    dx, dprobs, dpre, act = _inner(rows, dout, x, pre, probs, ends, fc1, fc2)
    if main_fc1:
        rows.grouped_wgrad_(main_fc1, dpre, x, ends, True)
    if main_fc2:
        rows.grouped_wgrad_(main_fc2, dout, act, ends, True)
    return dx, dprobs
