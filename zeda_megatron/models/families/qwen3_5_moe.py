"""Qwen3.5 and Qwen3.6 (35B-A3B, 122B-A10B, 397B-A17B) as published: a model that sees, whose language model is that of
`qwen3_5_moe_text`. The tower of vision and the head of multi-token prediction (`mtp.`) are carried along.
"""

from __future__ import annotations

from dataclasses import replace

from ..weight_map import PublishedNames
from .qwen3_5_moe_text import MODELING_FILE as MODELING_FILE
from .qwen3_5_moe_text import REQUIRED as REQUIRED
from .qwen3_5_moe_text import SIZES as SIZES
from .qwen3_5_moe_text import WEIGHTS as TEXT
from .qwen3_5_moe_text import refusal as refusal
from .qwen3_5_moe_text import transformer_config_kwargs as transformer_config_kwargs

ARCHITECTURES = ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoePlusPlusForConditionalGeneration")
MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_plus_plus")
WEIGHTS = replace(
    TEXT,
    published=PublishedNames(
        prefixes=(("model.language_model.", "model."),),
        aside=("model.visual.",),
        may_lack=("mtp.",),
        writes_fused=True,
    ),
)
