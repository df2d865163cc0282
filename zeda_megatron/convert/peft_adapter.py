"""The adapters of a checkpoint as peft opens them: `adapter_config.json` and `adapter_model.safetensors`.

The format is peft 0.21's: a projection's halves stand under its module's name; those of all experts stand together, of
both products beside the same module, the first one's under `base_layer`, because peft wraps the module twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from ..config.lora import ADAPTER
from ..durable_file import write_atomically
from ..models.architecture import dims_of, weight_map_of
from .megatron_model import MegatronModel

ADAPTER_FOLDER = "adapter"
"""Beside the weights of an export that does not merge them."""
_PREFIX = "base_model.model."
_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")
"""Modules of these names, of shared experts and dense MLPs, are asked for by their weight: peft takes a target module
of such a name for the experts' and leaves the module itself alone."""
_EXPERTS = {"fc1": ("gate_up_proj", "base_layer."), "fc2": ("down_proj", "")}
"""Each product: transformers' name of the weights of all experts, and where peft puts the adapter beside them."""


def write_adapter(folder: Path, model: MegatronModel, cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write the adapters of a checkpoint that has some into a new folder; all of them are in memory at once."""
    names, weights = model.arch.published, weight_map_of(model.arch)
    dims = dims_of(model.arch, paired=model.zero.paired)
    halves: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    modules, parameters = [], []
    for parameter in model.layout.parameters:
        adapter = None if ".local_experts." in parameter.name else model.adapter(parameter)
        if adapter is None:
            continue
        down, up = adapter
        for key, part in weights.for_mcore_name(parameter.name).to_hf(up, dims).items():
            module = names.published(key).removesuffix(".weight")
            halves[module] = down, part
            if module.endswith(_TAKEN_FOR_EXPERTS):
                parameters.append(f"{module}.weight")
            else:
                modules.append(module)
    for layer in range(model.arch.megatron["num_layers"]):
        stem = f"decoder.layers.{layer}.mlp.experts{ADAPTER}"
        experts = names.published(f"model.layers.{layer}.mlp.experts")
        for part, (name, wrapped) in _EXPERTS.items():
            stacks = [model.stored(f"{stem}{part}_{half}") for half in ("down", "up")]
            if stacks[0] is None:
                continue
            down_EDX, up_EYD = stacks
            if part == "fc1" and names.experts.interleaved:
                up_EYD = up_EYD.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            up_YDE = up_EYD.permute(1, 2, 0)
            halves[f"{experts}.{wrapped}".rstrip(".")] = down_EDX.flatten(0, 1), up_YDE.flatten(1)
            parameters.append(f"{experts}.{name}")
    tensors = {}
    for module, (down, up) in halves.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = cast(down).contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = cast(up).contiguous().clone()
    folder.mkdir()
    # As the other files of an export: `save_file` would let nobody else read it.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
    }
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
