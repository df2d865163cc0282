"""GLM-4.5, 4.5-Air, 4.6 and 4.7."""

from vllm.model_executor.models.glm4_moe import Glm4MoE, Glm4MoeForCausalLM

from ..dynamic import FirstLayersDense


class Glm4MoePlusPlusForCausalLM(FirstLayersDense, Glm4MoeForCausalLM):
    """Stock GLM-4.5 whose MoE blocks skip zero experts."""

    MOE_BLOCK = Glm4MoE
