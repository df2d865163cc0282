"""Bits of tensors: comparing, hashing, casting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch

from ..errors import UserError
from ..models.hf_config import DTYPES


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as a flat uint8 tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same type, shape and bits (NaN equals NaN, 0.0 differs from -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Eight bytes at once where PyTorch can see them as one number.
    wide = all(n % 8 == 0 for t in (a, b) for n in (t.nbytes, t.storage_offset() * t.element_size()))
    word = torch.int64 if wide else torch.uint8
    return torch.equal(raw(a).view(word), raw(b).view(word))


def caster(dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function behind `--dtype`: `keep`, `bf16`, `fp16` or `fp32`; integers stay."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    wanted = DTYPES[dtype]
    return lambda tensor: tensor.to(wanted) if wanted and tensor.is_floating_point() else tensor


class HashingRead:
    """Reads tensors and remembers their SHA-256, so that hashing the source costs no second pass."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        self._read = read
        self._lines: dict[str, str] = {}

    def __call__(self, key: str) -> torch.Tensor:
        tensor = self._read(key)
        digest = hashlib.sha256(raw(tensor).numpy()).hexdigest()
        self._lines[key] = f"{key} {tensor.dtype} {list(tensor.shape)} {digest}"
        return tensor

    def lines(self) -> list[str]:
        """Name, type, shape and hash of each tensor that was read."""
        return sorted(self._lines.values())


def source_digest(lines: Iterable[str]) -> str:
    """One hash over the lines of all readers; sharding and order do not matter."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
