"""Routing limited to groups of experts (DeepSeek-V2 and V3); zero experts belong to no group.

A token's real experts come from the best groups alone (arXiv 2412.19437, section 2.1.2). Zero experts stand outside:
groups are chosen by the real experts' scores as in the static model, so that the masked model, and a dynamic one whose
zero experts nobody picks, choose what the static model chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroupLimit:
    """The limit of one model's routers."""

    num_real: int
    """N: real experts, in groups of neighbours."""
    groups: int
    """Groups."""
    kept: int
    """Groups that a token may choose from."""
    best: int
    """A group's score is the sum of so many of its best experts' scores."""

    def __call__(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The scores that choose [T, E], -inf for real experts outside the kept groups; columns from N on stay."""
        real_TN, zero_TZ = scores_TE[:, : self.num_real], scores_TE[:, self.num_real :]
        grouped_TGM = real_TN.unflatten(1, (self.groups, -1))
        best_TG = grouped_TGM.topk(self.best, dim=-1).values.sum(-1)
        chosen_TK = best_TG.topk(self.kept, dim=-1).indices
        outside_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, chosen_TK, False)
        limited_TN = grouped_TGM.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return torch.cat([limited_TN, zero_TZ], dim=1)


class LimitedPicks:
    """What Megatron's routing asks for its picks (the interface of its `RouterReplay`), with a limit.

    Args:
        replay: takes the picks after it, or None.
    """

    def __init__(self, limit: GroupLimit, replay=None):
        self.limit, self.replay = limit, replay

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """Scores and ids of the picks, [T, K] each, for scores [T, E]."""
        limited = self.limit(scores)
        if self.replay is None:
            ids = torch.topk(limited, topk, dim=1).indices
        else:
            _, ids = self.replay.get_replay_topk(limited, topk, None, None, default_compute_topk)
        return scores.gather(1, ids), ids


def limit_of(config, num_real: int) -> GroupLimit | None:
    """What Megatron's config asks for, and the attribute `moe_router_group_scores` beside its fields (2, as in
    DeepSeek-V3, where it is not said)."""
    if not config.moe_router_group_topk:
        return None
    best = getattr(config, "moe_router_group_scores", 2)
    return GroupLimit(num_real, config.moe_router_num_groups, config.moe_router_group_topk, best)
