"""Prompts of unequal length as one batch for transformers' `generate`, and what it made of them."""

from __future__ import annotations

from collections.abc import Collection

import torch


def left_padded(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S] that end where the longest prompt ends, and which of them are real [B, S]."""
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask_BS = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids_BS, mask_BS


def until_stop(ids: list[int], stops: Collection[int]) -> tuple[list[int], str]:
    """An answer up to its end token, that included, and `stop`; or all of it and `length`."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[: place + 1], "stop"
    return ids, "length"
