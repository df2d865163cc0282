"""What an import checks before it writes anything: flags, zero experts of the source, shapes, tied tensors."""

from __future__ import annotations

import torch

from ..config import ZeroExpertConfig
from ..errors import UserError
from ..models.weight_kinds import Added, ModelDims, WeightMapping
from .bits import DTYPES, same_bits
from .hf_config import zero_experts_of
from .hf_files import HFReader
from .layout import Layout

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def wanted_zero_experts(
    reader: HFReader, real: int, count: int | None, kind: str, routing: str | None, score: str | None
) -> ZeroExpertConfig:
    """Zero experts of the import: those of the folder, or those that the flags add to a static one.

    Args:
        real: N. count, kind, routing, score: flags; None means not given.

    Raises:
        UserError: flags that contradict each other or the folder.
    """
    present = zero_experts_of(reader.config)
    if not present.num_zero_experts:
        return _new_zero_experts(real, count, kind, routing or "shared", score)
    flags = {
        "--num-zero-experts": (count, present.num_zero_experts),
        "--zero-experts-type": (None if count is None else kind, present.zero_experts_type),
        "--zero-expert-routing": (routing, present.zero_expert_routing),
        "--paired-score": (score, present.paired_score if present.paired else "none"),
    }
    for flag, (given, has) in flags.items():
        if given is not None and given != has:
            raise UserError(
                f"{flag} {given}: {reader.folder} already has {present.num_zero_experts} zero experts of type "
                f"{present.zero_experts_type}, {present.zero_expert_routing} routing; leave the flag away"
            )
    return present


def _new_zero_experts(
    real: int, count: int | None, kind: str, routing: str, score: str | None
) -> ZeroExpertConfig:
    if routing == "paired":
        if count not in (None, real):
            raise UserError(
                f"--num-zero-experts {count}: paired routing has one zero expert per real one, {real}; "
                "leave the flag away"
            )
        return ZeroExpertConfig(real, kind, routing, score or ZeroExpertConfig.paired_score)
    if score is not None:
        raise UserError(f"--paired-score {score} needs --zero-expert-routing paired")
    if not count:
        return ZeroExpertConfig(zero_expert_routing=routing)
    return ZeroExpertConfig(count, kind, routing)


def check_float_types(reader: HFReader, dtype: str) -> None:
    """Weights are floating-point numbers, and of the two 16-bit kinds there is one only.

    Raises:
        UserError: naming file and tensor.
    """
    halves: dict[torch.dtype, list[str]] = {torch.bfloat16: [], torch.float16: []}
    for key in sorted(reader.keys()):
        entry = reader.entry(key)
        if entry.dtype not in _FLOATS:
            raise UserError(
                f"{entry.file}: tensor {key} has type {entry.dtype}; only float weights can be converted, so "
                "give a folder that is not quantised"
            )
        halves.get(entry.dtype, []).append(key)
    few = min(halves.values(), key=len)
    if few and DTYPES[dtype] is None:
        raise UserError(
            f"{reader.entry(few[0]).file}: tensor {few[0]} has type {reader.dtype(few[0])}, which the other half "
            "precision weights have not; pass --dtype to make them one"
        )


def check_source(
    reader: HFReader, layout: Layout, bound: dict[str, WeightMapping], dims: ModelDims, tied: dict[str, str]
) -> None:
    """Check every shape, and that a repeated (tied) tensor really repeats, before anything is written."""
    used = set()
    for parameter in layout.parameters:
        for key, allowed in bound[parameter.name].hf_shapes(parameter.shape, dims).items():
            used.add(key)
            if key in reader:
                reader.check_shape(key, allowed)
    for key, original in tied.items():
        if key in reader and key not in used and not same_bits(reader.read(key), reader.read(original)):
            raise UserError(f"{reader.folder}: config ties {key} to {original}, but the two tensors differ")


def check_added(reader: HFReader, bound: dict[str, WeightMapping], present: ZeroExpertConfig) -> None:
    """Parameters of zero experts are all there, or, in a static folder, all absent."""
    for mapping in bound.values():
        if isinstance(mapping, Added) and (mapping.hf in reader) != bool(present.num_zero_experts):
            if present.num_zero_experts:
                raise UserError(f"{reader.folder}: tensor {mapping.hf} is missing")
            raise UserError(
                f"{reader.folder}: tensor {mapping.hf} belongs to zero experts, but config.json has no zce_nums"
            )
