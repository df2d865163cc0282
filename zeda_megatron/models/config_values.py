"""Types and ranges of the numbers in config.json, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..strict_json import is_int, is_number

_COUNTS = (
    "num_hidden_layers num_attention_heads num_key_value_heads num_experts num_local_experts n_routed_experts "
    "num_experts_per_tok decoder_sparse_step n_shared_experts"
).split()
_SIZES = (
    "hidden_size intermediate_size moe_intermediate_size vocab_size head_dim max_position_embeddings q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
).split()
_MAY_BE_NULL = ("head_dim", "q_lora_rank", "num_key_value_heads", "rope_theta")
_FROM_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace", "num_labels")
ROPE_THETAS = (1.0, 1e15)
"""Rotary frequencies are float32."""
_NUMBERS = {
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": ROPE_THETAS,
    "attention_dropout": (0.0, 1.0),
    "initializer_range": (0.0, 100.0),
    "routed_scaling_factor": (0.0, 1e6),
}
"""What makes sense, widely; beyond it the numbers of the model are NaN or infinite."""
_TYPES = ("float64", "float32", "float16", "bfloat16")
_TOKENS = ("bos_token_id", "pad_token_id")
_BOOLEANS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_sliding_window", "use_zce_mask")
_STRINGS = ("model_type", "hidden_act", "topk_method", "transformers_weights")
_OBJECTS = (
    "rope_parameters",
    "rope_scaling",
    "auto_map",
    "quantization_config",
    "custom_pipelines",
    "label2id",
)
_KERNELS = ("attn_implementation", "experts_implementation")
MAX_COUNT, MAX_SIZE = 10_000, 100_000_000
"""Far above any model; they keep a wrong digit from filling the memory."""


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: is_int(value) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low <= value <= high


def _is_token(value: Any) -> bool:
    return is_int(value) and 0 <= value < MAX_SIZE


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_COUNT and all(str(key).isdecimal() for key in value)


def _is_no_kernel(value: Any) -> bool:
    """A name with a slash is a kernel of the Hub, whose code transformers would fetch and run."""
    return isinstance(value, str) and "/" not in value


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (_between(1, MAX_COUNT), f"a whole number from 1 to {MAX_COUNT}")),
    **dict.fromkeys(_SIZES, (_between(1, MAX_SIZE), f"a whole number from 1 to {MAX_SIZE}")),
    **dict.fromkeys(_FROM_ZERO, (_between(0, MAX_COUNT), f"a whole number from 0 to {MAX_COUNT}")),
    **{key: (_number(*ends), f"a number from {ends[0]:g} to {ends[1]:g}") for key, ends in _NUMBERS.items()},
    **dict.fromkeys(_BOOLEANS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(_STRINGS, (_is_string, "a string")),
    **dict.fromkeys(_OBJECTS, (lambda value: isinstance(value, dict), "an object")),
    **dict.fromkeys(("dtype", "torch_dtype"), (lambda value: value in _TYPES, f"one of {', '.join(_TYPES)}")),
    **dict.fromkeys(_TOKENS, (_is_token, "the id of a token")),
    **dict.fromkeys(
        _KERNELS, (_is_no_kernel, "a name built into transformers: it may not name code elsewhere")
    ),
    "eos_token_id": (
        lambda value: _is_token(value) or _list_of(_is_token)(value),
        "the id of a token, or a list",
    ),
    "id2label": (_are_labels, f"an object of at most {MAX_COUNT} numbers with their names"),
    "per_layer_config": (lambda value: value == {}, "left out: all layers must have the same sizes"),
    "architectures": (_list_of(_is_string), "a list of strings"),
    "mlp_layer_types": (_list_of(_is_string), "a list of strings"),
    "mlp_only_layers": (_list_of(_between(0, MAX_COUNT)), "a list of layer numbers"),
    "zce_nums": (_list_of(_between(0, MAX_COUNT)), "a list of whole numbers"),
    "zce_types": (_list_of(_is_string), "a list of strings"),
}
_NEVER_NULL = {*_COUNTS, *_SIZES, *_NUMBERS} - set(_MAY_BE_NULL)


TEXT = "text_config"
"""Key of a model that sees, too, under which its language model has its settings."""


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: all of it, or what is in its `text_config`."""
    inner = config.get(TEXT)
    return inner if isinstance(inner, dict) else config


def with_text_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The config with the language model's settings in place of those it had."""
    return settings if text_settings(config) is config else {**config, TEXT: settings}


def check_config_values(config: Any, where: str) -> None:
    """Check the type and range of every known key that is there; unknown keys pass.

    Raises:
        UserError: naming `where`, the key, its value and what it must be.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: must hold a JSON object, not {type(config).__name__}")
    if text_settings(config) is not config:
        check_config_values(config[TEXT], f"{where}: {TEXT}")
    for key, (is_right, wanted) in _RULES.items():
        if key not in config or (config[key] is None and key not in _NEVER_NULL):
            continue
        if not is_right(config[key]):
            raise UserError(f"{where}: {key} {str(config[key])[:60]!r} must be {wanted}")
    kinds = config.get("mlp_layer_types")
    if kinds is not None and not set(kinds) <= {"dense", "sparse"}:
        raise UserError(f"{where}: mlp_layer_types {str(kinds)[:60]} must be 'dense' or 'sparse' each")
    if kinds is not None and len(kinds) != config.get("num_hidden_layers", len(kinds)):
        raise UserError(
            f"{where}: mlp_layer_types has {len(kinds)} entries, num_hidden_layers is {config['num_hidden_layers']}"
        )
    vocabulary = config.get("vocab_size")
    for key in ("eos_token_id", *_TOKENS):
        ids = config.get(key) if isinstance(config.get(key), list) else [config.get(key)]
        beyond = next((one for one in ids if one is not None and vocabulary and one >= vocabulary), None)
        if beyond is not None:
            raise UserError(f"{where}: {key} {beyond} is no token of a vocabulary of {vocabulary}")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )
