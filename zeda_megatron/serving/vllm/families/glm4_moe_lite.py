"""GLM-4.7-Flash."""

from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_moe_lite import Glm4MoeLite, Glm4MoeLiteForCausalLM

from ..dynamic import LatentAttentionModel


class Glm4MoeLitePlusPlusForCausalLM(LatentAttentionModel, Glm4MoeLiteForCausalLM):
    """Stock GLM-4.7-Flash whose MoE blocks skip zero experts, with transformers' numbers in its attention."""

    MOE_BLOCK = Glm4MoeLite

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _name_dense_layers(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def _name_dense_layers(config) -> None:
    """vLLM reads `first_k_dense_replace`, as published; transformers saves `mlp_layer_types` in its place."""
    if getattr(config, "first_k_dense_replace", None) is not None:
        return
    kinds = list(getattr(config, "mlp_layer_types", None) or [])
    dense = kinds.count("dense")
    if not kinds or kinds[:dense] != ["dense"] * dense:
        raise ValueError(
            f"config.json: mlp_layer_types {kinds}: dense layers must come first (or give first_k_dense_replace)"
        )
    config.first_k_dense_replace = dense
