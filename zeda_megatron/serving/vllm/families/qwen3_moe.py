"""Qwen3-MoE."""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock

from ..dynamic import DynamicModel, every_few_sparse


class Qwen3MoePlusPlusForCausalLM(DynamicModel, Qwen3MoeForCausalLM):
    """Stock Qwen3-MoE whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen3MoeSparseMoeBlock
    sparse_layers = staticmethod(every_few_sparse)
