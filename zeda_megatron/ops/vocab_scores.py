"""Scores of a chunk of tokens over a vocabulary that is split between ranks.

Each rank holds some columns of the logits. Everything a loss needs from the other ranks (log-sum-exp, the
label's score, the best column, the local part of a KL sum) is a handful of numbers per token, taken relative
to the rank's own maximum, so one all-gather per chunk carries them all. Every rank then joins the same
numbers in the same order: the result has the same bits everywhere, and ties of the argmax go to the lowest
column, as they do without a split.

Dimensions: C tokens of the chunk, V columns of this rank, R ranks, S = 4 statistics, P numbers gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

STATISTICS = 4
"""Rows that `local_scores` reports: maximum, sum of exponentials, argmax, score of the label."""

_NO_COLUMNS = -1e30
"""Maximum of a rank with padded columns only: finite, so that differences stay finite; exponential 0."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything after the GEMM: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def local_scores(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_C: torch.Tensor,
    first_column: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of this rank's columns: (shifted_CV, exp_CV, stats_SC).

    `shifted` is logits / temperature minus the row's local maximum, `exp` its exponential. The GEMM runs in
    the input dtype, the rest in `compute_dtype`. `stats` holds the rows named in STATISTICS; the argmax is a
    global column (exact in float32 up to 2**24 columns), the label's score is shifted too and 0 on the ranks
    that do not hold the label.
    """
    logits_CV = (hidden_CH @ weight_VH.t()).to(compute_dtype(hidden_CH.dtype))
    columns = logits_CV.shape[1]
    if columns == 0:
        stats_SC = logits_CV.new_zeros(STATISTICS, logits_CV.shape[0])
        stats_SC[0] = _NO_COLUMNS
        return logits_CV, logits_CV, stats_SC
    if temperature != 1.0:
        logits_CV.div_(temperature)
    max_C, argmax_C = logits_CV.max(dim=1)
    shifted_CV = logits_CV.sub_(max_C[:, None])
    exp_CV = shifted_CV.exp()
    index_C, inside_C = label_columns(labels_C, first_column, columns)
    label_C = shifted_CV.gather(1, index_C[:, None]).squeeze(1).where(inside_C, 0.0)
    best_C = (argmax_C + first_column).to(max_C.dtype)
    return shifted_CV, exp_CV, torch.stack([max_C, exp_CV.sum(dim=1), best_C, label_C])


def label_columns(
    labels_C: torch.Tensor, first_column: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local column of each label (clamped into range) and whether the label is this rank's."""
    index_C = labels_C - first_column
    return index_C.clamp(0, columns - 1), (index_C >= 0) & (index_C < columns)


def all_gather(stats_PC: torch.Tensor, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Stack the ranks' statistics: [P, C] -> [R, P, C]."""
    if tp_group is None or tp_group.size() == 1:
        return stats_PC[None]
    gathered_RPC = stats_PC.new_empty(tp_group.size(), *stats_PC.shape)
    dist.all_gather(list(gathered_RPC.unbind()), stats_PC.contiguous(), group=tp_group)
    return gathered_RPC


@dataclass(frozen=True)
class JoinedScores:
    """What one model says about a chunk, joined over the vocabulary's ranks."""

    shift_RC: torch.Tensor
    """log-probability of a column = its `shifted` score on rank r + shift[r]."""
    sum_RC: torch.Tensor
    """Each rank's sum of `exp`."""
    ce_C: torch.Tensor
    """-log-probability of the label."""
    argmax_C: torch.Tensor
    """Global column with the highest score."""

    @classmethod
    def join(cls, stats_RSC: torch.Tensor, owner_C: torch.Tensor) -> JoinedScores:
        """Join gathered statistics; `owner_C` is the rank that holds each token's label."""
        max_RC, sum_RC, argmax_RC, label_RC = stats_RSC.unbind(dim=1)
        top_C, winner_C = max_RC.max(dim=0)
        below_RC = max_RC - top_C
        shift_RC = below_RC - (sum_RC * below_RC.exp()).sum(dim=0).log()
        return cls(
            shift_RC=shift_RC,
            sum_RC=sum_RC,
            ce_C=-(label_RC + shift_RC).gather(0, owner_C[None]).squeeze(0),
            argmax_C=argmax_RC.gather(0, winner_C[None]).squeeze(0),
        )

    def kl_to(self, other: JoinedScores, gap_RC: torch.Tensor) -> torch.Tensor:
        """KL(self || other) per token; gap[r] = sum over r of self.exp * (self.shifted - other.shifted)."""
        local_RC = gap_RC + self.sum_RC * (self.shift_RC - other.shift_RC)
        return (self.shift_RC.exp() * local_RC).sum(dim=0)
