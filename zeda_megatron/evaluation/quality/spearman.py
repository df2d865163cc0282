"""Spearman's rank correlation: how far one quantity rises with another, whatever the shape of the curve.

Source: C. Spearman, The Proof and Measurement of Association between Two Things (1904); ties get the mean of their
ranks, and the coefficient is Pearson's of the ranks.
"""

from __future__ import annotations

import math

import torch


def average_ranks(values_T: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 in ascending order, [T] float64; equal values share the mean of their ranks."""
    _, place_T, count_U = torch.unique(values_T, return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()
    return (last_U - (count_U - 1) / 2)[place_T]


def spearman(x_T: torch.Tensor, y_T: torch.Tensor) -> float | None:
    """Rank correlation of two [T] tensors, from -1 to 1; None if one of them is constant (or empty).

    Raises:
        ValueError: shapes differ, or a value is no number.
    """
    if x_T.shape != y_T.shape or x_T.dim() != 1:
        raise ValueError(f"rank correlation needs two vectors of one length, got {x_T.shape} and {y_T.shape}")
    if x_T.isnan().any() or y_T.isnan().any():
        raise ValueError("rank correlation of values that are not a number")
    if x_T.numel() == 0 or bool((x_T == x_T[0]).all()) or bool((y_T == y_T[0]).all()):
        return None
    x_T, y_T = (ranks_T - ranks_T.mean() for ranks_T in (average_ranks(x_T), average_ranks(y_T)))
    r = float(x_T @ y_T) / math.sqrt(float(x_T @ x_T) * float(y_T @ y_T))
    return max(-1.0, min(1.0, r))
