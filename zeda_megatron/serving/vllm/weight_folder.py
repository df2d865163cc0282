"""New weights for a running server, from a folder that both sides see: a backend of vLLM's weight updates.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "zeda_folder"}'

A training run writes safetensors files under Hugging Face names and tells the server where (`distill.student_servers`).
Nothing but the folder connects the two: a server that was started again is told again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from .install import set_dials


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class FolderUpdate(WeightTransferUpdateInfo):
    """Where the weights are."""

    folder: str
    """Holds `*.safetensors`."""
    dials: list[float] = field(default_factory=list)
    """Per MoE layer its threshold or logit bias; empty: they stay."""


class FolderWeights(WeightTransferEngine[NoInit, FolderUpdate]):
    """Loads a folder into the model that runs, a tensor at a time."""

    init_info_cls = NoInit
    update_info_cls = FolderUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict) -> None:
        # vLLM's own waits for an accelerator, which a CPU has not; copies from the host are done when they return.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: FolderUpdate) -> None:
        files = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{update_info.folder}: no weights here; does this machine see the folder?")
        self.model.load_weights(_tensors(files))
        if update_info.dials:
            set_dials(self.model, update_info.dials)

    def shutdown(self) -> None:
        pass


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
