"""Published formats that are damaged, contradict themselves or are none of those that are read: one line each."""

import shutil

import pytest
import torch
from corruptions import edit_json, snapshot
from odd_folders import fused, single
from published_folders import EXPERT, MERGED, SCALE, fp8, mxfp4, plain
from tiny import weights_of

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.errors import UserError


def stored(change):
    """Change the tensors of a folder."""
    return lambda folder: single(folder, change(weights_of(folder)))


def cast(key, dtype):
    return stored(lambda weights: weights | {key: weights[key].to(dtype)})


def without(key):
    return stored(lambda weights: {name: value for name, value in weights.items() if name != key})


def put(key, value):
    def spoil(weights):
        weights[key].view(-1)[-1] = value
        return weights

    return stored(spoil)


def config(**changes):
    def change(value):
        value["quantization_config"] |= changes

    return edit_json("config.json", change)


def block_cases():
    yield "scale is missing", without(SCALE), f"tensor {EXPERT} is fp8, but its scales"
    yield "weight is missing", without(EXPERT), f"tensor {SCALE} is the scale of {EXPERT}"
    yield "weight is plain", cast(EXPERT, torch.bfloat16), f"tensor {SCALE} is the scale of {EXPERT}"
    yield "weight is E5M2", cast(EXPERT, torch.float8_e5m2), f"tensor {SCALE} is the scale of {EXPERT}"
    for number in (float("nan"), float("inf"), -1.0):
        yield f"scale {number}", put(SCALE, number), f"tensor {SCALE} has scales that are no finite positive"
    for shape in ((1,), (2, 1), (1, 1, 2), ()):
        change = stored(lambda weights, shape=shape: weights | {SCALE: torch.ones(shape)})
        yield (
            f"scales {shape}",
            change,
            (f"tensor {SCALE} has shape {list(shape)}", "[1, 2] fits weights of [16, 32]"),
        )
    for dtype in (torch.int32, torch.float64, torch.uint8):
        yield f"scales {dtype}", cast(SCALE, dtype), f"tensor {SCALE} has type {dtype}"
    yield "another block", config(weight_block_size=[8, 16]), ("weight_block_size", "_scale_inv has shape")
    for block in (None, [128], [0, 128], ["1", 2], 128, [1.5, 2], [True, True], {}):
        yield f"block {block}", config(weight_block_size=block), "config.json: weight_block_size"
    yield "fp8 vector", cast("model.norm.weight", torch.float8_e4m3fn), "tensor model.norm.weight is fp8, but"
    extra = stored(lambda weights: weights | {"model.norm.weight_scale_inv": torch.ones(1)})
    yield "scale of a norm", extra, "tensor model.norm.weight_scale_inv is the scale of"
    more = stored(lambda weights: weights | {EXPERT.replace("weight", "input_scale"): torch.ones(1)})
    yield (
        "scales of activations",
        more,
        ("up_proj.input_scale", "read are plain floats, fp8 with weight_block_size"),
    )
    for method in ("awq", "gptq", "compressed-tensors", "modelopt", "fbgemm_fp8", "mxfp4", ["fp8"]):
        yield (
            f"told {method}",
            config(quant_method=method),
            "MXFP4 of merged experts; give a folder in one of these",
        )
    yield (
        "told nothing",
        edit_json("config.json", lambda c: c.pop("quantization_config") and None),
        "no quantization_c",
    )


def packed_cases():
    for name in ("blocks", "scales"):
        other = "scales" if name == "blocks" else "blocks"
        yield f"no {name}", without(f"{MERGED}_{name}"), f"tensor {MERGED}_{other} is there, but"
        cut = stored(lambda w, k=f"{MERGED}_{name}": w | {k: w[k][:, 1:]})
        yield f"fewer {name}", cut, f"tensor {MERGED}_scales has shape"
        yield (
            f"signed {name}",
            cast(f"{MERGED}_{name}", torch.int8),
            f"tensor {MERGED}_{name} has type torch.int8",
        )
    odd = stored(lambda w: w | {f"{MERGED}_{n}": w[f"{MERGED}_{n}"][:, 1:] for n in ("blocks", "scales")})
    yield "odd rows", odd, f"tensor {MERGED}_blocks has shape [4, 63, 1, 16]; gate and up"
    flat = stored(lambda w: w | {f"{MERGED}_blocks": w[f"{MERGED}_blocks"].flatten(2)})
    yield "flat blocks", flat, f"tensor {MERGED}_blocks has shape [4, 64, 16]"
    yield "scale 255", put(f"{MERGED}_scales", 255), f"tensor {MERGED}_scales has scales that are NaN"
    fewer = stored(lambda w: w | {f"{MERGED}_{n}": w[f"{MERGED}_{n}"][:3] for n in ("blocks", "scales")})
    yield "fewer experts", fewer, "model.layers.0.mlp.experts.3.gate_proj.weight"
    both = stored(lambda w: w | {MERGED: torch.ones(4, 64, 32)})
    yield "plain, too", both, f"tensor {MERGED}_blocks is there twice"
    yield "told fp8", config(quant_method="fp8"), "_blocks has type torch.uint8; read are plain"


def merged_cases():
    def shaped(*shape):
        return stored(lambda w: w | {MERGED: torch.ones(shape, dtype=torch.bfloat16)})

    for shape in ((4, 31, 32), (128, 32), (4, 32, 32, 1), (20_000, 2, 0)):
        yield f"merged {shape}", shaped(*shape), f"tensor {MERGED} has shape {list(shape)}"
    yield "fewer experts", shaped(3, 32, 32), "model.layers.0.mlp.experts.3.gate_proj.weight"
    yield "more experts", shaped(5, 32, 32), "model.layers.0.mlp.experts.4.gate_proj.weight"
    yield "other width", shaped(4, 30, 32), "experts.0.gate_proj.weight has shape [15, 32], expected [16, 32]"
    single_one = stored(lambda w: w | {EXPERT: torch.ones(16, 32, dtype=torch.bfloat16)})
    yield "one expert twice", single_one, f"are both {EXPERT}; remove one"
    bytes_ = stored(lambda w: w | {MERGED: w[MERGED].to(torch.uint8)})
    yield "bytes", bytes_, "experts.0.gate_proj.weight has type torch.uint8"


KINDS = {
    "fp8": (fp8, block_cases),
    "mxfp4": (mxfp4, packed_cases),
    "merged": (fused, merged_cases),
}
CASES = [(kind, *case) for kind, (_, cases) in KINDS.items() for case in cases()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, (make, _) in KINDS.items():
        make(plain(root / kind, **({"moe_intermediate_size": 32} if kind == "mxfp4" else {})))
        hf_to_megatron(root / kind, root / f"{kind}_m")
    return root


@pytest.mark.parametrize("kind, name, spoil, words", CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_what_does_not_fit_is_refused_in_one_line(whole, tmp_path, kind, name, spoil, words):
    hf = shutil.copytree(whole / kind, tmp_path / "hf")
    spoil(hf)
    before = snapshot(hf)
    with pytest.raises(UserError) as error:
        hf_to_megatron(hf, tmp_path / "m")
    line = str(error.value)
    assert all(word in line for word in ([words] if isinstance(words, str) else words)), line
    assert "\n" not in line and len(line) < 600
    assert "model.safetensors" in line or "config.json" in line or str(hf) in line
    assert snapshot(hf) == before and [path.name for path in tmp_path.iterdir()] == ["hf"]
