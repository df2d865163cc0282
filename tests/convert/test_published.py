"""Published formats: their numbers are those that transformers makes of them, their names and layouts only names."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny
import tiny_mtp
import torch
from corruptions import edit_json, snapshot
from families import FAMILIES
from odd_folders import fused, single
from published_folders import EXPERT, MERGED, SCALE, SMALL, expanded, fp8, mxfp4, plain, told
from tiny import assert_same_bits, weights_of
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from zeda_megatron.convert.bits import same_bits
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.published import PublishedReader
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.models.families import qwen3_moe
from zeda_megatron.models.weight_map import HALVES, TURNS, FusedExperts, PublishedNames


def imported(folder):
    """The bytes of all weights of an import."""
    out = folder.with_name(f"{folder.name}_m")
    hf_to_megatron(folder, out, num_zero_experts=2, workers=2, max_shard_bytes=20_000)
    assert verify(folder, out) == []
    assert json.loads((out / "hf_config/config.json").read_text()).keys().isdisjoint({"quantization_config"})
    return snapshot(out / "release"), json.loads((out / "zeda.json").read_text())["source_sha256"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_becomes_what_transformers_makes_of_it(tmp_path, dtype):
    hf = plain(tmp_path / "hf")
    fp8(hf)
    edit_json("config.json", lambda config: config | {"dtype": dtype})(hf)
    theirs = AutoModelForCausalLM.from_pretrained(
        hf, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    if dtype == "bfloat16":  # the other one widens its plain weights, too
        theirs.save_pretrained(tmp_path / "theirs")
        assert imported(hf) == imported(tmp_path / "theirs")
    reader, read = PublishedReader(hf), tiny.hf_reader(theirs)
    for key in list(reader.keys()):
        assert torch.equal(reader.read(key).to(theirs.dtype), read(key)), key
    assert reader.dtype(EXPERT) == reader.read(EXPERT).dtype == theirs.dtype


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(16, 16), (8, 32), (24, 20), (7, 3), (128, 128)])
def test_fp8_blocks_of_any_size_have_their_own_scales(tmp_path, block, scale_type):
    hf = plain(tmp_path / "hf", num_hidden_layers=1, moe_intermediate_size=24)
    stored, values = fp8(hf, block, scale_type)
    reader = PublishedReader(hf)
    assert sorted(reader.keys()) == sorted(key for key in stored if not key.endswith("scale_inv"))
    theirs, compared = Fp8Dequantize(None), 0
    for key, value in values.items():
        ours = reader.read(key)
        assert ours.dtype == torch.bfloat16 and ours.shape == reader.shape(key)
        assert torch.equal(ours, value), key
        if all(size % side == 0 for size, side in zip(value.shape, block)):
            scales = stored[f"{key}_scale_inv"]
            assert torch.equal(ours, theirs._dequantize_one(stored[key], scales, torch.bfloat16))
            compared += 1
    assert compared or block not in [(16, 16), (8, 32)]


def test_rows_of_a_merged_fp8_tensor_keep_the_blocks_of_the_whole(tmp_path):
    """The up half begins within a block."""
    hf = plain(tmp_path / "hf", num_hidden_layers=1)
    whole = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(2))
    fused(hf)
    single(hf, weights_of(hf) | {MERGED: whole, f"{MERGED}_scale_inv": scales})
    told(hf, quant_method="fp8", weight_block_size=[12, 24])
    reader = PublishedReader(hf)
    for e in range(4):
        value = (whole[e].float() * expanded(scales[e], (12, 24), (32, 32))).to(torch.bfloat16)
        gate, up = (
            reader.read(f"model.layers.0.mlp.experts.{e}.{one}_proj.weight") for one in ("gate", "up")
        )
        assert torch.equal(torch.cat([gate, up]), value)


@pytest.mark.parametrize("mtp", [False, True], ids=["carried", "built"])
def test_a_head_of_multi_token_prediction_in_fp8_is_exported_plain(tmp_path, mtp):
    hf = tmp_path / "hf"
    tiny_mtp.WithHead().save(hf, torch.bfloat16)
    stored, values = fp8(hf)
    assert any(key.startswith("model.layers.3.") for key in values)
    wanted = {key: value for key, value in stored.items() if not key.endswith("_scale_inv")} | values
    hf_to_megatron(hf, tmp_path / "m", mtp=mtp)
    assert verify(hf, tmp_path / "m") == []
    for template in (hf, tmp_path / "m/hf_config"):
        megatron_to_hf(tmp_path / "m", template, tmp_path / "back", overwrite=True)
        assert_same_bits(weights_of(tmp_path / "back"), wanted)
        assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def assert_experts(reader, merged, experts=4):
    """Plain tensors of experts are those in merged ones of gpt-oss's layout."""
    for key, value in merged.items():
        for e in range(experts):
            names = (
                {"gate": value[e][..., ::2], "up": value[e][..., 1::2]}
                if "gate_up" in key
                else {"down": value[e]}
            )
            head, kind = key.rpartition(".")[0], "bias" if key.endswith("_bias") else "weight"
            for name, part in names.items():
                ours = reader.read(f"{head}.{e}.{name}_proj.{kind}")
                assert ours.shape == reader.shape(f"{head}.{e}.{name}_proj.{kind}")
                assert same_bits(ours, part.t() if kind == "weight" else part), (key, e, name)


def test_mxfp4_becomes_what_transformers_makes_of_it(tmp_path):
    """All exponents and all four-bit numbers, down to where bf16 runs out."""
    hf = plain(tmp_path / "hf", num_hidden_layers=1, moe_intermediate_size=64)
    theirs = mxfp4(hf, width=64, layers=1)
    weights = weights_of(hf)
    scales, blocks = weights[f"{MERGED}_scales"], weights[f"{MERGED}_blocks"]
    assert len(scales.unique()) > 200 and len(blocks.unique()) == 256
    assert_experts(PublishedReader(hf), theirs)


def test_mxfp4_is_imported_as_the_plain_folder(tmp_path):
    hf = plain(tmp_path / "hf", moe_intermediate_size=32)
    theirs, other = mxfp4(hf), plain(tmp_path / "plain", moe_intermediate_size=32)
    weights = weights_of(other)
    for key in [key for key in weights if ".experts." in key]:
        head, _, rest = key.partition(".experts.")
        e, name, _ = rest.split(".")
        both = theirs[f"{head}.experts.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"][int(e)]
        part = {"gate_proj": both[:, ::2], "up_proj": both[:, 1::2], "down_proj": both}[name]
        weights[key] = part.t().contiguous()
    single(other, weights)
    assert imported(hf) == imported(other)


def save_gpt_oss(folder):
    """A tiny gpt-oss of bf16 weights; its merged experts, biases too."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=32, head_dim=8)
    config = GptOssConfig(num_local_experts=4, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = tiny.drawn(GptOssForCausalLM, config, 0, 0.3).to(torch.bfloat16)
    model.save_pretrained(folder)
    return {key: value for key, value in model.state_dict().items() if ".experts." in key}


def test_merged_experts_of_gpt_oss_are_taken_apart(tmp_path):
    merged, stored = save_gpt_oss(tmp_path / "hf"), weights_of(tmp_path / "hf")
    assert len(merged) == 8 and merged.keys() <= stored.keys()
    reader = PublishedReader(tmp_path / "hf")
    assert_experts(reader, merged)
    assert len(reader.keys()) == len(stored) - 8 + 2 * 4 * 6


def test_a_published_gpt_oss_is_read_as_transformers_opens_it(tmp_path):
    """Packed matrices beside plain biases."""
    biases = {key: value for key, value in save_gpt_oss(tmp_path / "hf").items() if key.endswith("_bias")}
    mxfp4(tmp_path / "hf", more=biases)
    theirs, found = GptOssForCausalLM.from_pretrained(
        tmp_path / "hf", quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and theirs.dtype == torch.bfloat16
    merged = {key: value for key, value in theirs.state_dict().items() if ".experts." in key}
    assert len(merged) == 8
    assert_experts(PublishedReader(tmp_path / "hf"), merged)
    theirs.save_pretrained(tmp_path / "theirs")
    assert imported(tmp_path / "hf") == imported(tmp_path / "theirs")
    hf_to_megatron(tmp_path / "hf", tmp_path / "static")
    megatron_to_hf(tmp_path / "static", tmp_path / "hf", tmp_path / "back")
    assert_same_bits(weights_of(tmp_path / "back"), weights_of(tmp_path / "theirs"))


def family(monkeypatch, **published):
    """Qwen3-MoE, published otherwise."""
    monkeypatch.setattr(
        qwen3_moe, "WEIGHTS", replace(qwen3_moe.WEIGHTS, published=PublishedNames(**published))
    )


@pytest.mark.parametrize("make", [tiny.hf_model, tiny.glm_model])
def test_merged_experts_are_imported_as_single_ones(tmp_path, make):
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in weights_of(tmp_path / "merged"))
    assert imported(tmp_path / "merged") == imported(tmp_path / "single")


def test_an_export_with_merged_experts_is_what_transformers_saves(tmp_path, monkeypatch):
    model = tiny.hf_model(**SMALL).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    hf_to_megatron(tmp_path / "hf", tmp_path / "m")
    family(monkeypatch, experts=HALVES, writes_fused=True)
    for shard in (10_000, 2_000_000):
        out = tmp_path / str(shard)
        megatron_to_hf(tmp_path / "m", tmp_path / "m/hf_config", out, max_shard_bytes=shard)
        assert_same_bits(weights_of(out), weights_of(tmp_path / "merged"))
        assert verify(out, tmp_path / "m") == []


@pytest.mark.parametrize("layout", [TURNS, FusedExperts(turned=True), FusedExperts(interleaved=True)])
def test_every_layout_of_merged_experts_goes_round(tmp_path, monkeypatch, layout):
    hf = plain(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "m")
    family(monkeypatch, experts=layout, writes_fused=True)
    megatron_to_hf(tmp_path / "m", hf, tmp_path / "back", workers=2)
    weights, merged = weights_of(hf), weights_of(tmp_path / "back")
    one = merged[MERGED][1].t() if layout.turned else merged[MERGED][1]
    up = one[1::2] if layout.interleaved else one[16:]
    assert torch.equal(up, weights[EXPERT])
    hf_to_megatron(tmp_path / "back", tmp_path / "again")
    assert snapshot(tmp_path / "again/release") == snapshot(tmp_path / "m/release")
    assert verify(tmp_path / "back", tmp_path / "m") == verify(hf, tmp_path / "m") == []


def test_a_text_model_within_another_is_imported_and_the_rest_carried(tmp_path, monkeypatch):
    hf = plain(tmp_path / "hf")
    inner = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    tower = {
        "vision_tower.patch.proj.weight": torch.randn(3, 2, 4, 4).to(torch.bfloat16),
        "vision_tower.logit_scale": torch.randn(()),
        "mm_projector.0.bias": torch.randn(5),
    }
    text = {
        inner[head := key[: key.index(".") + 1]] + key.removeprefix(head): v
        for key, v in weights_of(hf).items()
    }
    wrapped = shutil.copytree(hf, tmp_path / "wrapped")
    single(wrapped, text | tower)
    with pytest.raises(UserError, match=r"vision_tower\.logit_scale"):
        hf_to_megatron(wrapped, tmp_path / "x")
    was = imported(hf)
    prefixes = tuple((theirs, ours) for ours, theirs in inner.items())
    family(monkeypatch, prefixes=prefixes, aside=("vision_tower.", "mm_projector."))
    assert imported(wrapped) == was
    out = tmp_path / "wrapped_m"
    assert_same_bits(weights_of(out / "hf_config/carried"), tower)
    hf_to_megatron(wrapped, tmp_path / "static_m")
    for template in (wrapped, out / "hf_config"):
        back = tmp_path / f"back_{template.name}"
        megatron_to_hf(tmp_path / "static_m", template, back, max_shard_bytes=20_000)
        assert_same_bits(weights_of(back), text | tower)
        assert verify(back, tmp_path / "static_m") == []
    with pytest.raises(UserError, match="no tensor beside the text model"):
        megatron_to_hf(tmp_path / "static_m", hf, tmp_path / "y")


def test_a_quantised_text_model_within_another_is_read_as_it_is_alone(tmp_path, monkeypatch):
    hf = plain(tmp_path / "hf")
    fp8(hf)
    alone = PublishedReader(hf)
    wrapped = shutil.copytree(hf, tmp_path / "wrapped")
    single(wrapped, {f"outer.{key}": value for key, value in weights_of(hf).items()})
    config = json.loads((hf / "config.json").read_text())
    inner = {"text_config": {"dtype": config.pop("dtype")}}
    (wrapped / "config.json").write_text(json.dumps(config | inner))
    family(monkeypatch, prefixes=(("outer.", ""),))
    reader = PublishedReader(wrapped)
    assert reader.keys() == alone.keys() and reader.dequantised
    assert all(same_bits(reader.read(key), alone.read(key)) for key in list(alone.keys()))
    single(wrapped, {key: v for key, v in weights_of(wrapped).items() if key != f"outer.{SCALE}"})
    with pytest.raises(UserError, match=re.escape(f"tensor outer.{EXPERT} is fp8, but its scales")):
        PublishedReader(wrapped)


def test_an_interrupted_import_goes_on_and_has_the_same_bits(tmp_path, monkeypatch):
    hf, flags = plain(tmp_path / "hf"), dict(num_zero_experts=2, max_shard_bytes=20_000)
    fp8(hf)
    hf_to_megatron(hf, tmp_path / "whole", **flags)
    reads, read = [], PublishedReader.read

    def breaks(self, key):
        reads.append(key)
        if len(reads) == 30:
            raise OSError("broken disk")
        return read(self, key)

    monkeypatch.setattr(PublishedReader, "read", breaks)
    with pytest.raises(UserError, match="broken disk; what is done stays"):
        hf_to_megatron(hf, tmp_path / "m", **flags)
    assert not (tmp_path / "m").exists() and (tmp_path / "m.partial").is_dir()
    hf_to_megatron(hf, tmp_path / "m", **flags)
    assert snapshot(tmp_path / "m") == snapshot(tmp_path / "whole")
    assert len(reads) < 30 + len(PublishedReader(hf).keys()), "finished files are read again"


def test_scales_of_zero_give_zeros_as_in_transformers(tmp_path):
    hf = plain(tmp_path / "hf")
    fp8(hf)
    single(hf, weights_of(hf) | {SCALE: torch.zeros(1, 2)})
    assert torch.equal(PublishedReader(hf).read(EXPERT), torch.zeros(16, 32, dtype=torch.bfloat16))


def test_two_names_of_one_tensor_are_refused(tmp_path, monkeypatch):
    hf = plain(tmp_path / "hf")
    family(monkeypatch, prefixes=(("language_model.", "model."),))
    single(hf, weights_of(hf) | {"language_model.norm.weight": torch.ones(32)})
    with pytest.raises(UserError, match=r"are both model\.norm\.weight; remove one of the two"):
        PublishedReader(hf)


def test_a_head_of_multi_token_prediction_that_transformers_does_not_save_is_carried_or_absent(tmp_path):
    FAMILIES["qwen3_next"].make().save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "without")
    assert not (tmp_path / "without/hf_config/carried").exists()
    megatron_to_hf(tmp_path / "without", tmp_path / "hf", tmp_path / "back")
    text = weights_of(tmp_path / "hf")
    assert_same_bits(weights_of(tmp_path / "back"), text)
    head = {"mtp.fc.weight": torch.randn(3, 2), "mtp.layers.0.mlp.gate.weight": torch.randn(8, 32)}
    whole = shutil.copytree(tmp_path / "hf", tmp_path / "whole")
    single(whole, text | head)
    hf_to_megatron(whole, tmp_path / "with", num_zero_experts=4)
    assert verify(whole, tmp_path / "with") == []
    megatron_to_hf(tmp_path / "with", tmp_path / "with/hf_config", tmp_path / "dynamic")
    exported = weights_of(tmp_path / "dynamic")
    assert_same_bits({key: exported[key] for key in head}, head)
