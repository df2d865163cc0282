"""Qwen3.5 and Qwen3.6."""

from vllm.model_executor.models.qwen3_5 import Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
from vllm.model_executor.models.qwen3_next import Qwen3NextSparseMoeBlock

from ..dynamic import DynamicModel


class Qwen3_5MoePlusPlusForCausalLM(DynamicModel, Qwen3_5MoeForCausalLM):
    """Stock Qwen3.5 without vision, whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen3NextSparseMoeBlock


class Qwen3_5MoePlusPlusForConditionalGeneration(DynamicModel, Qwen3_5MoeForConditionalGeneration):
    """Stock Qwen3.5 whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen3NextSparseMoeBlock
