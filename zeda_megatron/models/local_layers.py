"""Norm and core attention of the local layer spec, used where Transformer Engine is absent.

Multi-latent attention is Megatron's in both, with the norms of the published models and keys that may move in the
cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.nn import functional as F

from ..errors import UserError
from ..runtime.megatron_api import latent_parts


class SPRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism; Megatron's torch wrapper refuses to."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class SDPAttention(MegatronModule):
    """Core attention through `F.scaled_dot_product_attention`: grouped queries, packed sequences, KV cache.

    Query, key and value may have different head sizes (multi-latent attention).
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.cp_group = getattr(pg_collection, "cp", None) if config.context_parallel_size > 1 else None
        if config.context_parallel_size > 1 and self.cp_group is None:
            self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """[S, B, heads, D] -> [S, B, heads*D]; packed: [T, heads, D] -> [T, heads*D].

        An explicit `attention_mask` (True = hidden, [B, 1, Sq, Sk]) is honoured; otherwise the mask is causal,
        or absent for `no_mask` (decoding one token against the cache).
        """
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            ends = packed_seq_params.cu_seqlens_q.tolist()
            if self.cp_group is not None:
                return self._attend_across_ranks(query, key, value, ends)
            parts = [
                self._attend(*(x[a:b].unsqueeze(1) for x in (query, key, value)), None, True)
                for a, b in zip(ends, ends[1:])
                if b > a
            ]
            return torch.cat(parts).squeeze(1)
        if self.cp_group is not None:
            raise UserError("--context-parallel-size > 1 works on packed rows only, not for generation")
        kind = attn_mask_type or self.attn_mask_type
        return self._attend(query, key, value, attention_mask, kind == AttnMaskType.causal)

    def _attend_across_ranks(self, query, key, value, ends: list[int]) -> torch.Tensor:
        """Packed attention of this context-parallel rank's tokens [T / size, heads, D].

        Keys and values of the whole row are gathered (Transformer Engine's ring needs less memory; there is none
        here). Each sequence is held as chunks r and 2 * size - 1 - r, see `data.packing.context_part`.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key, value)
        )
        local = query.shape[0]
        parts = []
        for start, end in zip(ends, ends[1:]):
            chunk = (end - start) // (2 * size)
            if not chunk:
                continue
            here = start // size
            # Where each chunk of the sequence begins in the gathered rows: two per rank, ranks one after another.
            first = [
                (part if part < size else 2 * size - 1 - part) * local + here + (part >= size) * chunk
                for part in range(2 * size)
            ]
            for number, part in enumerate((rank, 2 * size - 1 - rank)):
                rows = [slice(place, place + chunk) for place in first[: part + 1]]
                seen_key, seen_value = (
                    torch.cat([x[row] for row in rows]).unsqueeze(1) for x in (key, value)
                )
                mine = query[here + number * chunk : here + (number + 1) * chunk].unsqueeze(1)
                length = seen_key.shape[0]
                hidden = torch.ones(chunk, length, dtype=torch.bool, device=mine.device)
                parts.append(
                    self._attend(
                        mine, seen_key, seen_value, hidden.triu(length - chunk + 1)[None, None], False
                    )
                )
        return torch.cat(parts).squeeze(1)

    def _attend(self, query, key, value, mask, causal: bool) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, mask, causal, self.softmax_scale, dropout)


def attend(query, key, value, mask, causal: bool, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """Attention of [S, B, heads, D] tensors with grouped queries -> [S, B, heads*D]. `mask` (True = hidden,
    [B, 1, Sq, Sk]) is joined with the causal one."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if mask is not None:
        mask = ~mask
        if causal and mask.shape[-1] == q.shape[2]:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def with_explicit_masks(base: type) -> type:
    """A core attention class that leaves passes with an explicit mask to `attend`.

    Transformer Engine's attention ignores the mask that answers of different beginnings need while decoding (its
    mask type is `no_mask` there). Training rows are packed, have none, and stay with `base`.
    """

    class ExplicitMaskAttention(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            config = kwargs.get("config", args[0] if args else None)
            channels = kwargs.get("k_channels") or config.kv_channels
            self.explicit_scale = kwargs.get("softmax_scale") or 1.0 / math.sqrt(channels)

        def forward(self, query, key, value, attention_mask=None, *args, **kwargs):
            packed = kwargs.get("packed_seq_params")
            if attention_mask is None or packed is not None:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            return attend(query, key, value, attention_mask, False, self.explicit_scale)

    return ExplicitMaskAttention


LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on the latents: transformers takes its class default there, not `rms_norm_eps`
(`Glm4MoeLiteAttention`, transformers 5.23)."""


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` with three differences.

    - The norms on the latents have their own epsilon.
    - Without Transformer Engine the down projections are whole on every tensor-parallel rank, as Transformer Engine's
      are. Megatron's local spec splits them, and the gradient of the shared rotary key then lacks the other ranks'
      heads (0.16.1).
    - Rotary positions are columns of the cache plus the `drift` of an inference context, see `distill.kv_slots`.
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
        self.rotary_pos_emb = DriftingRotary(self.rotary_pos_emb)

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
    """Rotary embedding whose position 0 an inference context may move.

    A cache that moves its columns leaves the keys' rotation as it is: `drift` says how far column and position are
    apart. Without a drift it is Megatron's.
    """

    def __init__(self, stock: RotaryEmbedding):
        """Takes over the frequencies of `stock`."""
        torch.nn.Module.__init__(self)
        self.rotary_interleaved = stock.rotary_interleaved
        self.seq_len_interpolation_factor = stock.seq_len_interpolation_factor
        self.inv_freq, self.cp_group = stock.inv_freq, stock.cp_group
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
            return super().forward(max_seq_len, offset, packed_seq, cp_group)
        wanted = (max_seq_len, offset + drift)
        if self._made is None or self._made[0] != wanted:
            self._made = (wanted, self._far_angles(*wanted))
        return self._made[1]

    def _far_angles(self, length: int, first: int) -> torch.Tensor:
        """Positions grow while answers come and go: in float32 their angles would lose digits."""
        place = torch.arange(first, first + length, device=self.inv_freq.device, dtype=torch.float64)
        angles = torch.outer(place, self.inv_freq.double()).remainder(2 * math.pi).float()
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
