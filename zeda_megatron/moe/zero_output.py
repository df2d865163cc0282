"""Zero experts that are not silent: `copy` (identity) and `learned` (a bias that starts at exactly 0)."""

from __future__ import annotations

import torch


class ZeroExpertOutput(torch.nn.Module):
    """What the picked zero experts add to a layer's output: sum over picks of weight * e_j(x).

    `copy`: e_j(x) = x. `learned`: e_j(x) = b_j, an [H] vector per zero expert that starts at 0, so a model
    begins bit-equal to one with parameter-free zero experts.

    Megatron's layer hands routing weights of the real experts alone from its router to its dispatcher. So those of the
    zero experts go past it: the router puts them here (`hand_over`), the dispatcher calls this module after the real
    experts, once for every pass of the router.
    """

    def __init__(
        self, kind: str, num_zero: int, hidden_size: int, dtype: torch.dtype, sequence_parallel: bool
    ):
        super().__init__()
        self.kind = kind
        self._probs_TZ: torch.Tensor | None = None
        if kind == "learned":
            self.bias = torch.nn.Parameter(torch.zeros(num_zero, hidden_size, dtype=dtype))
            self.bias.sequence_parallel = sequence_parallel

    def hand_over(self, probs_TZ: torch.Tensor) -> None:
        """Routing weights of the zero experts [T, Nz], 0 where they were not picked, for the next call."""
        self._probs_TZ = probs_TZ

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        """[T, H] layer input -> [T, H] to add, or None if nothing was routed since the last call."""
        probs_TZ, self._probs_TZ = self._probs_TZ, None
        if probs_TZ is None:
            return None
        if self.kind == "copy":
            return (probs_TZ.sum(1, keepdim=True) * hidden_TH).to(hidden_TH.dtype)
        return (probs_TZ.to(self.bias.dtype) @ self.bias).to(hidden_TH.dtype)
