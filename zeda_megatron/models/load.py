"""Load a Megatron checkpoint: its weights into a model that was built, or a whole model for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import state
from ..checkpoint.folders import require_folder
from ..config.lora import LoRA
from ..data.tokenizers import ChatTokenizer, load_tokenizer
from ..errors import UserError
from .adapters import fold_adapters, install_adapters
from .architecture import Architecture, read_architecture
from .build import build_gpt_model, transformer_config
from .on_disk import HF_CONFIG_NAME, ModelFacts, beside, read_facts, weight_folders


def load_weights(
    chunks: list[torch.nn.Module],
    checkpoint: str | Path,
    flag: str,
    lora: LoRA | None = None,
    **how: Any,
) -> None:
    """Load the weights of a checkpoint, wherever they lie, into bare model chunks (`checkpoint.state.load_weights`
    takes the rest of the arguments).

    Adapters become part of the weights, unless the chunks have them.

    Args:
        checkpoint: folder, or one of its `iter_*` or `release`. flag: what named it.
        lora: adapters that the chunks have; where the checkpoint has none they keep their values.

    Raises:
        UserError: no such checkpoint, damage, another model, other adapters.
    """
    folders, facts = weight_folders(checkpoint, flag), read_facts(checkpoint) or ModelFacts()
    fold = facts.lora is not None and lora is None
    if fold:
        install_adapters(chunks, facts.lora)
    elif lora is not None and facts.lora not in (None, lora):
        had = facts.lora
        raise UserError(
            f"{flag} {checkpoint}: was trained with --lora-rank {had.rank} --lora-alpha {had.alpha:g} --lora-targets "
            f"{had.targets}; go on with these"
        )
    state.load_weights(chunks, folders, flag, **how)
    if fold:
        fold_adapters(chunks)


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
    if mtp and state.holds_mtp_head(weight_folders(folder, "checkpoint"), "checkpoint"):
        arch = arch.with_mtp_head("checkpoint")
    chunk = build_gpt_model(arch, transformer_config(arch), facts.zero())
    load_weights([chunk], folder, "checkpoint")
    return LoadedModel(chunk.eval(), arch, load_tokenizer(hf_config))
