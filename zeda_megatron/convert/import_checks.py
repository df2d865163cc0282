"""What an import checks before it writes anything: flags, zero experts of the source, shapes, tied tensors."""

from __future__ import annotations

import re
from itertools import filterfalse

import torch

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import published_names
from ..models.hf_config import DTYPES, zero_experts_of
from ..models.weight_kinds import Added, ModelDims, Repeated, WeightMapping
from .bits import same_bits
from .hf_files import HFReader
from .layout import Layout

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PACKED = re.compile(
    r"[._](scale|scales|scale_inv|scale_2|packed|blocks|shape|zero_point|qweight|qzeros|g_idx|SCB|absmax|quant_map)$"
    r"|\.quant_state\."
)
"""Names that come with quantised weights: of fp8, AWQ and GPTQ, compressed-tensors, bitsandbytes, MXFP4."""


def check_not_quantised(reader: HFReader) -> None:
    """Refuse weights that do not come out as plain numbers, and a config that says so of plain ones: transformers would
    not open that either.

    Comes before names are compared: quantised weights have other names.

    Raises:
        UserError: naming the method and what was found.
    """
    told = reader.config.get("quantization_config")
    method = told.get("quant_method") if isinstance(told, dict) else told
    says = f"quantization_config {str(method)[:40]!r}" if told is not None else "no quantization_config"
    names = published_names(reader.config)
    for key in filterfalse(names.is_aside, reader.keys()):
        entry = reader.entry(key)
        if entry.dtype not in _FLOATS or _PACKED.search(key):
            raise UserError(
                f"{entry.file}: the weights are quantised (config.json has {says}): tensor {key} has type "
                f"{entry.dtype}; {reader.reads}"
            )
    if told is not None and not reader.dequantised:
        raise UserError(
            f"{reader.folder / 'config.json'}: {says} says that the weights are quantised, but all of them are plain "
            "numbers; if they were dequantised, remove the key, without which transformers opens the folder, too"
        )


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
                f"{present.zero_experts_type}, {present.zero_expert_routing} routing; leave the flag out"
            )
    return present


def _new_zero_experts(
    real: int, count: int | None, kind: str, routing: str, score: str | None
) -> ZeroExpertConfig:
    if kind in ("constant", "low_rank"):
        raise UserError(
            f"--zero-experts-type {kind}: what answers for skipped experts is fitted; convert the static model, then "
            "zeda fit --stand-in-rank makes it"
        )
    if routing == "paired":
        if count not in (None, real):
            raise UserError(
                f"--num-zero-experts {count}: paired routing has one zero expert per real one, {real}; "
                "leave the flag out"
            )
        return ZeroExpertConfig(real, kind, routing, score or ZeroExpertConfig.paired_score)
    if score is not None:
        raise UserError(f"--paired-score {score} needs --zero-expert-routing paired")
    if not count:
        return ZeroExpertConfig(zero_expert_routing=routing)
    return ZeroExpertConfig(count, kind, routing)


def check_float_types(reader: HFReader, dtype: str) -> None:
    """Of the two 16-bit kinds of numbers there is one only.

    Raises:
        UserError: naming file and tensor.
    """
    halves: dict[torch.dtype, list[str]] = {torch.bfloat16: [], torch.float16: []}
    for key in sorted(reader.keys()):
        halves.get(reader.dtype(key), []).append(key)
    few = min(halves.values(), key=len)
    if few and DTYPES[dtype] is None:
        raise UserError(
            f"{reader.entry(few[0]).file}: tensor {few[0]} has type {reader.dtype(few[0])}, unlike the other "
            "half-precision weights; pass --dtype to make them one"
        )


def check_source(
    reader: HFReader, layout: Layout, bound: dict[str, WeightMapping], dims: ModelDims, tied: dict[str, str]
) -> None:
    """Check every shape, and that a repeated (tied) tensor really repeats, before anything is written."""
    used = set()
    for parameter in layout.parameters:
        mapping = bound[parameter.name]
        for key, allowed in mapping.hf_shapes(parameter.shape, dims).items():
            used.add(key)
            if key in reader:
                reader.check_shape(key, allowed)
        for key in mapping.repeats() if isinstance(mapping, Repeated) else ():
            if key in reader and not same_bits(reader.read(key), reader.read(mapping.hf)):
                raise UserError(
                    f"{reader.folder}: {key} and {mapping.hf} differ, but Megatron's head of multi-token prediction "
                    "shares the model's; convert without --mtp"
                )
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
