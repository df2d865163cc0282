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
