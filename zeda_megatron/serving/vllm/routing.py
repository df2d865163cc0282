"""The mathematics of routing over real and zero experts in plain PyTorch; nothing here knows vLLM.

It is split as vLLM splits it. A gate turns hidden states into columns per token (logits; under paired routing also
what the score adds to the log of a pick's weight). A router turns columns into picks. All that a router needs is in
the columns, so they may be sent to other ranks.

Ids lie in [0, N+Nz): shared zero experts have ids from N on; a pick that a paired zero expert took has the real
expert's id plus N.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..transformers.zero_expert_routing import kept_picks, limit_to_groups, paired_shapes, predict, stand_ins
from .settings import ZeroRouting

TINY = 1e-20


class ZeroExpertGate(nn.Module):
    """The router's weights of one MoE layer, under the checkpoint's names.

    Attributes:
        weight: [N+Nz, H] (paired: [N+1, H], the last row unread).
        bias: [N+Nz] (paired: [N]), where the family's logits have one.
        e_score_correction_bias: float32 [N+Nz] (paired: [N]), with sigmoid scores only.
        zero_weight, zero_bias: heads of paired zero experts, [N, H] and [N], and what `paired_shapes` names.
            zero_bias: [Nz, H], of learned shared ones.
        dial: float32 [1]: the logit bias, or the threshold. A tensor, so that captured graphs follow it; no
            buffer, as vLLM waits for checkpoint values of buffers when weights are reloaded.
    """

    def __init__(self, routing: ZeroRouting, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.routing = routing
        kind = torch.float32 if routing.precise else dtype
        self.weight = _frozen(routing.rows + routing.zero.unread_rows, hidden_size, dtype=kind)
        self.bias = _frozen(routing.rows, dtype=dtype) if routing.biased else None
        if routing.score == "sigmoid":
            self.e_score_correction_bias = _frozen(routing.rows, dtype=torch.float32)
        if routing.paired:
            self.zero_weight = _frozen(routing.num_real, hidden_size, dtype=dtype)
            self.zero_bias = _frozen(routing.num_real, dtype=dtype)
            for name, shape in paired_shapes(routing.zero, hidden_size).items():
                setattr(self, name, _frozen(*shape, dtype=dtype))
        elif routing.zero.kind == "learned":
            self.zero_bias = _frozen(routing.zero.count, hidden_size, dtype=dtype)
        dial = routing.threshold if routing.paired else routing.logit_bias
        self.dial = torch.tensor([dial], dtype=torch.float32)
        self._residual_norm_T: torch.Tensor | None = None

    def see_residual(self, residual_TH: torch.Tensor) -> None:
        """Remember the norm of the stream that this layer's output will be added to, for the next `forward`."""
        self._residual_norm_T = torch.linalg.vector_norm(residual_TH, dim=-1, dtype=torch.float32)

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> float32 columns [T, C]: logits (masked: of the real experts), then, under paired routing, N
        columns that the score adds to the log of the weight."""
        routing = self.routing
        rows = routing.num_real if routing.masked else routing.rows
        hidden_TH, weight = hidden_TH.to(self.weight.dtype), self.weight[:rows]
        logits_TE = F.linear(hidden_TH, weight, None if self.bias is None else self.bias[:rows]).float()
        if routing.masked:
            return logits_TE
        if not routing.paired:
            return logits_TE
        more_TN = torch.zeros_like(logits_TE)
        if "head" in routing.zero.terms:
            more_TN = predict(hidden_TH, self)
        if routing.needs_residual:
            norm_T, self._residual_norm_T = self._residual_norm_T, None
            if norm_T is None:
                raise RuntimeError("the gate saw no residual: run the whole decoder layer")
            more_TN = more_TN - norm_T.clamp(min=TINY).log().unsqueeze(-1)
        return torch.cat([logits_TE, more_TN], dim=-1)


def pick(
    columns_TC: torch.Tensor,
    routing: ZeroRouting,
    dtype: torch.dtype,
    score_bias: torch.Tensor | None = None,
    dial: torch.Tensor | float = 0.0,
    scaled: bool = True,
    no_token_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, K] and ids int64 [T, K] of the picks, from a gate's columns.

    Args:
        dtype: the model's type; softmax weights are rounded to it, as transformers does.
        score_bias: [E], added to sigmoid scores for the choice alone.
        dial: the logit bias or the threshold: a number, [1], or [T, 1] of each token.
        scaled: multiply by the model's factor. Scores of paired zero experts are those of scaled weights anyway.
        no_token_T: bool, rows that only pad a batch: they load no expert.
    """
    if not routing.paired and not routing.masked:
        real_TN, zero_TZ = columns_TC.split([routing.num_real, routing.zero.count], dim=-1)
        columns_TC = torch.cat([real_TN, zero_TZ + dial], dim=-1)
    paired = routing.paired and not routing.masked
    # Contiguous: a sigmoid of a slice may round otherwise than that of transformers.
    logits_TE = columns_TC[:, : routing.num_real].contiguous() if paired else columns_TC
    if routing.score == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        choice_TE = scores_TE + score_bias[: scores_TE.shape[1]]
        choice_TE = limit_to_groups(choice_TE, routing.num_real, *routing.groups, routing.group_best)
        ids_TK = torch.topk(choice_TE, routing.top_k, sorted=False)[1]
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
    else:
        scores_TE = logits_TE.softmax(dim=-1)
        choice_TE = limit_to_groups(scores_TE, routing.num_real, *routing.groups, routing.group_best)
        ids_TK = torch.topk(choice_TE, routing.top_k, dim=-1)[1]
        weights_TK = scores_TE.gather(1, ids_TK)
        if routing.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    whole_TK = weights_TK * routing.scale
    if paired:
        score_TK = columns_TC[:, routing.num_real :].gather(1, ids_TK)
        if "weight" in routing.zero.terms:
            score_TK = score_TK + whole_TK.clamp(min=TINY).log()
        kept_TK = kept_picks(score_TK, ids_TK, dial, routing.batch_margin, routing.num_real, no_token_T)
        ids_TK = torch.where(kept_TK, ids_TK, ids_TK + routing.num_real)
    weights_TK = whole_TK if scaled else weights_TK
    precise = routing.precise or routing.score == "sigmoid"
    return (weights_TK if precise else weights_TK.to(dtype).float()), ids_TK


def zero_output(
    hidden_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    gate: ZeroExpertGate,
) -> torch.Tensor | None:
    """What zero slots add to a layer's output [T, H], in float32; None if nothing."""
    routing = gate.routing
    if routing.zero.kind == "zero" or routing.masked:
        return None
    zero_TK = ids_TK >= routing.num_real
    if routing.paired:
        own_TK = ids_TK.long() - zero_TK * routing.num_real
        parts = (getattr(gate, name, None) for name in ("zero_down", "zero_up", "zero_constant"))
        return stand_ins(hidden_TH, weights_TK, own_TK, zero_TK, *parts).float()
    weights_TK = weights_TK * zero_TK
    if routing.zero.kind == "copy":
        return weights_TK.sum(dim=-1, keepdim=True) * hidden_TH.float()
    bias_TKH = gate.zero_bias.float()[(ids_TK - routing.num_real).clamp(min=0)]
    return (weights_TK.unsqueeze(-1) * bias_TKH).sum(dim=1)


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
