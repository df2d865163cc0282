"""The weights of a live Megatron model under their Hugging Face names, for an engine beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...models.architecture import Architecture
from ...models.weight_kinds import Added, Router, Setting
from ...models.weight_maps import dims_of, weight_map_of


def hf_weights(
    model: torch.nn.Module, arch: Architecture, static: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of every weight, views where possible.

    Args:
        model: a bare chunk that is the whole model (no tensor, expert or pipeline parallelism).
        static: of the static model: without zero experts.
    """
    weights, state = weight_map_of(arch), model.state_dict()
    dims = dims_of(arch, paired=any(".router.paired." in name for name in state))
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            continue  # Megatron's empty extra states
        mapping = weights.for_mcore_name(name)
        if isinstance(mapping, Setting) or (static and isinstance(mapping, Added)):
            continue
        for key, part in mapping.to_hf(tensor.detach(), dims).items():
            yield key, part[: dims.num_real_experts] if static and isinstance(mapping, Router) else part


def hf_settings(model: torch.nn.Module, arch: Architecture) -> dict[str, list[float]]:
    """Numbers that config.json has per MoE layer (`zce_threshold`), in layer order."""
    weights, found = weight_map_of(arch), {}
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            mapping = weights.for_mcore_name(name)
            if isinstance(mapping, Setting):
                found.setdefault(mapping.key, []).append(float(tensor))
    return found
