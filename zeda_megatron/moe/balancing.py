"""Losses that balance the routing, and the scores and slots that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutedSlots:
    """Scores and slots of one router's local tokens. T tokens, E = N+Nz experts."""

    scores_TE: torch.Tensor
    """Float32 scores that sum to 1 per token, 0 for padding. Gradient flows here."""
    slots_E: torch.Tensor
    """Routed slots of each expert, int64."""
    tokens: torch.Tensor
    """0-d count of the tokens that are no padding, int64."""

    @classmethod
    def count(
        cls,
        logits_TE: torch.Tensor,
        map_TE: torch.Tensor,
        padding_T: torch.Tensor | None,
        score_function: str,
    ) -> RoutedSlots:
        """Count the slots of a routing map (bool). `padding_T` True = padding; `score_function` softmax or sigmoid."""
        scores_TE = normalised_scores(logits_TE, score_function)
        if padding_T is None:
            tokens = torch.tensor(map_TE.shape[0], device=map_TE.device)
        else:
            map_TE = map_TE & ~padding_T[:, None]
            scores_TE = scores_TE * ~padding_T[:, None]
            tokens = (~padding_T).sum()
        return cls(scores_TE, map_TE.sum(0), tokens)

    @classmethod
    def count_fresh(cls, logits_TE: torch.Tensor, topk: int, score_function: str) -> RoutedSlots:
        """Count a fresh top-k of the scores, without expert bias, padding included (the ZEDA authors' code)."""
        picks_TK = normalised_scores(logits_TE, score_function).topk(topk, dim=1).indices
        map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, picks_TK, True)
        return cls.count(logits_TE, map_TE, None, score_function)


def normalised_scores(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores over all experts in float32, each token's summing to 1."""
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    scores_TE = torch.sigmoid(logits_TE.float())
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


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
