"""Where each parameter of a Megatron model lies in its torch_dist checkpoint; no weights are built."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..config.parallel import ParallelConfig
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from ..runtime import cpu
from ..runtime.process_groups import initialize


@dataclass(frozen=True)
class Box:
    """A box of one global tensor of the checkpoint. Stacked axes (experts) are axes of length 1 here."""

    key: str
    """Name of the global tensor."""
    global_shape: tuple[int, ...]
    """Its shape, with stacked axes in front."""
    offset: tuple[int, ...]
    """First corner of the box."""
    shape: tuple[int, ...]
    """Side lengths of the box; as many axes as `global_shape`."""
    may_be_padded: bool = False
    """The stored tensor may have more rows (vocabulary padded to a multiple of the tensor-parallel size)."""


@dataclass(frozen=True)
class Parameter:
    """One parameter or persistent buffer of the whole model."""

    name: str
    """Name in the module, e.g. `decoder.layers.0.mlp.router.weight`."""
    shape: tuple[int, ...]
    """Unsharded shape."""
    boxes: tuple[Box, ...]
    """Parts in the checkpoint: one, or the gate and the up half (rows in this order)."""


@dataclass(frozen=True)
class Layout:
    """A whole checkpoint of model weights."""

    parameters: tuple[Parameter, ...]
    """All parameters, in the model's order."""
    objects: tuple[str, ...]
    """Keys of Megatron's empty `_extra_state` objects."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> unsharded shape."""
        return {parameter.name: parameter.shape for parameter in self.parameters}


def model_layout(arch: Architecture, zero: ZeroExpertConfig) -> Layout:
    """Ask Megatron itself: build the model on the meta device and read its sharded state dict.

    Needs a world of one process (started here if there is none): with it, local shapes are global ones. The
    checkpoint's keys do not depend on the parallel layout, so this describes files of any layout.
    """
    cpu.install()
    if not torch.distributed.is_initialized():
        # A private group: variables of torchrun or Slurm around this process do not concern a conversion.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    initialize(ParallelConfig())
    if torch.distributed.get_world_size() != 1:
        raise RuntimeError("checkpoint conversion runs in a single process, not under torchrun")
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from ..checkpoint.saving import first_line
    from ..models.build import build_gpt_model, transformer_config

    try:
        config = transformer_config(
            arch,
            overrides={
                "use_cpu_initialization": True,
                "perform_initialization": False,
                "moe_grouped_gemm": False,
            },
        )
        with torch.device("meta"):
            model = build_gpt_model(arch, config, zero, use_te=False)
    except (AssertionError, ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"config.json: Megatron refuses these settings: {first_line(error)}") from error
    parameters, objects = [], []
    for name, item in model.sharded_state_dict().items():
        if isinstance(item, ShardedObject):
            objects.append(item.unique_key)
        else:
            parts = item.build() if isinstance(item, ShardedTensorFactory) else [item]
            shape = tuple(item.data.shape)
            parameters.append(Parameter(name, shape, tuple(_box(part) for part in parts)))
    return Layout(tuple(parameters), tuple(objects))


def _box(part) -> Box:
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return Box(
        part.key, tuple(part.global_shape), tuple(part.global_offset), shape, part.allow_shape_mismatch
    )


def stacked(box: Box, num_layers: int) -> Box:
    """The same box where all decoder layers share one tensor, as stock Megatron stores uniform models."""
    match = re.match(r"decoder\.layers\.(\d+)\.", box.key)
    if match is None:
        return box
    return Box(
        "decoder.layers." + box.key[match.end() :],
        (num_layers, *box.global_shape),
        (int(match[1]), *box.offset),
        (1, *box.shape),
        box.may_be_padded,
    )
