"""Routing of the vLLM plugin, without vLLM: against the definition and against the files for transformers."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import Glm4MoeLiteConfig, MixtralConfig, Qwen3MoeConfig

from zeda_megatron.models.architecture import MODELS
from zeda_megatron.serving.transformers import modeling_glm4_moe_lite_zero as glm_file
from zeda_megatron.serving.transformers import modeling_mixtral_zero as mixtral_file
from zeda_megatron.serving.transformers import modeling_qwen3_moe_zero as qwen_file
from zeda_megatron.serving.vllm.routing import ZeroExpertGate, pick, zero_output
from zeda_megatron.serving.vllm.settings import read_routing

N, NZ, K, H = 8, 4, 3, 32


def qwen_config(**changes):
    return Qwen3MoeConfig(**(tiny.TINY | {"zce_nums": [NZ], "zce_types": ["zero"]} | changes))


PAIRED = {
    "zce_nums": [N],
    "zce_routing": "paired",
    "zce_score": "weight+head+residual",
    "zce_threshold": -2.0,
}


AWAKE = {"zce_types": ["low_rank"], "zce_rank": 3, "zce_head_width": 5}


def paired_config(**changes):
    return qwen_config(**(PAIRED | changes))


def glm_config(**changes):
    return Glm4MoeLiteConfig(**(tiny.GLM | {"zce_nums": [NZ], "zce_types": ["zero"]} | changes))


def mixtral_config(**changes):
    return MixtralConfig(**(tiny.MIXTRAL | {"zce_nums": [NZ], "zce_types": ["zero"]} | changes))


FILES = {qwen_config: qwen_file, glm_config: glm_file, mixtral_config: mixtral_file}
"""What makes a family's config, and its file for transformers."""
every_family = pytest.mark.parametrize("make", FILES)


def make_gate(config, dtype=torch.float32, seed=0):
    """A gate of one layer with drawn weights, and its routing."""
    (routing,) = read_routing(config, 1)
    gate = ZeroExpertGate(routing, H, dtype)
    draw = torch.Generator().manual_seed(seed)
    for parameter in gate.parameters():
        parameter.copy_((torch.randn(parameter.shape, generator=draw) * 0.3).to(parameter.dtype))
    return gate, routing


def run(gate, hidden, residual=None):
    if gate.routing.needs_residual:
        gate.see_residual(residual)
    bias = getattr(gate, "e_score_correction_bias", None)
    return pick(gate(hidden), gate.routing, hidden.dtype, bias, gate.dial)


def by_expert(weights_TK, ids_TK, columns):
    return torch.zeros(len(ids_TK), columns).scatter(1, ids_TK, weights_TK)


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [True, False])
def test_shared_zero_experts_follow_the_definition(renormalise):
    gate, _ = make_gate(qwen_config(norm_topk_prob=renormalise))
    hidden = torch.randn(20, H)
    weights, ids = run(gate, hidden)
    expected = tiny.dense_routing(hidden @ gate.weight.T, K, N, "softmax" if renormalise else "pre_softmax")
    tiny.close(by_expert(weights, ids, N + NZ), expected.weights_TE, atol=1e-6, rtol=1e-5)
    assert 0 < (ids >= N).sum() < ids.numel()


@torch.no_grad()
def test_sigmoid_routing_follows_the_definition():
    gate, _ = make_gate(glm_config())
    hidden = torch.randn(20, H)
    weights, ids = run(gate, hidden)
    logits, scale = hidden @ gate.weight.T, tiny.GLM["routed_scaling_factor"]
    expected = tiny.dense_routing(logits, K, N, "sigmoid", gate.e_score_correction_bias, scale)
    tiny.close(by_expert(weights, ids, N + NZ), expected.weights_TE, atol=1e-6, rtol=1e-5)


def twin_router(make, config, gate, dtype):
    """The router of the file for transformers with a gate's weights."""
    router = FILES[make].ZeroExpertRouter(config).to(dtype)
    for name, parameter in gate.named_parameters():
        if name == "e_score_correction_bias":
            router.e_score_correction_bias = parameter
        else:
            getattr(router, name).data = parameter.clone()
    return router


@torch.no_grad()
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [0.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_picks_are_those_of_the_file_for_transformers(make, dtype, bias, masked):
    config = make(zce_logit_bias=bias, use_zce_mask=masked)
    gate, _ = make_gate(config, dtype)
    router = twin_router(make, config, gate, dtype)
    router.dials.logit_bias = torch.tensor(bias).item()
    hidden = torch.randn(50, H).to(dtype)
    _, weights, ids, _ = router(hidden)
    found_weights, found_ids = run(gate, hidden)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_weights, weights.float())


@torch.no_grad()
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["weight", "head", "weight+head", "weight+head+residual"])
@pytest.mark.parametrize(
    "more", [{}, AWAKE, {"zce_types": ["constant"]}], ids=["silent", "awake", "constant"]
)
def test_paired_picks_and_answers_are_those_of_the_file_for_transformers(make, dtype, score, more):
    config = make(**(PAIRED | {"zce_score": score} | more))
    gate, routing = make_gate(config, dtype)
    router = twin_router(make, config, gate, dtype)
    hidden, residual = torch.randn(2, 50, H).to(dtype)
    ordered = router_scores(router, hidden, residual).flatten().sort().values
    router.dials.threshold = float(ordered[len(ordered) // 2 - 1 :][:2].mean())  # no score is there
    gate.dial.fill_(router.dials.threshold)
    router.see_residual(None, (residual,))
    _, weights, ids, answer = router(hidden)
    found_weights, found_ids = run(gate, hidden, residual)
    assert torch.equal(found_weights, weights.float())
    assert torch.equal(found_ids.clamp(max=N), ids)
    found = zero_output(hidden, found_weights, found_ids, gate)
    assert (answer is None) == (found is None) == (not more)
    if more:
        torch.testing.assert_close(found, answer.float())
        assert found.any()
    # where the engine applies the model's factor itself, the weights lack it, but not the scores
    gate.see_residual(residual)
    bias = getattr(gate, "e_score_correction_bias", None)
    plain_weights, plain_ids = pick(gate(hidden), routing, hidden.dtype, bias, gate.dial, scaled=False)
    assert torch.equal(plain_ids, found_ids)
    torch.testing.assert_close(plain_weights * routing.scale, found_weights)
    # the raw id of a skipped pick says whose zero expert took it
    gate.dial.fill_(-1e4)
    assert torch.equal(found_ids % N, run(gate, hidden, residual)[1])
    assert 0 < (ids == N).sum() < ids.numel()


@torch.no_grad()
@every_family
@pytest.mark.parametrize("kind", ["zero", "copy", "learned"])
def test_zero_slots_give_what_their_kind_says(make, kind):
    gate, routing = make_gate(make(zce_types=[kind]))
    hidden = torch.randn(20, H)
    weights, ids = run(gate, hidden)
    assert 0 < (ids >= N).sum() < ids.numel()
    expected = torch.zeros(20, H)
    for t in range(20):
        for weight, e in zip(weights[t], ids[t]):
            if e >= N and kind == "copy":
                expected[t] += weight * hidden[t]
            elif e >= N and kind == "learned":
                expected[t] += weight * gate.zero_bias[e - N]
    found = zero_output(hidden, weights, ids, gate)
    if kind == "zero":
        assert found is None
    else:
        torch.testing.assert_close(found, expected)
    gate.routing = replace(routing, masked=True)
    assert zero_output(hidden, weights, ids, gate) is None


def router_scores(router, hidden, residual):
    logits = router._project(hidden, router.weight[:N])
    weights, ids = router._pick(logits)
    router.see_residual(None, (residual,))
    return router._scores(hidden, weights, ids)


@torch.no_grad()
def test_columns_may_travel_without_the_gate():
    """Data-parallel ranks gather hidden states and columns; a pick depends on its own row alone."""
    gate, routing = make_gate(paired_config())
    hidden, residual = torch.randn(2, 12, H)
    gate.see_residual(residual)
    columns = gate(hidden)
    whole = pick(columns, routing, hidden.dtype, dial=gate.dial)
    parts = [pick(part, routing, hidden.dtype, dial=gate.dial) for part in columns.split(5)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))


@torch.no_grad()
def test_a_gate_without_its_residual_fails_loudly():
    gate, _ = make_gate(paired_config())
    with pytest.raises(RuntimeError, match="saw no residual"):
        gate(torch.randn(2, H))


def test_dials_of_the_server_go_before_those_of_the_checkpoint():
    shared = read_routing(qwen_config(zce_logit_bias=0.5), 2, {"zce_logit_bias": -1.0, "other": 1})
    assert [one.logit_bias for one in shared] == [-1.0, -1.0]
    assert [one.threshold for one in read_routing(paired_config(), 2, {"zce_threshold": [1, 2]})] == [
        1.0,
        2.0,
    ]
    assert read_routing(paired_config(), 1)[0] == replace(read_routing(paired_config(), 1)[0], threshold=-2.0)


@pytest.mark.parametrize(
    ("make", "changes", "dials", "told"),
    [
        (qwen_config, {"zce_nums": None}, {}, "zce_nums"),
        (qwen_config, {"zce_types": ["other"]}, {}, "zce_types"),
        (glm_config, {"zce_nums": [2, 2], "zce_types": ["zero", "copy"]}, {}, "zce_types"),
        (qwen_config, {"zce_routing": "other"}, {}, "zce_routing 'other'"),
        (qwen_config, {}, {"zce_threshold": 1.0}, "dial is zce_logit_bias"),
        (qwen_config, {"zce_logit_bias": float("nan")}, {}, "zce_logit_bias nan"),
        (paired_config, {}, {"zce_logit_bias": 1.0}, "dial is zce_threshold"),
        (paired_config, {"zce_threshold": None}, {}, "no zce_threshold"),
        (paired_config, {"zce_batch_margin": -1.0}, {}, "zce_batch_margin"),
        (qwen_config, {}, {"zce_batch_margin": 0.5}, "shared, paired ones alone"),
        (paired_config, {"zce_threshold": [1.0, 2.0, 3.0]}, {}, "3 numbers for 2 MoE layers"),
        (paired_config, {"zce_nums": [4]}, {}, "zce_nums"),
        (paired_config, {"zce_score": "weight+weight"}, {}, "zce_score"),
        (paired_config, {"zce_types": ["learned"]}, {}, "zce_types"),
        (glm_config, PAIRED | {"zce_threshold": None}, {}, "no zce_threshold"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, changes, dials, told):
    with pytest.raises(ValueError, match=told):
        read_routing(make(**changes), 2, dials)


def test_naming_the_plugin_loads_nothing_heavy():
    code = (
        "import sys, zeda_megatron.serving.vllm.register as r; "
        "print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)), sorted(r.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {sorted(model.ARCHITECTURES for model in MODELS)}"
