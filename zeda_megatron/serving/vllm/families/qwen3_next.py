"""Qwen3-Next."""

from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM, Qwen3NextSparseMoeBlock

from ..dynamic import DynamicModel, every_few_sparse


class Qwen3NextPlusPlusForCausalLM(DynamicModel, Qwen3NextForCausalLM):
    """Stock Qwen3-Next whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen3NextSparseMoeBlock
    sparse_layers = staticmethod(every_few_sparse)
