"""Which Hugging Face tensors come out of a Megatron checkpoint, in which order, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..models.architecture import Architecture
from ..models.hf_config import SettingsWriter
from ..models.weight_kinds import ModelDims, ScoreBias, Setting, WeightMapping
from ..models.weight_map import WeightMap
from .carried import carried_plans, read_carried
from .hf_files import HFReader
from .layout import Parameter
from .megatron_model import MegatronModel
from .safetensors_shards import Planned


class ExportPlan:
    """Makes Hugging Face tensors.

    Args:
        model: the checkpoint.
        weights: map of the architecture.
        dims: numbers of the model.
        cast: what `--dtype` asks for.
        carried: where tensors that Megatron does not know come from.
    """

    def __init__(
        self,
        model: MegatronModel,
        weights: WeightMap,
        dims: ModelDims,
        cast: Callable[[torch.Tensor], torch.Tensor],
        carried: HFReader | None,
    ):
        self._model, self._dims, self._cast, self._carried = model, dims, cast, carried
        self._mappings = {p.name: weights.for_mcore_name(p.name) for p in model.layout.parameters}

    def tensors(self, arch: Architecture) -> Iterator[Planned]:
        """All tensors, in the model's order, the carried ones last.

        Raises:
            UserError: the checkpoint lacks a parameter or has it in another shape.
        """
        for parameter in self._model.layout.parameters:
            shape_only = torch.empty(
                parameter.shape, dtype=self._model.checked_dtype(parameter), device="meta"
            )
            for key, part in self._taken_apart(parameter, shape_only).items():
                yield Planned(key, part.dtype, tuple(part.shape), parameter)
        if self._carried is not None:
            yield from carried_plans(self._carried, arch, self._cast)

    def make(self, plans: Iterable[Planned]) -> Iterator[torch.Tensor]:
        """The tensors of some plans. Neighbours of one parameter (q, k and v) cost one read."""
        last: tuple[Any, dict[str, torch.Tensor]] = (None, {})
        for planned in plans:
            if not isinstance(planned.source, Parameter):
                yield from read_carried(self._carried, self._cast)([planned])
                continue
            if last[0] is not planned.source:
                last = (None, {})  # free one parameter before the next is read
                last = (planned.source, self._taken_apart(planned.source, self._model.read(planned.source)))
            yield last[1][planned.key]

    def settings(self) -> dict[str, float | list[float]]:
        """Keys of config.json that come from the checkpoint."""
        writer = SettingsWriter()
        for parameter in self._model.layout.parameters:
            mapping = self._mappings[parameter.name]
            if isinstance(mapping, Setting):
                writer.add(mapping, self._model.read(parameter))
        return writer.entries()

    def _taken_apart(self, parameter: Parameter, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        mapping: WeightMapping = self._mappings[parameter.name]
        parts = mapping.to_hf(tensor, self._dims)
        if isinstance(mapping, ScoreBias):
            return parts
        return {key: self._cast(part) for key, part in parts.items()}
