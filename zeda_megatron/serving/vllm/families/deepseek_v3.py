"""DeepSeek-V3, R1, V3.1, Kimi-K2 (text), Moonlight."""

from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE, DeepseekV3ForCausalLM

from ..dynamic import LatentAttentionModel


class DeepseekV3PlusPlusForCausalLM(LatentAttentionModel, DeepseekV3ForCausalLM):
    """Stock DeepSeek-V3 whose MoE blocks skip zero experts, with transformers' numbers in its attention."""

    MOE_BLOCK = DeepseekV2MoE
