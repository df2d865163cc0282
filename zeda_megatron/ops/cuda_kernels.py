"""The same functions as `reference`, on the GPU: each checks its tensors and launches kernels of the library.

Nothing here waits for the device or reads its memory, so calls may be captured in a CUDA graph (after one call that
warms up). Work goes to the current stream; temporary tensors come from torch's allocator.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .kernel_library import KernelLibrary, library
from .reference import wide as wide

TYPES = {torch.bfloat16: 0, torch.float16: 1}
FORWARD, DGRAD, WGRAD = range(3)
FEW_ROWS = 200
"""Mean rows per group below which the 64-row tile pads less than it costs."""


def tile_for(rows: int, groups: int) -> int:
    """0: the small tile, 1: the large one. Decided by what the host knows: the length of the buffer."""
    return int(rows >= FEW_ROWS * groups)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from running there, or None."""
    if device.type != "cuda":
        return "no CUDA device"
    found = library()
    if found is None:
        return "the kernels are not built: python -m zeda_megatron.ops.build"
    if dtype not in TYPES or (dtype == torch.float16 and not found.has_half):
        return f"the kernels were not built for {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if found.arch_for(capability) is None:
        return f"the kernels were not built for compute capability {capability[0]}.{capability[1]}"
    return None


@cache
def _device(index: int) -> tuple[int, int]:
    """Architecture whose kernels run on a device, and its multiprocessors."""
    found = _library()
    arch = found.arch_for(torch.cuda.get_device_capability(index))
    if arch is None:
        raise RuntimeError("torch.ops.zeda: " + why_not(torch.device("cuda", index), torch.bfloat16))
    return arch, torch.cuda.get_device_properties(index).multi_processor_count


def _library() -> KernelLibrary:
    found = library()
    if found is None:
        raise RuntimeError("torch.ops.zeda has no kernels on this GPU: python -m zeda_megatron.ops.build")
    return found


def _type(x: Tensor) -> int:
    if x.dtype not in TYPES:
        raise RuntimeError(f"torch.ops.zeda takes bfloat16 or float16 on a GPU, not {x.dtype}")
    return TYPES[x.dtype]


def _rows(x: Tensor) -> Tensor:
    """Contiguous: gradients arrive expanded or transposed, and kernels see a pointer alone."""
    return x.contiguous()


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _launch(x: Tensor, name: str, *arguments) -> None:
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _library().call(name, *arguments, stream)


def _experts(tensors: list[Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
    """Host array of the addresses of E matrices."""
    for tensor in tensors:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise RuntimeError(
                f"torch.ops.zeda: every expert must be {shape}, {dtype}, on {device}; one is "
                f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise RuntimeError("torch.ops.zeda: experts must be contiguous")
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _check_ends(ends: Tensor, groups: int, device: torch.device) -> None:
    if ends.shape != (groups,) or ends.device != device:
        raise RuntimeError(f"torch.ops.zeda: ends must be [{groups}] on {device}")


def _grouped(
    product, a: Tensor, b: Tensor | None, d: Tensor | None, experts, n: int, k: int, ends, accumulate
) -> None:
    arch, sms = _device(a.device.index)
    rows, groups = a.shape[0], len(experts)
    _check_ends(ends, groups, a.device)
    choice = (product, _type(a), arch, tile_for(rows, groups), groups, rows, n, k)
    size = _library().functions.zk_grouped_workspace(*choice, sms)
    workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=a.device)
    pointers = (ends.data_ptr(), a.data_ptr(), _at(b), _at(d), ctypes.cast(experts, ctypes.c_void_p))
    _launch(
        a, "zk_grouped", *choice, *pointers, float(accumulate), workspace.data_ptr(), workspace.numel(), sms
    )


def _zero_tail(out: Tensor, ends: Tensor) -> Tensor:
    _, sms = _device(out.device.index)
    size = out.shape[1] * out.element_size()
    _launch(out, "zk_zero_tail", ends.numel(), out.shape[0], size, ends.data_ptr(), out.data_ptr(), sms)
    return out


def grouped_mm(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    x, ends, (n, k) = _rows(x), _int32(ends), weights[0].shape
    out = x.new_empty(x.shape[0], n)
    _grouped(FORWARD, x, None, out, _experts(weights, (n, x.shape[1]), x.dtype, x.device), n, k, ends, False)
    return _zero_tail(out, ends)


def grouped_dgrad(dy: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    dy, ends, (n, k) = _rows(dy), _int32(ends), weights[0].shape
    out = dy.new_empty(dy.shape[0], k)
    _grouped(
        DGRAD, dy, None, out, _experts(weights, (dy.shape[1], k), dy.dtype, dy.device), n, k, ends, False
    )
    return _zero_tail(out, ends)


def grouped_wgrad_(outputs: list[Tensor], dy: Tensor, x: Tensor, ends: Tensor, accumulate: bool) -> None:
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise RuntimeError("torch.ops.zeda: dy and x must have the same rows and type")
    dy, x, ends, n, k = _rows(dy), _rows(x), _int32(ends), dy.shape[1], x.shape[1]
    experts = _experts(outputs, (n, k), torch.float32, x.device)
    _grouped(WGRAD, dy, x, None, experts, n, k, ends, accumulate)


def _float(probs: Tensor | None) -> Tensor | None:
    return None if probs is None else probs.float().contiguous()


def swiglu(pre: Tensor, probs: Tensor | None, ends: Tensor) -> Tensor:
    pre, probs, ends = _rows(pre), _float(probs), _int32(ends)
    act = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
    sizes = (_type(pre), ends.numel(), *act.shape, ends.data_ptr())
    _launch(
        pre, "zk_swiglu", *sizes, pre.data_ptr(), _at(probs), act.data_ptr(), _device(pre.device.index)[1]
    )
    return act


def moe_fc1(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor]:
    x, probs, ends, n = _rows(x), _float(probs), _int32(ends), weights[0].shape[0]
    if _fc1_workspace(x, weights) < 0:
        pre = grouped_mm(x, weights, ends)
        return pre, swiglu(pre, probs, ends)
    pre, act = x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], n // 2)
    _fused_fc1(x, weights, probs, ends, pre, act)
    return _zero_tail(pre, ends), _zero_tail(act, ends)


def moe_act(x: Tensor, weights: list[Tensor], probs: Tensor | None, ends: Tensor) -> Tensor:
    if _fc1_workspace(x, weights) < 0:
        return moe_fc1(x, weights, probs, ends)[1]
    x, probs, ends = _rows(x), _float(probs), _int32(ends)
    act = x.new_empty(x.shape[0], weights[0].shape[0] // 2)
    _fused_fc1(x, weights, probs, ends, None, act)
    return _zero_tail(act, ends)


def _fc1_workspace(x: Tensor, weights: list[Tensor]) -> int:
    """Bytes the fused fc1 needs; negative where there is none for this GPU, type or number of experts."""
    arch, _ = _device(x.device.index)
    return _library().functions.zk_fc1_workspace(_type(x), arch, len(weights))


def _fused_fc1(x, weights, probs, ends, pre: Tensor | None, act: Tensor) -> None:
    """One kernel for both outputs; pre may be None: it is not written then."""
    arch, sms = _device(x.device.index)
    (rows, k), width, groups = x.shape, act.shape[1], len(weights)
    _check_ends(ends, groups, x.device)
    experts = ctypes.cast(_experts(weights, (2 * width, k), x.dtype, x.device), ctypes.c_void_p)
    workspace = torch.empty(_fc1_workspace(x, weights), dtype=torch.uint8, device=x.device)
    choice = (_type(x), arch, tile_for(rows, groups), groups, rows, width, k)
    pointers = (ends.data_ptr(), x.data_ptr(), experts, _at(probs), _at(pre), act.data_ptr())
    _launch(x, "zk_fc1", *choice, *pointers, workspace.data_ptr(), workspace.numel(), sms)


def swiglu_backward(
    dact: Tensor, pre: Tensor, probs: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dact, pre, probs, ends = _rows(dact), _rows(pre), _float(probs), _int32(ends)
    dpre, act = torch.empty_like(pre), torch.empty_like(dact)
    dprobs = torch.empty(pre.shape[0], dtype=torch.float32, device=pre.device)
    sizes = (_type(pre), ends.numel(), *act.shape, ends.data_ptr())
    pointers = (
        dact.data_ptr(),
        pre.data_ptr(),
        _at(probs),
        dpre.data_ptr(),
        act.data_ptr(),
        dprobs.data_ptr(),
    )
    _launch(pre, "zk_swiglu_grad", *sizes, *pointers, _device(pre.device.index)[1])
    return dpre, act, dprobs


def sort_slots(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = _int32(ids)
    row_map = torch.empty_like(flat)
    ends = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    size = _library().functions.zk_sort_workspace(flat.numel(), num_experts)
    workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=ids.device)
    pointers = (flat.data_ptr(), row_map.data_ptr(), ends.data_ptr(), workspace.data_ptr())
    _launch(flat, "zk_sort", flat.numel(), num_experts, *pointers, workspace.numel())
    return row_map, ends


def scatter_rows(x: Tensor, row_map: Tensor, rows: int) -> Tensor:
    x, row_map = _rows(x), _int32(row_map)
    out = x.new_zeros(rows, x.shape[1])
    sizes = (_type(x), row_map.numel(), row_map.shape[1], x.shape[1])
    pointers = (row_map.data_ptr(), x.data_ptr(), out.data_ptr())
    _launch(x, "zk_gather", *sizes, *pointers, _device(x.device.index)[1])
    return out


def combine(y: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    y, row_map, probs = _rows(y), _int32(row_map), _float(probs)
    out = y.new_empty(row_map.shape[0], y.shape[1])
    sizes = (_type(y), *row_map.shape, y.shape[1])
    pointers = (row_map.data_ptr(), y.data_ptr(), _at(probs), out.data_ptr())
    _launch(y, "zk_combine", *sizes, *pointers, _device(y.device.index)[1])
    return out


def combine_backward(dout: Tensor, y: Tensor, row_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    dout, y, row_map, probs = _rows(dout), _rows(y), _int32(row_map), _float(probs)
    dy = torch.zeros_like(y)
    dprobs = torch.empty(row_map.shape, dtype=torch.float32, device=y.device)
    sizes = (_type(y), row_map.numel(), row_map.shape[1], y.shape[1])
    pointers = (row_map.data_ptr(), dout.data_ptr(), y.data_ptr(), _at(probs), dy.data_ptr(), _at(dprobs))
    _launch(y, "zk_combine_grad", *sizes, *pointers, _device(y.device.index)[1])
    return dy, dprobs
