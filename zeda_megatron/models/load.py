"""Load a Megatron checkpoint for measuring: one process, fp32, evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.folders import require_folder
from ..checkpoint.state import holds_mtp_head, load_weights, require_checkpoint
from ..data.tokenizers import ChatTokenizer, load_tokenizer
from ..errors import UserError
from .architecture import Architecture, read_architecture
from .build import build_gpt_model, transformer_config
from .on_disk import HF_CONFIG_NAME, ModelFacts, beside, read_facts


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    chunk: torch.nn.Module
    """Bare GPTModel."""
    arch: Architecture
    """Its geometry."""
    tokenizer: ChatTokenizer
    """Its tokenizer."""


def load_model(folder: str | Path, mtp: bool = False) -> LoadedModel:
    """Load a checkpoint folder written by the converter or by training, or one of its `iter_*` or `release`; with `mtp`
    the head of multi-token prediction too, if it has one.

    Raises `UserError` if its hf_config/ is missing or its weights cannot be read.
    """
    require_folder(Path(folder), "checkpoint")
    hf_config = beside(folder, HF_CONFIG_NAME)
    if hf_config is None:
        raise UserError(f"{folder}/{HF_CONFIG_NAME} is missing: is {folder} a checkpoint of this project?")
    arch, facts = read_architecture(hf_config), read_facts(folder) or ModelFacts()
    checkpoint = require_checkpoint(folder, "checkpoint")
    if mtp and holds_mtp_head(checkpoint, "checkpoint"):
        arch = arch.with_mtp_head("checkpoint")
    chunk = build_gpt_model(arch, transformer_config(arch), facts.zero())
    load_weights([chunk], checkpoint, "checkpoint")
    return LoadedModel(chunk.eval(), arch, load_tokenizer(hf_config))
