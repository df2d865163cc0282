"""The expert MLP over rows sorted by expert: SwiGLU, weighted by the routing probability.

`grouped_mlp` has three implementations with the same meaning: a plain loop (the reference),
`torch.nn.functional.grouped_mm`, which is faster on the CPU too, and kernels that another distribution brings.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .expert_kernels import installed

BACKENDS = ("loop", "grouped_mm", "kernels")


def grouped_mlp(
    rows_RH: torch.Tensor,
    probs_R: torch.Tensor,
    counts: torch.Tensor | list[int],
    fc1_weights: list[torch.Tensor],
    fc2_weights: list[torch.Tensor],
    backend: str,
) -> torch.Tensor:
    """Apply expert e to its `counts[e]` rows: fc2_e( silu(gate) * up * prob ).

    Args:
        rows_RH: [R, H] rows sorted by expert, R = sum(counts); counts may be 0, and on any device.
        probs_R: [R] routing weights.
        fc1_weights: per expert [2F, H], gate rows first. fc2_weights: per expert [H, F].
        backend: one of `BACKENDS`.

    Returns:
        [R, H] in the dtype of the rows.
    """
    counts = torch.as_tensor(counts)
    if backend == "loop":
        return reference_grouped_mlp(rows_RH, probs_R, counts.tolist(), fc1_weights, fc2_weights)
    ends = counts.to(rows_RH.device, non_blocking=True).cumsum(0).to(torch.int32)
    if backend == "kernels":
        return installed().mlp(rows_RH, probs_R, ends, fc1_weights, fc2_weights)
    hidden = F.grouped_mm(rows_RH, torch.stack(fc1_weights).transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    acted = (F.silu(gate) * up * probs_R[:, None]).to(rows_RH.dtype)
    output_RH = F.grouped_mm(acted, torch.stack(fc2_weights).transpose(1, 2), offs=ends)
    if output_RH.requires_grad:
        output_RH.register_hook(torch.Tensor.contiguous)  # its backward refuses an expanded gradient
    return output_RH


def reference_grouped_mlp(rows_RH, probs_R, counts, fc1_weights, fc2_weights) -> torch.Tensor:
    """The definition, one expert after the other, gradients by autograd."""
    parts = []
    for rows, probs, fc1, fc2 in zip(rows_RH.split(counts), probs_R.split(counts), fc1_weights, fc2_weights):
        gate, up = F.linear(rows, fc1).chunk(2, dim=-1)
        parts.append(F.linear((F.silu(gate) * up * probs[:, None]).to(rows.dtype), fc2))
    return torch.cat(parts)
