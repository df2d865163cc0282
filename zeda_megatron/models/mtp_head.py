"""The head of multi-token prediction (MTP): one layer behind the decoder that drafts the token after the next one.

At position t it takes the decoder's state h_t, as the LM head does (after the final norm), and the embedding of token
t+1; what comes out goes through the model's own LM head and predicts token t+2:

    g_t = norm( layer( eh_proj [ enorm(embedding of token t+1) ; hnorm(h_t) ] ) )

The parts, their order and their names are those of Megatron's `MultiTokenPredictionLayer`, which this one extends, and
of Hugging Face folders (`enorm`, `hnorm`, `eh_proj`, a decoder layer, `shared_head.norm`). Megatron-Core 0.16.1 and
vLLM 0.32 (`glm4_moe_lite_mtp.py`, `deepseek_mtp.py`) agree on all of it but one thing: at position 0 of a sequence vLLM
sets the embedding to zero, and Megatron does not. Here it is zero, as where the head is used.

The head learns from its own loss, and nothing else does: decoder, embedding and LM head are constants to it
(`ZedaGPTModel.draft`). Their aim is the teacher's distribution, whether drafts are easy or not.

Shapes: S sequence, B batch, H hidden.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    get_mtp_layer_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..moe.stats import routers
from ..runtime.megatron_api import moe_submodules, name_layer_of_head, one_head
from .local_layers import SPRMSNorm


class MTPHead(MultiTokenPredictionLayer):
    """Megatron's layer with another forward pass: it knows of padding, which its router must not count."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name_layer_of_head(self)

    def forward(
        self,
        hidden_SBH: torch.Tensor,
        embedded_SBH: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        **layer_inputs,
    ) -> torch.Tensor:
        """States g [S, B, H] that the LM head takes; under sequence parallelism all are the local part.

        Args:
            hidden_SBH: the decoder's states after the final norm.
            embedded_SBH: embeddings of each position's next token, zero at the first position of a sequence.
            padding_mask: [B, S], True = padding.
            layer_inputs: what else the decoder's layers take (rotary embedding, bounds of packed sequences).
        """
        joined_SBH = self._concat_embeddings(hidden_SBH, embedded_SBH)
        output_SBH, _ = self.transformer_layer(
            hidden_states=joined_SBH, attention_mask=None, padding_mask=padding_mask, **layer_inputs
        )
        return self._postprocess(output_SBH)


def build_mtp_head(
    config, decoder: TransformerBlockSubmodules, use_te: bool, vp_stage: int | None = None
) -> MultiTokenPredictionBlock:
    """A block of one head, whose layer is built like the decoder's last MoE layer: with the same kind of experts, zero
    experts and router.

    Args:
        config: Megatron's `TransformerConfig`.
        decoder: specs of the decoder's layers, with zero experts.
        use_te: the layers are Transformer Engine's.
    """
    layer = [spec for spec in decoder.layer_specs if moe_submodules(spec) is not None][-1]
    spec = get_mtp_layer_spec(copy.deepcopy(layer), use_te)
    spec.module = MTPHead
    if not use_te:
        parts = spec.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = SPRMSNorm
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with one_head(config):
        block = MultiTokenPredictionBlock(
            config, MultiTokenPredictionBlockSubmodules([spec]), vp_stage, pg_collection=groups
        )
    for router in routers(block):
        router.in_mtp_head = True
    return block


def first_positions(position_ids_BS: torch.Tensor, tp_group, sequence_parallel: bool) -> torch.Tensor:
    """[S, B, 1] bool, this rank's part under sequence parallelism: True where a sequence begins."""
    first_SB = (position_ids_BS == 0).t()
    if sequence_parallel and tp_group.size() > 1:
        first_SB = first_SB.chunk(tp_group.size())[tp_group.rank()]
    return first_SB[..., None]
