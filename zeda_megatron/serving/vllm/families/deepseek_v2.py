"""DeepSeek-V2 and V2-Lite."""

from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2MoE

from ..dynamic import FirstLayersDense, correct_latent_attention


class DeepseekV2PlusPlusForCausalLM(FirstLayersDense, DeepseekV2ForCausalLM):
    """Stock DeepSeek-V2 whose MoE blocks skip zero experts, with transformers' numbers in its attention."""

    MOE_BLOCK = DeepseekV2MoE

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        correct_latent_attention(self.model.layers)
