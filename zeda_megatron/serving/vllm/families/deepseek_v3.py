"""DeepSeek-V3, R1, V3.1, Kimi-K2 (text), Moonlight."""

from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE, DeepseekV3ForCausalLM

from ..dynamic import FirstLayersDense, correct_latent_attention


class DeepseekV3PlusPlusForCausalLM(FirstLayersDense, DeepseekV3ForCausalLM):
    """Stock DeepSeek-V3 whose MoE blocks skip zero experts, with transformers' numbers in its attention."""

    MOE_BLOCK = DeepseekV2MoE

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        correct_latent_attention(self.model.layers)
