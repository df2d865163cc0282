"""Experts read by a step of decoding: counted as they are, and what the steps say is what the whole sequence says."""

import argparse

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig

from tools.measure import batch_decoding
from zeda_megatron.serving.transformers.modeling_qwen3_moe_zero import Qwen3MoePlusPlusForCausalLM

PAIRED = {"zce_nums": [tiny.TINY["num_experts"]], "zce_routing": "paired", "zce_score": "weight+head"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Qwen3MoePlusPlusForCausalLM(Qwen3MoeConfig(**tiny.TINY, **PAIRED, zce_threshold=-1.2)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def options():
    return argparse.Namespace(prompt=4, batches=[1, 3], margins=[0.5], turns=[0.3], steps=5)


@torch.no_grad()
def test_steps_give_what_the_whole_sequence_gives_and_experts_are_counted(model, options):
    ids_NS = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    reads = batch_decoding.Reads(model)
    made = batch_decoding.decode(model, reads, ids_NS, 3, options, margin=0.0, more=0.0)
    whole = F.log_softmax(model(ids_NS).logits[:, 4:].float(), dim=-1)
    torch.testing.assert_close(made["log_p"], whole, atol=1e-4, rtol=1e-4)
    seen = []
    hooks = [
        block.experts.register_forward_pre_hook(
            lambda _module, args: seen.append(set(args[1].flatten().tolist()))
        )
        for block in model.moe_blocks()
    ]
    state = model(ids_NS[:, :4], use_cache=True)
    seen.clear()
    for step in range(4, 9):
        state = model(ids_NS[:, step : step + 1], past_key_values=state.past_key_values, use_cache=True)
    for hook in hooks:
        hook.remove()
    assert made["experts"] == pytest.approx(sum(len(one) for one in seen) / len(seen))
    alone = batch_decoding.decode(model, reads, ids_NS, 1, options, margin=0.0, more=0.0)
    assert alone["experts"] < made["experts"]


def test_the_table_has_a_line_for_every_rule(model, options):
    ids_NS = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    rows = batch_decoding.measure(model, model, ids_NS, options)
    assert {row["rule"] for row in rows} == {"skipping alone", "margin"}
    assert all(row["kl"] >= -1e-6 for row in rows)
    lines = batch_decoding.table(rows)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "skipping alone",
        "threshold + 0.3",
        "margin 0.5",
    ]
