"""ModelOpt rounds the weights of an exported model and leaves alone what decides on picks."""

import json
import re
from importlib.util import find_spec

import pytest
import test_modeling_families as families
import tiny
import torch
from safetensors.torch import load_file, save_file

from zeda_megatron.errors import UserError
from zeda_megatron.serving.load import load_model, load_zero_expert_model, unpacked
from zeda_megatron.serving.quantize import QuantizeOptions, main, quantize

KEPT = (
    *(
        "norm",
        ".gate.",
        ".shared_expert_gate.",
        "embed_tokens",
        "lm_head",
        "e_score_correction_bias",
        "layernorm",
    ),
    *("_proj.bias", "conv1d", "A_log", "dt_bias", ".in_proj_a.", ".in_proj_b.", ".in_proj_ba."),
)
every_family = pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "gpt_oss"])
every_packed = pytest.mark.parametrize(
    ("name", "kind"), [p for p in families.every_family_and_kind.args[1] if p.values[0] != "gpt_oss"]
)
"""gpt-oss is refused."""


@pytest.fixture
def modelopt():
    pytest.importorskip("modelopt", reason="ModelOpt is not installed: bash tests/serving/modelopt_env.sh")


def make_folder(tmp_path, name, kind):
    families.make_model(tmp_path / "config", name, kind).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def int8_rows(weight):
    """Symmetric int8 with a scale per row, straight from the definition."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def fp8_matrix(weight):
    """E4M3 with a scale per matrix, 448 being its largest number."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def moved_as(by_hand, before, after) -> int:
    """Parameters that have moved, each as `by_hand` says; what decides on picks has not."""
    assert before.keys() == after.keys()
    moved = 0
    for key, weight in before.items():
        if any(word in key for word in KEPT):
            assert torch.equal(weight, after[key]), key
            continue
        moved += weight.numel()
        tiny.close(after[key], by_hand(weight), rtol=0, atol=1e-6)
        assert not torch.equal(weight, after[key])
    return moved


@every_packed
def test_int8_is_the_definition_and_nothing_else_moves(modelopt, tmp_path, name, kind):
    hf = make_folder(tmp_path, name, kind)
    done = quantize(QuantizeOptions(str(hf), str(tmp_path / "out")))
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "out"))
    assert done["parameters"] == moved_as(int8_rows, before, after) > 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["zeda_rounded_to"] == "int8"


@every_family
def test_a_bf16_folder_keeps_its_types(modelopt, tmp_path, name):
    model = families.make_model(tmp_path / "c", name, "paired").to(torch.bfloat16)
    for block in model.moe_blocks():
        if hasattr(block.gate, "e_score_correction_bias"):  # float32 in every model
            block.gate.e_score_correction_bias = block.gate.e_score_correction_bias.float()
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"dtype": "float32"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))  # the weights' own type counts
    quantize(QuantizeOptions(str(tmp_path / "hf"), str(tmp_path / "out")))
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "out"))
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.dtype, v.shape) for k, v in after.items()
    }
    assert torch.bfloat16 in {v.dtype for v in before.values()}
    kept = [k for k in before if any(word in k for word in KEPT)]
    assert all(torch.equal(before[k], after[k]) for k in kept)


@every_family
def test_fp8_is_the_definition(modelopt, tmp_path, name):
    hf = make_folder(tmp_path, name, "zero")
    quantize(QuantizeOptions(str(hf), str(tmp_path / "out"), number_format="fp8"))
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "out"))
    for key, weight in before.items():
        if any(word in key for word in KEPT):
            assert torch.equal(weight, after[key]), key
        elif not any(word in key for word in ("gate_proj", "up_proj", ".w1.", ".w3.")):
            tiny.close(after[key], fp8_matrix(weight), rtol=1e-6, atol=1e-6)
        else:
            assert not torch.equal(weight, after[key])  # gate and up share a scale


def fp8_rows(weight):
    """E4M3 with a scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@every_packed
@pytest.mark.parametrize(("number_format", "by_hand"), [("int8", int8_rows), ("fp8", fp8_rows)])
@torch.no_grad()
def test_a_packed_folder_holds_the_numbers_of_the_definition(tmp_path, name, kind, number_format, by_hand):
    hf = make_folder(tmp_path, name, kind)
    done = quantize(QuantizeOptions(str(hf), str(tmp_path / "packed"), number_format, packed=True))
    small, large = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("packed", "hf"))
    assert small < 0.7 * large
    before, after = load_file(hf / "model.safetensors"), unpacked(tmp_path / "packed", torch.float32)
    assert done["parameters"] == moved_as(by_hand, before, after) > 0
    opened, plain, tokens = load_model(tmp_path / "packed"), load_model(hf), torch.randint(1, 96, (2, 9))
    for parameter, other in zip(opened.parameters(), plain.parameters(), strict=True):
        assert parameter.dtype == other.dtype and parameter.shape == other.shape
    assert (opened(tokens).logits - plain(tokens).logits).abs().max() > 0
    # transformers alone would take the integers for weights: the file that travels refuses, or transformers does.
    with pytest.raises((ValueError, ImportError), match="compressed-tensors"):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", trust_remote_code=True)


@every_packed
@torch.no_grad()
def test_packed_int8_is_what_modelopt_rounds_to(modelopt, tmp_path, name, kind):
    hf, tokens = make_folder(tmp_path, name, kind), torch.randint(1, 96, (2, 9))
    quantize(QuantizeOptions(str(hf), str(tmp_path / "rounded")))
    quantize(QuantizeOptions(str(hf), str(tmp_path / "packed"), packed=True))
    rounded, opened = load_model(tmp_path / "rounded"), load_model(tmp_path / "packed")
    tiny.close(opened(tokens).logits, rounded(tokens).logits, rtol=1e-4, atol=1e-4)


def test_merged_experts_with_biases_are_refused_in_one_line(tmp_path):
    hf = make_folder(tmp_path, "gpt_oss", "zero")
    with pytest.raises(UserError, match="merged into one tensor: they cannot be rounded"):
        quantize(QuantizeOptions(str(hf), str(tmp_path / "out"), packed=True))
    assert not (tmp_path / "out").exists()


def test_layers_of_multi_token_prediction_are_packed_along_as_they_are(tmp_path):
    """vLLM reads them beside the others, under the names that `ignore` has."""
    hf = make_folder(tmp_path, "glm4_moe_lite", "zero")
    tensors, config = load_file(hf / "model.safetensors"), json.loads((hf / "config.json").read_text())
    layers = config["num_hidden_layers"]
    extra = {f"model.layers.{layers}.eh_proj.weight": torch.randn(4, 8)}
    save_file(tensors | extra, hf / "model.safetensors", metadata={"format": "pt"})
    (hf / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    quantize(QuantizeOptions(str(hf), str(tmp_path / "packed"), packed=True))
    (key,) = extra
    assert torch.equal(load_file(tmp_path / "packed" / "model.safetensors")[key], extra[key])
    ignored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [pattern.removeprefix("re:") for pattern in ignored]
    assert any(re.match(pattern, key) for pattern in patterns)
    assert not any(re.match(pattern, "model.layers.1.self_attn.o_proj") for pattern in patterns)


@every_family
@torch.no_grad()
def test_modelopts_own_hooks_reach_the_experts_and_folded_weights_give_the_same(modelopt, tmp_path, name):
    """Our layer calls the stock experts as the stock block does."""
    import modelopt.torch.quantization as mtq

    model = families.make_model(tmp_path, name, "zero")
    block, hidden = model.moe_blocks()[-1], torch.randn(1, 9, 32)
    block.shared_experts = None
    before = block(hidden)
    mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG)
    hooked = block(hidden)
    assert (hooked - before).abs().max() > 1e-4
    mtq.fold_weight(model)
    tiny.close(block(hidden), hooked, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_rounded_routers_pick_otherwise(modelopt, tmp_path):
    hf = make_folder(tmp_path, "qwen3_moe", "paired")
    flags = ["--hf", str(hf), "--out", str(tmp_path / "out"), "--number-format", "fp8"]
    assert main([*flags, "--quantize-router"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "out"))
    for name in ("weight", "zero_weight", "zero_bias"):
        key = f"model.layers.0.mlp.gate.{name}"
        assert 0 < (before[key] - after[key]).abs().max() < 0.1 * before[key].abs().max()


def test_packed_tensors_are_read_with_their_scales(tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(-127, 128, (4, 6), generator=draw).to(torch.int8)
    half = torch.randn(4, 6, generator=draw).to(torch.float8_e4m3fn)
    scale = torch.rand(4, generator=draw)
    tensors = {
        "a.weight": rows,
        "a.weight_scale": scale,
        "b.weight": half,
        "b.weight_scale": torch.tensor(0.5),
    }
    save_file(tensors | {"c.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    found = unpacked(tmp_path, torch.float32)
    assert found.keys() == {"a.weight", "b.weight", "c.weight"}
    for i in range(4):
        assert torch.equal(found["a.weight"][i], rows[i].float() * scale[i])
    assert torch.equal(found["b.weight"], half.float() * 0.5)
    assert torch.equal(found["c.weight"], torch.ones(2))
    save_file({"a.weight": rows, "a.weight_scale": scale[:3].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a\.weight is packed, but has no scale"):
        unpacked(tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        unpacked(tmp_path / "none", torch.float32)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"number_format": "int3"}, "--number-format 'int3'"),
        ({"packed": True, "quantize_router": True}, "leave --quantize-router out"),
        ({"out": "hf"}, "--overwrite"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(modelopt, tmp_path, changes, told):
    hf = make_folder(tmp_path, "qwen3_moe", "zero")
    fields = {"hf": str(hf), "out": str(tmp_path / changes.pop("out", "out")), **changes}
    with pytest.raises(UserError, match=told):
        quantize(QuantizeOptions(**fields))
    assert {path.name for path in tmp_path.iterdir()} == {"config", "hf"}
    load_zero_expert_model(hf)


def test_a_quantised_folder_is_not_quantised_again(modelopt, tmp_path):
    hf = make_folder(tmp_path, "qwen3_moe", "zero")
    quantize(QuantizeOptions(str(hf), str(tmp_path / "out"), packed=True))
    with pytest.raises(UserError, match="quantised already"):
        quantize(QuantizeOptions(str(tmp_path / "out"), str(tmp_path / "again")))


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path, capsys):
    hf, out = make_folder(tmp_path, "qwen3_moe", "zero"), tmp_path / "out"
    assert main(["--hf", str(hf), "--out", str(out), "--packed", "--no-progress"]) == 0
    wrote, then = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {out}: ") and wrote.endswith(" as int8")
    assert then.startswith(f"next: vllm serve {out}; zeda evaluate folders ")


def test_without_modelopt_the_package_to_install_is_named(tmp_path):
    if find_spec("modelopt") is not None:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=r"\[modelopt\]"):
        quantize(QuantizeOptions("a", "b"))
