"""Qwen2-MoE."""

from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM, Qwen2MoeSparseMoeBlock

from ..dynamic import DynamicModel, every_few_sparse


class Qwen2MoePlusPlusForCausalLM(DynamicModel, Qwen2MoeForCausalLM):
    """Stock Qwen2-MoE whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen2MoeSparseMoeBlock
    sparse_layers = staticmethod(every_few_sparse)
