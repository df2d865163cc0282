"""Conversion of GLM-4.7-Flash both ways: bits, score biases, multi-token prediction, logits, greedy tokens."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same_bits, weights_of
from transformers import AutoModelForCausalLM, Glm4MoeLiteForCausalLM

from zeda_megatron.checkpoint.state import model_state, require_checkpoint, save_checkpoint
from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.models.load import load_weights
from zeda_megatron.runtime.process_groups import initialize
from zeda_megatron.serving.load import load_zero_expert_model

N, NZ, MTP = 8, 4, "model.layers.3."
BIAS = "mlp.gate.e_score_correction_bias"


def make_folder(folder, dtype=torch.float32, mtp=True):
    """A folder as published: score biases in float32, and one layer more than the config counts."""
    model = tiny.glm_model().to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.data = torch.randn(N, generator=torch.Generator().manual_seed(len(name))) * 0.2
    model.config.num_nextn_predict_layers = int(mtp)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if mtp:
        last = {k: v for k, v in tensors.items() if k.startswith("model.layers.2.")}
        draw = torch.Generator().manual_seed(9)
        for key, tensor in last.items():
            new = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
            tensors[key.replace("model.layers.2.", MTP)] = new
        for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head"):
            tensors[f"{MTP}{name}.weight"] = torch.randn(5, generator=draw).to(dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, model.eval()


def load_megatron(folder, hf, zero=None, dtype=torch.float32):
    initialize(ParallelConfig())
    arch = read_architecture(hf)
    model = build_gpt_model(arch, transformer_config(arch, dtype=dtype), zero).eval()
    load_weights([model], require_checkpoint(folder, "--load"), "--load")
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_gives_back_every_bit_and_the_layer_of_multi_token_prediction(tmp_path, dtype):
    hf, _ = make_folder(tmp_path / "hf", dtype)
    original = weights_of(hf)
    assert original[f"{MTP}mlp.gate.weight"].shape == (N, 32)
    hf_to_megatron(hf, tmp_path / "megatron")
    assert verify(hf, tmp_path / "megatron") == []
    for template in (hf, tmp_path / "megatron/hf_config"):
        back = tmp_path / f"back {template.name}"
        megatron_to_hf(tmp_path / "megatron", template, back, max_shard_bytes=20_000)
        assert_same_bits(weights_of(back), original)


def test_widening_leaves_old_rows_and_the_layer_of_multi_token_prediction_alone(tmp_path):
    hf, _ = make_folder(tmp_path / "hf", torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    original, back = weights_of(hf), weights_of(tmp_path / "back")
    widened = [key for key in original if back[key].shape != original[key].shape]
    assert sorted(widened) == sorted(
        f"model.layers.{layer}.mlp.gate.{name}"
        for layer in (1, 2)
        for name in ("weight", "e_score_correction_bias")
    )
    for key in widened:
        assert back[key].shape[0] == N + NZ and len(set(back[key][N:].flatten().tolist())) > 1
        back[key] = back[key][:N]
    assert_same_bits(back, original)
    assert verify(hf, tmp_path / "megatron") == []
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["Glm4MoeLitePlusPlusForCausalLM"]
    assert (config["model_type"], config["zce_nums"], config["zce_types"]) == (
        "glm4_moe_lite",
        [NZ],
        ["zero"],
    )
    # and the dynamic folder goes round too
    hf_to_megatron(tmp_path / "back", tmp_path / "again")
    megatron_to_hf(tmp_path / "again", tmp_path / "back", tmp_path / "back2")
    assert_same_bits(weights_of(tmp_path / "back2"), weights_of(tmp_path / "back"))


def test_no_dtype_rounds_a_score_bias(tmp_path):
    hf, _ = make_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ, dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back", dtype="bf16")
    original, back = weights_of(hf), weights_of(tmp_path / "back")
    for key, tensor in back.items():
        if key.endswith(BIAS):
            assert tensor.dtype == torch.float32 and torch.equal(tensor[:N], original[key])
        else:
            assert tensor.dtype == torch.bfloat16, key


def test_a_bfloat16_model_saves_and_loads_score_biases_exactly(tmp_path):
    hf, _ = make_folder(tmp_path / "hf", torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ)
    model = load_megatron(tmp_path / "megatron", hf, ZeroExpertConfig(NZ), torch.bfloat16).bfloat16()
    save_checkpoint(tmp_path / "run", 7, {"model": model_state([model])["model"]})
    assert all(key.startswith(MTP) for key in (line.split(":")[0] for line in verify(hf, tmp_path / "run")))
    for folder in ("megatron", "run"):
        megatron_to_hf(tmp_path / folder, hf, tmp_path / f"{folder} hf")
    assert_same_bits(weights_of(tmp_path / "run hf"), weights_of(tmp_path / "megatron hf"))


def test_verify_sees_a_changed_layer_of_multi_token_prediction(tmp_path):
    hf, _ = make_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    tensors = load_file(hf / "model.safetensors")
    tensors[f"{MTP}enorm.weight"][0] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    assert verify(hf, tmp_path / "megatron") == [f"{MTP}enorm.weight: differs"]


def test_export_without_the_weights_that_the_config_names_is_refused(tmp_path):
    hf, _ = make_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((hf / "config.json").read_text())
    with pytest.raises(UserError, match="num_nextn_predict_layers 1"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "bare", tmp_path / "back")


def test_export_opens_in_transformers_with_the_same_logits_and_greedy_tokens(tmp_path, tokens):
    hf, static = make_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "dynamic")
    model = load_megatron(tmp_path / "megatron", hf, ZeroExpertConfig(NZ))
    expected = logits(model, tokens)
    engine = BuiltinEngine(model, set(), pad_id=0, max_length=64)
    made = engine.generate(tokens.tolist(), SamplingConfig(max_new_tokens=20, temperature=0.0), [0, 1])
    for theirs in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "dynamic", trust_remote_code=True),
        load_zero_expert_model(tmp_path / "dynamic"),
    ):
        assert type(theirs).__name__ == "Glm4MoeLitePlusPlusForCausalLM"
        with torch.no_grad():
            tiny.close(theirs(tokens).logits, expected, rtol=0, atol=1e-4)
            answers = theirs.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None)
            assert answers[:, 9:].tolist() == [one.response_ids for one in made]
            assert all(0 < share < 1 for share in theirs.zero_share())
            theirs.set_zero_mask(True)
            tiny.close(theirs(tokens).logits, static(tokens).logits, rtol=0, atol=1e-5)
    again = Glm4MoeLiteForCausalLM.from_pretrained(hf)
    assert torch.equal(again(tokens).logits, static(tokens).logits)
