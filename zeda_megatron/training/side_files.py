"""What stands beside a Megatron checkpoint so that export and evaluation need no flags."""

from __future__ import annotations

from pathlib import Path

from ..durable_file import write_atomically
from ..models.hf_config import copy_side_files, static_config, write_config
from ..models.on_disk import HF_CONFIG_NAME, ZEDA_NAME, ModelFacts
from ..strict_json import read_json


def write_side_files(root: Path, source: Path, facts: ModelFacts) -> None:
    """`hf_config/` (config and tokenizer of the folder `source`) and `zeda.json`, as the converter writes them."""
    copy_side_files(source, root / HF_CONFIG_NAME)
    write_config(root / HF_CONFIG_NAME, static_config(read_json(source / "config.json")))
    write_atomically(root / ZEDA_NAME, facts.text())
