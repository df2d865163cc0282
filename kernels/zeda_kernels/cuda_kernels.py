"""The same functions as `reference`, on the GPU: each checks its tensors and launches kernels of the library.

Nothing here waits for the device or reads its memory, so calls may be captured in a CUDA graph (after one call that
warms up). Work goes to the current stream; temporary tensors come from torch's allocator.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from zeda_megatron.errors import UserError

from .expert_table import as_table
from .kernel_call import (
    address,
    built_library,
    check_ends,
    device_facts,
    float32,
    int32,
    launch,
    packed,
    type_code,
)
from .reference import wide as wide

FORWARD, DGRAD, WGRAD = range(3)
LARGE_FROM: int = json.loads(Path(__file__).with_name("tiles.json").read_text())["large_from"]
"""Mean rows per group from which the large tile, which pads more, takes less time."""
TILES = ("small", "large")


def tile_for(rows: int, groups: int) -> int:
    """Index in `TILES`. Decided by what the host knows, the length of the buffer, unless ZEDA_KERNEL_TILE names one."""
    forced = os.environ.get("ZEDA_KERNEL_TILE")
    if not forced:
        return int(rows >= LARGE_FROM * groups)
    if forced not in TILES:
        raise UserError(f"ZEDA_KERNEL_TILE={forced}: choose from {', '.join(TILES)}, or unset it")
    return TILES.index(forced)


def _grouped(
    product, a: Tensor, b: Tensor | None, d: Tensor | None, experts, n: int, k: int, ends, accumulate
) -> None:
    arch, sms = device_facts(a.device.index)
    rows, groups = a.shape[0], len(experts)
    check_ends(ends, groups, a.device)
    choice = (product, type_code(a), arch, tile_for(rows, groups), groups, rows, n, k)
    size = built_library().functions.zk_grouped_workspace(*choice, sms)
    workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=a.device)
    pointers = (ends.data_ptr(), a.data_ptr(), address(b), address(d), ctypes.cast(experts, ctypes.c_void_p))
    launch(
        a, "zk_grouped", *choice, *pointers, float(accumulate), workspace.data_ptr(), workspace.numel(), sms
    )


def _zero_tail(out: Tensor, ends: Tensor) -> Tensor:
    _, sms = device_facts(out.device.index)
    size = out.shape[1] * out.element_size()
    launch(out, "zk_zero_tail", ends.numel(), out.shape[0], size, ends.data_ptr(), out.data_ptr(), sms)
    return out


def grouped_mm(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    x, ends, (n, k) = packed(x), int32(ends), weights[0].shape
    out = x.new_empty(x.shape[0], n)
    experts = as_table(weights).array((n, x.shape[1]), x.dtype, x.device)
    _grouped(FORWARD, x, None, out, experts, n, k, ends, False)
    return _zero_tail(out, ends)


def grouped_dgrad(dy: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    dy, ends, (n, k) = packed(dy), int32(ends), weights[0].shape
    out = dy.new_empty(dy.shape[0], k)
    experts = as_table(weights).array((dy.shape[1], k), dy.dtype, dy.device)
    _grouped(DGRAD, dy, None, out, experts, n, k, ends, False)
    return _zero_tail(out, ends)


def grouped_wgrad_(outputs: list[Tensor], dy: Tensor, x: Tensor, ends: Tensor, accumulate: bool) -> None:
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise RuntimeError("torch.ops.zeda: dy and x must have the same rows and type")
    dy, x, ends, n, k = packed(dy), packed(x), int32(ends), dy.shape[1], x.shape[1]
    experts = as_table(outputs).array((n, k), torch.float32, x.device)
    _grouped(WGRAD, dy, x, None, experts, n, k, ends, accumulate)


def swiglu(pre: Tensor, probs: Tensor | None, ends: Tensor) -> Tensor:
    pre, probs, ends = packed(pre), float32(probs), int32(ends)
    act = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
    sizes = (type_code(pre), ends.numel(), *act.shape, ends.data_ptr())
    launch(
        pre,
        "zk_swiglu",
        *sizes,
        pre.data_ptr(),
        address(probs),
        act.data_ptr(),
        device_facts(pre.device.index)[1],
    )
    return act


def moe_fc1(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor]:
    x, probs, ends, n = packed(x), float32(probs), int32(ends), weights[0].shape[0]
    workspace = _fc1_workspace(x, weights)
    if workspace is None:
        pre = grouped_mm(x, weights, ends)
        return pre, swiglu(pre, probs, ends)
    pre, act = x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], n // 2)
    _fused_fc1(x, weights, probs, ends, pre, act, workspace)
    return _zero_tail(pre, ends), _zero_tail(act, ends)


def moe_act(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> Tensor:
    workspace = _fc1_workspace(x, weights)
    if workspace is None:
        return swiglu(grouped_mm(x, weights, ends), probs, ends)
    x, probs, ends = packed(x), float32(probs), int32(ends)
    act = x.new_empty(x.shape[0], weights[0].shape[0] // 2)
    _fused_fc1(x, weights, probs, ends, None, act, workspace)
    return _zero_tail(act, ends)


def _fc1_workspace(x: Tensor, weights: list[Tensor]) -> Tensor | None:
    """What the fused fc1 works in; None where there is none for this GPU, type or number of experts."""
    arch, _ = device_facts(x.device.index)
    size = built_library().functions.zk_fc1_workspace(type_code(x), arch, len(weights))
    return None if size < 0 else torch.empty(size, dtype=torch.uint8, device=x.device)


def _fused_fc1(x, weights, probs, ends, pre: Tensor | None, act: Tensor, workspace: Tensor) -> None:
    """One kernel for both outputs; pre may be None: it is not written then."""
    arch, sms = device_facts(x.device.index)
    (rows, k), width, groups = x.shape, act.shape[1], len(weights)
    check_ends(ends, groups, x.device)
    experts = ctypes.cast(as_table(weights).array((2 * width, k), x.dtype, x.device), ctypes.c_void_p)
    choice = (type_code(x), arch, tile_for(rows, groups), groups, rows, width, k)
    pointers = (ends.data_ptr(), x.data_ptr(), experts, address(probs), address(pre), act.data_ptr())
    launch(x, "zk_fc1", *choice, *pointers, workspace.data_ptr(), workspace.numel(), sms)


def swiglu_backward(
    dact: Tensor, pre: Tensor, probs: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dact, pre, probs, ends = packed(dact), packed(pre), float32(probs), int32(ends)
    dpre, act = torch.empty_like(pre), torch.empty_like(dact)
    dprobs = torch.empty(pre.shape[0], dtype=torch.float32, device=pre.device)
    sizes = (type_code(pre), ends.numel(), *act.shape, ends.data_ptr())
    pointers = (
        dact.data_ptr(),
        pre.data_ptr(),
        address(probs),
        dpre.data_ptr(),
        act.data_ptr(),
        dprobs.data_ptr(),
    )
    launch(pre, "zk_swiglu_grad", *sizes, *pointers, device_facts(pre.device.index)[1])
    return dpre, act, dprobs
