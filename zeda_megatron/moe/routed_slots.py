"""What balancing losses are computed from: this rank's scores and slots, padding left out."""

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
