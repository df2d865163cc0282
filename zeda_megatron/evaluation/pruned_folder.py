"""A Hugging Face folder with fewer experts, streamed tensor by tensor from the whole one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..convert.hf_files import HFReader
from ..convert.import_checks import check_not_quantised
from ..convert.parts import PartWriter
from ..convert.safetensors_shards import Planned, plan_shards, write_index
from ..errors import UserError
from ..models.hf_config import copy_side_files, write_config
from ..runtime.partial import files_of, partial_folder
from ..runtime.target import check_target

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"\.gate\.(weight|e_score_correction_bias)$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def write_pruned(hf: str | Path, kept: dict[int, list[int]], out: str | Path) -> None:
    """Write `hf` with the experts in `kept` only (by layer, in their old order), renumbered from 0.

    Layers beyond those of the model (multi-token prediction) are left out: nothing is known of their experts.

    Raises:
        UserError: the folder is damaged, `out` is in use, layers keep different numbers of experts, or the router
            picks groups first.
    """
    check_target(Path(out), False)
    reader, counts = HFReader(hf), {len(experts) for experts in kept.values()}
    check_not_quantised(reader)
    if len(counts) != 1:
        raise UserError(f"{hf}: layers would keep {sorted(counts)} experts; a config has one number")
    if (reader.config.get("n_group") or 1) > 1:
        raise UserError(f"{hf}: its router picks groups of experts first; pruning would unbalance them")
    planned = list(_planned(reader, kept))

    def make(tensors: Iterable[Planned]) -> Iterator[torch.Tensor]:
        for one in tensors:
            key, rows = one.source
            tensor = reader.read(key)
            yield tensor if rows is None else tensor[rows].contiguous()

    shards = plan_shards(planned, make)
    config = dict(reader.config)
    config |= {name: counts.copy().pop() for name in _COUNTS if name in config}
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    request = {
        "make": "pruned",
        "source": files_of(reader.files),
        "kept": {str(k): v for k, v in kept.items()},
    }
    with partial_folder(out, request, False, False) as partial:
        if partial is not None:
            PartWriter(partial, shards, 1, "prune").run()
            write_index(partial.work, shards)
            copy_side_files(Path(hf), partial.work)
            write_config(partial.work, config)


def _planned(reader: HFReader, kept: dict[int, list[int]]) -> Iterator[Planned]:
    layers = reader.config["num_hidden_layers"]
    for key in sorted(reader.keys()):
        entry, named = reader.entry(key), _LAYER.search(key)
        layer = int(named[1]) if named else None
        if layer is not None and layer >= layers:
            continue
        stay, expert = kept.get(layer), _EXPERT.search(key)
        if stay is not None and expert is not None:
            if int(expert[1]) in stay:
                new = key.replace(expert[0], f".experts.{stay.index(int(expert[1]))}.")
                yield Planned(new, entry.dtype, entry.shape, (key, None))
        elif stay is not None and _ROUTER.search(key):
            yield Planned(key, entry.dtype, (len(stay), *entry.shape[1:]), (key, stay))
        else:
            yield Planned(key, entry.dtype, entry.shape, (key, None))
