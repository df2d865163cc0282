"""Load a dynamic model from its folder, ours or the authors' published ones."""

from __future__ import annotations

import os
from importlib import import_module

from ..models.architecture import REGISTRY, read_architecture


def load_zero_expert_model(folder: str | os.PathLike, **kwargs):
    """Load a folder with zero experts as a transformers model; needs no `trust_remote_code`.

    transformers does not know the authors' `model_type` (`qwen3_moe_plus_plus`) and would not merge the per-expert
    weights; it is read as the native one. `kwargs` go to `from_pretrained`.

    Raises:
        UserError: an unknown architecture.
        ValueError: the config asks for no zero experts, or for a kind that is not supported.
    """
    arch = read_architecture(folder)
    model = REGISTRY[arch.name]
    module = import_module(f".{model.MODELING_FILE.removesuffix('.py')}", __package__)
    dynamic = getattr(module, model.ARCHITECTURES[1])
    config = dynamic.config_class.from_dict(arch.hf | {"model_type": model.MODEL_TYPES[0]})
    return dynamic.from_pretrained(folder, config=config, **kwargs)
