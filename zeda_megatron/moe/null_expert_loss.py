"""AdaMoE's load balancing: every real expert for itself, the zero experts as one kind."""

from __future__ import annotations

import torch


def null_expert_loss(
    slots_E: torch.Tensor, num_tokens: torch.Tensor, scores_TE: torch.Tensor, num_real: int
) -> torch.Tensor:
    """Balance N real and Nz null experts (AdaMoE, arXiv 2406.13233), without a coefficient.

        L = (N + Nz) * sum_i f~_i * P_i,    f~_i = f_i of a real expert, mean of the null experts' f of a null one

    f_i is expert i's share of all routed slots, P_i its mean score. Moving slots between null experts changes nothing:
    they are all alike, so only their sum matters. At equal f it equals 1 for any scores; its pull is towards equal
    loads, so towards a zero share of Nz / (N + Nz).

    Args:
        slots_E: [N+Nz] routed slots of each expert over all ranks of the group, real experts first. No gradient.
        num_tokens: 0-d count of tokens over the same ranks.
        scores_TE: [T, N+Nz] normalised scores of the local tokens, rows of padding set to 0. Gradient flows here.
        num_real: N.

    Returns:
        0-d tensor: this rank's part; the sum over the ranks is the loss.
    """
    share_E = slots_E / slots_E.sum().clamp(min=1)
    mass_E = scores_TE.sum(dim=0) / num_tokens.clamp(min=1)
    real = (share_E[:num_real] * mass_E[:num_real]).sum()
    null = share_E[num_real:].mean() * mass_E[num_real:].sum()
    return len(slots_E) * (real + null)
