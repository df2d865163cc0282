"""Writes docs/models.md: what is supported of every family, and what skipping can buy for its published models.

    python -m tools.models_page > docs/models.md

The published geometries are in docs/models/*.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zeda_megatron.models.architecture import MODEL_TYPES, MODELS, Architecture, read_architecture
from zeda_megatron.models.config_values import text_settings
from zeda_megatron.planning.flops import Geometry
from zeda_megatron.text_table import markdown_table

FOLDER = Path(__file__).parents[1] / "docs" / "models"
SHARE = 0.5
"""Share of picks that is skipped, for the bound."""

TEXT = """# Models

You need this if you want to know whether your model is supported, and what skipping can gain for it.

```bash
zeda plan flops --hf examples/qwen3_30b_a3b --paired      # by share, batch and GPU; give your model's folder
```

This page is written by `python -m tools.models_page > docs/models.md`; the geometries are those of the published
config.json files, kept in [docs/models/](models/) with their sources.

## What skipping can buy

A step of decoding one token waits for the weights that it reads. If half of a model's picks are skipped, the routed
experts' part of them halves: the step takes at best 1 - share / 2 of the time. Attention over a long context, kernels
and batches lower the gain ([measurements](evidence/serving.md)); where the share is small, skipping gains
little.

{gains}

Active: weights that one token uses, with the LM head, without the embedding. Share: of the routed experts in them.
Bound: 1 / (1 - share / 2), the most that a step of decoding can gain where half of the picks are skipped. Published
as: what an import reads; exports are bf16 (`zeda quantize` makes 8 bits of them).

## What is supported

Every family here is converted both ways, trained in all stages on every layout (tensor, expert, pipeline, context and
data parallel, recomputed or not) with the numbers of one process, fitted, answered by the built-in engine with the
tokens of transformers, exported, and served by transformers and by vLLM with this package beside it. What differs:

{families}

Not supported, and refused with a message: context parallelism of gated delta networks; expert tensor parallelism of
experts with biases; multi-token prediction under pipeline or context parallelism (the layers can be carried along
instead); rope types whose frequencies depend on the length (`dynamic`, `longrope`). To add a family:
[adding a model](add_a_model.md).
"""
_HYBRID = "no context parallelism; vLLM on a CPU: bf16 only, nearly the same tokens"
NOTES = {
    "qwen3_moe": "",
    "glm4_moe_lite": "`--mtp` trains the head",
    "mixtral": "no sliding window",
    "glm4_moe": "`--mtp` trains the head",
    "deepseek_v3": "`--mtp` trains the head; zero experts stand outside the group limit",
    "deepseek_v2": "transformers 5.16 or newer; zero experts stand outside the group limit",
    "gpt_oss": "exports keep experts merged, as published; stage 2 answers with the built-in engine",
    "minimax_m2": "transformers 5.19 or newer",
    "olmoe": "",
    "qwen2_moe": "",
    "qwen3_next": f"{_HYBRID}; `mtp.` is carried along",
    "qwen3_5_moe_text": f"{_HYBRID}; transformers 5.3 or newer; the language model of the next one alone",
    "qwen3_5_moe": f"{_HYBRID}; transformers 5.3 or newer; vision and `mtp.` are carried along, exports see as before; "
    "experts stay merged, as published; stage 2 answers with the built-in engine",
}
"""What a reader of one family should know."""


def main() -> None:
    """Print the page."""
    published = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    print(page(published), end="")


def page(published: list[dict[str, Any]]) -> str:
    """The page for these models, each the content of a file of `FOLDER`."""
    known = [(model, Geometry.from_config(model["config"])) for model in published if is_known(model)]
    rows = sorted(
        (gain_row(model["model"], model["config"], geometry) for model, geometry in known), key=by_share
    )
    head = ["model", "family", "parameters", "active", "share", "bound", "published as"]
    head_of_families = ["family", "models", "attention", "router", "note"]
    families = markdown_table(head_of_families, [family_row(model, published) for model in MODELS])
    return TEXT.format(gains="\n".join(markdown_table(head, rows)), families="\n".join(families))


def is_known(model: dict[str, Any]) -> bool:
    """Its family is one of the package."""
    return model["config"].get("model_type") in MODEL_TYPES


def routed_share(geometry: Geometry) -> tuple[float, float]:
    """Active weights of a token without the embedding, and the share of the routed experts in them."""
    table = 0 if geometry.tied else geometry.hidden * geometry.vocabulary
    active = geometry.active_parameters() - table
    return active, geometry.moe_layers * geometry.topk * geometry.expert / active


def gain_row(name: str, config: dict[str, Any], geometry: Geometry) -> list[str]:
    active, share = routed_share(geometry)
    return [
        name,
        f"`{geometry.model_type}`",
        f"{geometry.parameters / 1e9:.1f} B",
        f"{active / 1e9:.1f} B",
        f"{share:.2f}",
        f"{1 / (1 - SHARE * share):.2f}×",
        (config.get("quantization_config") or {}).get("quant_method", "bf16"),
    ]


def by_share(row: list[str]) -> tuple[float, str]:
    return -float(row[4]), row[0]


def family_row(model: Any, published: list[dict[str, Any]]) -> list[str]:
    """What a family's own file says, in words."""
    kind = model.MODEL_TYPES[0]
    examples = [one for one in published if one["config"]["model_type"] == kind]
    names = ", ".join(one["model"].partition("/")[2] for one in examples)
    around = [one for one in published if f"{one['config']['model_type']}_text" == kind]
    arch = read_architecture((examples or around)[0]["config"])
    return [f"`{kind}`", names, attention_words(arch), router_words(arch), NOTES[kind]]


def attention_words(arch: Architecture) -> str:
    """Kind of attention, and what it has beside."""
    fields = arch.megatron
    words = ["latent" if fields.get("multi_latent_attention") else "grouped queries"]
    if fields.get("linear_attention_freq"):
        linear = sum(fields["linear_attention_freq"])
        words.insert(0, f"gated delta networks in {linear} of {fields['num_layers']} layers")
        words.append("output gates")
    if fields.get("qk_norm_over_heads"):
        words.append("norms over all heads")
    elif fields["qk_layernorm"] and not fields.get("multi_latent_attention"):
        words.append("norms of each head")
    if fields.get("add_qkv_bias") or fields["add_bias_linear"]:
        words.append("biases")
    if fields.get("softmax_type") == "learnable":
        words.append("sinks")
    if fields.get("window_size"):
        words.append(f"windows of {fields['window_size'][0] + 1}")
    turned, channels = (
        2 * len(arch.rotary.frequencies),
        fields.get("qk_pos_emb_head_dim") or fields["kv_channels"],
    )
    if turned < channels:
        words.append(f"{turned} of {channels} channels turned")
    text = text_settings(arch.hf)
    told = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if (told.get("rope_type") or told.get("type") or "default") != "default":
        words.append("YaRN")
    return ", ".join(words)


def router_words(arch: Architecture) -> str:
    """Score, picks, groups and shared experts."""
    fields = arch.megatron
    score = fields["moe_router_score_function"] + (
        " + bias" if fields.get("moe_router_enable_expert_bias") else ""
    )
    words = [f"{score}, top-{fields['moe_router_topk']} of {fields['num_moe_experts']}"]
    if fields.get("moe_router_group_topk"):
        words.append(f"out of {fields['moe_router_group_topk']} of {fields['moe_router_num_groups']} groups")
    if fields.get("moe_shared_expert_intermediate_size"):
        words.append("shared expert" + (" behind a gate" if fields.get("moe_shared_expert_gate") else ""))
    return ", ".join(words)


if __name__ == "__main__":
    main()
