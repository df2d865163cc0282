"""The weights of a model that runs, under their Hugging Face names, whatever its parallel layout: a tensor at a time.

Megatron's own sharded state dict says which part of which parameter a rank holds. All ranks walk the same list; each
part is sent by one rank that has it, so nobody ever holds more of what is not his than one parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import save_file

from ..config.lora import ADAPTER
from ..errors import UserError
from ..runtime.agreement import gathered, rank, world_size
from ..runtime.process_groups import device
from .adapters import adapters_of, merged_parts, names_of_adapter
from .architecture import Architecture, dims_of, weight_map_of
from .weight_kinds import Added, Router, Setting
from .weight_map import MTP

SHARD_BYTES = 256 << 20
"""So much of the weights is held at a time while they are written."""
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.weight)\d+$")


@dataclass(frozen=True)
class _Box:
    """Where a part lies in its parameter."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[tuple(slice(begin, begin + size) for begin, size in zip(self.offset, self.shape))]


@dataclass
class _Parameter:
    """One parameter of the whole model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool
    """Its rows are a vocabulary, padded to what tensor parallelism divides."""
    owner: dict[_Box, int] = field(default_factory=dict)
    """Rank that sends each part."""


class LiveWeights:
    """Gives the weights out as often as they are asked for.

    Args:
        chunks: bare model chunks of this rank; all ranks of the world make one together.
        arch: of the model.

    Raises:
        UserError: a family whose experts engines want merged.
    """

    def __init__(self, chunks: list[torch.nn.Module], arch: Architecture):
        if arch.published.writes_fused:
            raise UserError(
                f"--rollout-engine: engines want the experts of {arch.name} merged into one tensor, as which they "
                "cannot be handed over while the model runs; use builtin"
            )
        # Engines that answer have no head of multi-token prediction.
        self.chunks, self.arch, self.map = chunks, arch, weight_map_of(arch.without_mtp_head())
        mine = [(name, box, parameter) for name, box, parameter, _ in self._local()]
        plan: dict[str, _Parameter] = {}
        for owner, theirs in enumerate(gathered(mine)):
            for name, box, parameter in theirs:
                plan.setdefault(name, parameter).owner.setdefault(box, owner)
        # Adapters are handed over as part of the weights beside them.
        self.halves = {name: plan.pop(name) for name in list(plan) if ADAPTER in name}
        self.scale = max(gathered(max((one.scale for one in adapters_of(chunks)), default=0.0)))
        # The two largest, embedding and head, lie far apart: who still holds one when the next comes holds no second.
        self.plan = dict(
            sorted(plan.items(), key=lambda item: ("embedding" not in item[0], _natural(item[0])))
        )
        self.dims = dims_of(arch, paired=any(".router.paired." in name for name in plan))

    @torch.no_grad()
    def tensors(self, static: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) of every weight, views where possible; all ranks walk to the end together. `static`: of the
        static model inside, without zero experts."""
        mine = self._mine()
        for name, parameter in self.plan.items():
            mapping = self.map.for_mcore_name(name)
            if isinstance(mapping, Setting) or (static and isinstance(mapping, Added)):
                continue
            adapter = None if static else self._adapter(name, mine)
            whole = self._whole(name, parameter, mine)
            parts = merged_parts(mapping, whole, adapter, self.scale, self.dims)
            for key, part in parts.items():
                cut = static and isinstance(mapping, Router)
                yield key, part[: self.dims.num_real_experts] if cut else part

    def _adapter(self, name: str, mine: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`down` and `up` beside a parameter; None: it has none."""
        down, up, expert = names_of_adapter(name)
        if down not in self.halves:
            return None
        whole = (self._whole(half, self.halves[half], mine) for half in (down, up))
        return tuple(half if expert is None else half[expert] for half in whole)

    def settings(self) -> dict[str, list[float]]:
        """Numbers that config.json has per MoE layer (`zce_threshold`), in layer order; all ranks ask together."""
        mine, found = self._mine(), {}
        for name, parameter in self.plan.items():
            mapping = self.map.for_mcore_name(name)
            if isinstance(mapping, Setting):
                found.setdefault(mapping.key, []).append(float(self._whole(name, parameter, mine)))
        return found

    def _mine(self) -> dict[tuple[str, _Box], torch.Tensor]:
        return {(name, box): tensor for name, box, _, tensor in self._local()}

    def _whole(self, name: str, parameter: _Parameter, mine: dict) -> torch.Tensor:
        if world_size() == 1 and len(parameter.owner) == 1:
            (box,) = parameter.owner
            whole = mine[name, box]
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device())
            for box, owner in parameter.owner.items():
                target = box.of(whole)
                if owner == rank():
                    target.copy_(mine[name, box])
                if world_size() > 1:
                    sent = target.contiguous()
                    # As bytes: not every backend knows every type.
                    torch.distributed.broadcast(sent.reshape(-1).view(torch.uint8), src=owner)
                    target.copy_(sent)
        return whole[: self.arch.vocab_size] if parameter.padded else whole

    def _local(self) -> Iterator[tuple[str, _Box, _Parameter, torch.Tensor]]:
        """Name in the whole model, place, and data of every part that this rank holds."""
        for chunk in self.chunks:
            for name, item in chunk.sharded_state_dict().items():
                if name.startswith(MTP):
                    continue
                parts = item.build() if isinstance(item, ShardedTensorFactory) else [item]
                for part in parts:
                    if isinstance(part, ShardedTensor):
                        yield _described(name, part)


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path | None) -> None:
    """Write them in files of `SHARD_BYTES`, or of one tensor that is larger; without a folder only walk along."""
    shard, size, number = {}, 0, 0
    for name, tensor in tensors:
        if folder is None:
            continue
        shard[name] = _on_host(tensor)
        size += tensor.nbytes
        del tensor
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that the format takes: in order, and with memory of its own."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _described(name: str, part: ShardedTensor) -> tuple[str, _Box, _Parameter, torch.Tensor]:
    stacked = part.prepend_axis_num  # experts, counted over the whole model
    layer = _LAYER.search(part.key)
    if layer:
        name = _LAYER.sub(layer[0], name, count=1)
    if stacked:
        name = _EXPERT.sub(str(part.global_offset[0]), name, count=1)
    box = _Box(tuple(part.global_offset[stacked:]), tuple(part.local_shape))
    parameter = _Parameter(tuple(part.global_shape[stacked:]), part.data.dtype, part.allow_shape_mismatch)
    return name, box, parameter, part.data.detach()


def _natural(name: str) -> list:
    """Layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
