"""Mixtral."""

from vllm.model_executor.models.mixtral import MixtralForCausalLM, MixtralMoE

from ..dynamic import DynamicModel


class MixtralPlusPlusForCausalLM(DynamicModel, MixtralForCausalLM):
    """Stock Mixtral whose MoE blocks skip zero experts."""

    MOE_BLOCK, MOE_NAME = MixtralMoE, "block_sparse_moe"
