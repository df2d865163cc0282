"""The same functions as `reference`, on the GPU: each checks its tensors and launches kernels of the library.

Nothing here waits for the device or reads its memory, so calls may be captured in a CUDA graph (after one call that
warms up). Work goes to the current stream; temporary tensors come from torch's allocator.
"""

from __future__ import annotations

import ctypes
import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from zeda_megatron.errors import UserError

from .expert_table import as_table
from .kernel_call import (
    TYPES,
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

FORWARD, DGRAD, WGRAD, FC1, DSWIGLU = range(5)
HOPPER = 90
MAP_BYTES = 128
"""Of what describes a weight to Hopper's memory engine."""
CHOSEN: dict = json.loads(Path(__file__).with_name("tiles.json").read_text())
LARGE_FROM: int = CHOSEN["large_from"]
"""Mean rows per group from which the large tile, which pads more, takes less time."""
LEAD: int = CHOSEN["lead"]
"""Products by which the first half of a large tile is ahead of the second, so that both do not write at one time."""
TILES = ("small", "large")
LEADS = ("0", "1", "2", "3")


def tile_for(rows: int, groups: int) -> int:
    """Index in `TILES`. Decided by what the host knows, the length of the buffer, unless ZEDA_KERNEL_TILE names one."""
    return _forced("ZEDA_KERNEL_TILE", TILES, int(rows >= LARGE_FROM * groups))


def _forced(name: str, known: tuple[str, ...], else_: int) -> int:
    """Index in `known` of what an environment variable names; `else_` where it is not set."""
    value = os.environ.get(name)
    if not value:
        return else_
    if value not in known:
        raise UserError(f"{name}={value}: choose from {', '.join(known)}, or unset it")
    return known.index(value)


def _rows(
    product, x, weights, ends, columns: int, out: Tensor, probs=None, pre=None, act=None, sums=None
) -> Tensor:
    """`out`, which one of Hopper's kernels writes, and what else is given."""
    _, sms = device_facts(x.device.index)
    (rows, depth), groups = x.shape, len(weights)
    check_ends(ends, groups, x.device)
    shape = {FORWARD: (columns, depth), FC1: (2 * columns, depth)}.get(product, (depth, columns))
    maps = as_table(weights).maps(shape, x.dtype, x.device, _maps)
    tile, lead = tile_for(rows, groups), _forced("ZEDA_KERNEL_LEAD", LEADS, LEAD)
    choice = (product, type_code(x), tile, lead, groups, rows, columns, depth)
    pointers = (ends.data_ptr(), x.data_ptr(), maps.data_ptr(), address(probs), address(pre), out.data_ptr())
    launch(x, "zk_rows", *choice, *pointers, address(act), address(sums), sms)
    return out


@lru_cache(maxsize=1024)
def _maps(
    addresses: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """uint8 [E, 128] on the device. Kept by address, so that a call may be captured in a graph after another one."""
    host = (ctypes.c_char * (MAP_BYTES * len(addresses)))()
    table = (ctypes.c_void_p * len(addresses))(*addresses)
    built_library().call("zk_maps", TYPES[dtype], len(addresses), *shape, table, host)
    maps = torch.empty(len(addresses), MAP_BYTES, dtype=torch.uint8, device=device)
    return maps.copy_(torch.frombuffer(host, dtype=torch.uint8).view_as(maps))


def _grouped(
    product, a: Tensor, b: Tensor | None, d: Tensor | None, experts, n: int, k: int, ends, accumulate
):
    """CUTLASS's grouped product."""
    arch, sms = device_facts(a.device.index)
    rows, groups = a.shape[0], len(experts)
    check_ends(ends, groups, a.device)
    choice = (product, type_code(a), arch, groups, rows, n, k)
    size = built_library().functions.zk_grouped_workspace(*choice, sms)
    workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=a.device)
    pointers = (ends.data_ptr(), a.data_ptr(), address(b), address(d), ctypes.cast(experts, ctypes.c_void_p))
    launch(
        a, "zk_grouped", *choice, *pointers, float(accumulate), workspace.data_ptr(), workspace.numel(), sms
    )


def _product(product, x: Tensor, weights: list[Tensor], ends: Tensor, n: int, k: int) -> Tensor:
    """forward or dgrad with E x [n, k]."""
    columns = n if product == FORWARD else k
    out = x.new_empty(x.shape[0], columns)
    if _on_hopper(x):
        return _rows(product, x, weights, ends, columns, out)
    _grouped(product, x, None, out, as_table(weights).array((n, k), x.dtype, x.device), n, k, ends, False)
    size = columns * out.element_size()
    tail = (ends.numel(), out.shape[0], size, ends.data_ptr(), out.data_ptr())
    launch(out, "zk_zero_tail", *tail, device_facts(out.device.index)[1])
    return out


def _on_hopper(x: Tensor) -> bool:
    return device_facts(x.device.index)[0] == HOPPER


def grouped_mm(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return _product(FORWARD, packed(x), weights, int32(ends), weights[0].shape[0], x.shape[1])


def grouped_dgrad(dy: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return _product(DGRAD, packed(dy), weights, int32(ends), dy.shape[1], weights[0].shape[1])


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
    pointers = (pre.data_ptr(), address(probs), act.data_ptr())
    launch(pre, "zk_swiglu", *sizes, *pointers, device_facts(pre.device.index)[1])
    return act


def moe_fc1(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor]:
    x, probs, ends, n = packed(x), float32(probs), int32(ends), weights[0].shape[0]
    if not _on_hopper(x):
        pre = grouped_mm(x, weights, ends)
        return pre, swiglu(pre, probs, ends)
    pre, act = x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], n // 2)
    return pre, _rows(FC1, x, weights, ends, n // 2, act, probs, pre)


def moe_act(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> Tensor:
    if not _on_hopper(x):
        return swiglu(grouped_mm(x, weights, ends), probs, ends)
    width = weights[0].shape[0] // 2
    return _rows(FC1, packed(x), weights, int32(ends), width, x.new_empty(x.shape[0], width), float32(probs))


def swiglu_dgrad(
    dout: Tensor, weights: list[Tensor], pre: Tensor, probs: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not _on_hopper(dout):
        return swiglu_backward(grouped_dgrad(dout, weights, ends), pre, probs, ends)
    dout, pre, probs, ends, width = packed(dout), packed(pre), float32(probs), int32(ends), pre.shape[1] // 2
    dpre, act = torch.empty_like(pre), pre.new_empty(pre.shape[0], width)
    tiles = built_library().functions.zk_tiles(tile_for(pre.shape[0], len(weights)), width)
    sums = torch.zeros(pre.shape[0], tiles, dtype=torch.float32, device=pre.device)
    _rows(DSWIGLU, dout, weights, ends, width, dpre, probs, pre, act, sums)
    return dpre, act, sums.sum(dim=1)


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
