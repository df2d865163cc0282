"""The routers' dials: set through one door, and back on every path."""

import ast
from pathlib import Path

import pytest
import tiny
import torch

import zeda_megatron
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.pick_rules import StaticTopK
from zeda_megatron.moe.router_dials import RouterDials, dialled, set_dials, zero_mask
from zeda_megatron.moe.stats import evaluating

N = tiny.TINY["num_experts"]


def model(count=2):
    """Routers of neighbouring layers; they learn."""
    zero = ZeroExpertConfig(4, group_loss_coeff=0.1, moe_zero_expert_weight=2.5)
    return torch.nn.ModuleList(tiny.router(zero, seed=i) for i in range(count)).train()


def test_all_layers_get_a_dial_and_keep_the_others():
    routers = model()
    set_dials(routers, pick_rule=StaticTopK(2))
    set_dials(routers, zero_weight=3.0)
    assert [r.dials for r in routers] == [RouterDials(pick_rule=StaticTopK(2), zero_weight=3.0)] * 2
    with pytest.raises(TypeError, match="zero_wait"):
        set_dials(routers, zero_wait=3.0)


def test_w_begins_as_the_config_says():
    assert [router.dials for router in model()] == [RouterDials(zero_weight=2.5)] * 2


def test_dials_mode_and_statistics_come_back_after_an_error():
    routers = model()
    set_dials(routers[0], pick_rule=StaticTopK(1))
    routers[1].eval()
    routers[0](tiny.hidden_states())
    before = [(r.dials, r.training, r.routing_stats) for r in routers]
    with pytest.raises(ValueError, match="x"), evaluating(list(routers)), zero_mask(routers):
        with dialled(routers, zero_logit_bias=1.0):
            assert routers[1].dials == RouterDials(zero_mask=True, zero_logit_bias=1.0, zero_weight=2.5)
        assert routers[1].dials.zero_logit_bias == 0.0
        assert not routers[0].training and routers[0].dials.pick_rule is None
        assert routers[0].routing_stats.slots is None
        routers[0](tiny.hidden_states())
        raise ValueError("x")
    after = [(r.dials, r.training, r.routing_stats) for r in routers]
    assert [x[:2] for x in after] == [x[:2] for x in before]
    assert all(mine is kept for (*_, mine), (*_, kept) in zip(after, before))


def test_no_other_file_reaches_for_the_dials():
    """They are set by `moe.router_dials` and read by the router; everything else asks there."""
    root = Path(zeda_megatron.__file__).parent
    users = {
        str(path.relative_to(root))
        for room in ("moe", "models", "distill", "fit", "training", "evaluation/quality")
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "dials"
    }
    assert users == {"moe/router.py", "moe/router_dials.py"}
