"""A folder as it is published, read as the plain folder that the rest of the project knows.

Quantised weights come out as plain numbers (`number_formats`), tensors of all experts as tensors of each
(`fused_experts`), names without the prefix that the family's folders have (`models.weight_map`). One tensor is
read at a time, and of a fused one no more than the expert's part.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from ...errors import UserError
from ...models.architecture import published_names
from ...models.config_values import text_settings
from ...models.hf_config import DTYPES
from ...models.weight_map import TURNS, FusedExperts
from ...strict_json import is_int
from ..hf_files import HFReader, TensorEntry, read_part
from .fused_experts import FUSED, Part, parts_of
from .number_formats import FP8, Fp8Blocks, Mxfp4Blocks, NumberFormat, Plain, Stored

_SCALE = "_scale_inv"
"""`...weight` and `...weight_scale_inv`, `...gate_up_proj` and `...gate_up_proj_scale_inv`."""
_PACKED = re.compile(r"(?P<weight>.*\.experts\.(gate_up|down)_proj)_(?P<part>blocks|scales)")
_MXFP4_ROWS = FusedExperts(turned=False, interleaved=TURNS.interleaved)
"""Packed matrices of gpt-oss are [out, in]; gate and up take turns as in its plain ones."""


class PublishedReader(HFReader):
    """An `HFReader` of plain tensors, whatever of the above the folder has. A plain folder is read as it is.

    `entry(key)` tells file, type and shape as if the tensor were stored alone; its bytes may lie elsewhere.

    Raises:
        UserError: as `HFReader`; a quantised weight or a scale without the other, a type or shape that does not fit,
            two tensors of one plain name. Weights in other formats come out as they are: `check_not_quantised` refuses
            them.
    """

    reads = (
        "read are plain floats, fp8 with weight_block_size and weight_scale_inv, and MXFP4 of merged experts; give "
        "a folder in one of these formats"
    )

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        self._names = published_names(self.config)
        told = self.config.get("quantization_config")
        self._told: dict[str, Any] = told if isinstance(told, dict) else {}
        self._parts: dict[str, Part] = {}
        self._stored = {key: Stored(key, entry) for key, entry in self._entries.items()}
        self._entries = {}
        for key, source in self._weights().items():
            plain = self._names.plain(key)
            if FUSED.fullmatch(plain) and not self._names.is_aside(key):
                packed = isinstance(source, Mxfp4Blocks)
                parts = parts_of(plain, source, _MXFP4_ROWS if packed else self._names.experts)
            else:
                parts = {plain: Part(source)}
            for name, part in parts.items():
                self._add(name, part)

    def _weights(self) -> dict[str, NumberFormat]:
        """What is stored, by the name that the weight has; scales are no weights."""
        method = self._told.get("quant_method")
        dequantise = {"fp8": self._fp8, "mxfp4": self._mxfp4}.get(method if isinstance(method, str) else "")
        found = dequantise() if dequantise else {}
        self.dequantised = bool(found)
        used = {part.key for parts, _ in found.values() for part in parts}
        plain = {key: Plain(stored) for key, stored in self._stored.items() if key not in used}
        for key, (parts, source) in found.items():
            if key in plain:
                raise parts[0].wrong(f"is there twice: {key} is the same weight")
            plain[key] = source
        return plain

    def _fp8(self) -> dict[str, tuple[tuple[Stored, Stored], NumberFormat]]:
        size = self._told.get("weight_block_size", [128, 128])
        is_block = isinstance(size, list) and len(size) == 2 and all(is_int(n) and n > 0 for n in size)
        pairs = {}
        for key, stored in self._stored.items():
            if key.endswith(_SCALE):
                weight = self._stored.get(key.removesuffix(_SCALE))
                if weight is None or weight.entry.dtype != FP8:
                    raise stored.wrong(
                        f"is the scale of {key.removesuffix(_SCALE)}, which is no fp8 weight of this folder"
                    )
            elif stored.entry.dtype == FP8:
                scales = self._stored.get(key + _SCALE)
                if scales is None:
                    raise stored.wrong(f"is fp8, but its scales, {key}{_SCALE}, are missing")
                pairs[key] = (stored, scales)
        if pairs and not is_block:
            raise UserError(
                f"{self.folder / 'config.json'}: weight_block_size {str(size)[:60]} of quantization_config must be two "
                "whole numbers from 1; fp8 weights are read in blocks only"
            )
        dtype = self._dtype()
        return {key: (pair, Fp8Blocks(*pair, tuple(size), dtype)) for key, pair in pairs.items()}

    def _mxfp4(self) -> dict[str, tuple[tuple[Stored, Stored], NumberFormat]]:
        pairs, dtype = {}, self._dtype()
        for key, stored in self._stored.items():
            match = _PACKED.fullmatch(key)
            if match:
                both = [self._stored.get(f"{match['weight']}_{part}") for part in ("blocks", "scales")]
                if None in both:
                    other = "scales" if match["part"] == "blocks" else "blocks"
                    raise stored.wrong(f"is there, but {match['weight']}_{other} is missing")
                pairs[match["weight"]] = tuple(both)
        return {key: (pair, Mxfp4Blocks(*pair, dtype)) for key, pair in pairs.items()}

    def _dtype(self) -> torch.dtype:
        """What quantised weights become: the type of the model's parameters, as transformers makes them."""
        settings = [self.config, text_settings(self.config)]
        told = next((one[key] for one in settings for key in ("dtype", "torch_dtype") if one.get(key)), None)
        found = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype is not None}
        return found.get(told if isinstance(told, str) else "", torch.bfloat16)

    def _add(self, name: str, part: Part) -> None:
        if name in self._parts:
            other = self._parts[name].source.values
            raise part.source.values.wrong(f"and tensor {other.key} are both {name}; remove one of the two")
        file, start = part.source.values.entry.file, part.source.values.entry.start
        nbytes = torch.Size(part.shape).numel() * part.source.dtype.itemsize
        self._parts[name] = part
        self._entries[name] = TensorEntry(file, part.source.dtype, part.shape, start, nbytes)

    def read(self, key: str) -> torch.Tensor:
        """Load one plain tensor into its own memory."""
        entry, part = self.entry(key), self._parts[key]
        if isinstance(part.source, Plain) and part.expert is None:
            return read_part(entry, key, 0, entry.shape)
        return part.read()
