"""Tools that hook or wrap modules find in an exported model what they find in the stock one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_modeling_families import FAMILIES, KINDS, every_family, every_family_and_kind, make_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from zeda_megatron.serving.load import load_zero_expert_model

ROOT = Path(__file__).parents[2]
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")


def split_model(folder, name, kind):
    """A drawn model whose picks are partly zero slots, and tokens."""
    model, tokens = make_model(folder, name, kind), torch.randint(1, 96, (2, 9))
    if KINDS[kind].paired:
        model.set_zero_threshold(tiny.splitting_threshold(model, tokens))
        model.reset_zero_share()
    return model, tokens


@every_family_and_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_offloaded_weights_give_the_same_bits(tmp_path, name, kind, dtype):
    model, tokens = split_model(tmp_path / "source", name, kind)
    expected = model.to(dtype)(tokens).logits
    shares = model.zero_share()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.model.embed_tokens.weight.is_meta
    model.reset_zero_share()
    assert torch.equal(model(tokens).logits, expected)
    assert model.zero_share() == shares and any(shares)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "constant")) for kind in KINDS]
)
@torch.no_grad()
def test_a_folder_opened_partly_on_disk_gives_the_same_bits(tmp_path, kind):
    model, tokens = split_model(tmp_path / "source", "qwen3_moe", kind)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "folder")
    parts = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    parts |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(model.config.num_hidden_layers)}
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", trust_remote_code=True, device_map=parts, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(on_disk(tokens).logits, expected)


@every_family_and_kind
def test_adapters_on_expert_and_router_parameters_train_and_merge(tmp_path, name, kind):
    model, tokens = split_model(tmp_path, name, kind)
    with torch.no_grad():
        expected = model(tokens).logits
    targets = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, lora_dropout=0.0)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(tuned(tokens).logits, expected)  # an adapter begins as zero
    tuned(tokens).logits.square().mean().backward()
    trained = {key: p for key, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for key, p in trained.items()
        if "lora_B" in key
    )
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
        changed = tuned(tokens).logits
        assert not torch.equal(changed, expected)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, changed, rtol=1e-4, atol=1e-4)


@every_family_and_kind
@torch.no_grad()
def test_stock_loaders_fail_on_an_export(tmp_path, name, kind):
    model, _ = split_model(tmp_path / "source", name, kind)
    model.save_pretrained(tmp_path / "folder")
    stock = type(FAMILIES[name].make())
    for open_it in (AutoModelForCausalLM.from_pretrained, stock.from_pretrained):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            open_it(tmp_path / "folder", trust_remote_code=False)
    opened = load_zero_expert_model(tmp_path / "folder")
    assert all(block.routing.zero.kind == KINDS[kind].zero_experts_type for block in opened.moe_blocks())


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("way", ["tensor", "expert", "fsdp"])
def test_two_ranks_give_the_numbers_of_one(tmp_path, name, way):
    """transformers' own parallel plans; all kinds of zero experts in one start of two gloo ranks."""
    if way != "tensor" and "ep_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("this version of transformers has no such plan for these classes")
    for kind in KINDS:
        model, tokens = split_model(tmp_path / "source" / kind, name, kind)
        model.save_pretrained(tmp_path / kind)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norms = {key: p.grad.norm() for key, p in model.named_parameters() if p.grad is not None}
        torch.save((tokens, loss.detach(), model(tokens).logits.detach(), norms), tmp_path / f"{kind}.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(ROOT / "tests/serving/two_ranks.py"),
    ]
    done = subprocess.run(
        [*command, str(tmp_path), way, *KINDS],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("equal") == len(KINDS)
