"""Which data file gets which Megatron parameter, and how each is made of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import UserError
from ..models.bits import HashingRead
from ..models.weight_kinds import Added, ModelDims, ScoreBias, Setting, WeightMapping
from ..moe.paired import KEEP_ALL
from .hf_files import HFReader
from .layout import Layout, Parameter
from .safetensors_shards import group_by_bytes
from .torch_dist_writer import DataFile, Filled, check_types


class ImportPlan:
    """Makes Megatron's tensors.

    Args:
        reader: the Hugging Face folder.
        bound: mapping of each parameter.
        dims: numbers of the model.
        cast: what `--dtype` asks for.
        settings: numbers that config.json holds for paired zero experts; None if they are new.
    """

    def __init__(
        self,
        reader: HFReader,
        bound: dict[str, WeightMapping],
        dims: ModelDims,
        cast: Callable[[torch.Tensor], torch.Tensor],
        settings: dict[str, torch.Tensor] | None,
    ):
        self._reader, self._bound, self._dims, self._cast = reader, bound, dims, cast
        self._settings = settings

    def data_files(self, layout: Layout, below: str, max_bytes: int) -> list[DataFile]:
        """Deal all parameters, in the model's order; the last file gets the empty objects too.

        Raises:
            UserError: tensors that Megatron joins have different types.
        """
        items = [Filled(parameter, self._dtype(parameter)) for parameter in layout.parameters]
        check_types(items)
        groups = list(group_by_bytes(items, lambda item: item.nbytes, max_bytes))
        return [
            DataFile(
                f"{below}__0_{number}.distcp",
                group,
                self._fill,
                self._read,
                layout.objects if number == len(groups) - 1 else (),
            )
            for number, group in enumerate(groups)
        ]

    def _read(self, key: str) -> torch.Tensor:
        return self._settings[key] if self._settings and key in self._settings else self._reader.read(key)

    def _is_new(self, mapping: WeightMapping) -> bool:
        return isinstance(mapping, Added) and mapping.hf not in self._reader

    def _fill(self, parameter: Parameter, read: HashingRead) -> torch.Tensor:
        mapping = self._bound[parameter.name]
        if isinstance(mapping, Setting) and self._settings is None:
            return torch.full(parameter.shape, KEEP_ALL, dtype=torch.float32)
        if self._is_new(mapping):
            return torch.zeros(parameter.shape, dtype=self._dtype(parameter))
        tensor = mapping.to_mcore(read, parameter.shape, self._dims)
        return tensor if isinstance(mapping, Setting | ScoreBias) else self._cast(tensor)

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        mapping = self._bound[parameter.name]
        if isinstance(mapping, Setting):
            return torch.float32
        if self._is_new(mapping):
            stored = self._reader.dtype(self._reader.keys()[0])
        else:
            stored = self._common_type(list(mapping.hf_shapes(parameter.shape, self._dims)))
        return stored if isinstance(mapping, ScoreBias) else self._cast(torch.empty(0, dtype=stored)).dtype

    def _common_type(self, keys: list[str]) -> torch.dtype:
        types = [self._reader.dtype(key) for key in keys]
        wide = max(types, key=lambda dtype: dtype.itemsize)
        other = keys[types.index(wide)]
        for key, dtype in zip(keys, types):
            if dtype != wide and self._cast(torch.empty(0, dtype=dtype)).dtype == dtype:
                raise UserError(
                    f"{self._reader.entry(key).file}: tensor {key} is {dtype}, but {other}, with which it is "
                    f"joined, is {wide}; pass --dtype to make them one"
                )
        return wide
