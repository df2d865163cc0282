"""How far a residual stream is from another one, token by token: |h - t|^2 / |t|^2, summed with weights."""

from __future__ import annotations

import torch

SMALLEST = 1e-20
"""Least |t|^2 that is divided by."""


class RelativeError(torch.autograd.Function):
    """`relative_error` with a gradient of one kept tensor, of the type of the hidden states."""

    @staticmethod
    def forward(ctx, hidden_TH, target_TH, weight_T):
        difference_TH = hidden_TH.float() - target_TH.float()
        weight_T = weight_T.float() / target_TH.float().square().sum(-1).clamp(min=SMALLEST)
        ctx.save_for_backward((2 * weight_T[:, None] * difference_TH).to(hidden_TH.dtype))
        return (weight_T * difference_TH.square().sum(-1)).sum()

    @staticmethod
    def backward(ctx, grad):
        (gradient_TH,) = ctx.saved_tensors
        return (grad * gradient_TH).to(gradient_TH.dtype), None, None


def relative_error(hidden_TH: torch.Tensor, target_TH: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """sum over tokens of weight * |h - t|^2 / |t|^2, a float32 number with a gradient for h alone.

    Args:
        hidden_TH: [T, H] of any floating type. target_TH: [T, H]. weight_T: [T], 0 = not counted.
    """
    return RelativeError.apply(hidden_TH, target_TH, weight_T)


def reference_relative_error(hidden_TH, target_TH, weight_T) -> torch.Tensor:
    """The definition, gradient by autograd."""
    target_TH = target_TH.detach().float()
    error_T = (hidden_TH.float() - target_TH).square().sum(-1)
    return (weight_T * error_T / target_TH.square().sum(-1).clamp(min=SMALLEST)).sum()
