"""How tensors become arguments of the library's C functions, and whether a device has kernels at all."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from zeda_megatron.errors import UserError

from .kernel_library import KernelLibrary, library

TYPES = {torch.bfloat16: 0, torch.float16: 1}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from running on a GPU, or None."""
    found = library()
    if found is None:
        return "the kernels are not built: python -m zeda_kernels.build"
    if dtype not in TYPES or (dtype == torch.float16 and not found.has_half):
        return f"the kernels were not built for {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if found.arch_for(capability) is None:
        return f"the kernels have no code for compute capability {capability[0]}.{capability[1]}"
    return found.why_not()


@cache
def device_facts(index: int) -> tuple[int, int]:
    """Architecture whose kernels run on a device, and how many multiprocessors they take: all but
    ZEDA_KERNEL_SM_MARGIN, which are left to communication that runs beside."""
    found = built_library()
    arch = found.arch_for(torch.cuda.get_device_capability(index))
    if arch is None:
        raise RuntimeError("torch.ops.zeda: " + why_not(torch.device("cuda", index), torch.bfloat16))
    count, margin = torch.cuda.get_device_properties(index).multi_processor_count, _margin()
    if margin >= count:
        raise UserError(f"ZEDA_KERNEL_SM_MARGIN={margin}: the GPU has {count} multiprocessors")
    return arch, count - margin


def _margin() -> int:
    told = os.environ.get("ZEDA_KERNEL_SM_MARGIN") or "0"
    if not told.isdecimal():
        raise UserError(f"ZEDA_KERNEL_SM_MARGIN={told}: must be a whole number from 0")
    return int(told)


def built_library() -> KernelLibrary:
    found = library()
    if found is None:
        raise RuntimeError("torch.ops.zeda has no kernels on this GPU: python -m zeda_kernels.build")
    return found


def type_code(x: Tensor) -> int:
    if x.dtype not in TYPES:
        raise RuntimeError(f"torch.ops.zeda takes bfloat16 or float16 on a GPU, not {x.dtype}")
    return TYPES[x.dtype]


def packed(x: Tensor) -> Tensor:
    """Contiguous: gradients arrive expanded or transposed, and kernels see a pointer alone."""
    return x.contiguous()


def int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def launch(x: Tensor, name: str, *arguments) -> None:
    device = x.device
    if device.index == torch.cuda.current_device():
        return built_library().call(name, *arguments, torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        built_library().call(name, *arguments, torch.cuda.current_stream(device).cuda_stream)


def check_ends(ends: Tensor, groups: int, device: torch.device) -> None:
    if ends.shape != (groups,) or ends.device != device:
        raise RuntimeError(f"torch.ops.zeda: ends must be [{groups}] on {device}")


def float32(probs: Tensor | None) -> Tensor | None:
    return None if probs is None else probs.float().contiguous()
