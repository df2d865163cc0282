"""The router rows of new zero experts."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a tensor's name only, not on the order of conversion."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def zero_rows(old: torch.Tensor, count: int, seed: int, name: str) -> torch.Tensor:
    """Draw `count` rows like the old ones: Gaussian, with their mean and deviation per hidden dimension.

    `old` is a router weight [N, H] or a score bias [N] (one mean and deviation then). Statistics and draw are
    in float32, the result has the type of `old`: [count, H] or [count]. Source: arXiv 2605.18643 (the authors
    draw without a seed).
    """
    old_float = old.float()
    mean = old_float.mean(dim=0)
    std = old_float.std(dim=0) if old.shape[0] > 1 else torch.zeros_like(mean)
    noise = torch.randn((count, *old.shape[1:]), generator=seeded_generator(seed, name))
    return (mean + std * noise).to(old.dtype)


def widen(old: torch.Tensor, rows: int, seed: int, name: str) -> torch.Tensor:
    """Append zero rows until there are `rows`; the old rows stay bit for bit, enough rows are left alone."""
    if old.shape[0] == rows:
        return old
    return torch.cat([old, zero_rows(old, rows - old.shape[0], seed, name)])
