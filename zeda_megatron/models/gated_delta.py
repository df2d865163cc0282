"""Gated delta networks: linear attention with a recurrent state and a short causal convolution, in the place of a
layer's self-attention (Qwen3-Next, Qwen3.5).

The recurrence is transformers' (`torch_chunk_gated_delta_rule`, which newer versions replace by FLA's kernel where that
is installed). What Megatron-Core has of it wants FLA, and 0.16 refuses packed rows and generation.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

State = tuple[torch.Tensor, torch.Tensor]
"""What a layer remembers of the tokens so far: the convolution's last inputs [B, C, taps - 1], and the recurrent state
[B, value heads, key channels, value channels], float32."""
SPLIT = {"conv_weight": 0, "A_log": 0, "dt_bias": 0}
"""Own parameters, all cut along their heads on tensor-parallel ranks."""


class GatedDeltaNet(MegatronModule):
    """The layer, with the interface of Megatron's `SelfAttention`.

    A key head and its value heads stay together on one tensor-parallel rank. Rows of `in_proj` are, for each key head,
    [query; key; values; gates; betas; alphas], and channels of the convolution [query; key; values].

    Attributes:
        groups: key heads of this rank. values: value heads of each.
        conv_weight: [C, 1, taps]. A_log, dt_bias: [value heads of this rank].
    """

    def __init__(self, config, layer_number: int, pg_collection=None, **attention: Any):
        """`attention`: what Megatron tells every attention, and has no meaning here."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = getattr(pg_collection, "tp", None)
        if self.tp_group is None:
            self.tp_group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        ranks = config.tensor_model_parallel_size
        self.groups = config.linear_num_key_heads // ranks
        self.values = config.linear_num_value_heads // config.linear_num_key_heads
        self.key_channels, self.value_channels = config.linear_key_head_dim, config.linear_value_head_dim
        key, value = self.key_channels, self.values * self.value_channels
        self.parts = [2 * key + value, value, self.values, self.values]
        linear = {"config": config, "bias": False, "tp_group": self.tp_group}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            config.linear_num_key_heads * sum(self.parts),
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.out_proj = RowParallelLinear(
            config.linear_num_value_heads * self.value_channels,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        self.norm = Qwen3NextRMSNormGated(self.value_channels, eps=config.layernorm_epsilon)
        self.norm.to(config.params_dtype)
        # Whole on every tensor-parallel rank, which has its heads' part of the gradient: Megatron sums it.
        self.norm.weight.sequence_parallel = config.sequence_parallel
        self._add_parameters(config)

    def _add_parameters(self, config) -> None:
        """Drawn whole on every rank, so that all ranks' random streams stay alike."""
        rank = self.tp_group.rank() if self.tp_group is not None else 0
        heads, channels = self.groups * self.values, self.groups * self.parts[0]
        ranks, taps = config.tensor_model_parallel_size, config.linear_conv_kernel_dim
        drawn = {
            "conv_weight": torch.empty(channels * ranks, 1, taps),
            "A_log": torch.empty(heads * ranks),
            "dt_bias": torch.ones(heads * ranks),
        }
        if config.perform_initialization:
            config.init_method(drawn["conv_weight"])
            drawn["A_log"].uniform_(0.01, 16.0).log_()
        for name, tensor in drawn.items():
            mine = tensor.chunk(ranks)[rank].to(config.params_dtype, copy=True)
            setattr(self, name, torch.nn.Parameter(mine))
            set_tensor_model_parallel_attributes(getattr(self, name), True, SPLIT[name], 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        inference_context=None,
        packed_seq_params=None,
        **attention: Any,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] (under sequence parallelism the local part) -> (the same shape, None).

        Args:
            attention_mask: [B, 1, Sq, Sk], True = hidden: what the last token must not see is padding before a row's
                beginning. With one query no padding is looked for.
            inference_context: Megatron's static one with `recurrent_states`, which keeps the last token's state.
            packed_seq_params: sequences one after another (thd): each begins from a state of zeros.
        """
        projected_BSX = self.in_proj(hidden_states)[0].transpose(0, 1)
        qkv, gate, beta, alpha = projected_BSX.unflatten(-1, (self.groups, -1)).split(self.parts, dim=-1)
        qkv_BSC, beta_BSN, alpha_BSN = (part.flatten(2) for part in (qkv, beta, alpha))
        length = qkv_BSC.shape[1]
        if attention_mask is not None and length > 1:
            # Zeros leave the state of zeros as it is: the convolution has no bias.
            padding_BS = attention_mask[:, 0, -1, -length:]
            qkv_BSC = qkv_BSC.masked_fill(padding_BS.unsqueeze(-1), 0.0)
        inputs = qkv_BSC, beta_BSN, alpha_BSN
        if packed_seq_params is not None:
            ends = packed_seq_params.cu_seqlens_q.tolist()
            rows = [[x[:, a:b] for x in inputs] for a, b in zip(ends, ends[1:]) if b > a]
            mixed_BSND = torch.cat([self._mix(*row)[0] for row in rows], dim=1)
        elif inference_context is not None:
            states = inference_context.recurrent_states
            mixed_BSND, states[self.layer_number] = self._mix(*inputs, states.get(self.layer_number))
        else:
            mixed_BSND = self._mix(*inputs)[0]
        gate_RD = gate.reshape(-1, self.value_channels)
        normed_RD = self.norm(mixed_BSND.reshape_as(gate_RD), gate_RD)
        return self.out_proj(normed_RD.view(*projected_BSX.shape[:2], -1).transpose(0, 1).contiguous())

    def _mix(
        self,
        qkv_BSC: torch.Tensor,
        beta_BSN: torch.Tensor,
        alpha_BSN: torch.Tensor,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Values mixed over the tokens [B, S, N, D], and the state after the last one."""
        taps, recurrent = self.conv_weight.shape[-1], None
        qkv_BCS = qkv_BSC.transpose(1, 2)
        if state is None:
            longer_BCS = F.pad(qkv_BCS, (taps - 1, 0))
        else:
            longer_BCS, recurrent = torch.cat([state[0], qkv_BCS], dim=-1), state[1]
        convolved_BCS = F.silu(F.conv1d(longer_BCS, self.conv_weight, groups=longer_BCS.shape[1]))
        heads_BSGX = convolved_BCS.transpose(1, 2).unflatten(-1, (self.groups, -1))
        query, key, value = heads_BSGX.split(
            [self.key_channels, self.key_channels, self.values * self.value_channels], dim=-1
        )
        decay = -self.A_log.float().exp() * F.softplus(alpha_BSN.float() + self.dt_bias)
        one_by_one = state is not None and qkv_BSC.shape[1] == 1
        rule = torch_recurrent_gated_delta_rule if one_by_one else torch_chunk_gated_delta_rule
        mixed_BSND, recurrent = rule(
            query.repeat_interleave(self.values, dim=2),
            key.repeat_interleave(self.values, dim=2),
            value.reshape(*value.shape[:2], -1, self.value_channels),
            g=decay,
            beta=beta_BSN.sigmoid(),
            initial_state=recurrent,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return mixed_BSND, (longer_BCS[..., longer_BCS.shape[-1] - taps + 1 :], recurrent)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description for checkpoints: own parameters are cut along their heads."""
        made = make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in SPLIT},
            prefix,
            SPLIT,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        for name, module in self.named_children():
            made |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return made
