"""What a torch_dist checkpoint holds, seen as the parameters of one architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from ..models.hf_config import zero_experts_of
from ..models.on_disk import ZEDA_NAME, ModelFacts, read_facts
from .layout import Layout, Parameter, model_layout, stacked
from .torch_dist_reader import TorchDistReader

_MODEL_KEY = re.compile(r"(embedding|decoder|output_layer|mtp)\.")
_ROUTER_KEY = re.compile(r"decoder\.layers\.(\d+\.)?mlp\.router\.weight")
_HEAD_KEY = re.compile(r"decoder\.layers\.(\d+\.)?mlp\.router\.paired\.\w+")


class MegatronModel:
    """Unsharded parameters of a checkpoint, read one by one.

    Args:
        folder: checkpoint folder (or the iteration's folder inside it).
        arch: architecture of the Hugging Face template.
        config: its config.json.
        verify: how closely files are looked at before they are read (`integrity.LEVELS`).

    Raises:
        UserError: incomplete checkpoint, or one that does not belong to this config.
    """

    def __init__(self, folder: Path, arch: Architecture, config: dict[str, Any], verify: str = "hash"):
        self._arch = arch
        self._reader = TorchDistReader(folder, verify)
        self.folder = self._reader.folder
        about = read_facts(folder) or read_facts(self.folder)
        self.zero = self._zero_experts(folder, about, config)
        self.adapted_steps = self._adapted_steps(about)
        self.layout: Layout = model_layout(arch, self.zero)
        self._check_keys()

    def read(self, parameter: Parameter) -> torch.Tensor:
        """One parameter, unsharded, in its stored type."""
        boxes = [self._stored(box) for box in parameter.boxes]
        parts = [self._reader.read(box).reshape(-1, *parameter.shape[1:]) for box in boxes]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(parameter.shape)

    def checked_dtype(self, parameter: Parameter) -> torch.dtype:
        """Stored type of a parameter, whose shape is looked at too, without reading it.

        Raises:
            UserError: it is missing, incomplete, has another shape, or its parts have different types.
        """
        boxes = [self._stored(box) for box in parameter.boxes]
        for box in boxes:
            self._reader.check(box)
        types = {self._reader.dtype(box.key) for box in boxes}
        if len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
            raise UserError(f"{self.folder}: {parameter.name} has type {' and '.join(map(str, types))}")
        return types.pop()

    def _stored(self, box):
        """The box itself, or its place in a checkpoint that stacks all layers in one tensor."""
        return box if box.key in self._reader else stacked(box, self._arch.megatron["num_layers"])

    def _check_keys(self) -> None:
        known = {self._stored(box).key for parameter in self.layout.parameters for box in parameter.boxes}
        extra = sorted(key for key in filter(_MODEL_KEY.match, self._reader.keys()) if key not in known)
        if extra:
            raise UserError(
                f"{self.folder}: holds {len(extra)} tensors that the config lacks, e.g. {extra[0]}; "
                "give the config.json that belongs to this checkpoint"
            )

    def _zero_experts(self, root: Path, about: ModelFacts | None, config: dict[str, Any]) -> ZeroExpertConfig:
        keys = self._reader.keys()
        routers = [key for key in keys if _ROUTER_KEY.fullmatch(key)]
        if not routers:
            raise UserError(f"{self.folder}: holds no router weights; it is no Mixture-of-Experts model")
        real = self._arch.megatron["num_moe_experts"]
        rows = self._reader.shape(routers[0])[-2]
        if rows < real:
            raise UserError(f"{self.folder}: {routers[0]} has {rows} rows, the config {real} experts")
        facts = about or ModelFacts()
        if facts.renormalize_after_drop:
            raise UserError(
                f"{root}: was trained with --renormalize-after-drop (for study), which the exported model does not do"
            )
        if any(map(_HEAD_KEY.fullmatch, keys)):
            return self._paired(real, facts, config)
        if facts.zero_expert_routing == "paired":
            raise UserError(
                f"{self.folder}: {ZEDA_NAME} says paired zero experts, but the checkpoint has no heads "
                "(mlp.router.paired); convert or train it again"
            )
        if rows == real:
            return ZeroExpertConfig()
        if any(key.endswith("mlp.router.zero_output.bias") for key in keys):
            return ZeroExpertConfig(rows - real, "learned")
        kind = (about or zero_experts_of(config)).zero_experts_type
        return ZeroExpertConfig(rows - real, kind)

    def _adapted_steps(self, about: ModelFacts | None) -> int | None:
        """Steps of distillation. Without zeda.json nobody knows what training has made: the number that the checkpoint
        itself holds is in a pickle, which a conversion never opens."""
        if about is not None:
            return about.adapted_steps
        trained = not all(map(_MODEL_KEY.match, self._reader.keys()))  # an optimizer's state
        return None if trained else 0

    @staticmethod
    def _paired(real: int, facts: ModelFacts, config: dict[str, Any]) -> ZeroExpertConfig:
        """Heads in the checkpoint tell that it is paired; the score's terms are in zeda.json, else in the template."""
        score = facts.paired_score
        if score is None:
            template = zero_experts_of(config)
            score = template.paired_score if template.paired else ZeroExpertConfig.paired_score
        return ZeroExpertConfig(real, "zero", "paired", score)
