"""Mixtral."""

from vllm.model_executor.models.mixtral import MixtralForCausalLM, MixtralMoE

from ..dynamic import DynamicModel
from ..install import Names


class MixtralPlusPlusForCausalLM(DynamicModel, MixtralForCausalLM):
    """Stock Mixtral whose MoE blocks skip zero experts."""

    MOE_BLOCK, NAMES = MixtralMoE, Names(block="block_sparse_moe")
