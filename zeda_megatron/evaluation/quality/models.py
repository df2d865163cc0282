"""Load a Megatron checkpoint for measuring: one process, fp32, evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoint.folders import require_folder
from ...checkpoint.state import load_weights, require_checkpoint
from ...data.tokenizers import ChatTokenizer, load_tokenizer
from ...errors import UserError
from ...models.architecture import Architecture, read_architecture
from ...models.build import build_gpt_model, transformer_config
from ...models.on_disk import HF_CONFIG_NAME, ModelFacts, beside, read_facts


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    chunk: torch.nn.Module
    """Bare GPTModel."""
    arch: Architecture
    """Its geometry."""
    tokenizer: ChatTokenizer
    """Its tokenizer."""


def load_model(folder: str) -> LoadedModel:
    """Load a checkpoint folder written by the converter or by training, or one of its `iter_*` or `release`.

    Raises `UserError` if its hf_config/ is missing or its weights cannot be read.
    """
    require_folder(Path(folder), "checkpoint")
    hf_config = beside(folder, HF_CONFIG_NAME)
    if hf_config is None:
        raise UserError(f"{folder}/{HF_CONFIG_NAME} is missing: is {folder} a checkpoint of this project?")
    arch, facts = read_architecture(hf_config), read_facts(folder) or ModelFacts()
    chunk = build_gpt_model(arch, transformer_config(arch), facts.zero())
    load_weights([chunk], require_checkpoint(folder, "checkpoint"), "checkpoint")
    return LoadedModel(chunk.eval(), arch, load_tokenizer(hf_config))
