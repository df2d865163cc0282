"""Ridge regression by a dense least-squares solver in float64."""

from __future__ import annotations

import torch


def dense_ridge(x_RH: torch.Tensor, y_R: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [H] and constant: centred rows, and below them one row per channel that wants weight 0.

    Those rows weigh as much as ridge * H rows of the inputs' mean variance.
    """
    x, y = x_RH.double(), y_R.double()
    size, mean = x.shape[1], x.mean(0)
    penalty = (ridge * size * (x - mean).square().mean()).sqrt() * torch.eye(size, dtype=torch.float64)
    stacked = torch.cat([x - mean, penalty])
    answers = torch.cat([y - y.mean(), torch.zeros(size, dtype=torch.float64)])
    weight = torch.linalg.lstsq(stacked, answers.unsqueeze(1)).solution.squeeze(1)
    return weight, y.mean() - weight @ mean


def dense_low_rank(
    x_RH: torch.Tensor, y_RO: torch.Tensor, weight_R: torch.Tensor, ridge: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map [O, H] of that rank and the constant [O] that are nearest to weighted rows, with the penalty of
    `dense_ridge`: the full-rank answer, cut to the strongest directions of what it predicts."""
    x, y, w = x_RH.double(), y_RO.double(), weight_R.double()
    mean_x, mean_y = ((w[:, None] * part).sum(0) / w.sum() for part in (x, y))
    x, y = (w.sqrt()[:, None] * part for part in (x - mean_x, y - mean_y))
    size = x.shape[1]
    penalty = (ridge * x.square().sum() / len(x)).sqrt() * torch.eye(size, dtype=torch.float64)
    stacked = torch.cat([x, penalty])
    full = torch.linalg.lstsq(stacked, torch.cat([y, y.new_zeros(size, y.shape[1])])).solution
    strongest = torch.linalg.svd(stacked @ full, full_matrices=False)[2][:rank]
    cut = (full @ strongest.t() @ strongest).t()
    return cut, mean_y - cut @ mean_x
