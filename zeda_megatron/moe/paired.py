"""Paired zero experts: every real expert has a zero expert of its own, which takes picks that would add little.

Pick i of token x goes to its zero expert when

    log w_i + h_i(x) - log|residual|  <  threshold,   h_i(x) = U_i.x + c_i + V_i.silu(W x + d)

w_i is the pick's routing weight, h_i(x) predicts log|E_i(x)| (fitted, see `fit.paired_fit`; the part with hidden
units, which all experts of a layer share, is there only if asked for), the residual is the stream that the layer's
output is added to: the sum is the log of the pick's relative contribution. Kept picks keep their weights.

Closest kin: BEAM's learned mask router (arXiv 2605.14438), which is the term `head` alone, trained.
"""

from __future__ import annotations

from collections import deque

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.nn import functional as F

from ..config.zero_experts import ZeroExpertConfig

KEEP_ALL = -1e4
"""Threshold of a fresh head: no score is below it."""


class PairedZeroExperts(torch.nn.Module):
    """The scores of all picks of one layer, and the threshold that splits them.

    Attributes:
        weight: U [N, H]. bias: c [N]. hidden_weight: W [h, H]. hidden_bias: d [h]. hidden_output: V [N, h].
        threshold: one number, float32 whatever the model's type.
    """

    def __init__(
        self, zero: ZeroExpertConfig, hidden_size: int, dtype: torch.dtype, sequence_parallel: bool = False
    ):
        super().__init__()
        self.terms = zero.score_terms
        self.temperature = zero.paired_temperature
        experts = zero.num_zero_experts
        self.weight = torch.nn.Parameter(torch.zeros(experts, hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(experts, dtype=dtype))
        self.width = zero.paired_head_width
        if self.width:
            self.hidden_weight = torch.nn.Parameter(torch.zeros(self.width, hidden_size, dtype=dtype))
            self.hidden_bias = torch.nn.Parameter(torch.zeros(self.width, dtype=dtype))
            self.hidden_output = torch.nn.Parameter(torch.zeros(experts, self.width, dtype=dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel
        self.register_buffer("threshold", torch.full((1,), KEEP_ALL, dtype=torch.float32))
        self._seen: torch.Tensor | None = None
        self._recompute: deque[torch.Tensor] = deque()

    def _apply(self, fn, recurse=True):
        """Move with the model, but let no cast round the threshold."""
        exact = self.threshold
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.threshold = exact.to(self.threshold.device)
        return self

    @property
    def trains(self) -> bool:
        """The head has gradients: then all picks are computed while training (straight-through)."""
        return self.weight.requires_grad

    def see_residual(self, _norm, args) -> None:
        """Forward pre-hook of the norm before the layer: remember |residual| of its input [S, B, H]."""
        if "residual" in self.terms:
            self._seen = args[0].detach().float().norm(dim=-1).reshape(-1)

    def pass_masked(self) -> None:
        """This pass is the static model's: the norm that was seen is of no use."""
        self._seen = None

    def scores(self, hidden_TH: torch.Tensor, probs_TN: torch.Tensor) -> torch.Tensor:
        """Log of the predicted relative contribution of every expert, [T, N] float32; only picks mean something.

        Gradients reach the head alone.
        """
        score_TN = torch.zeros_like(probs_TN, dtype=torch.float32)
        if "weight" in self.terms:
            score_TN = score_TN + probs_TN.detach().float().clamp(min=1e-20).log()
        if "head" in self.terms:
            score_TN = score_TN + self.predict(hidden_TH.detach())
        if "residual" in self.terms:
            norm_T = self._residual_norm(hidden_TH.shape[0])
            score_TN = score_TN - norm_T.clamp(min=1e-20).log().unsqueeze(1)
        return score_TN

    def predict(self, hidden_TH: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """h(x) of every expert, [T, N] float32; of a single one, [T]."""
        one = slice(expert, None if expert is None else expert + 1)
        x_TH = hidden_TH.float()
        value_TN = F.linear(x_TH, self.weight[one].float(), self.bias[one].float())
        if self.width:
            unit_TU = F.silu(F.linear(x_TH, self.hidden_weight.float(), self.hidden_bias.float()))
            value_TN = value_TN + F.linear(unit_TU, self.hidden_output[one].float())
        return value_TN if expert is None else value_TN[:, 0]

    def _residual_norm(self, tokens: int) -> torch.Tensor:
        """|residual| [T] of this pass.

        Selective recomputation runs the layer twice, but the norm before it once: the first pass (no gradients)
        leaves its values in a queue. Backward passes come in the order of the forward ones.
        """
        seen, self._seen = self._seen, None
        if self.training and not torch.is_grad_enabled():
            self._recompute.append(seen)
        elif self.training and self._recompute:
            queued = self._recompute.popleft()
            seen = queued if seen is None else seen
        if seen is None or seen.numel() != tokens:
            raise RuntimeError("paired zero experts saw no residual for these tokens: install_residual_norms")
        return seen

    def kept(self, score_TN: torch.Tensor, map_TN: torch.Tensor) -> torch.Tensor:
        """Picks at or above the threshold, [T, N] bool: those that stay with their real experts."""
        return map_TN & (score_TN >= self.threshold)

    def thin_out(
        self, score_TN: torch.Tensor, probs_TN: torch.Tensor, map_TN: torch.Tensor, kept_TN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hand the picks that are not kept to their zero experts. All [T, N].

        Returns:
            probs and map for the dispatcher, and the gates (None for a frozen head). With a head that trains, the
            dispatched map still has all picks: those that are skipped have weight 0 and a gradient, the
            straight-through estimate.
        """
        if not (self.trains and self.training):
            return probs_TN * kept_TN, kept_TN, None
        gate_TN = torch.sigmoid((score_TN - self.threshold) / self.temperature)
        hard_TN = kept_TN.to(probs_TN.dtype)
        return (
            probs_TN * (hard_TN + (gate_TN - gate_TN.detach()).to(probs_TN.dtype)),
            map_TN,
            gate_TN,
        )


def install_residual_norms(model: torch.nn.Module) -> None:
    """Let the paired zero experts of every layer see the norm of its residual stream. Call after building."""
    for layer in model.modules():
        mlp = getattr(layer, "mlp", None)
        paired = getattr(mlp.router, "paired", None) if isinstance(mlp, MoELayer) else None
        if paired is not None:
            layer.pre_mlp_layernorm.register_forward_pre_hook(paired.see_residual)


def forget_residuals(model_chunks) -> None:
    """After a step nothing of it may be left: norms that wait for a recomputation would meet another step's tokens.

    Raises `RuntimeError` if some do.
    """
    for paired in paired_modules(model_chunks):
        waiting = len(paired._recompute)
        paired._seen = None
        paired._recompute.clear()
        if waiting:
            raise RuntimeError(f"{waiting} passes of paired zero experts were never recomputed")


def paired_modules(model_chunks) -> list[PairedZeroExperts]:
    """The paired zero experts of all layers of a model (or list of chunks)."""
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, PairedZeroExperts)]
