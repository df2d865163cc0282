"""Experts of a layer in one tensor, or in tensors of their own: names, shapes, and the way from one to the other.

The layouts are `models.weight_map.FusedExperts`; the plain names are `...experts.7.gate_proj.weight`, `up_proj`,
`down_proj`, and `.bias` of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ...models.config_values import MAX_COUNT
from ...models.weight_map import FusedExperts
from ..safetensors_shards import Planned
from .number_formats import NumberFormat

FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<name>gate_up_proj|down_proj)(?P<bias>_bias)?")
"""Tensor of all experts."""
_SINGLE = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<name>gate|up|down)_proj\.(?P<kind>weight|bias)"
)


@dataclass(frozen=True)
class Part:
    """A plain tensor in a stored one: some rows of it, or of one expert's matrix."""

    source: NumberFormat
    """What is stored."""
    expert: int | None = None
    """Whose matrix; None: the tensor is no expert's, or not fused."""
    first: int = 0
    """First row, of the matrix [out, in]."""
    step: int = 1
    """1: rows without a gap; 2: every second one."""
    rows: int | None = None
    """How many; None: all."""
    turned: bool = False
    """Stored as [in, out]."""

    @property
    def _whole(self) -> tuple[int, ...]:
        """Shape of the matrix (or bias) that the rows belong to."""
        shape = self.source.shape if self.expert is None else self.source.shape[1:]
        return shape[::-1] if self.turned else shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain tensor."""
        return self._whole if self.rows is None else (self.rows, *self._whole[1:])

    def read(self) -> torch.Tensor:
        """The plain tensor, in its own memory."""
        height = self._whole[0]
        rows = slice(self.first, min(self.first + self.shape[0] * self.step, height), self.step)
        if not self.turned:
            return self.source.read(self.expert, rows)
        columns = self.source.read(self.expert, slice(0, self._whole[1], 1))
        return columns.t()[rows].clone(memory_format=torch.contiguous_format)


def parts_of(key: str, source: NumberFormat, layout: FusedExperts) -> dict[str, Part]:
    """Plain names -> parts of one fused tensor.

    Args:
        key: its name; `FUSED` must match.
        source: weights [E, out, in], or [E, in, out] if the layout turns them; biases [E, out].

    Raises:
        UserError: a shape that does not fit, naming file and tensor.
    """
    match, shape = FUSED.fullmatch(key), source.shape
    has = f"has shape {list(source.values.entry.shape)}"
    axes = 2 if match["bias"] else 3
    if len(shape) != axes or shape[0] > MAX_COUNT:
        raise source.values.wrong(
            f"{has}; merged experts have {axes} axes, the first for at most {MAX_COUNT} experts"
        )
    turned = layout.turned and not match["bias"]
    kind = "bias" if match["bias"] else "weight"
    both = shape[-1] if turned else shape[1]
    if match["name"] == "gate_up_proj" and both % 2:
        raise source.values.wrong(f"{has}; gate and up are not equally large")
    parts = {}
    for expert in range(shape[0]):
        name = f"{match['experts']}.{expert}."
        if match["name"] == "down_proj":
            parts[f"{name}down_proj.{kind}"] = Part(source, expert, turned=turned)
            continue
        half = both // 2
        for number, one in enumerate(("gate", "up")):
            first, step = (number, 2) if layout.interleaved else (number * half, 1)
            parts[f"{name}{one}_proj.{kind}"] = Part(source, expert, first, step, half, turned)
    return parts


@dataclass(frozen=True)
class Joined:
    """What a fused tensor is made of: for each expert the plans of its plain tensors (gate and up, or down)."""

    experts: tuple[tuple[Planned, ...], ...]
    layout: FusedExperts

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One expert's part of the fused tensor; `tensors` are its plain ones, [out, in] or [out]."""
        if len(tensors) == 1:
            whole = tensors[0]
        else:
            whole = torch.stack(tensors, 1).flatten(0, 1) if self.layout.interleaved else torch.cat(tensors)
        return whole.t().contiguous() if self.layout.turned and whole.dim() == 2 else whole


def fused_plans(plans: Iterable[Planned], layout: FusedExperts) -> Iterator[Planned]:
    """The same tensors with all experts of a layer in one; in the place of the layer's first expert.

    Raises:
        ValueError: an expert's tensor is missing, or has another shape or type than the first expert's.
    """
    plans = list(plans)
    groups: dict[str, dict[int, dict[str, Planned]]] = {}
    for plan in plans:
        match = _SINGLE.fullmatch(plan.key)
        if match:
            experts = groups.setdefault(_fused_name(match), {})
            experts.setdefault(int(match["number"]), {})[match["name"]] = plan
    for plan in plans:
        match = _SINGLE.fullmatch(plan.key)
        if match is None:
            yield plan
        elif (name := _fused_name(match)) in groups:
            yield _joined(name, groups.pop(name), layout)


def _fused_name(match: re.Match) -> str:
    name = "down_proj" if match["name"] == "down" else "gate_up_proj"
    return f"{match['experts']}.{name}{'_bias' if match['kind'] == 'bias' else ''}"


def _joined(key: str, experts: dict[int, dict[str, Planned]], layout: FusedExperts) -> Planned:
    names = ("down",) if "down_proj" in key else ("gate", "up")
    rows = [tuple(experts.get(number, {}).get(name) for name in names) for number in range(len(experts))]
    first = rows[0][0]
    if any(p is None or (p.dtype, p.shape) != (first.dtype, first.shape) for row in rows for p in row):
        raise ValueError(f"tensor {key}: experts are missing, or differ in shape or type")
    shape = (first.shape[0] * len(names), *first.shape[1:])
    turned = layout.turned and len(shape) == 2
    shape = (len(rows), *(shape[::-1] if turned else shape))
    return Planned(key, first.dtype, shape, Joined(tuple(rows), layout), parts=len(rows))
