"""Conversion of GLM-4.7-Flash whose head of multi-token prediction becomes a part of the Megatron model (`--mtp`)."""

import json

import pytest
import tiny_mtp
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same_bits, weights_of

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.serving.load import load_zero_expert_model

N, NZ, HEAD = 8, 4, "model.layers.3."


@pytest.fixture(
    params=[
        ("glm4_moe_lite", torch.float32),
        ("glm4_moe_lite", torch.bfloat16),
        pytest.param(("glm4_moe", torch.bfloat16), marks=pytest.mark.slow),
        pytest.param(("deepseek_v3", torch.bfloat16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def hf(request, tmp_path):
    family, dtype = request.param
    tiny_mtp.WithHead(family=family).save(tmp_path / "hf", dtype)
    return tmp_path / "hf"


def change(folder, key):
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_gives_back_every_bit_of_the_head(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron", mtp=True)
    assert not (tmp_path / "megatron/hf_config/carried").exists()
    assert verify(hf, tmp_path / "megatron") == []
    for template in (hf, tmp_path / "megatron/hf_config"):
        back = tmp_path / f"back {template.name}"
        megatron_to_hf(tmp_path / "megatron", template, back, max_shard_bytes=20_000)
        assert_same_bits(weights_of(back), weights_of(hf))


def test_the_heads_router_is_widened_like_the_others_and_old_rows_stay(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ, mtp=True)
    assert verify(hf, tmp_path / "megatron") == []
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    original, back = weights_of(hf), weights_of(tmp_path / "back")
    widened = [key for key in original if back[key].shape != original[key].shape]
    assert sorted(widened) == sorted(
        f"model.layers.{layer}.mlp.gate.{name}"
        for layer in (1, 2, 3)
        for name in ("weight", "e_score_correction_bias")
    )
    for key in widened:
        assert back[key].shape[0] == N + NZ and len(set(back[key][N:].flatten().tolist())) > 1
        back[key] = back[key][:N]
    assert_same_bits(back, original)
    # and the dynamic folder goes round too
    hf_to_megatron(tmp_path / "back", tmp_path / "again", mtp=True)
    megatron_to_hf(tmp_path / "again", tmp_path / "back", tmp_path / "back2")
    assert_same_bits(weights_of(tmp_path / "back2"), weights_of(tmp_path / "back"))
    # or with its head as it is
    hf_to_megatron(tmp_path / "back", tmp_path / "carried")
    megatron_to_hf(tmp_path / "carried", tmp_path / "back", tmp_path / "back3")
    assert_same_bits(weights_of(tmp_path / "back3"), weights_of(tmp_path / "back"))


def test_the_decoder_does_not_depend_on_whether_the_head_is_built(hf, tmp_path):
    for name, mtp in (("with", True), ("without", False)):
        hf_to_megatron(hf, tmp_path / name, num_zero_experts=NZ, mtp=mtp)
        megatron_to_hf(tmp_path / name, hf, tmp_path / f"{name} hf")
    a, b = (weights_of(tmp_path / f"{name} hf") for name in ("with", "without"))
    for key in a:
        assert torch.equal(a[key][: len(b[key])], b[key]), key
        assert a[key].shape == b[key].shape or key.startswith(f"{HEAD}mlp.gate.")


def test_paired_zero_experts_of_the_head_have_a_threshold_of_their_own(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron", zero_expert_routing="paired", mtp=True)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert isinstance(config["zce_threshold"], float) and isinstance(config["zce_mtp_threshold"], float)
    config |= {"zce_threshold": [-1.0, -2.0], "zce_mtp_threshold": -3.0}
    (tmp_path / "back/config.json").write_text(json.dumps(config))
    hf_to_megatron(tmp_path / "back", tmp_path / "again", mtp=True)
    assert verify(tmp_path / "back", tmp_path / "again") == []
    megatron_to_hf(tmp_path / "again", hf, tmp_path / "back2")
    assert_same_bits(weights_of(tmp_path / "back2"), weights_of(tmp_path / "back"))
    again = json.loads((tmp_path / "back2/config.json").read_text())
    assert again["zce_threshold"] == [-1.0, -2.0] and again["zce_mtp_threshold"] == -3.0


def test_a_head_that_keeps_all_picks_is_exported_for_engines_that_draft(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron", zero_expert_routing="paired", mtp=True)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    drafts, original = tmp_path / "back/drafts", weights_of(hf)
    assert_same_bits(weights_of(drafts), {key: value for key, value in original.items() if HEAD in key})
    static = json.loads((hf / "config.json").read_text())
    config = json.loads((drafts / "config.json").read_text())
    assert config["architectures"] == static["architectures"] and not any("zce" in key for key in config)
    assert config["first_k_dense_replace"] == 1
    config = json.loads((tmp_path / "back/config.json").read_text()) | {"zce_mtp_threshold": -3.0}
    (tmp_path / "back/config.json").write_text(json.dumps(config))
    hf_to_megatron(tmp_path / "back", tmp_path / "skips", mtp=True)
    megatron_to_hf(tmp_path / "skips", hf, tmp_path / "other")
    hf_to_megatron(hf, tmp_path / "shared", num_zero_experts=NZ, mtp=True)
    megatron_to_hf(tmp_path / "shared", hf, tmp_path / "widened")
    assert not any((tmp_path / name / "drafts").exists() for name in ("other", "widened"))


@pytest.mark.parametrize("flags", [{"num_zero_experts": NZ}, {"zero_expert_routing": "paired"}])
def test_transformers_opens_an_export_with_a_head_and_leaves_it_out(tmp_path, flags):
    tiny_mtp.WithHead().save(tmp_path / "hf")
    for name, mtp in (("with", True), ("without", False)):
        hf_to_megatron(tmp_path / "hf", tmp_path / name, mtp=mtp, **flags)
        megatron_to_hf(tmp_path / name, tmp_path / "hf", tmp_path / f"{name} hf")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        a, b = (
            load_zero_expert_model(tmp_path / f"{name} hf")(tokens).logits for name in ("with", "without")
        )
    assert torch.equal(a, b)


def test_verify_sees_every_tensor_of_the_head(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ, mtp=True)
    for name in ("enorm.weight", "mlp.experts.5.up_proj.weight", "embed_tokens.weight", "mlp.gate.weight"):
        (hf / "model.safetensors").rename(tmp_path / "kept")
        (hf / "model.safetensors").write_bytes((tmp_path / "kept").read_bytes())
        change(hf, HEAD + name)
        (line,) = verify(hf, tmp_path / "megatron")
        assert line.startswith(f"{HEAD}{name}: 1 of")
        (tmp_path / "kept").rename(hf / "model.safetensors")


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_head_that_does_not_share_the_models_own_is_refused(hf, tmp_path, name):
    change(hf, HEAD + name)
    with pytest.raises(UserError, match=f"{HEAD}{name} and .* differ.*convert without --mtp"):
        hf_to_megatron(hf, tmp_path / "megatron", mtp=True)
    assert not (tmp_path / "megatron").exists()


def test_a_model_without_a_head_is_refused(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(UserError, match=r"--mtp: config\.json says num_nextn_predict_layers 0"):
        hf_to_megatron(hf, tmp_path / "megatron", mtp=True)


def test_a_folder_may_have_embedding_and_lm_head_once(tmp_path):
    """As GLM-4.6 is published; the export repeats them, for engines that draft."""
    tiny_mtp.WithHead(family="glm4_moe").save(tmp_path / "hf")
    whole = load_file(tmp_path / "hf/model.safetensors")
    repeats = {f"{HEAD}embed_tokens.weight", f"{HEAD}shared_head.head.weight"}
    lean = {key: value for key, value in whole.items() if key not in repeats}
    save_file(lean, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", mtp=True)
    assert verify(tmp_path / "hf", tmp_path / "megatron") == []
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "back")
    assert_same_bits(weights_of(tmp_path / "back"), whole)
