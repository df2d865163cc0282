"""Quantise an exported dynamic model: weights only, router and zero rows as they are.

zeda quantize --hf DIR --out DIR [--number-format int8|fp8] [--packed]

Rounded by default, by NVIDIA ModelOpt: the folder has the layout, type and size that it had, and its numbers are those
that the format can hold; every engine serves it. `--packed` writes 8-bit numbers (`pack`), half the size of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config.arguments import check_choices, parse, require
from ..config.run import Watched
from ..convert.hf_files import HFReader
from ..convert.import_checks import check_not_quantised
from ..errors import UserError
from ..models.architecture import read_architecture
from ..models.hf_config import copy_side_files, write_config
from ..runtime.whole_folder import check_space, check_target, files_of, staged_folder
from ..strict_json import read_json
from .load import load_model, packed_by, stored_dtype
from .pack import pack

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "axis": 0},
    "fp8": {"num_bits": (4, 3), "axis": None},
}
"""ModelOpt's words. int8: a scale per output row. fp8 (E4M3): a scale per matrix, as ModelOpt's own format has it."""
ROUTER = (
    "weight",
    "zero_weight",
    "zero_bias",
    *(f"zero_hidden_{part}" for part in ("weight", "bias", "output")),
)
"""What decides on picks."""


@dataclass(frozen=True)
class QuantizeOptions(Watched):
    """What to quantise."""

    hf: str | None = None
    """Folder of an exported model, with zero experts or without."""

    out: str | None = None
    """Folder that is written."""

    number_format: Literal["int8", "fp8"] = "int8"
    """int8 or fp8; weights alone, activations keep their type."""

    packed: bool = False
    """Write 8-bit numbers with a scale per row, in compressed-tensors' format, which vLLM reads. Needs no ModelOpt."""

    quantize_router: bool = False
    """Round the routers and the heads of zero experts as well: to see what that does."""

    overwrite: bool = False
    """Replace a checkpoint at --out."""


def quantize(options: QuantizeOptions) -> dict[str, int]:
    """Write the quantised folder; nothing has its name before it is complete.

    Returns:
        `weights` that were quantised (an expert's gate and up matrix are one), and the `parameters` in them.

    Raises:
        UserError: no ModelOpt, an unknown format, a folder that cannot be read or written, or a packed one.
    """
    mtq = None if options.packed else _modelopt()
    check_choices(options)
    if options.packed and options.quantize_router:
        raise UserError("--packed has no place for quantised routers: leave --quantize-router out")
    source, target = Path(options.hf), Path(options.out)
    arch = read_architecture(source)
    if packed_by(arch.hf) is not None:
        raise UserError(f"{source / 'config.json'}: the weights are quantised already (quantization_config)")
    if arch.published.writes_fused:
        raise UserError(
            f"{source / 'config.json'}: folders of this family have the experts merged into one tensor: they cannot be "
            "rounded here"
        )
    reader = HFReader(source)
    check_not_quantised(reader)
    check_target(target, options.overwrite)
    if options.packed:
        return pack(source, target, arch, options.number_format, options.overwrite, options.progress)
    check_space(target, sum(file.stat().st_size for file in source.iterdir()))
    model = load_model(source, dtype=stored_dtype(source))
    plain = type(model)
    model = mtq.quantize(model, _config(mtq, FORMATS[options.number_format]))
    done = _count(model)
    request = {
        "make": "quantised",
        "source": files_of([source / "config.json", *reader.files]),
        "number_format": options.number_format,
    }
    with staged_folder(target, request, options.overwrite) as staging:
        if staging is not None:
            _save_rounded(mtq, model, plain, staging.work, options)
            copy_side_files(source, staging.work)
            write_config(staging.work, read_json(staging.work / "config.json"))
    return done


def _modelopt():
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise UserError(
            f"NVIDIA ModelOpt cannot be imported ({error}): pip install -e '.[modelopt]'"
        ) from None
    return mtq


def _config(mtq, weights: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's weight-only recipe, whose list of exceptions has head, embedding and routers, in this format."""
    recipe = mtq.INT8_WEIGHT_ONLY_CFG
    entries = [
        {**entry, "cfg": dict(weights)} if entry.get("quantizer_name") == "*weight_quantizer" else entry
        for entry in recipe["quant_cfg"]
    ]
    return {**recipe, "quant_cfg": entries}


def _quantizers(model: nn.Module):
    """(name, quantiser) of weights; experts have one each in a list."""
    for name, module in model.named_modules():
        if "weight_quantizer" in name and getattr(module, "is_enabled", False):
            yield name, module


def _count(model: nn.Module) -> dict[str, int]:
    names = [name for name, _ in _quantizers(model)]
    sizes = dict(model.named_parameters())
    parameters = 0
    for name in names:
        owner, _, _ = name.rpartition(".weight_quantizer")
        if owner:
            parameters += sizes[f"{owner}.weight"].numel()
        else:
            owner, _, _ = name.rpartition("_weight_quantizers.")
            parameters += sizes[owner][0].numel()
    return {"weights": len(names), "parameters": parameters}


def _save_rounded(mtq, model: nn.Module, plain: type, folder: Path, options: QuantizeOptions) -> None:
    """A `plain` model with the rounded weights, saved as transformers does."""
    mtq.fold_weight(model)
    state = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    state |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    if options.quantize_router:
        _round_routers(model, state, FORMATS[options.number_format])
    config = model.config
    config.zeda_rounded_to = options.number_format
    with torch.device("meta"):
        fresh = plain._from_config(config, dtype=model.dtype)
    missing, unexpected = fresh.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(f"weights do not fit: {missing[:3]} {unexpected[:3]}")
    fresh.save_pretrained(folder)


def _round_routers(model: nn.Module, state: dict[str, torch.Tensor], number_format: dict[str, Any]) -> None:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name in list(state):
        owner, _, last = name.rpartition(".")
        if owner.endswith((".gate", ".router")) and last in ROUTER:
            rows = state[name].reshape(state[name].shape[0], -1)
            quantizer = TensorQuantizer(QuantizerAttributeConfig(**number_format))
            quantizer.enable_calib()
            quantizer.disable_quant()
            quantizer(rows)
            quantizer.load_calib_amax()
            quantizer.disable_calib()
            quantizer.enable_quant()
            state[name] = quantizer(rows).reshape(state[name].shape).detach()


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(argv, {"quantize": QuantizeOptions}, prog="zeda quantize")["quantize"]
    require(options, "hf", "out")
    done = quantize(options)
    print(
        f"wrote {options.out}: {done['weights']} weights, {done['parameters']} parameters as {options.number_format}"
    )
    print(
        f"next: vllm serve {options.out}; zeda evaluate folders --teacher ORIGINAL --models {options.hf} {options.out} "
        "--heldout FILE says what it costs"
    )
    return 0
