"""Load a Megatron checkpoint for measuring: one process, fp32, evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.folders import require_folder
from ..checkpoint.state import load_weights, require_checkpoint
from ..config import ZeroExpertConfig
from ..data.packing import PackedBatch
from ..data.rows import rows_for
from ..data.tokenizers import ChatTokenizer, load_tokenizer
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..models.build import build_gpt_model, transformer_config
from ..regular_file import is_regular
from ..strict_json import read_json


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
    """Load a checkpoint folder written by the converter or by training (needs its hf_config/ and zeda.json)."""
    root = Path(folder)
    require_folder(root, "checkpoint")
    if not (root / "hf_config").is_dir():
        raise UserError(f"{root / 'hf_config'} is missing: is {root} a checkpoint of this project?")
    arch = read_architecture(root / "hf_config")
    about = read_json(root / "zeda.json") if is_regular(root / "zeda.json") else {}
    keys = (
        "num_zero_experts",
        "zero_experts_type",
        "zero_expert_routing",
        "paired_score",
        "renormalize_after_drop",
    )
    zero = ZeroExpertConfig(**{key: about[key] for key in keys if key in about})
    chunk = build_gpt_model(arch, transformer_config(arch), zero)
    load_weights([chunk], require_checkpoint(root, "checkpoint"), "checkpoint")
    return LoadedModel(chunk.eval(), arch, load_tokenizer(root / "hf_config"))


def load_rows(file: str, tokenizer: ChatTokenizer, seq_length: int, count: int) -> list[PackedBatch]:
    """The first packed rows of a rollout file."""
    packed = rows_for([file], tokenizer, seq_length, overlong="skip")
    return [packed[i] for i in range(min(count, packed.rows_in_epoch(0)))]
