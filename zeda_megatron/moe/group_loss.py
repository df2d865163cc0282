"""Group-level balancing loss: real experts as one group, zero experts as the other."""

from __future__ import annotations

import torch


def group_loss(
    real_slots: torch.Tensor,
    zero_slots: torch.Tensor,
    num_tokens: torch.Tensor,
    scores_TE: torch.Tensor,
    num_real: int,
    num_zero: int,
    zero_weight: float,
) -> torch.Tensor:
    """Balance the two groups (arXiv 2605.18643, section 3), without the coefficient alpha.

        L = (N + w*Nz) * ( f_R * P_R / N  +  f_Z * P_Z / (w*Nz) )

    f are the shares of routed slots per group, P the mean score mass per group. At equal f and P it equals 1
    and it is least at a zero share of w*Nz / (N + w*Nz).

    Args:
        real_slots, zero_slots: 0-d counts of routed slots over all ranks of the group. No gradient.
        num_tokens: 0-d count of tokens over the same ranks.
        scores_TE: [T, N+Nz] normalised scores of the local tokens, rows of padding set to 0. Gradient flows here.
        num_real, num_zero: N and Nz.
        zero_weight: w.

    Returns:
        0-d tensor: this rank's part; the sum over the ranks is the loss.
    """
    slots = (real_slots + zero_slots).clamp(min=1)
    mass_E = scores_TE.sum(dim=0) / num_tokens.clamp(min=1)
    mass_real, mass_zero = mass_E[:num_real].sum(), mass_E[num_real:].sum()
    weighted_zero = zero_weight * num_zero
    return (num_real + weighted_zero) * (
        (real_slots / slots) * mass_real / num_real + (zero_slots / slots) * mass_zero / weighted_zero
    )
