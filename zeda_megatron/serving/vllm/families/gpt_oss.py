"""gpt-oss."""

from vllm.model_executor.models.gpt_oss import GptOssForCausalLM, MLPBlock

from ..dynamic import DynamicModel
from ..install import Names


class GptOssPlusPlusForCausalLM(DynamicModel, GptOssForCausalLM):
    """Stock gpt-oss whose MoE blocks skip zero experts."""

    MOE_BLOCK, NAMES = MLPBlock, Names(router="router")
