"""Conversion both ways: bits, Megatron's own loader, transformers' logits, and errors a user can cause."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from tiny import assert_same_bits, weights_of
from tiny_models import TINY, make_hf_folder
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from zeda_megatron.checkpoint.state import require_checkpoint
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.models.load import load_weights
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.runtime.process_groups import initialize
from zeda_megatron.serving.load import load_zero_expert_model

CLI = Path(__file__).parents[2] / "tools" / "checkpoint_convert.py"
N, NZ = TINY["num_experts"], 3
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "dense layers": {"mlp_only_layers": [0], "num_hidden_layers": 4, "decoder_sparse_step": 2},
}


def load_megatron(folder, hf, zero=None, dtype=torch.float32):
    """Build the model and load it with Megatron's own loader."""
    initialize(ParallelConfig())
    arch = read_architecture(hf)
    model = build_gpt_model(arch, transformer_config(arch, dtype=dtype), zero).eval()
    load_weights([model], require_checkpoint(folder, "--load"), "--load")
    return model


@torch.no_grad()
def megatron_logits(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None)


@pytest.fixture
def tokens():
    return torch.randint(0, TINY["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_gives_back_every_bit(tmp_path, variant, dtype):
    hf, _ = make_hf_folder(tmp_path / "hf", dtype, **VARIANTS[variant])
    hf_to_megatron(hf, tmp_path / "megatron")
    summary = megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back", max_shard_bytes=20_000)
    assert_same_bits(weights_of(tmp_path / "back"), weights_of(hf))
    assert summary.tensors == len(weights_of(hf))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (hf / "config.json").read_text()
    )
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_text() == (hf / name).read_text()
        assert (tmp_path / "megatron" / "hf_config" / name).is_file()
    assert verify(hf, tmp_path / "megatron") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_round_trip_keeps_every_original_bit(tmp_path, dtype):
    hf, _ = make_hf_folder(tmp_path / "hf", dtype)
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ, seed=3)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "megatron/hf_config", tmp_path / "back")
    original, back = weights_of(hf), weights_of(tmp_path / "back")
    for key in original:
        if key.endswith("mlp.gate.weight"):
            assert back[key].shape == (N + NZ, 32) and back[key].dtype == dtype
            back[key] = back[key][:N]
    assert_same_bits(back, original)
    assert verify(hf, tmp_path / "megatron") == []
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["Qwen3MoePlusPlusForCausalLM"]
    assert config["model_type"] == "qwen3_moe"
    assert (config["zce_nums"], config["zce_types"], config["use_zce_mask"]) == ([NZ], ["zero"], False)
    # and the dynamic folder goes round too, zero rows included
    hf_to_megatron(tmp_path / "back", tmp_path / "again")
    megatron_to_hf(tmp_path / "again", tmp_path / "back", tmp_path / "back2")
    assert_same_bits(weights_of(tmp_path / "back2"), weights_of(tmp_path / "back"))
    assert verify(tmp_path / "back", tmp_path / "again") == []


def test_zero_rows_depend_on_the_seed_only(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    key = "model.layers.1.mlp.gate.weight"
    rows = []
    for i, seed in enumerate([1, 1, 2]):
        hf_to_megatron(hf, tmp_path / f"m{i}", num_zero_experts=NZ, seed=seed)
        megatron_to_hf(tmp_path / f"m{i}", hf, tmp_path / f"h{i}")
        rows.append(weights_of(tmp_path / f"h{i}")[key][N:])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_loads_it_and_its_logits_are_those_of_transformers(tmp_path, tokens, variant):
    hf, model = make_hf_folder(tmp_path / "hf", **VARIANTS[variant])
    hf_to_megatron(hf, tmp_path / "megatron")
    ours = megatron_logits(load_megatron(tmp_path / "megatron", hf), tokens)
    with torch.no_grad():
        theirs = model(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["zero", "copy", "learned"])
def test_dynamic_model_has_the_same_logits_in_megatron_and_transformers(tmp_path, tokens, kind):
    hf, static = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ, zero_experts_type=kind)
    model = load_megatron(tmp_path / "megatron", hf, ZeroExpertConfig(NZ, kind))
    if kind == "learned":  # wake the zero experts up, and save as training does
        for name, parameter in model.named_parameters():
            if name.endswith("zero_output.bias"):
                assert parameter.abs().sum() == 0
                torch.nn.init.normal_(parameter)
        from zeda_megatron.checkpoint.state import model_state, save_checkpoint

        save_checkpoint(tmp_path / "megatron", 7, model_state([model]))
    ours = megatron_logits(model, tokens)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(exported).__name__ == "Qwen3MoePlusPlusForCausalLM"
    with torch.no_grad():
        theirs, static_logits = exported(tokens).logits, static(tokens).logits
        exported.set_zero_mask(True)
        masked = exported(tokens).logits
    assert all(0 < share < 1 for share in exported.zero_share())
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (theirs - static_logits).abs().max() > 0.01
    assert (masked - static_logits).abs().max() < 1e-5 * theirs.abs().max()
    with zero_mask([model]):
        assert (megatron_logits(model, tokens) - static_logits).abs().max() < 1e-5 * theirs.abs().max()


def test_static_export_opens_in_stock_transformers(tmp_path, tokens):
    hf, _ = make_hf_folder(tmp_path / "hf", torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    first, again = (Qwen3MoeForCausalLM.from_pretrained(folder) for folder in (hf, tmp_path / "out"))
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, first(tokens).logits)


def test_authors_folder_is_understood(tmp_path, tokens):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "m", num_zero_experts=NZ)
    megatron_to_hf(tmp_path / "m", hf, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config.pop("auto_map")
    config["model_type"] = "qwen3_moe_plus_plus"
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    summary = hf_to_megatron(tmp_path / "theirs", tmp_path / "megatron")
    assert summary.zero == ZeroExpertConfig(NZ, "zero")
    ours = megatron_logits(load_megatron(tmp_path / "megatron", hf, summary.zero), tokens)
    with torch.no_grad():
        theirs = load_zero_expert_model(tmp_path / "theirs")(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3_moe"


def test_megatrons_own_saver_and_stacked_layers_are_read(tmp_path):
    """Stock Megatron stores uniform models with all layers in one tensor."""
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    model = load_megatron(tmp_path / "megatron", hf)
    model.decoder.config.moe_layer_freq = 1
    state = model.sharded_state_dict()
    assert any(item.key == "decoder.layers.mlp.router.weight" for item in state.values())
    (tmp_path / "stock").mkdir()
    dist_checkpointing.save(state, str(tmp_path / "stock"))
    megatron_to_hf(tmp_path / "stock", hf, tmp_path / "back")
    assert_same_bits(weights_of(tmp_path / "back"), weights_of(hf))
    assert verify(hf, tmp_path / "stock") == []


def test_dtype_flag_casts_and_is_recorded(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "megatron/hf_config", tmp_path / "back")
    original, back = weights_of(hf), weights_of(tmp_path / "back")
    assert_same_bits(back, {key: tensor.bfloat16() for key, tensor in original.items()})
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    assert len(verify(hf, tmp_path / "megatron")) == len(original)


def test_an_export_says_which_type_its_weights_have_whatever_the_template_says(tmp_path):
    """`dtype="auto"` rounds to what config.json says."""
    hf, _ = make_hf_folder(tmp_path / "hf", torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron", dtype="fp32")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path / "back").values())
    assert json.loads((hf / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float32"


def test_verify_names_the_changed_tensor(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", num_zero_experts=NZ)
    keys = ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.2.mlp.gate.weight"]
    for shard in hf.glob("*.safetensors"):
        tensors = load_file(shard)
        for key in keys:
            if key in tensors:
                tensors[key].view(-1)[5] += 1
                save_file(tensors, shard, metadata={"format": "pt"})
    differences = verify(hf, tmp_path / "megatron")
    assert [line.split(":")[0] for line in differences] == sorted(keys)
    assert "1 of 512 values differ" in differences[0]


def test_source_hash_ignores_sharding_but_not_content(tmp_path):
    digests = []
    for name, size, seed in [("a", "20kB", 0), ("b", "1GB", 0), ("c", "20kB", 1)]:
        hf, _ = make_hf_folder(tmp_path / name, max_shard_size=size, seed=seed)
        hf_to_megatron(hf, tmp_path / f"m{name}")
        digests.append(json.loads((tmp_path / f"m{name}" / "zeda.json").read_text())["source_sha256"])
    assert digests[0] == digests[1] != digests[2]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def truncate_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)


def add_tensor(folder, key):
    save_file({key: torch.zeros(32)}, folder / "extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][key] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN_SOURCES = {
    "missing shard": (drop_shard, r"model-00001-of-\d+\.safetensors: shard is missing"),
    "truncated shard": (truncate_shard, r"model-00001-of-\d+\.safetensors: shard is truncated, tensor"),
    "wrong shape": (
        lambda folder: edit_config(folder, moe_intermediate_size=24),
        r"safetensors: tensor \S+experts\.0\.gate_proj\.weight has shape \[16, 32\], expected \[24, 32\]",
    ),
    "unknown architecture": (
        lambda folder: edit_config(folder, architectures=["LlamaForCausalLM"]),
        r"config\.json: architecture 'LlamaForCausalLM'",
    ),
    "layer too few": (
        lambda folder: edit_config(folder, num_hidden_layers=2),
        r"hf: \d+ tensors do not belong to this architecture: model\.layers\.2\.",
    ),
    "layer too many": (
        lambda folder: edit_config(folder, num_hidden_layers=4),
        r"hf: \d+ tensors are missing: model\.layers\.3\.",
    ),
    "wrong tie": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        r"hf: config ties lm_head\.weight to model\.embed_tokens\.weight, but the two tensors differ",
    ),
    "biases that Megatron's layer lacks": (
        lambda folder: add_tensor(folder, "model.layers.0.self_attn.o_proj.bias"),
        r"hf: 1 tensors do not belong to this architecture: model\.layers\.0\.self_attn\.o_proj\.bias",
    ),
    "unknown zero type": (
        lambda folder: edit_config(folder, zce_nums=[2], zce_types=["constant"]),
        r"zce_types \['constant'\] is not supported",
    ),
}


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_broken_source_is_named_and_nothing_is_written(tmp_path, case):
    hf, _ = make_hf_folder(tmp_path / "hf")
    spoil, message = BROKEN_SOURCES[case]
    spoil(hf)
    with pytest.raises(UserError, match=message):
        hf_to_megatron(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_wrong_flags_are_named(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    with pytest.raises(UserError, match="--num-zero-experts -1"):
        hf_to_megatron(hf, tmp_path / "out", num_zero_experts=-1)
    with pytest.raises(UserError, match="--zero-experts-type 'sparse'"):
        hf_to_megatron(hf, tmp_path / "out", num_zero_experts=2, zero_experts_type="sparse")
    with pytest.raises(UserError, match="--dtype 'int4'"):
        hf_to_megatron(hf, tmp_path / "out", dtype="int4")
    edit_config(hf, zce_nums=[2], zce_types=["zero"])
    with pytest.raises(UserError, match=r"--num-zero-experts 3: .* already has 2 zero experts"):
        hf_to_megatron(hf, tmp_path / "out", num_zero_experts=3)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_broken_megatron_checkpoint_is_named(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    data = tmp_path / "megatron/release/__0_0.distcp"
    whole = data.read_bytes()
    os.truncate(data, len(whole) // 2)
    with pytest.raises(UserError, match=r"__0_0\.distcp has \d+ bytes, \d+ were written"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    (tmp_path / "megatron/release/integrity.json").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp: file is truncated, tensor \S+ ends at byte"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    data.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp: file is missing"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    (tmp_path / "megatron/release/metadata.json").unlink()
    with pytest.raises(UserError, match="no complete Megatron checkpoint"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        megatron_to_hf(tmp_path / "nowhere", hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_template_that_does_not_fit_is_named(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    edit_config(hf, num_hidden_layers=2)
    with pytest.raises(
        UserError, match=r"holds \d+ tensors that the config lacks, e\.g\. decoder\.layers\.2\."
    ):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    edit_config(hf, num_hidden_layers=3, moe_intermediate_size=24)
    with pytest.raises(UserError, match=r"linear_fc\d\.weight has shape"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")


def test_command_works_inside_a_launched_job(tmp_path):
    """Variables of torchrun or Slurm must not make it wait for other processes."""
    hf, _ = make_hf_folder(tmp_path / "hf")
    command = [
        sys.executable,
        CLI,
        "hf-to-megatron",
        "--hf",
        hf,
        "--out",
        tmp_path / "m",
        "--num-zero-experts",
        "3",
    ]
    around = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | around)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path}/m: ") and "3 zero experts" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(CLI), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(CLI), run_name="__main__")
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


def test_commands_convert_and_verify(tmp_path, command):
    hf, _ = make_hf_folder(tmp_path / "hf")
    assert command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m", "--num-zero-experts", 3)[0] == 0
    code, out, _ = command(
        "megatron-to-hf", "--megatron", tmp_path / "m", "--hf-template", hf, "--out", tmp_path / "out"
    )
    assert code == 0 and "3 zero experts" in out
    assert command("verify", "--hf", tmp_path / "out", "--megatron", tmp_path / "m")[0] == 0
    other, _ = make_hf_folder(tmp_path / "other", seed=1)
    capture = command("verify", "--hf", other, "--megatron", tmp_path / "m")
    assert capture[0] == 1
    assert "different: model.embed_tokens.weight" in capture[2]


def test_commands_never_overwrite_and_say_so_in_one_line(tmp_path, command):
    hf, _ = make_hf_folder(tmp_path / "hf")
    to_megatron = ("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    to_hf = ("megatron-to-hf", "--megatron", tmp_path / "m", "--hf-template", hf, "--out", hf)
    assert command(*to_megatron)[0] == 0
    for arguments, target in ((to_megatron, tmp_path / "m"), (to_hf, hf)):
        before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        code, _, err = command(*arguments)
        assert code == 2
        assert err == f"error: {target}: folder is not empty; choose another --out or pass --overwrite\n"
        assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert command(*to_megatron, "--overwrite", "--num-zero-experts", 2)[0] == 0
    assert json.loads((tmp_path / "m/zeda.json").read_text())["num_zero_experts"] == 2


def test_a_terminal_sees_how_far_a_conversion_is_unless_it_is_told_not_to(
    world, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for flags in ([], ["--no-progress"]):
        there, back = (tmp_path / f"{name}{len(flags)}" for name in ("megatron", "hf"))
        runs = {
            "import": ["hf-to-megatron", "--hf", world.hf, "--out", there],
            "verify": ["verify", "--hf", world.hf, "--megatron", there],
            "export": ["megatron-to-hf", "--megatron", there, "--hf-template", world.hf, "--out", back],
        }
        for title, words in runs.items():
            code, _, err = command(*words, *flags)
            assert code == 0 and (f"{title}: " in err) is (not flags), (title, err)
