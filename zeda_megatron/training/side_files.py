"""What stands beside a Megatron checkpoint so that export and evaluation need no flags."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint.hf_config import copy_side_files, static_config, write_config
from ..checkpoint.hf_files import read_json
from ..checkpoint.state import write_atomically
from ..config import ZeroExpertConfig


def write_side_files(root: Path, source: Path, zero: ZeroExpertConfig, adapted_steps: int = 0) -> None:
    """`hf_config/` (config and tokenizer of the folder `source`) and `zeda.json`, as the converter writes them.

    `adapted_steps`: how long the weights have been distilled; above 0 they are the teacher's no more.
    """
    copy_side_files(source, root / "hf_config")
    write_config(root / "hf_config", static_config(read_json(source / "config.json")))
    about = {"num_zero_experts": zero.num_zero_experts, "zero_experts_type": zero.zero_experts_type}
    if zero.paired:
        about |= {"zero_expert_routing": "paired", "paired_score": zero.paired_score}
    if zero.renormalize_after_drop:
        about["renormalize_after_drop"] = True
    if adapted_steps:
        about["adapted_steps"] = adapted_steps
    write_atomically(root / "zeda.json", json.dumps(about, indent=2) + "\n")
