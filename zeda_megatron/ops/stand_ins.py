"""What stand-ins answer in place of skipped experts: sum over skipped picks i of w_i * (B_i A_i x + b_i).

Computed where the token lives. `stand_ins` has the shapes of all picks, so that a device is never asked how many are
skipped (on the CPU, where that is free, only skipped ones are rows); `reference_stand_ins` is the definition.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_ALIGNED = 16
"""Bytes that the rows of a grouped product's operands must be a multiple of."""


def stand_ins(
    x_TH: torch.Tensor,
    weights_TN: torch.Tensor,
    skipped_TN: torch.Tensor,
    down_NRH: torch.Tensor | None,
    up_NHR: torch.Tensor | None,
    bias_NH: torch.Tensor,
    topk: int,
) -> torch.Tensor:
    """[T, H] in the dtype of x.

    Args:
        x_TH: input of the layer. weights_TN: routing weights of the picks that are answered.
        skipped_TN: those picks (bool), at most `topk` a token. A weight may be 0, and its gradient is wanted then too.
        down_NRH, up_NHR: A and B of every expert; None: constants only. bias_NH: b.
    """
    weights_TN = weights_TN.masked_fill(~skipped_TN, 0)
    constant_TH = weights_TN.to(bias_NH.dtype) @ bias_NH
    if down_NRH is None:
        return constant_TH.to(x_TH.dtype)
    experts = down_NRH.shape[0]
    picked_TK, id_TK = skipped_TN.to(torch.uint8).topk(topk, dim=-1)
    id_S = id_TK.masked_fill(picked_TK == 0, experts).flatten()
    order_S = id_S.argsort(stable=True)
    ends_N = skipped_TN.sum(0).cumsum(0).to(torch.int32)
    row_R = order_S[: int(ends_N[-1])] if asking_is_free(x_TH) else order_S
    weight_R = weights_TN.gather(1, id_TK).flatten()[row_R]
    # Rows behind the last group are not computed, forward nor backward: whatever lies there must not get out.
    inside_R1 = (id_S[row_R] < experts)[:, None]
    rows_RH = torch.where(inside_R1, x_TH[row_R // topk], 0)
    low_Rr = F.grouped_mm(rows_RH, _padded(down_NRH, 1).transpose(1, 2), offs=ends_N)
    low_Rr = (torch.where(inside_R1, low_Rr, 0) * weight_R[:, None]).to(x_TH.dtype)
    rows_RH = F.grouped_mm(low_Rr, _padded(up_NHR, 2).transpose(1, 2), offs=ends_N)
    rows_RH = torch.where(inside_R1, rows_RH, 0)
    if rows_RH.requires_grad:
        rows_RH.register_hook(torch.Tensor.contiguous)  # the product's backward refuses an expanded gradient
    slots_SH = rows_RH.new_zeros(len(id_S), rows_RH.shape[1]).index_copy(0, row_R, rows_RH)
    return (slots_SH.view(*id_TK.shape, -1).sum(1) + constant_TH).to(x_TH.dtype)


def asking_is_free(tensor: torch.Tensor) -> bool:
    """Whether the host may ask how many rows there are without waiting for a device."""
    return tensor.device.type == "cpu"


def _padded(matrix: torch.Tensor, rank_dim: int) -> torch.Tensor:
    """The rank filled up with zeros to what the grouped product takes."""
    unit = _ALIGNED // matrix.element_size()
    missing = -matrix.shape[rank_dim] % unit
    return matrix if not missing else F.pad(matrix, (0, missing) if rank_dim == 2 else (0, 0, 0, missing))


def reference_stand_ins(x_TH, weights_TN, skipped_TN, down_NRH, up_NHR, bias_NH, topk) -> torch.Tensor:
    """The definition, all experts of all tokens."""
    weights_TN = (weights_TN * skipped_TN).to(x_TH.dtype)
    answer_TH = weights_TN @ bias_NH
    if down_NRH is None:
        return answer_TH
    low_TNR = torch.einsum("th,nrh->tnr", x_TH, down_NRH)
    return answer_TH + torch.einsum("tn,tnr,nhr->th", weights_TN, low_TNR, up_NHR)
