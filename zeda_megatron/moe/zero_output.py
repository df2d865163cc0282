"""Zero experts that are not silent: `copy` (identity) and `learned` (a bias that starts at exactly 0)."""

from __future__ import annotations

import torch


class ZeroExpertOutput(torch.nn.Module):
    """What the picked zero experts add to a layer's output: sum over picks of weight * e_j(x).

    `copy`: e_j(x) = x. `learned`: e_j(x) = b_j, an [H] vector per zero expert that starts at 0, so a model
    begins bit-equal to one with parameter-free zero experts.
    """

    def __init__(
        self, kind: str, num_zero: int, hidden_size: int, dtype: torch.dtype, sequence_parallel: bool
    ):
        super().__init__()
        self.kind = kind
        self.probs_TZ: torch.Tensor | None = None
        if kind == "learned":
            self.bias = torch.nn.Parameter(torch.zeros(num_zero, hidden_size, dtype=dtype))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        """[T, H] layer input -> [T, H] to add, or None if nothing was routed since the last call."""
        probs_TZ, self.probs_TZ = self.probs_TZ, None
        if probs_TZ is None:
            return None
        if self.kind == "copy":
            return (probs_TZ.sum(1, keepdim=True) * hidden_TH).to(hidden_TH.dtype)
        return (probs_TZ.to(self.bias.dtype) @ self.bias).to(hidden_TH.dtype)
