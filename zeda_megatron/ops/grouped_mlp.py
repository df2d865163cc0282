"""The expert MLP over rows sorted by expert: SwiGLU, weighted by the routing probability.

`grouped_mlp` has three implementations with the same meaning: a plain loop (the reference), one autograd
function that works expert by expert on contiguous rows (fast on CPU), and `torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BACKENDS = ("loop", "fused_loop", "grouped_mm")


def grouped_mlp(
    rows_RH: torch.Tensor,
    probs_R: torch.Tensor,
    counts: list[int],
    fc1_weights: list[torch.Tensor],
    fc2_weights: list[torch.Tensor],
    backend: str,
) -> torch.Tensor:
    """Apply expert e to its `counts[e]` rows: fc2_e( silu(gate) * up * prob ).

    Args:
        rows_RH: [R, H] rows sorted by expert, R = sum(counts); counts may be 0.
        probs_R: [R] routing weights.
        fc1_weights: per expert [2F, H], gate rows first. fc2_weights: per expert [H, F].
        backend: one of `BACKENDS`.

    Returns:
        [R, H] in the dtype of the rows.
    """
    if backend == "loop":
        return reference_grouped_mlp(rows_RH, probs_R, counts, fc1_weights, fc2_weights)
    if backend == "fused_loop":
        return _FusedLoop.apply(rows_RH, probs_R, counts, *fc1_weights, *fc2_weights)
    ends = torch.tensor(counts, device=rows_RH.device).cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(rows_RH, torch.stack(fc1_weights).transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    acted = (F.silu(gate) * up * probs_R[:, None]).to(rows_RH.dtype)
    return F.grouped_mm(acted, torch.stack(fc2_weights).transpose(1, 2), offs=ends)


def reference_grouped_mlp(rows_RH, probs_R, counts, fc1_weights, fc2_weights) -> torch.Tensor:
    """The definition, one expert after the other, gradients by autograd."""
    parts = []
    for rows, probs, fc1, fc2 in zip(rows_RH.split(counts), probs_R.split(counts), fc1_weights, fc2_weights):
        gate, up = F.linear(rows, fc1).chunk(2, dim=-1)
        parts.append(F.linear((F.silu(gate) * up * probs[:, None]).to(rows.dtype), fc2))
    return torch.cat(parts)


class _FusedLoop(torch.autograd.Function):
    """The loop as one autograd node: few Python-level nodes, element-wise work on all rows at once."""

    @staticmethod
    def forward(ctx, rows_RH, probs_R, counts, *weights):
        n = len(counts)
        fc1, fc2 = weights[:n], weights[n:]
        hidden = rows_RH.new_empty(rows_RH.shape[0], fc1[0].shape[0])
        starts = _starts(counts)
        for e, (a, b) in enumerate(starts):
            if b > a:
                torch.mm(rows_RH[a:b], fc1[e].t(), out=hidden[a:b])
        gate, up = hidden.chunk(2, dim=-1)
        acted = (F.silu(gate) * up * probs_R[:, None]).to(rows_RH.dtype)
        out = torch.empty_like(rows_RH)
        for e, (a, b) in enumerate(starts):
            if b > a:
                torch.mm(acted[a:b], fc2[e].t(), out=out[a:b])
        ctx.save_for_backward(rows_RH, probs_R, hidden, *weights)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad_RH):
        rows_RH, probs_R, hidden, *weights = ctx.saved_tensors
        n, starts = len(ctx.counts), _starts(ctx.counts)
        fc1, fc2 = weights[:n], weights[n:]
        grad_RH = grad_RH.contiguous()
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        plain = silu * up  # before the routing weight
        acted = (plain * probs_R[:, None]).to(rows_RH.dtype)
        grad_acted = torch.empty_like(acted)
        grad_fc1, grad_fc2 = [None] * n, [None] * n
        for e, (a, b) in enumerate(starts):
            if b > a:
                torch.mm(grad_RH[a:b], fc2[e], out=grad_acted[a:b])
                grad_fc2[e] = grad_RH[a:b].t() @ acted[a:b]
            else:
                grad_fc2[e] = torch.zeros_like(fc2[e])
        grad_probs = (grad_acted * plain).sum(-1).to(probs_R.dtype)
        grad_plain = grad_acted * probs_R[:, None]
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        grad_up.copy_(grad_plain * silu)
        grad_gate.copy_(grad_plain * up * (sigmoid + silu * (1 - sigmoid)))
        grad_rows = torch.empty_like(rows_RH)
        for e, (a, b) in enumerate(starts):
            if b > a:
                torch.mm(grad_hidden[a:b], fc1[e], out=grad_rows[a:b])
                grad_fc1[e] = grad_hidden[a:b].t() @ rows_RH[a:b]
            else:
                grad_fc1[e] = torch.zeros_like(fc1[e])
        return grad_rows, grad_probs, None, *grad_fc1, *grad_fc2


def _starts(counts: list[int]) -> list[tuple[int, int]]:
    bounds, at = [], 0
    for count in counts:
        bounds.append((at, at + count))
        at += count
    return bounds
