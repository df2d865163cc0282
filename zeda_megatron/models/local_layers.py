"""Norm and core attention of the local layer spec, used where Transformer Engine is absent."""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from ..errors import UserError


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
