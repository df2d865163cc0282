"""Multi-latent attention, Megatron's, with the norms of the published models, and rotary embeddings whose keys may move
in the cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from ..runtime.megatron_api import latent_parts
from .rotary import Rotary

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on the latents: transformers takes its class default there, not `rms_norm_eps`
(`Glm4MoeLiteAttention`, `DeepseekV3Attention`, transformers 5.23)."""


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` with two differences (`rotary.install_rotary` makes a third).

    - The norms on the latents have their own epsilon.
    - Without Transformer Engine the down projections are whole on every tensor-parallel rank, as Transformer Engine's
      are. Megatron's local spec splits them, and the gradient of the shared rotary key then lacks the other ranks'
      heads (0.16.1).
    """

    def __init__(self, config, *args: Any, whole_down_projections: bool = False, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if whole_down_projections:
            self.linear_kv_down_proj = WholeLinear(config, self.linear_kv_down_proj)
            if config.q_lora_rank is not None:
                self.linear_q_down_proj = WholeLinear(config, self.linear_q_down_proj)
        _set_eps(self.kv_layernorm, self.linear_kv_up_proj)
        if config.q_lora_rank is not None:
            _set_eps(self.q_layernorm, self.linear_q_up_proj)

    def _resolve_qk_norm_config(self, submodules) -> dict[str, Any]:
        return latent_parts(self.config, submodules)


def _set_eps(norm: torch.nn.Module, projection: torch.nn.Module) -> None:
    """Transformer Engine fuses the norm into the projection behind it."""
    holder = projection if isinstance(norm, IdentityOp) else norm
    if not hasattr(holder, "eps"):
        raise RuntimeError(f"{type(holder).__name__} has no eps to set: its version is unknown here")
    holder.eps = LATENT_NORM_EPS


class WholeLinear(torch.nn.Module):
    """[S/tp, B, in] -> ([S/tp, B, out], None): the whole weight on every tensor-parallel rank.

    Under sequence parallelism a rank sees its part of the sequence: Megatron then sums the weight's gradient.
    """

    def __init__(self, config, split: torch.nn.Module):
        """`split` is the layer whose place it takes."""
        super().__init__()
        like = split.weight
        self.weight = torch.nn.Parameter(like.new_empty(split.output_size, split.input_size))
        self.weight.sequence_parallel = config.sequence_parallel
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(hidden_SBH, self.weight), None


class DriftingRotary(RotaryEmbedding):
    """Megatron's rotary embedding with given frequencies, whose position 0 an inference context may move.

    A cache that moves its columns leaves the keys' rotation as it is where keys are cached after it (latent attention):
    `drift` says how far column and position are apart.
    """

    def __init__(self, stock: RotaryEmbedding, rotary: Rotary, with_factor: bool = False):
        """Takes the place of `stock`. `with_factor`: give the factor beside the angles, as Megatron's latent attention
        wants it under YaRN."""
        torch.nn.Module.__init__(self)
        self.rotary_interleaved = stock.rotary_interleaved
        self.seq_len_interpolation_factor = None
        self.inv_freq = torch.tensor(rotary.frequencies, dtype=torch.float32, device=stock.inv_freq.device)
        self.cp_group = stock.cp_group
        self._factor = rotary.factor if with_factor else None
        self._drift = 0
        self._made: tuple[tuple[int, int], torch.Tensor] | None = None

    def get_rotary_seq_len(self, inference_context, *args: Any, **kwargs: Any) -> int:
        """Megatron asks for the length, then for the table."""
        self._drift = getattr(inference_context, "drift", 0)
        return super().get_rotary_seq_len(inference_context, *args, **kwargs)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None):
        """Angles [S, 1, 1, D] of positions offset + drift, ..., offset + drift + S - 1."""
        drift, self._drift = self._drift, 0
        if not drift:
            angles = super().forward(max_seq_len, offset, packed_seq, cp_group)
        else:
            wanted = (max_seq_len, offset + drift)
            if self._made is None or self._made[0] != wanted:
                self._made = (wanted, self._far_angles(*wanted))
            angles = self._made[1]
        return angles if self._factor is None else (angles, self._factor)

    def _far_angles(self, length: int, first: int) -> torch.Tensor:
        """Positions grow while answers come and go: in float32 their angles would lose digits."""
        place = torch.arange(first, first + length, device=self.inv_freq.device, dtype=torch.float64)
        angles = torch.outer(place, self.inv_freq.double()).remainder(2 * math.pi).float()
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def install_rotary(model: torch.nn.Module, rotary: Rotary, with_factor: bool) -> None:
    """Give a new model these frequencies, in place of those that Megatron computes.

    Grouped-query attention caches keys before their rotation and has one embedding; latent attention caches them after
    it, and every layer has its own. `with_factor`: see `DriftingRotary`.
    """
    for layer in model.modules():
        if isinstance(layer, MLASelfAttention):
            layer.rotary_pos_emb = DriftingRotary(layer.rotary_pos_emb, rotary, with_factor)
    stock = getattr(model, "rotary_pos_emb", None)
    if isinstance(stock, RotaryEmbedding):
        stock.inv_freq = torch.tensor(rotary.frequencies, dtype=torch.float32, device=stock.inv_freq.device)
