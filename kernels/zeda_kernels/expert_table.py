"""One tensor an expert, and the array of their addresses that kernels take: kept from call to call.

Gathering and checking 2 x 128 weights takes longer than the kernels of a decoding step, so it is done when one has
moved, not at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor


class ExpertTable(list):
    """A list of tensors. Whoever replaces one by another object makes a new list; their memory may change."""

    _known: tuple | None = None
    _ends: tuple = ()
    _mapped: ctypes.Array | None = None

    def __reduce__(self):
        return type(self), (list(self),)  # copies have addresses of their own

    def array(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> ctypes.Array:
        """Host array of the addresses. Raises `RuntimeError` unless all are such matrices."""
        known = [tensor.data_ptr() for tensor in self], shape, dtype, device
        if known != self._known:
            self._check(shape, dtype, device)
            self._array, self._known = (ctypes.c_void_p * len(self))(*known[0]), known
        return self._array

    def maps(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, make: Callable
    ) -> Tensor:
        """What `make(addresses, shape, dtype, device)` gives for such an array."""
        array = self.array(shape, dtype, device)
        if self._mapped is not array:
            self._maps, self._mapped = make(tuple(self._known[0]), shape, dtype, device), array
        return self._maps

    def _check(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        for tensor in self:
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
                raise RuntimeError(
                    f"torch.ops.zeda: every expert must be {tuple(shape)}, {dtype}, on {device}; one is "
                    f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise RuntimeError("torch.ops.zeda: experts must be contiguous")

    def trained(self) -> tuple[bool, ExpertTable | None]:
        """Whether any wants a gradient, and the float32 buffers that kernels can add all gradients to, if there are.

        Looked up again when the first or the last tensor tells another story.
        """
        ends = tuple(
            part
            for one in (self[0], self[-1])
            for part in (one.requires_grad, getattr(one, "main_grad", None))
        )
        if len(self._ends) != len(ends) or any(a is not b for a, b in zip(ends, self._ends)):
            self._ends = ends
            self._trained = any(one.requires_grad for one in self)
            self._main = (
                ExpertTable(one.main_grad for one in self) if all(map(_has_main_grad, self)) else None
            )
        return self._trained, self._main


def _has_main_grad(weight: Tensor) -> bool:
    """Megatron's data parallelism keeps a float32 buffer for it that kernels can add to."""
    return (
        weight.requires_grad
        and hasattr(weight, "grad_added_to_main_grad")
        and getattr(weight, "main_grad", None) is not None
        and weight.main_grad.dtype == torch.float32
        and weight.main_grad.data_ptr() % 16 == 0
    )


def as_table(tensors: list[Tensor]) -> ExpertTable:
    """The list itself if it is a table."""
    return tensors if isinstance(tensors, ExpertTable) else ExpertTable(tensors)
