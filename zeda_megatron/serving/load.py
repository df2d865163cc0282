"""Load a dynamic model from its folder, ours or the authors' published ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .modeling_qwen3_moe_zero import Qwen3MoePlusPlusForCausalLM


def load_qwen3_moe_zero(folder: str | os.PathLike, **kwargs) -> Qwen3MoePlusPlusForCausalLM:
    """Load a Qwen3-MoE folder with zero experts; needs no `trust_remote_code`.

    transformers does not know the authors' `model_type` (`qwen3_moe_plus_plus`) and would not merge the
    per-expert weights; it is read as `qwen3_moe`. `kwargs` go to `from_pretrained`.

    Raises:
        ValueError: the config asks for no zero experts, or for a kind that is not supported.
    """
    from transformers import Qwen3MoeConfig

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = Qwen3MoeConfig.model_type
    return Qwen3MoePlusPlusForCausalLM.from_pretrained(
        folder, config=Qwen3MoeConfig.from_dict(config), **kwargs
    )
