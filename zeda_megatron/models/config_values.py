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
_FROM_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace")
_NUMBERS = ("rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range", "routed_scaling_factor")
_BOOLEANS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_sliding_window", "use_zce_mask")
_STRINGS = ("model_type", "hidden_act", "topk_method", "torch_dtype", "dtype")
_OBJECTS = ("rope_parameters", "rope_scaling", "auto_map")
MAX_COUNT, MAX_SIZE = 10_000, 100_000_000
"""Far above any model; they keep a wrong digit from filling the memory."""


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: is_int(value) and low <= value <= high


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (_between(1, MAX_COUNT), f"a whole number from 1 to {MAX_COUNT}")),
    **dict.fromkeys(_SIZES, (_between(1, MAX_SIZE), f"a whole number from 1 to {MAX_SIZE}")),
    **dict.fromkeys(_FROM_ZERO, (_between(0, MAX_COUNT), f"a whole number from 0 to {MAX_COUNT}")),
    **dict.fromkeys(_NUMBERS, (is_number, "a finite number")),
    **dict.fromkeys(_BOOLEANS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(_STRINGS, (_is_string, "a string")),
    **dict.fromkeys(_OBJECTS, (lambda value: isinstance(value, dict), "an object")),
    "architectures": (_list_of(_is_string), "a list of strings"),
    "mlp_layer_types": (_list_of(_is_string), "a list of strings"),
    "mlp_only_layers": (_list_of(_between(0, MAX_COUNT)), "a list of layer numbers"),
    "zce_nums": (_list_of(_between(0, MAX_COUNT)), "a list of whole numbers"),
    "zce_types": (_list_of(_is_string), "a list of strings"),
}
_NEVER_NULL = {*_COUNTS, *_SIZES, *_NUMBERS} - set(_MAY_BE_NULL)


def check_config_values(config: Any, where: str) -> None:
    """Check the type and range of every known key that is there; unknown keys pass.

    Raises:
        UserError: naming `where`, the key, its value and what it must be.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: must hold a JSON object, not {type(config).__name__}")
    for key, (is_right, wanted) in _RULES.items():
        if key not in config or (config[key] is None and key not in _NEVER_NULL):
            continue
        if not is_right(config[key]):
            raise UserError(f"{where}: {key} {str(config[key])[:60]!r} must be {wanted}")
    kinds = config.get("mlp_layer_types")
    if kinds is not None and len(kinds) != config.get("num_hidden_layers", len(kinds)):
        raise UserError(
            f"{where}: mlp_layer_types has {len(kinds)} entries, num_hidden_layers is {config['num_hidden_layers']}"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )
    for name in ("rope_parameters", "rope_scaling"):
        theta = (config.get(name) or {}).get("rope_theta")
        if theta is not None and not is_number(theta):
            raise UserError(f"{where}: rope_theta {str(theta)[:60]!r} in {name} must be a finite number")
