"""Low-rank adapters (LoRA) beside the projections and experts of a built model: installed, switched off, folded in.

A projection's adapter works on activations: `down` first, on what the rank has, then tensor-parallel ranks exchange
`rank` numbers a token, then `up`. The weights stay as they are, and so does every name in a checkpoint; adapters are
new names beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional as F

from ..config.lora import ADAPTER, LoRA
from ..errors import UserError
from ..moe.experts import GroupedExperts
from ..ops.grouped_mlp import LowRank
from .weight_kinds import ModelDims, WeightMapping, seeded_generator

_EXPERT_WEIGHT = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.local_experts\.(?P<number>\d+)\.linear_(?P<part>fc[12])\.weight"
)
_ROWS, _COLUMNS, _WHOLE = 0, 1, None
_CUT = {
    **dict.fromkeys(("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"), _ROWS),
    **dict.fromkeys(("in_proj", "linear_fc1"), _ROWS),
    **dict.fromkeys(("linear_proj", "out_proj", "linear_fc2"), _COLUMNS),
    **dict.fromkeys(("linear_q_down_proj", "linear_kv_down_proj"), _WHOLE),
}
"""What of a projection's weight tensor-parallel ranks share out, by its name."""
_ACROSS = {
    (_ROWS, True): gather_from_sequence_parallel_region,
    (_ROWS, False): copy_to_tensor_model_parallel_region,
    (_COLUMNS, True): reduce_scatter_to_sequence_parallel_region,
    (_COLUMNS, False): reduce_from_tensor_model_parallel_region,
}
"""What happens between `down` and `up`, by that and by whether sequences are split over these ranks."""


class ProjectionAdapter(torch.nn.Module):
    """scale * up (down x) beside a projection.

    Attributes:
        down: [D, in], of a projection that is cut by columns this rank's columns. up: [out, D], of one that is cut by
            rows this rank's rows.
        on: it answers.
        sequence_parallel: as in the projection's config; switched together with it.
    """

    def __init__(self, projection: torch.nn.Module, name: str, lora: LoRA, config, seed: int, gated: bool):
        """`name`: of the projection in the whole model; what `down` begins with depends on it and the seed alone.
        `gated`: the upper half of `up` is a gate's."""
        super().__init__()
        self.cut, self.gated, self.scale, self.on = _CUT[name.rsplit(".", 1)[-1]], gated, lora.scale, True
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        ranks = config.tensor_model_parallel_size
        rank = self.tp_group.rank() if ranks > 1 else 0
        weight = projection.weight
        width = weight.shape[1] * (ranks if self.cut == _COLUMNS else 1)
        down = _first_down(lora.rank, width, seed, name)
        if self.cut == _COLUMNS:
            down = down.chunk(ranks, dim=1)[rank]
        self.down = torch.nn.Parameter(down.to(weight))
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], lora.rank))
        for parameter, cut in ((self.down, _COLUMNS), (self.up, _ROWS)):
            if self.cut == cut:
                set_tensor_model_parallel_attributes(parameter, True, cut, 1)
            else:  # whole on every rank, with the gradient of its part of the sequence
                parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, in] -> [S, B, out], both as the projection has them."""
        low_SBD = F.linear(hidden_SBH, self.down)
        if self.tp_group is not None and self.tp_group.size() > 1 and self.cut is not _WHOLE:
            low_SBD = _ACROSS[self.cut, self.sequence_parallel](low_SBD, group=self.tp_group)
        return self.scale * F.linear(low_SBD, self.up)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description for checkpoints."""
        cut = {_ROWS: {"up": 0}, _COLUMNS: {"down": 1}, _WHOLE: {}}[self.cut]
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            cut,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        if self.gated:
            alone = (metadata or {}).get("singleton_local_shards", False)
            state[f"{prefix}up"] = apply_swiglu_sharded_factory(state[f"{prefix}up"], sharded_offsets, alone)
        return state

    @torch.no_grad()
    def fold(self, projection: torch.nn.Module) -> None:
        """Add to the projection's weight what it makes of an input."""
        projection.weight.copy_(merged(projection.weight, self.down, self.up, self.scale))


class ExpertAdapter(torch.nn.Module):
    """The same beside both projections of every local expert.

    Attributes:
        fc1_down: [E, D, H]. fc1_up: [E, 2F, D], gate rows first. fc2_down: [E, D, F]. fc2_up: [E, H, D].
    """

    def __init__(self, experts: GroupedExperts, name: str, lora: LoRA, seed: int):
        super().__init__()
        self.scale, self.on = lora.scale, True
        self.ep_group, self.dp_group = experts.ep_group, experts.dp_group
        count = experts.num_local_experts
        first = self.ep_group.rank() * count
        for part in ("fc1", "fc2"):
            weight = getattr(experts.local_experts[0], f"linear_{part}").weight
            drawn = [
                _first_down(lora.rank, weight.shape[1], seed, f"{name}.{first + expert}.{part}")
                for expert in range(count)
            ]
            up = weight.new_zeros(count, weight.shape[0], lora.rank)
            setattr(self, f"{part}_down", torch.nn.Parameter(torch.stack(drawn).to(weight)))
            setattr(self, f"{part}_up", torch.nn.Parameter(up))
        for parameter in self.parameters():
            # As the experts themselves, see `moe.experts.mark_expert_parameters`.
            parameter.allreduce = parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True

    def factors(self) -> LowRank:
        """What the experts' products add."""
        return LowRank(self.fc1_down, self.fc1_up, self.fc2_down, self.fc2_up, self.scale)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description for checkpoints: experts along the first axis."""
        outer, ranks = len(sharded_offsets), self.ep_group.size()
        return {
            prefix + name: ShardedTensor.from_rank_offsets(
                prefix + name,
                tensor,
                *sharded_offsets,
                (outer, self.ep_group.rank(), ranks),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=outer,
            )
            for name, tensor in self.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def fold(self, experts: GroupedExperts) -> None:
        """Add to the experts' weights what it makes of an input."""
        for number, expert in enumerate(experts.local_experts):
            for part in ("fc1", "fc2"):
                weight = getattr(expert, f"linear_{part}").weight
                down, up = (getattr(self, f"{part}_{half}")[number] for half in ("down", "up"))
                weight.copy_(merged(weight, down, up, self.scale))


def names_of_adapter(weight: str) -> tuple[str, str, int | None]:
    """What `down` and `up` beside a parameter are called; and which part of them is its own, if that is an expert's."""
    expert = _EXPERT_WEIGHT.fullmatch(weight)
    if expert:
        stem = f"{expert['experts']}{ADAPTER}{expert['part']}_"
        return stem + "down", stem + "up", int(expert["number"])
    stem = weight.removesuffix(".weight") + ADAPTER
    return stem + "down", stem + "up", None


def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale * up @ down: the product in float32, the sum rounded once to the weight's type, as peft's
    `merge_and_unload` does it. [out, in], [D, in], [out, D]."""
    return (weight.float() + (up.float() @ down.float()) * scale).to(weight.dtype)


def merged_parts(
    mapping: WeightMapping,
    weight: torch.Tensor,
    adapter: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float | None,
    dims: ModelDims,
) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of a whole parameter; its adapter (`down`, `up`), if it has one, is merged into each."""
    parts = mapping.to_hf(weight, dims)
    if adapter is None:
        return parts
    down, ups = adapter[0], mapping.to_hf(adapter[1], dims)
    return {key: merged(part, down, ups[key], scale) for key, part in parts.items()}


def _first_down(rank: int, width: int, seed: int, name: str) -> torch.Tensor:
    """[rank, width] float32, drawn as a linear layer's weight; `up` begins with zeros."""
    bound = 1.0 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=seeded_generator(seed, name))


@cache
def _with_adapter(base: type) -> type:
    """A projection's class whose output has the adapter's added."""

    class Adapted(base):
        def forward(self, hidden, *args, **kwargs):
            output, bias = super().forward(hidden, *args, **kwargs)
            if self.adapter.on:
                output = output + self.adapter(_normed(self, hidden))
            return output, bias

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            stock = getattr(super(), "sharded_state_dict", None)
            if stock is None:
                own = {"weight": self.weight}
                groups = {
                    "tp_group": self.adapter.tp_group,
                    "dp_cp_group": (metadata or {}).get("dp_cp_group"),
                }
                state = make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets, **groups)
            else:
                state = stock(prefix, sharded_offsets, metadata)
            inner = f"{prefix}adapter."
            state = {key: item for key, item in state.items() if not key.startswith(inner)}
            return state | self.adapter.sharded_state_dict(inner, sharded_offsets, metadata)

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{base.__name__}"
    return Adapted


class AdaptedExperts(GroupedExperts):
    """Experts with an adapter."""

    def low_rank(self) -> LowRank | None:
        return self.adapter.factors() if self.adapter.on else None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


def _normed(projection: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a projection multiplies: Transformer Engine's may have the norm before it inside."""
    weight = getattr(projection, "layer_norm_weight", None)
    if weight is None:
        return hidden
    gain = weight.float() + 1.0 if getattr(projection, "zero_centered_gamma", False) else weight.float()
    return F.rms_norm(hidden.float(), hidden.shape[-1:], gain, projection.eps).type_as(hidden)


def install_adapters(chunks: Sequence[torch.nn.Module], lora: LoRA, seed: int = 0) -> None:
    """Give the decoder layers of bare model chunks adapters that add nothing yet.

    Values depend on the seed and the whole model alone, not on the parallel layout. Raises `UserError` for experts that
    cannot have them.
    """
    lora.validate()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in list(layer.named_modules()):
                target = _target_of(name)
                if target is None or not lora.has(target):
                    continue
                whole_name = f"decoder.layers.{layer.layer_number - 1}.{name}"
                if target == "experts":
                    if not isinstance(module, GroupedExperts) or not module.plain:
                        raise UserError(
                            "--lora-targets experts: adapters of experts want --expert-tensor-parallel-size 1 and "
                            "--expert-backend auto, grouped_mm or loop; or use --lora-targets attention+shared"
                        )
                    adapter, adapted = ExpertAdapter(module, whole_name, lora, seed), AdaptedExperts
                else:
                    gated = name.endswith("linear_fc1") and chunk.config.gated_linear_unit
                    adapter = ProjectionAdapter(module, whole_name, lora, chunk.config, seed, gated)
                    adapted = _with_adapter(type(module))
                module.adapter = adapter
                module.__class__ = adapted


def _target_of(name: str) -> str | None:
    """The target that a module of a layer belongs to; None: it has no adapter."""
    if name == "mlp.experts":
        return "experts"
    if name.startswith("mlp.experts.") or name.rsplit(".", 1)[-1] not in _CUT:
        return None
    return "attention" if name.startswith("self_attention.") else "shared"


def _adapted(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(getattr(module, "adapter", None), ProjectionAdapter | ExpertAdapter):
                yield module


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[ProjectionAdapter | ExpertAdapter]:
    """All adapters of these model chunks."""
    return [module.adapter for module in _adapted(chunks)]


@contextmanager
def switched_off(adapters: Sequence[ProjectionAdapter | ExpertAdapter]) -> Iterator[None]:
    """Their model without what they add."""
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


def fold_adapters(chunks: Sequence[torch.nn.Module]) -> None:
    """Make the adapters part of the weights, and take them away."""
    for module in list(_adapted(chunks)):
        module.adapter.fold(module)
        module.__class__ = type(module).__base__
        del module.adapter
