"""MiniMax-M2."""

from vllm.model_executor.models.minimax_m2 import MiniMaxM2ForCausalLM, MiniMaxM2MoE

from ..dynamic import DynamicModel
from ..install import Names


class MiniMaxM2PlusPlusForCausalLM(DynamicModel, MiniMaxM2ForCausalLM):
    """Stock MiniMax-M2 whose MoE blocks skip zero experts."""

    MOE_BLOCK, NAMES = MiniMaxM2MoE, Names(block="block_sparse_moe", block_has_score_bias=True)
