"""Qwen3-MoE."""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock

from ..dynamic import DynamicModel


class Qwen3MoePlusPlusForCausalLM(DynamicModel, Qwen3MoeForCausalLM):
    """Stock Qwen3-MoE whose MoE blocks skip zero experts."""

    MOE_BLOCK = Qwen3MoeSparseMoeBlock

    @staticmethod
    def sparse_layers(config) -> list[int]:
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
        return [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]
