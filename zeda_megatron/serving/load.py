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

    return _load(folder, Qwen3MoePlusPlusForCausalLM, Qwen3MoeConfig, kwargs)


def load_glm4_moe_lite_zero(folder: str | os.PathLike, **kwargs):
    """The same for GLM-4.7-Flash (`glm4_moe_lite_plus_plus` is read as `glm4_moe_lite`); transformers >= 5.23."""
    from transformers import Glm4MoeLiteConfig

    from .modeling_glm4_moe_lite_zero import Glm4MoeLitePlusPlusForCausalLM

    return _load(folder, Glm4MoeLitePlusPlusForCausalLM, Glm4MoeLiteConfig, kwargs)


def _load(folder, model: type, config_class: type, kwargs: dict):
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = config_class.model_type
    return model.from_pretrained(folder, config=config_class.from_dict(config), **kwargs)
