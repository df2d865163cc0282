"""Load a model from its folder: ours, the authors' published ones, and static ones."""

from __future__ import annotations

import os
from importlib import import_module

from ..errors import UserError
from ..models.architecture import REGISTRY, read_architecture
from .packed import packed_by, unpacked


def load_zero_expert_model(folder: str | os.PathLike, **kwargs):
    """Load a folder with zero experts as a transformers model; needs no `trust_remote_code`.

    transformers does not know the authors' `model_type` (`qwen3_moe_plus_plus`) and would not merge the per-expert
    weights; it is read as the native one. Weights that ModelOpt has packed are multiplied by their scales.
    `kwargs` go to `from_pretrained`.

    Raises:
        UserError: an unknown architecture; weights that are missing, or that the model has no place for.
        ValueError: the config asks for no zero experts, or for a kind that is not supported.
    """
    arch = read_architecture(folder)
    model = REGISTRY[arch.name]
    module = import_module(f".{model.MODELING_FILE.removesuffix('.py')}", __package__)
    dynamic = getattr(module, model.ARCHITECTURES[1])
    fields = arch.hf | {"model_type": model.MODEL_TYPES[0]}
    if packed_by(fields) != "modelopt":
        config = dynamic.config_class.from_dict(fields)
        return _whole(dynamic, folder, folder, config=config, **kwargs)
    del fields["quantization_config"]
    config = dynamic.config_class.from_dict(fields)
    dtype = kwargs.pop("dtype", None) or config.dtype
    return _whole(
        dynamic, folder, None, config=config, state_dict=unpacked(folder, dtype), dtype=dtype, **kwargs
    )


def load_model(folder: str | os.PathLike, **kwargs):
    """Load a folder with or without zero experts; otherwise as `load_zero_expert_model`."""
    from transformers import AutoModelForCausalLM

    if read_architecture(folder).num_zero_experts:
        return load_zero_expert_model(folder, **kwargs)
    return _whole(AutoModelForCausalLM, folder, folder, **kwargs)


def _whole(kind, where: str | os.PathLike, folder: str | os.PathLike | None, **kwargs):
    """`from_pretrained`, refused where transformers would draw weights that it does not find, and report it only."""
    model, found = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    for what, why in (("missing", "is missing"), ("unexpected", "has no place in this model")):
        names = sorted(found[f"{what}_keys"])
        if names:
            raise UserError(f"{where}: tensor {names[0]} {why} ({len(names)} such tensors)")
    return model
