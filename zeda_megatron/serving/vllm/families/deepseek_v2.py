"""DeepSeek-V2 and V2-Lite."""

from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2MoE

from ..dynamic import LatentAttentionModel


class DeepseekV2PlusPlusForCausalLM(LatentAttentionModel, DeepseekV2ForCausalLM):
    """Stock DeepSeek-V2 whose MoE blocks skip zero experts, with transformers' numbers in its attention."""

    MOE_BLOCK = DeepseekV2MoE
