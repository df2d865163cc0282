"""OLMoE."""

from vllm.model_executor.models.olmoe import OlmoeForCausalLM, OlmoeMoE

from ..dynamic import DynamicModel


class OlmoePlusPlusForCausalLM(DynamicModel, OlmoeForCausalLM):
    """Stock OLMoE whose MoE blocks skip zero experts."""

    MOE_BLOCK = OlmoeMoE
