"""Models that see, too: their language model is adapted, the rest is carried along bit for bit (Qwen3.5, Qwen3.6)."""

import json
import shutil

import pytest
import tiny
import torch
from families import EVERY, FAMILIES, seeing_model
from odd_folders import single
from tiny import assert_same_bits, weights_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.hf_config import adapted_steps_of, zero_experts_of
from zeda_megatron.serving.load import load_model, load_zero_expert_model

TEXT = "qwen3_5_moe_text"
pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.skipif(TEXT not in FAMILIES, reason="this version of transformers does not have the model"),
]
TOKENS = torch.randint(7, 96, (2, 9), generator=torch.Generator().manual_seed(5))
HEAD = {"mtp.fc.weight": torch.randn(3, 2), "mtp.layers.0.mlp.gate.weight": torch.randn(8, 32)}


@pytest.fixture
def folder(tmp_path):
    """A folder as published, with a head of multi-token prediction, and its model."""
    model = seeing_model()
    model.save_pretrained(tmp_path / "hf")
    stored = weights_of(tmp_path / "hf") | HEAD
    merged = {key for key in stored if key.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    for layer in range(3) if not merged else ():  # some versions save every expert alone
        at = f"model.language_model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([stored.pop(f"{at}{expert}.{name}_proj.weight") for expert in range(8)])
            for name in ("gate", "up", "down")
        )
        stored |= {f"{at}gate_up_proj": torch.cat([gate, up], dim=1), f"{at}down_proj": down}
    single(tmp_path / "hf", stored)
    (tmp_path / "hf/preprocessor_config.json").write_text('{"patch_size": 4}')
    return tmp_path / "hf", model


def picture():
    """What the model is given for one picture of four patches, merged into one token."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(7, 96, (1, 9), generator=draw)
    ids[0, 2:5] = torch.tensor([5, 3, 6])
    kinds = (ids == 3).int()
    patches = torch.randn(4, 3 * 2 * 4 * 4, generator=draw)
    grid = torch.tensor([[1, 2, 2]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def test_the_language_model_is_read_as_if_it_stood_alone():
    whole = read_architecture(seeing_model().config.to_dict() | {"architectures": None})
    alone = read_architecture(EVERY[TEXT].fields)
    assert whole.megatron == alone.megatron and whole.rotary == alone.rotary
    assert whole.vocab_size == alone.vocab_size and not whole.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, r"settings of the language model in an object text_config"),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            r"'qwen3_moe' has no settings",
        ),
        ({"text_config": {"model_type": "qwen3_5_text"}}, r"text_config: model_type 'qwen3_5_text' must be"),
        ({"text_config": {"num_experts": 0}}, r"text_config: num_experts '0' must be a whole number from 1"),
        ({"text_config": {"hidden_size": None}}, r"text_config: hidden_size 'None' must be"),
        ({"text_config": {"zce_nums": [2], "zce_types": ["odd"]}}, r"zce_types \['odd'\] is not supported"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_its_key(change, message):
    config = seeing_model().config.to_dict() | {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    inner = change.get("text_config")
    changed = config | change | ({"text_config": config["text_config"] | inner} if inner else {})
    with pytest.raises(UserError, match=message):
        read_architecture(changed)
        zero_experts_of(changed)


@pytest.mark.parametrize("kind", [{}, {"num_zero_experts": 4}, {"zero_expert_routing": "paired"}])
@torch.no_grad()
def test_a_round_trip_changes_routers_alone_and_the_model_still_sees(folder, tmp_path, kind):
    hf, static = folder
    hf_to_megatron(hf, tmp_path / "megatron", **kind)
    assert verify(hf, tmp_path / "megatron") == []
    template = tmp_path / "megatron/hf_config"
    megatron_to_hf(tmp_path / "megatron", template, tmp_path / "back")
    before, after = weights_of(hf), weights_of(tmp_path / "back")
    routers = {key for key in before if key.endswith("mlp.gate.weight") and not key.startswith("mtp.")}
    assert len(routers) == 3 and sum(key.startswith("model.visual.") for key in before) > 10
    for key in routers:
        assert torch.equal(after[key][:8], before[key])
    others = before.keys() - routers
    assert_same_bits({key: after[key] for key in others}, {key: before[key] for key in others})
    assert all(".mlp.gate.zero_" in key for key in after.keys() - before.keys())
    assert (tmp_path / "back/preprocessor_config.json").read_bytes() == (
        hf / "preprocessor_config.json"
    ).read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert zero_experts_of(config).num_zero_experts == (8 if "zero_expert_routing" in kind else len(kind) * 4)
    assert not any(key.startswith("zce_") for key in config), "ours stand with the language model's"
    if not kind:
        assert_same_bits(after, before)
        assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
        tiny.close(load_model(tmp_path / "back")(TOKENS).logits, static(TOKENS).logits, rtol=0, atol=1e-5)
        return
    opened = [
        load_zero_expert_model(tmp_path / "back"),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "back", trust_remote_code=True),
        AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True),
    ]
    seen = static(**picture()).logits
    for model in opened:
        assert type(model).__name__ == "Qwen3_5MoePlusPlusForConditionalGeneration"
        assert len(model.moe_blocks()) == 3
        skipping = model(TOKENS).logits
        model.set_zero_mask(True)
        tiny.close(model(TOKENS).logits, static(TOKENS).logits, rtol=0, atol=1e-5)
        tiny.close(model(**picture()).logits, seen, rtol=0, atol=1e-5)
        model.set_zero_mask(False)
        assert torch.equal(model(TOKENS).logits, skipping)
    assert (seen - static(picture()["input_ids"]).logits).abs().max() > 0.1, "the picture says nothing"


@torch.no_grad()
def test_the_dial_of_a_model_that_sees_is_saved_with_it_and_left_out_of_an_import(folder, tmp_path):
    hf, _ = folder
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=4)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "dynamic")
    model = load_zero_expert_model(tmp_path / "dynamic")
    usual = model(TOKENS).logits
    model.set_zero_logit_bias(2.0)
    turned = model(TOKENS).logits
    assert not torch.equal(turned, usual)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(again(TOKENS).logits, turned)
    shutil.copyfile(hf / "preprocessor_config.json", tmp_path / "saved/preprocessor_config.json")
    hf_to_megatron(tmp_path / "saved", tmp_path / "again")
    kept = json.loads((tmp_path / "again/hf_config/config.json").read_text())
    assert not any(key.startswith("zce_") for key in kept["text_config"])
    assert adapted_steps_of(json.loads((tmp_path / "saved/config.json").read_text())) == 0
