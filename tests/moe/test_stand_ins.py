"""Zero experts that answer in their expert's place, against the definition: every expert on every token."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.models.build import build_gpt_model
from zeda_megatron.moe.paired import paired_modules
from zeda_megatron.moe.router_dials import set_dials, set_thresholds
from zeda_megatron.ops import stand_ins as op

N, K, H = (tiny.TINY[key] for key in ("num_experts", "num_experts_per_tok", "hidden_size"))
PAIRED = ZeroExpertConfig(N, zero_expert_routing="paired", paired_score="weight+head")
KINDS = {
    "constant": ZeroExpertConfig(N, "constant", "paired", "weight+head"),
    "low_rank": ZeroExpertConfig(N, "low_rank", "paired", "weight+head", 5, 3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("all_slots", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_answers_and_gradients_are_those_of_the_definition(monkeypatch, all_slots, rank, dtype, gap, share):
    """`all_slots`: as on a device, which is never asked how many picks are skipped."""
    if all_slots:
        monkeypatch.setattr(op, "asking_is_free", lambda tensor: False)
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    x, weights = drawn(21, H), torch.rand(21, N, generator=draw)
    picked = torch.zeros(21, N).scatter(1, torch.rand(21, N, generator=draw).topk(K).indices, 1.0).bool()
    skipped = picked & (torch.rand(21, N, generator=draw) < share)
    weights = weights * skipped
    weights[skipped.nonzero()[:1].unbind(1)] = 0.0  # a pick of a head that trains
    maps = (drawn(N, rank, H), drawn(N, H, rank)) if rank else (None, None)
    factor, found = drawn(21, H), []
    for answer in (op.stand_ins, op.reference_stand_ins):
        given = [part.clone().requires_grad_() for part in (x, weights)]
        out = answer(*given, skipped, *maps, drawn(N, H) * 0 + 0.5, K)
        assert out.dtype == dtype
        out.backward(factor)
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in given]
        assert not (grads[1] * ~skipped).any()
        found.append([out.detach(), *grads])
    for mine, wanted in zip(*found):
        torch.testing.assert_close(
            mine.float(), wanted.float(), rtol=gap, atol=gap * (1 + wanted.abs().max())
        )


def layer_of(kind):
    layer = tiny.moe_layer(KINDS[kind])
    set_thresholds(layer, [-1.2])
    return layer.eval()


@every_kind
def test_a_layer_gives_kept_experts_and_the_stand_ins_of_the_others(kind):
    layer, static = layer_of(kind), tiny.moe_layer(ZeroExpertConfig()).eval()
    router = layer.router
    hidden = tiny.hidden_states(17)
    seen = {}
    router.register_forward_hook(lambda _m, _a, out: seen.update(probs=out[0], kept=out[1]))
    found = layer(hidden)[0]
    static.load_state_dict(layer.state_dict(), strict=False)
    seen["kept"], kept = None, seen["kept"]
    set_dials(layer, zero_mask=True)
    whole = layer(hidden)[0]
    assert torch.equal(whole, static(hidden)[0])
    weights = seen["probs"] * ~kept
    x = hidden.reshape(-1, H)
    assert 0 < (weights > 0).sum() < 17 * K
    answer = weights @ router.zero_output.constant
    if kind == "low_rank":
        low = torch.einsum("th,nrh->tnr", x, router.zero_output.down)
        answer = answer + torch.einsum("tn,tnr,nhr->th", weights, low, router.zero_output.up)
    dense = torch.zeros(17, H)
    for n, expert in enumerate(layer.experts.local_experts):
        gate, up = (x @ expert.linear_fc1.weight.t()).chunk(2, dim=-1)
        dense = dense + (seen["probs"] * kept)[:, n : n + 1] * (
            (F.silu(gate) * up) @ expert.linear_fc2.weight.t()
        )
    tiny.close(found.reshape(-1, H), dense + answer, atol=1e-5, rtol=1e-4)


@every_kind
def test_before_the_fit_they_are_silent_bit_for_bit(kind):
    """And a head whose hidden units have no weight yet decides as a linear one."""
    arch, config = tiny.architecture(), tiny.megatron_config()
    silent, awake = (build_gpt_model(arch, config, zero).eval() for zero in (PAIRED, KINDS[kind]))
    tiny.draw(silent)
    assert not any(
        part.any() for layer in awake.decoder.layers for part in layer.mlp.router.zero_output.parameters()
    )
    awake.load_state_dict(silent.state_dict(), strict=False)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    for model in (silent, awake):
        set_thresholds(model, [-1.0])
    with torch.no_grad():
        expected = silent(tokens, torch.arange(12)[None], None)
        assert torch.equal(awake(tokens, torch.arange(12)[None], None), expected)
        set_thresholds(silent, [-1e4])
        assert not torch.equal(silent(tokens, torch.arange(12)[None], None), expected)


def test_hidden_units_add_to_the_heads_of_all_experts():
    router = tiny.router(KINDS["low_rank"])
    head, x = router.paired, tiny.hidden_states().reshape(-1, H)
    unit = F.silu(x @ head.hidden_weight.t() + head.hidden_bias)
    wanted = x @ head.weight.t() + head.bias + unit @ head.hidden_output.t()
    torch.testing.assert_close(head.predict(x), wanted)
    torch.testing.assert_close(head.predict(x, 2), wanted[:, 2])
    assert (wanted - x @ head.weight.t() - head.bias).abs().max() > 0.1


@every_kind
def test_a_head_that_trains_weighs_an_expert_against_its_stand_in(kind):
    """Its gradient is that of gate * expert + (1 - gate) * stand-in; what was fitted has none."""
    layer = layer_of(kind).train()
    hidden = tiny.hidden_states(17)
    target = torch.randn(17, 1, H, generator=torch.Generator().manual_seed(2))
    router, answers = layer.router, layer.router.zero_output
    found = torch.autograd.grad((layer(hidden)[0] * target).sum(), router.paired.bias)[0]
    assert not any(parameter.requires_grad for parameter in answers.parameters())
    x = hidden.detach().reshape(-1, H)
    set_dials(layer, zero_mask=True)
    seen = {}
    router.register_forward_hook(lambda _m, _a, out: seen.update(probs=out[0].detach(), map=out[1]))
    layer(hidden)
    score = router.paired.scores(x, seen["probs"])
    gate = torch.sigmoid(score - router.paired.threshold)
    wanted = torch.zeros(N)
    for n, expert in enumerate(layer.experts.local_experts):
        up_gate, up = (x @ expert.linear_fc1.weight.t()).chunk(2, dim=-1)
        real = (F.silu(up_gate) * up) @ expert.linear_fc2.weight.t()
        instead = answers.constant[n].expand_as(real)
        if kind == "low_rank":
            instead = instead + x @ answers.down[n].t() @ answers.up[n].t()
        along = ((real - instead) * target.reshape(-1, H)).sum(1)
        wanted[n] = (seen["probs"][:, n] * gate[:, n] * (1 - gate[:, n]) * along)[seen["map"][:, n]].sum()
    tiny.close(found, wanted, atol=1e-4, rtol=1e-3)
    assert paired_modules(layer)[0].trains
