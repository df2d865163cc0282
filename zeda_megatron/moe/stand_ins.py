"""What zero experts that are not silent add to a layer's output, behind the real experts.

Megatron's layer hands routing weights of the real experts alone from its router to its dispatcher. So those of the zero
experts go past it: the router puts them here (`hand_over`), the dispatcher calls this module after the real experts,
once for every pass of the router. All that a token needs is where the token lives: nothing is sent.
"""

from __future__ import annotations

import torch

from ..config.zero_experts import ZeroExpertConfig
from ..ops.stand_ins import stand_ins


class _Awaited(torch.nn.Module):
    """Takes what the router hands over, for one call."""

    def __init__(self):
        super().__init__()
        self._handed: tuple | None = None

    def hand_over(self, *parts: torch.Tensor) -> None:
        """What the next call answers."""
        self._handed = parts

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        """[T, H] layer input -> [T, H] to add, or None if nothing was routed since the last call."""
        handed, self._handed = self._handed, None
        return None if handed is None else self._answer(hidden_TH, *handed)


class SharedOutput(_Awaited):
    """Shared zero experts: sum over picks of weight * e_j(x).

    `copy`: e_j(x) = x. `learned`: e_j(x) = b_j, an [H] vector per zero expert that starts at 0, so a model begins
    bit-equal to one with parameter-free zero experts. Handed over: weights [T, Nz], 0 where they were not picked.
    """

    def __init__(self, zero: ZeroExpertConfig, hidden_size: int, dtype: torch.dtype, sequence_parallel: bool):
        super().__init__()
        self.kind = zero.zero_experts_type
        if self.kind == "learned":
            self.bias = torch.nn.Parameter(torch.zeros(zero.num_zero_experts, hidden_size, dtype=dtype))
            self.bias.sequence_parallel = sequence_parallel

    def _answer(self, hidden_TH, probs_TZ):
        if self.kind == "copy":
            return (probs_TZ.sum(1, keepdim=True) * hidden_TH).to(hidden_TH.dtype)
        return (probs_TZ.to(self.bias.dtype) @ self.bias).to(hidden_TH.dtype)


class StandIns(_Awaited):
    """Paired zero experts that answer a skipped pick in its expert's place: w_i * (B_i A_i x + b_i).

    `constant` [N, H] is b. The kind `low_rank` also has `down` [N, r, H], A, and `up` [N, H, r], B. All begin at 0,
    that is silent; a fit wakes them up, and then they stay as they are: training them on gained nothing. Handed over:
    weights [T, N] and map [T, N] (bool) of the picks that are answered.
    """

    def __init__(self, zero: ZeroExpertConfig, hidden_size: int, topk: int, dtype: torch.dtype):
        super().__init__()
        self.topk = topk
        experts, rank = zero.num_zero_experts, zero.stand_in_rank

        def fitted(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)

        self.constant = fitted(experts, hidden_size)
        self.down = fitted(experts, rank, hidden_size) if rank else None
        self.up = fitted(experts, hidden_size, rank) if rank else None

    def _answer(self, hidden_TH, weights_TN, skipped_TN):
        return stand_ins(hidden_TH, weights_TN, skipped_TN, self.down, self.up, self.constant, self.topk)


def zero_output(zero: ZeroExpertConfig, config) -> SharedOutput | StandIns | None:
    """What a layer's zero experts add, for Megatron's `config` of it; None where they are silent."""
    if zero.zero_experts_type == "zero" or not zero.num_zero_experts:
        return None
    if zero.paired:
        return StandIns(zero, config.hidden_size, config.moe_router_topk, config.params_dtype)
    return SharedOutput(zero, config.hidden_size, config.params_dtype, config.sequence_parallel)
