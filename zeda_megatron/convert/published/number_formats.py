"""Weights as folders store them, read as plain numbers: plain ones, fp8 with a scale per block, MXFP4.

Each format reads rows of one matrix, or of one expert's matrix in a tensor of all experts, and no other bytes. The
results have the bits that transformers gets (`Fp8Dequantize`, `convert_moe_packed_tensors`): products in float32,
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ...errors import UserError
from ..hf_files import TensorEntry, read_part

FP8 = torch.float8_e4m3fn
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
"""Types of fp8's scales."""
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FP4 += [-value for value in _FP4]
"""The sixteen numbers of E2M1; the sign is the highest bit (OCP Microscaling Formats 1.0, table 5)."""
_GROUP = 32
"""Neighbours with one scale in MXFP4; two to a byte."""
_ROWS = 1024
"""Rows that MXFP4 unpacks at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a folder."""

    key: str
    """Its name in the folder."""
    entry: TensorEntry
    """Where it lies."""

    def wrong(self, what: str) -> UserError:
        """An error that names file and tensor."""
        return UserError(f"{self.entry.file}: tensor {self.key} {what}")

    def rows(self, expert: int | None, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of the tensor, or of the matrix of one expert."""
        _, height, *rest = (1, *self.entry.shape) if expert is None else self.entry.shape
        width = torch.Size(rest).numel()
        begin = ((expert or 0) * height + first) * width
        return read_part(self.entry, self.key, begin, (stop - first, *rest))


class NumberFormat(Protocol):
    """A weight of plain numbers, however it is stored."""

    values: Stored
    """What holds the numbers; names the weight in messages."""
    dtype: torch.dtype
    """Of the plain numbers."""
    shape: tuple[int, ...]
    """Of the plain numbers: [out, in], or experts in front of it."""

    def read(self, expert: int | None, rows: slice) -> torch.Tensor:
        """Some rows (first, stop and step are given) of the whole, or of one expert's part; in their own memory.

        Raises:
            UserError: a scale that makes no sense, a file that ends before.
        """


class Plain:
    """Numbers that are stored as they are."""

    def __init__(self, values: Stored):
        self.values, self.dtype, self.shape = values, values.entry.dtype, values.entry.shape

    def read(self, expert: int | None, rows: slice) -> torch.Tensor:
        return self.values.rows(expert, rows.start, rows.stop)[:: rows.step].contiguous()


class Fp8Blocks:
    """E4M3 numbers [..., R, C] and a factor for each block: [..., ceil(R / rows), ceil(C / columns)].

    The last blocks of a row or column may be smaller. transformers derives the block from the two shapes instead, so it
    refuses most such weights and takes blocks of another size where the shapes happen to divide; DeepSeek's own
    conversion and vLLM go by `weight_block_size`, as here. Where blocks fill the matrix all agree.

    Args:
        values, scales: the two tensors.
        block: (rows, columns) of a block.
        dtype: of the result.

    Raises:
        UserError: a type or shape that does not fit; naming file and tensor.
    """

    def __init__(self, values: Stored, scales: Stored, block: tuple[int, int], dtype: torch.dtype):
        self.values, self.dtype, self.shape = values, dtype, values.entry.shape
        self._scales, self._block = scales, block
        if len(self.shape) not in (2, 3):
            raise values.wrong(
                f"has shape {list(self.shape)}; fp8 blocks need a matrix, or one for each expert"
            )
        if scales.entry.dtype not in _SCALES:
            raise scales.wrong(
                f"has type {scales.entry.dtype}; scales of fp8 blocks are float32, or 16-bit floats"
            )
        *experts, height, width = self.shape
        wanted = (*experts, -(-height // block[0]), -(-width // block[1]))
        if scales.entry.shape != wanted:
            raise scales.wrong(
                f"has shape {list(scales.entry.shape)}, but {list(wanted)} fits weights of {list(self.shape)} in "
                f"blocks of {list(block)} (weight_block_size)"
            )

    def read(self, expert: int | None, rows: slice) -> torch.Tensor:
        first, stop, (height, width) = rows.start, rows.stop, self._block
        values, start = self.values.rows(expert, first, stop), first // height
        scales = self._scales.rows(expert, start, -(-stop // height)).float()
        if not (scales.isfinite().all() and (scales >= 0).all()):
            raise self._scales.wrong("has scales that are no finite positive numbers; download it again")
        plain = torch.empty(values.shape, dtype=self.dtype)
        for number, scales_of_row in enumerate(
            scales, start
        ):  # a row of blocks at a time: float32 needs room
            part = slice(max(number * height, first) - first, min((number + 1) * height, stop) - first)
            plain[part] = values[part].float() * scales_of_row.repeat_interleave(width)[: values.shape[1]]
        return plain[:: rows.step].contiguous()


class Mxfp4Blocks:
    """Four-bit numbers of all experts, [E, R, C/32, 16] bytes, and an exponent for each 32 of them, [E, R, C/32].

    A byte holds two neighbours, the first one in its low half; an exponent is stored with 127 added. The plain matrices
    are [E, R, C].

    Args:
        values, scales: the two tensors.
        dtype: of the result.

    Raises:
        UserError: a type or shape that does not fit; naming file and tensor.
    """

    def __init__(self, values: Stored, scales: Stored, dtype: torch.dtype):
        self.values, self.dtype, self._scales = values, dtype, scales
        for part in (values, scales):
            if part.entry.dtype != torch.uint8:
                raise part.wrong(f"has type {part.entry.dtype}; MXFP4 is stored in bytes (U8)")
        shape = values.entry.shape
        if len(shape) != 4 or shape[-1] != _GROUP // 2:
            raise values.wrong(f"has shape {list(shape)}, expected [experts, rows, groups, {_GROUP // 2}]")
        if scales.entry.shape != shape[:-1]:
            raise scales.wrong(f"has shape {list(scales.entry.shape)}, expected {list(shape[:-1])}")
        self.shape = (*shape[:2], shape[2] * _GROUP)

    def read(self, expert: int | None, rows: slice) -> torch.Tensor:
        plain = torch.empty((len(range(rows.start, rows.stop, rows.step)), self.shape[2]), dtype=self.dtype)
        table = torch.tensor(_FP4)
        for number, begin in enumerate(range(rows.start, rows.stop, _ROWS * rows.step)):
            end = min(begin + _ROWS * rows.step, rows.stop)
            stored = (part.rows(expert, begin, end) for part in (self.values, self._scales))
            bytes_, scales = (part[:: rows.step] for part in stored)
            if (scales == 255).any():
                raise self._scales.wrong("has scales that are NaN (255); download it again")
            values = table[torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).int()].flatten(-2)
            torch.ldexp(values, scales[..., None].int() - 127, out=values)
            plain[number * _ROWS : (number + 1) * _ROWS] = values.flatten(1)
        return plain
