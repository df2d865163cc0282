"""Low-rank adapters of a built model: what they add, when they are off, what folding leaves."""

import pytest
import tiny
import torch
from families import FAMILIES

from zeda_megatron.config.lora import ADAPTER, LORA_TARGETS, LoRA
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.adapters import adapters_of, fold_adapters, install_adapters, switched_off
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def built(name, lora=None, seed=0, **overrides):
    arch = read_architecture(FAMILIES[name].make().config.to_dict())
    torch.manual_seed(5)
    model = build_gpt_model(arch, transformer_config(arch, overrides=overrides), ZeroExpertConfig(2)).eval()
    if lora is not None:
        install_adapters([model], lora, seed)
    return model


def halves(model):
    return {name: p for name, p in model.named_parameters() if ADAPTER in name}


def wake(model):
    """`up` begins with zeros; this makes it answer."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in halves(model).items():
            if name.rsplit(".", 1)[-1].endswith("up"):
                parameter.normal_(0.0, 0.1, generator=draw)


@torch.no_grad()
def logits(model):
    return model(TOKENS, torch.arange(12).expand_as(TOKENS), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_answer_as_the_weights_that_they_are_folded_into(name):
    model = built(name, LoRA(8, 16.0))
    plain = logits(built(name))
    assert torch.equal(logits(model), plain)
    wake(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-2
    with switched_off(adapters_of([model])):
        assert torch.equal(logits(model), plain)
    fold_adapters([model])
    assert not halves(model) and not any("Adapted" in type(m).__name__ for m in model.modules())
    tiny.close(logits(model), adapted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_both_products_of_experts_have_the_same_gradients(backend):
    """Against a plain computation of the folded weights, by autograd."""
    from zeda_megatron.ops.grouped_mlp import LowRank, grouped_mlp

    draw = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=draw).requires_grad_()  # noqa: E731
    counts, rank, hidden, inner = [3, 0, 5], 8, 16, 8
    rows, probs = make(8, hidden), make(8)
    fc1 = [make(2 * inner, hidden) for _ in counts]
    fc2 = [make(hidden, inner) for _ in counts]
    low = [
        make(3, rank, hidden),
        make(3, 2 * inner, rank),
        make(3, rank, inner),
        make(3, hidden, rank),
    ]
    found = grouped_mlp(rows, probs, counts, fc1, fc2, backend, low_rank=LowRank(*low, 0.5))
    folded1 = [w + 0.5 * low[1][e] @ low[0][e] for e, w in enumerate(fc1)]
    folded2 = [w + 0.5 * low[3][e] @ low[2][e] for e, w in enumerate(fc2)]
    parts = []
    for x, p, w1, w2 in zip(rows.split(counts), probs.split(counts), folded1, folded2):
        gate, up = (x @ w1.T).chunk(2, dim=-1)
        parts.append((torch.nn.functional.silu(gate) * up * p[:, None]) @ w2.T)
    expected = torch.cat(parts)
    tiny.close(found, expected, rtol=1e-5, atol=1e-4)
    inputs = [rows, probs, *low]
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
    ):
        tiny.close(mine, theirs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "target", "parts"),
    [
        ("qwen3_moe", "attention", {"linear_qkv", "linear_proj"}),
        ("qwen3_moe", "experts", {"experts"}),
        ("qwen3_moe", "shared", set()),
        ("glm4_moe_lite", "shared", {"linear_fc1", "linear_fc2"}),
        (
            "glm4_moe_lite",
            "attention",
            {
                "linear_q_down_proj",
                "linear_q_up_proj",
                "linear_kv_down_proj",
                "linear_kv_up_proj",
                "linear_proj",
            },
        ),
        ("qwen3_next", "attention", {"linear_qkv", "linear_proj", "in_proj", "out_proj"}),
    ],
)
def test_targets_say_what_has_adapters(name, target, parts):
    found = halves(built(name, LoRA(8, 16.0, target)))
    assert {key.split(ADAPTER)[0].rsplit(".", 1)[-1] for key in found} == parts


def test_what_adapters_begin_with_depends_on_seed_and_place_alone():
    first, again, other = (halves(built("qwen3_moe", LoRA(8), seed)) for seed in (1, 1, 2))
    downs = [key for key in first if key.endswith("down")]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in downs)
    assert len({first[key].flatten()[:8].sum().item() for key in downs}) == len(downs)
    experts = first["decoder.layers.0.mlp.experts.adapter.fc1_down"]
    assert not torch.equal(experts[0], experts[1])
    bound = experts.shape[-1] ** -0.5
    assert 0.9 * bound < experts.abs().max() <= bound
    assert all(not first[key].any() for key in first if key.endswith("up"))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((4,), "--lora-rank 4 must be a multiple of 8"),
        ((0,), "--lora-rank 0"),
        ((8, 0.0), "--lora-alpha 0.0 must be above 0"),
        (
            (8, 1.0, "experts+heads"),
            "--lora-targets 'experts[+]heads': 'heads' is unknown; join words of attention",
        ),
        ((8, 1.0, ""), "--lora-targets ''"),
    ],
)
def test_settings_that_cannot_work_are_named(values, match):
    with pytest.raises(UserError, match=match):
        install_adapters([], LoRA(*values))


def test_all_targets_are_the_default():
    assert LoRA().targets.split("+") == list(LORA_TARGETS)
