"""What an export, `hf_config/` and a pruned folder take over of a Hugging Face folder, and what stays behind."""

import json
import os

import pytest
import torch
from odd_folders import fused, names_case, single
from safetensors.torch import save_file
from tiny import weights_of
from tiny_models import make_hf_folder
from transformers import AutoModelForCausalLM

from examples.rivals.reap import write_pruned
from zeda_megatron.checkpoint.state import require_checkpoint
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_files import HFReader
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.models.hf_config import (
    copy_side_files,
    dynamic_config,
    static_config,
    with_dtype,
    with_stored_dtype,
    write_config,
)

EVIL = "someone/repo--evil.C"
CODE = {
    "auto_map": {"AutoConfig": EVIL, "AutoModelForCausalLM": EVIL, "AutoTokenizer": [EVIL, None]},
    "custom_pipelines": {"text-generation": {"impl": "evil.P", "pt": ["evil.C"]}},
    "trust_remote_code": True,
    "inner": {"auto_map": {"AutoProcessor": EVIL}, "list": [{"auto_map": {"AutoModel": EVIL}}]},
}


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    """A folder that names code wherever it can."""
    folder, _ = make_hf_folder(tmp_path_factory.mktemp("armed") / "hf", max_shard_size="1GB")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(value | CODE))
    (folder / "tokenizer.json").write_text('{"auto_map": "kept: the Rust library reads no code"}')
    for name in ("evil.py", "tokenizer_evil.py", "vocab.pkl", "tokenizer.so", "chat_template.py"):
        (folder / name).write_text("raise SystemExit")
    (folder / "processor_config.json").write_text(json.dumps(CODE))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.model.v3").write_text("x")
    return folder


def test_no_code_of_the_input_reaches_an_export_hf_config_or_a_pruned_folder(armed, tmp_path):
    hf_to_megatron(armed, tmp_path / "m", num_zero_experts=2)
    # An older import, whose hf_config/ still has everything.
    (tmp_path / "old").mkdir()
    for path in armed.iterdir():
        if path.suffix == ".json":
            (tmp_path / "old" / path.name).write_bytes(path.read_bytes())
    megatron_to_hf(tmp_path / "m", tmp_path / "m" / "hf_config", tmp_path / "out")
    megatron_to_hf(tmp_path / "m", tmp_path / "old", tmp_path / "out_old")
    write_pruned(armed, {layer: [0, 2] for layer in range(3)}, tmp_path / "pruned")
    ours = {"modeling_qwen3_moe_zero.py", "zero_expert_model.py", "zero_expert_routing.py"}
    for name, files in (("m/hf_config", set()), ("pruned", set()), ("out", ours), ("out_old", ours)):
        folder = tmp_path / name
        assert {path.name for path in folder.rglob("*.py")} == files
        assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".so")]
        for path in folder.rglob("*.json"):
            assert "evil" not in path.read_text() and "custom_pipelines" not in path.read_text()
        map_of = json.loads((folder / "config.json").read_text()).get("auto_map")
        ours_alone = {"AutoModelForCausalLM": "modeling_qwen3_moe_zero.Qwen3MoePlusPlusForCausalLM"}
        assert map_of == (ours_alone if files else None)
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "tokenizer.json",
        "tokenizer.model.v3",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (armed / name).read_bytes()


def test_files_without_code_keep_their_bytes(tmp_path):
    source, text = tmp_path / "hf", '{"b":1,\n\n "a": "\\u00e9"}'
    source.mkdir()
    (source / "tokenizer_config.json").write_text(text)
    assert copy_side_files(source, tmp_path / "out") == ["tokenizer_config.json"]
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text


def test_templates_in_a_folder_that_leads_out_are_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jinja").write_text("secret")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "additional_chat_templates").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="link to a file outside"):
        copy_side_files(tmp_path / "hf", tmp_path / "out")


def test_the_type_of_the_weights_stands_under_every_name_that_the_config_has():
    sizes = {torch.float32: 10, torch.bfloat16: 2, torch.int64: 100}
    for keys in (["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]):
        config = dict.fromkeys(keys, "bfloat16")
        assert with_stored_dtype(config, sizes) == dict.fromkeys(keys, "float32")
        assert with_dtype(config, "fp16") == dict.fromkeys(keys, "float16")
        assert with_dtype(config, "keep") == config
    assert with_stored_dtype({"a": 1}, sizes) == {"a": 1}
    assert with_dtype({"a": 1}, "bf16") == {"a": 1, "dtype": "bfloat16"}


def test_an_export_opens_with_the_type_of_its_weights(tmp_path):
    folder, _ = make_hf_folder(tmp_path / "hf", torch.bfloat16, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    hf_to_megatron(folder, tmp_path / "m", dtype="fp32")
    megatron_to_hf(tmp_path / "m", tmp_path / "m" / "hf_config", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_a_config_without_architectures_gets_the_one_that_its_model_type_has():
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8"}, "num_local_experts": 4}
    assert static_config(config) == {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "architectures": ["MixtralForCausalLM"],
    }
    assert dynamic_config(config, ZeroExpertConfig(2))["architectures"] == ["MixtralPlusPlusForCausalLM"]


def test_write_config_adds_our_code_alone(tmp_path):
    write_config(tmp_path, {"architectures": ["Qwen3MoePlusPlusForCausalLM"]} | CODE)
    text = (tmp_path / "config.json").read_text()
    assert "evil" not in text and "modeling_qwen3_moe_zero" in text
    assert (tmp_path / "zero_expert_model.py").is_file()


def told(folder, tmp_path):
    with pytest.raises(UserError) as error:
        hf_to_megatron(folder, tmp_path / "m")
    return str(error.value)


def merged_otherwise(folder):
    """Merged experts under names that nobody knows."""
    fused(folder)
    single(
        folder,
        {key.replace("gate_up_proj", "w13_weight"): value for key, value in weights_of(folder).items()},
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors.index.json").unlink(), "several shards, whose index is missing"),
        (names_case(lambda key: "_orig_mod." + key), "a foreign prefix, '_orig_mod.'"),
        (names_case(lambda key: key.removeprefix("model.")), "without the prefix 'model.'"),
        (
            names_case(lambda key: key.replace("model.", "language_model.", 1)),
            "'language_model.' in place of 'model.'",
        ),
        (
            names_case(lambda key: key.replace("q_proj.", "q_proj.base_layer.")),
            "an adapter, LoRA, is not merged",
        ),
        (merged_otherwise, "merged into one tensor, e.g. model.layers.0.mlp.experts.w13_weight"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json: an adapter"),
    ],
)
def test_a_refusal_says_what_was_found(tmp_path, spoil, words):
    folder, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    spoil(folder)
    assert words in told(folder, tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_weights_are_named_before_their_names_are_compared(tmp_path, method):
    folder, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method}})
    )
    assert f"quantization_config '{method}' says" in told(folder, tmp_path), "plain weights"
    weights = weights_of(folder)
    scales = {f"{key}_scale_inv": torch.ones(1) for key in weights if ".experts." in key}
    single(
        folder, {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in weights.items()} | scales
    )
    line = told(folder, tmp_path)
    assert f"quantised (config.json has quantization_config '{method}')" in line and "experts.0" in line


def test_two_sources_are_read_as_transformers_reads_them_or_refused(tmp_path):
    folder, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    zeros = {key: torch.zeros_like(value) for key, value in weights_of(folder).items()}
    for name in ("consolidated.safetensors", "model-00077-of-00077.safetensors"):
        save_file(zeros, folder / name, {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert torch.equal(HFReader(folder).read("model.norm.weight"), theirs["model.norm.weight"])
    save_file(zeros, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        HFReader(folder)


def test_each_kind_of_folder_is_named_where_the_other_belongs(tmp_path):
    folder, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    with pytest.raises(UserError, match="is a Hugging Face folder; convert it first"):
        require_checkpoint(folder, "--pretrained-checkpoint")
    (tmp_path / "m" / "hf_config").mkdir(parents=True)
    with pytest.raises(UserError, match="is a Megatron checkpoint"):
        HFReader(tmp_path / "m")
    with pytest.raises(UserError, match="hf download"):
        HFReader("Qwen/Qwen3-30B-A3B")


def test_a_pipe_beside_the_weights_is_refused(tmp_path):
    folder, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=1)
    os.mkfifo(folder / "merges.txt")
    assert "merges.txt: is a pipe" in told(folder, tmp_path)
