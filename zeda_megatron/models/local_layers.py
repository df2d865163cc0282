"""Norms and core attention of the local layer spec, used where Transformer Engine is absent; norms over all heads are
used beside it too."""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch.nn import functional as F

from ..errors import UserError


class SPRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism; Megatron's torch wrapper refuses to.

    With `layernorm_zero_centered_gamma` the weight is what is added to 1, in float32.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.zero_centred = config.layernorm_zero_centered_gamma
        if self.zero_centred:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.zero_centred:
            return super().forward(x)
        weight = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)


class QueryHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together, where Megatron's norms of queries and keys are over one head.

    Every tensor-parallel rank has its heads' weights; the mean square is that of all ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float):
        """`hidden_size`: of a head."""
        super().__init__()
        self.eps, self.channels = eps, self.heads(config) * hidden_size
        self.ranks = config.tensor_model_parallel_size
        self.tp_group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        self.weight = torch.nn.Parameter(torch.ones(self.channels // self.ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    @staticmethod
    def heads(config) -> int:
        """Of the whole model."""
        return config.num_attention_heads

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """[S, B, heads of this rank, D] -> the same shape and type."""
        x_SBND = x_SBND.contiguous()
        rows = x_SBND.flatten(-2).float()
        square = rows.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            # Summed forward and, as every rank goes on with it in its own way, backward.
            square = reduce_from_tensor_model_parallel_region(square, group=self.tp_group)
            square = copy_to_tensor_model_parallel_region(square, group=self.tp_group)
        normed = rows * torch.rsqrt(square / self.channels + self.eps)
        return (self.weight * normed.to(x_SBND.dtype)).view_as(x_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description for checkpoints: the weight is cut along its heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class KeyHeadsNorm(QueryHeadsNorm):
    """The same of keys."""

    @staticmethod
    def heads(config) -> int:
        return config.num_query_groups


class SDPAttention(MegatronModule):
    """Core attention through `F.scaled_dot_product_attention`: grouped queries, packed sequences, KV cache, windows,
    sinks.

    Query, key and value may have different head sizes (multi-latent attention).

    Attributes:
        window: keys before a token's own that it sees; None: all.
        softmax_offset: [heads of this rank], the logits of the sinks, or None.
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
        self.window = window_of(config, layer_number)
        self.softmax_offset = None
        if config.softmax_type != "vanilla":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.empty(heads, dtype=config.params_dtype)
            if config.perform_initialization:
                config.init_method(sinks)
            self.softmax_offset = torch.nn.Parameter(sinks)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description for checkpoints, as its own core attention has it."""
        own = {} if self.softmax_offset is None else self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(check_initialized=False),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

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
        return attend(
            query,
            key,
            value,
            mask,
            causal,
            self.softmax_scale,
            dropout,
            window=self.window,
            sinks=self.softmax_offset,
        )


def window_of(config, layer_number: int) -> int | None:
    """Keys before a token's own that it sees in a layer (counted from 1); None: all."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    return config.window_size[0]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of [S, B, heads, D] tensors with grouped queries -> [S, B, heads*D].

    Args:
        mask: True = hidden, [B, 1, Sq, Sk]; joined with the causal one where there are as many queries as keys.
        window: keys before a token's own that it sees; the last query is the last key's. None: all.
        sinks: [heads], a logit that joins each softmax and answers nothing.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    grouped = k.shape[1] != q.shape[1]
    # The CPU's kernel finds a query's group itself, to the same bits but for gradients; CUDA's takes no mask then.
    inside = grouped and sinks is None and not q.is_cuda and not torch.is_grad_enabled()
    if grouped and not inside:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    seen = None if mask is None else ~mask
    narrow = window is not None and window < keys - 1
    if narrow or (causal and (mask is not None or sinks is not None)):
        place_K = torch.arange(keys, device=q.device)
        age_QK = place_K[keys - queries :, None] - place_K
        near_QK = torch.ones_like(age_QK, dtype=torch.bool)
        if causal and keys == queries:
            near_QK = age_QK >= 0
        if narrow:
            near_QK = near_QK & (age_QK <= window)
        seen = near_QK if seen is None else seen & near_QK
    if sinks is not None:
        q, k, v, seen = _with_sinks(q, k, v, seen, sinks, scale)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=causal and seen is None,
        scale=scale,
        enable_gqa=inside,
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _with_sinks(q, k, v, seen, sinks, scale: float):
    """One key more, whose product with every query of a head is the head's sink, and whose value is 0: queries get a
    channel of ones for it, keys one of zeros."""
    heads, queries = q.shape[1:3]
    q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1, 0, 1))
    place = torch.zeros(k.shape[2:], dtype=torch.bool, device=k.device)
    place[-1, -1] = True
    k = torch.where(place, (sinks.to(k.dtype) / scale).view(1, heads, 1, 1), k)
    v = F.pad(v, (0, 0, 0, 1))
    if seen is not None:
        seen = F.pad(seen.expand(*seen.shape[:-2], queries, seen.shape[-1]), (0, 1), value=True)
    return q, k, v, seen


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
            self.explicit_window = window_of(config, kwargs.get("layer_number", 1))

        def forward(self, query, key, value, attention_mask=None, *args, **kwargs):
            packed = kwargs.get("packed_seq_params")
            if attention_mask is None or packed is not None:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            sinks = getattr(self, "softmax_offset", None)
            return attend(
                query,
                key,
                value,
                attention_mask,
                False,
                self.explicit_scale,
                window=self.explicit_window,
                sinks=None if sinks is None else sinks.view(-1),
            )

    return ExplicitMaskAttention
