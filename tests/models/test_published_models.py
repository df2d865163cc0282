"""Published models: their configs are read, and the tensors of their folders are those of the Megatron model.

The facts are those of `docs/models/*.json`, from sources outside of this project. `names` are templates: `all` layers
are the decoder's and those behind it (multi-token prediction, `mtp`), which have experts as `moe` layers have;
`full` and `linear` ones differ in attention.
"""

import json
import re
from math import prod
from pathlib import Path

import pytest
from families import EVERY, FAMILIES

from tools.models_page import page
from zeda_megatron.__main__ import main as zeda
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.layout import model_layout
from zeda_megatron.models.architecture import dims_of, published_names, read_architecture, weight_map_of
from zeda_megatron.models.config_values import text_settings, with_text_settings
from zeda_megatron.models.weight_kinds import Repeated, Router
from zeda_megatron.planning.flops import Geometry

FOLDER = Path(__file__).parents[2] / "docs" / "models"
PUBLISHED = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
TOO_NEW = {EVERY[name].architecture for name in EVERY.keys() - FAMILIES.keys()}
MODELS = {name: one for name, one in PUBLISHED.items() if not TOO_NEW & set(one["config"]["architectures"])}
"""Those of families that this version of transformers has."""
DTYPES = {"BF16", "F8_E4M3", "F32", "U8"}
MERGED = re.compile(r"(.*\.experts\.)(gate_up|down)_proj(?:_(blocks|scales|bias))?")
NO_PARAMETER = re.compile(r".*\.(e_score_correction_bias|inv_freq)")
"""Buffers of transformers' models."""
SMALL = 25
"""Models with fewer billions of parameters are checked at full size in the default suite, too."""


def shortened(model: dict, layers: int) -> dict:
    """The model with the first `layers` layers of the decoder."""
    text = {
        key: value[:layers] if isinstance(value, list) and len(value) == layers_of(model) else value
        for key, value in text_of(model).items()
    }
    return model | {"config": with_text_settings(model["config"], text | {"num_hidden_layers": layers})}


def text_of(model: dict) -> dict:
    return text_settings(model["config"])


def layers_of(model: dict) -> int:
    return text_of(model)["num_hidden_layers"]


def heads_of(model: dict) -> int:
    return text_of(model).get("num_nextn_predict_layers") or 0


def first_expert_layer(model: dict) -> int:
    return text_of(model).get("first_k_dense_replace", 0)


def experts_of(model: dict) -> int:
    return next(
        value
        for key, value in text_of(model).items()
        if key in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def stored(model: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the folder with its shape."""
    layers, heads, dense = layers_of(model), heads_of(model), first_expert_layer(model)
    numbers = {
        "all": range(layers + heads),
        "dense": range(dense),
        "moe": range(dense, layers + heads),
        "mtp": range(layers, layers + heads),
    }
    interval = text_of(model).get("full_attention_interval", 1)
    numbers["full"] = range(interval - 1, layers, interval)
    numbers["linear"] = [layer for layer in range(layers) if layer not in numbers["full"]]
    found = {}
    for name, tensor in model["names"].items():
        experts = range(experts_of(model) if "{expert}" in name else 1)
        for layer in numbers[tensor["layers"]] if "layers" in tensor else [0]:
            found |= {name.format(layer=layer, expert=e): tuple(tensor["shape"]) for e in experts}
    return found


def plain(model: dict) -> dict[str, tuple[int, ...]]:
    """The same weights as plain numbers under plain names, each expert's alone."""
    found, names = {}, published_names(model["config"])
    for stored_key, shape in stored(model).items():
        key = names.plain(stored_key)
        match = MERGED.fullmatch(key)
        if key.endswith(".weight_scale_inv") or (match and match[3] == "scales"):
            continue
        if match is None:
            found[key] = shape
            continue
        experts, rows, *rest = shape
        is_bias = match[3] == "bias"
        width = (rest[0] * rest[1] * 2,) if match[3] == "blocks" else tuple(rest)  # two numbers to a byte
        parts = ["gate_proj", "up_proj"] if match[2] == "gate_up" else ["down_proj"]
        for expert in range(experts):
            for part in parts:
                name = f"{match[1]}{expert}.{part}.{'bias' if is_bias else 'weight'}"
                found[name] = (rows // len(parts), *width)
    return found


def parameters(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for key, shape in tensors.items() if not NO_PARAMETER.fullmatch(key))


def check_every_tensor_has_its_parameter(arch, wanted: dict[str, tuple[int, ...]]) -> None:
    zero = experts_of({"config": arch.hf}) // 2
    layout, dims, weights = model_layout(arch, ZeroExpertConfig(zero)), dims_of(arch), weight_map_of(arch)
    bound = weights.bind(layout.shapes(), wanted, dims)
    seen = set()
    for parameter in layout.parameters:
        mapping = bound[parameter.name]
        for key, allowed in mapping.hf_shapes(parameter.shape, dims).items():
            if key not in wanted and isinstance(mapping, Repeated) and key in mapping.repeats():
                continue  # GLM-4.6 has embedding and LM head once
            assert wanted[key] in allowed, key
            seen.add(key)
            if type(mapping) is Router:
                assert parameter.shape[0] == wanted[key][0] + zero
    assert seen == {key for key in wanted if not weights.is_ignored(key)}


@pytest.mark.parametrize("name", MODELS)
def test_the_facts_of_a_model_fit_each_other(name):
    model = MODELS[name]
    assert model["model"].rpartition("/")[2] == name and model["source"]
    assert {tensor["dtype"] for tensor in model["names"].values()} <= DTYPES
    tensors = stored(model)
    if model["tensors"] is not None:
        assert len(tensors) == model["tensors"]
    if model["elements"] is not None:
        assert sum(map(prod, tensors.values())) == model["elements"]
    for key, shape in tensors.items():
        if key.endswith(".weight_scale_inv"):
            weight = tensors[key.removesuffix("_scale_inv")]
            block = model["config"]["quantization_config"]["weight_block_size"]
            assert shape == tuple(-(-size // step) for size, step in zip(weight, block, strict=True)), key


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_a_published_config_are_counted(name):
    model = MODELS[name]
    arch, weights = read_architecture(model["config"], name), plain(model)
    decoder = {key: shape for key, shape in weights.items() if not arch.is_carried(key)}
    carried = len(weights) - len(decoder)
    assert bool(carried) == bool(heads_of(model))
    assert Geometry.from_config(model["config"]).parameters == parameters(decoder)
    told = model["parameters_billion"]
    total = parameters(weights if model.get("parameters_include_mtp") else decoder)
    digits = len(str(told).partition(".")[2])
    assert round(total / 1e9, digits) == told


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_first_published_layers_has_its_megatron_parameter(name):
    """All dense layers and two with experts."""
    model = shortened(MODELS[name], first_expert_layer(MODELS[name]) + 2)
    arch, weights = read_architecture(model["config"], name), plain(model)
    decoder = {key: shape for key, shape in weights.items() if not arch.is_carried(key)}
    check_every_tensor_has_its_parameter(arch, decoder)
    assert all(f"layers.{layers_of(model)}." in key for key in weights.keys() - decoder.keys())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", [name for name in MODELS if heads_of(MODELS[name])])
def test_every_tensor_of_a_published_head_of_multi_token_prediction_has_its_megatron_parameter(name):
    model = shortened(MODELS[name], first_expert_layer(MODELS[name]) + 1)
    arch = read_architecture(model["config"], name).with_mtp_head("--mtp")
    check_every_tensor_has_its_parameter(arch, plain(model))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (model["parameters_billion"] > SMALL))
        for name, model in MODELS.items()
    ],
)
def test_every_published_tensor_has_its_megatron_parameter(name):
    model = MODELS[name]
    arch = read_architecture(model["config"], name)
    weights = {key: shape for key, shape in plain(model).items() if not arch.is_carried(key)}
    check_every_tensor_has_its_parameter(arch, weights)


@pytest.mark.parametrize("name", MODELS)
def test_every_published_model_is_planned(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]["config"]))
    ranks = min(experts_of(MODELS[name]), 4)
    for command in (
        ["flops"],
        ["memory", "--gpus", "8", "--bf16", "--expert-model-parallel-size", str(ranks)],
    ):
        assert zeda(["plan", *command, "--hf", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert "nan" not in told and "inf " not in told and len(told.splitlines()) > 10


@pytest.mark.skipif(
    len(EVERY) > len(FAMILIES), reason="this version of transformers reads some configs otherwise"
)
def test_the_page_of_models_is_what_its_program_writes():
    """`python -m tools.models_page > docs/models.md`"""
    assert FOLDER.with_suffix(".md").read_text() == page(list(PUBLISHED.values()))
