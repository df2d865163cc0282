"""Paired zero experts in the transformers modeling file: a plain loop over tokens, the stock model, the dials."""

import copy
import json
import math

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import zeda_megatron.serving.transformers.modeling_qwen3_moe_zero as modeling
from zeda_megatron.errors import UserError
from zeda_megatron.serving.load import load_zero_expert_model
from zeda_megatron.serving.transformers.zero_expert_model import ZeroExpertMoeBlock

N, K = 8, 3
SCORES = ("weight", "head", "residual", "weight+head", "weight+head+residual")


def make_config(**changes):
    fields = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=N,
        num_experts_per_tok=K,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        max_position_embeddings=64,
        mlp_only_layers=[1],
        zce_nums=[N],
        zce_types=["zero"],
        zce_routing="paired",
        zce_score="weight+head+residual",
        zce_threshold=-2.0,
        pad_token_id=0,
        architectures=["Qwen3MoePlusPlusForCausalLM"],
    )
    return Qwen3MoeConfig(**(fields | changes))


def make_model(experts="grouped_mm", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = modeling.Qwen3MoePlusPlusForCausalLM._from_config(
        make_config(**changes), experts_implementation=experts
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def draw_tokens(*shape):
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def watch(model, tokens):
    """Run; per MoE layer: block, residual stream, block input and output, all [T, H]."""
    seen, hooks = [], []
    for layer in model.model.layers:
        if isinstance(layer.mlp, ZeroExpertMoeBlock):
            row = {"block": layer.mlp}
            seen.append(row)
            hooks += [
                layer.post_attention_layernorm.register_forward_hook(
                    lambda _m, args, _o, row=row: row.update(residual=args[0].reshape(-1, 32))
                ),
                layer.mlp.register_forward_hook(
                    lambda _m, args, out, row=row: row.update(
                        hidden=args[0].reshape(-1, 32), out=out.reshape(-1, 32)
                    )
                ),
            ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def naive(row, score, renormalise=True):
    """Per token: {expert: (weight, score)} of the picks, one number at a time, by the formula."""
    gate, found = row["block"].gate, []
    for x, residual in zip(row["hidden"], row["residual"]):
        logits = [float(w @ x) for w in gate.weight[:N]]
        best = sorted(range(N), key=lambda e: -logits[e])[:K]
        total = sum(math.exp(logits[e] - max(logits)) for e in (best if renormalise else range(N)))
        picks = {}
        for e in best:
            weight = math.exp(logits[e] - max(logits)) / total
            terms = {
                "weight": math.log(weight),
                "head": float(gate.zero_weight[e] @ x + gate.zero_bias[e]),
                "residual": -math.log(math.sqrt(sum(float(v) ** 2 for v in residual))),
            }
            picks[e] = (weight, sum(terms[name] for name in score.split("+")))
        found.append(picks)
    return found


def naive_output(row, picks, threshold):
    out = torch.zeros_like(row["hidden"])
    for t, x in enumerate(row["hidden"]):
        for e, (weight, score) in picks[t].items():
            if score >= threshold:
                gate, up = (row["block"].experts.gate_up_proj[e] @ x).chunk(2)
                y = row["block"].experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up)
                out[t] += weight * y
    return out


def middle(picks):
    """A threshold between the two middle scores, so that rounding decides nothing."""
    ordered = sorted(score for token in picks for _, score in token.values())
    half = len(ordered) // 2
    return (ordered[half - 1] + ordered[half]) / 2


def check_against_loop(model, score, renormalise=True):
    """Thresholds at the median from the first layer to the last, as a layer's input depends on those below."""
    tokens, thresholds = draw_tokens(2, 9), [-1e4] * len(model.moe_blocks())
    for i, block in enumerate(model.moe_blocks()):
        picks = naive(watch(model, tokens)[i], score, renormalise)
        thresholds[i] = middle(picks)
        model.set_zero_threshold(thresholds)
        model.reset_zero_share()
        row = watch(model, tokens)[i]
        expected = naive_output(row, picks, thresholds[i])
        assert (expected - row["out"]).abs().max() < 1e-5 * expected.abs().max()
        if not block.static_shapes:
            assert model.zero_share()[i] == 0.5


@pytest.mark.parametrize("path", ["grouped_mm", "eager", "static"])
@torch.no_grad()
def test_picks_below_the_threshold_are_skipped_and_the_others_keep_their_weight(path):
    model = make_model("eager" if path == "eager" else "grouped_mm")
    for block in model.moe_blocks():
        block.static_shapes = path == "static"
    check_against_loop(model, "weight+head+residual")


@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_a_score_has_the_terms_it_names(score):
    check_against_loop(make_model(zce_score=score), score)


@torch.no_grad()
def test_without_norm_topk_prob_scores_take_the_weights_of_the_full_softmax():
    check_against_loop(make_model(norm_topk_prob=False), "weight+head+residual", renormalise=False)


@torch.no_grad()
def test_skipped_picks_reach_no_expert():
    model = make_model(mlp_only_layers=[1, 2])
    slots = tiny.watch_slots(model.moe_blocks()[0])
    tokens = draw_tokens(1, 20)
    picks = naive(watch(model, tokens)[0], "weight+head+residual")
    model.set_zero_threshold(middle(picks))
    slots.clear()
    model(tokens)
    assert slots == [(20 * K // 2, 20 * K // 2)]


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@torch.no_grad()
def test_masked_model_equals_stock_transformers_bit_for_bit_and_computes_no_head(experts):
    dynamic = make_model(experts, use_zce_mask=True)
    stock = Qwen3MoeForCausalLM._from_config(make_config(), experts_implementation=experts).eval()
    state = {k: v for k, v in dynamic.state_dict().items() if "gate.zero_" not in k}
    state |= {k: v[:N] for k, v in state.items() if k.endswith("gate.weight")}
    stock.load_state_dict(state)
    tokens = draw_tokens(2, 11)
    expected = stock(tokens).logits
    for block in dynamic.moe_blocks():
        block.gate.zero_weight.fill_(math.nan)
    assert torch.equal(dynamic(tokens).logits, expected)
    assert all(block.gate._residual_norm_T is None for block in dynamic.moe_blocks())
    for block in dynamic.moe_blocks():
        block.gate.zero_weight.fill_(0.1)
    dynamic.set_zero_mask(False)
    assert not torch.equal(dynamic(tokens).logits, expected)
    dynamic.set_zero_threshold(-1e4)
    assert (dynamic(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert dynamic(tokens, output_router_logits=True).aux_loss > 0


@torch.no_grad()
def test_raising_the_threshold_raises_the_zero_share():
    model, tokens, shares = make_model(), draw_tokens(2, 16), []
    for threshold in (-1e4, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 2.0, 1e4):
        model.set_zero_threshold(threshold)
        model.reset_zero_share()
        model(tokens)
        shares.append(model.zero_share())
    assert shares[0] == [0.0, 0.0] and shares[-1] == [1.0, 1.0]
    first = [row[0] for row in shares]  # the input of later layers changes with the threshold
    assert first == sorted(first) and len(set(first)) > 4
    means = [sum(row) for row in shares]
    assert means == sorted(means)


@torch.no_grad()
def test_a_bias_on_shared_zero_logits_goes_from_no_zero_pick_to_all():
    model = make_model(
        zce_nums=[4], zce_routing="shared", zce_score=None, zce_threshold=None, zce_logit_bias=None
    )
    tokens, shares = draw_tokens(2, 16), []
    plain = model(tokens).logits
    for bias in (-1e4, -2.0, -0.5, 0.0, 0.5, 2.0, 1e4):
        model.set_zero_logit_bias(bias)
        model.reset_zero_share()
        logits = model(tokens).logits
        shares.append(model.zero_share()[0])
        if bias == 0.0:
            assert torch.equal(logits, plain)
        if bias == -1e4:
            model.set_zero_mask(True)
            assert (model(tokens).logits - logits).abs().max() < 1e-5 * logits.abs().max()
            model.set_zero_mask(False)
    assert shares[0] == 0.0 and shares[-1] == 1.0
    assert shares == sorted(shares) and len(set(shares)) > 4


@torch.no_grad()
def test_the_logit_bias_is_added_to_the_zero_logits_alone():
    model = make_model(zce_nums=[4], zce_routing=None, zce_logit_bias=0.7)
    gate = model.moe_blocks()[0].gate
    hidden = torch.randn(6, 32)
    logits = hidden @ gate.weight.T
    logits[:, N:] += 0.7
    best = logits.topk(K)
    _, weights, ids, _ = gate(hidden)
    assert torch.equal(ids, best.indices)
    tiny.close(weights, best.values.softmax(-1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_generation_with_cache_equals_generation_without():
    model = make_model()
    prompt = draw_tokens(1, 6)
    model.set_zero_threshold(tiny.splitting_threshold(model, prompt))
    model.reset_zero_share()
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    with_cache = model.generate(prompt, use_cache=True, **options)
    assert all(0 < share < 1 for share in model.zero_share())
    without = prompt
    for _ in range(12):
        without = torch.cat([without, model(without).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_left_padding_changes_neither_tokens_nor_zero_share():
    model = make_model()
    prompt = draw_tokens(1, 6)
    model.set_zero_threshold(tiny.splitting_threshold(model, prompt))
    model.reset_zero_share()
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    share = model.zero_share()
    assert all(0 < value < 1 for value in share)
    model.reset_zero_share()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 3).long().unsqueeze(0)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], alone)
    assert model.zero_share() == share


@pytest.mark.slow  # the same of every family: test_modeling_families
@pytest.mark.parametrize("routing", ["paired", "shared"])
@torch.no_grad()
def test_it_compiles_as_one_graph(routing):
    shared = dict(zce_nums=[4], zce_routing="shared", zce_logit_bias=0.3)
    # The compiler's grouped product takes bf16 alone.
    model = make_model(dtype=torch.bfloat16, **({} if routing == "paired" else shared))
    for block in model.moe_blocks():
        block.static_shapes = True
    tokens = draw_tokens(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(tokens, use_cache=False).logits
    assert torch.equal(compiled(tokens, use_cache=False).logits, expected)
    # a compiled model follows its dial
    model.set_zero_threshold(1e4) if routing == "paired" else model.set_zero_logit_bias(1e4)
    turned = model(tokens, use_cache=False).logits
    assert not torch.equal(turned, expected)
    assert torch.equal(compiled(tokens, use_cache=False).logits, turned)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_scores_are_float32_in_bf16(autocast):
    model = make_model(dtype=torch.float32 if autocast else torch.bfloat16)
    gate, tokens = model.moe_blocks()[0].gate, draw_tokens(2, 9)
    seen = []
    inner = gate._scores
    gate._scores = lambda *args: seen.append((args, gate._residual_norm_T, inner(*args))) or seen[-1][-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        row = watch(model, tokens)[0]
    (hidden, weights, ids), norm, scores = seen[0]
    assert {x.dtype for x in (weights, norm, scores)} == {torch.float32}
    head = hidden.float() @ gate.zero_weight.float().T + gate.zero_bias.float()
    expected = weights.log() + head.gather(1, ids) - row["residual"].float().norm(dim=-1).log()[:, None]
    tiny.close(scores, expected, atol=1e-5, rtol=1e-5)
    assert all(0 < share < 1 for share in model.zero_share())


@torch.no_grad()
def test_a_copy_of_the_model_sees_its_own_residuals():
    model = make_model()
    twin, tokens = copy.deepcopy(model), draw_tokens(1, 7)
    expected = model(tokens).logits
    assert torch.equal(twin(tokens).logits, expected)


def test_gradients_equal_those_of_the_plain_loop():
    model = make_model("eager", mlp_only_layers=[1, 2], zce_score="weight+head")
    block = model.moe_blocks()[0]
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        row = {"block": block, "hidden": hidden, "residual": hidden}
        picks = naive(row, "weight+head")
    block.gate.dials.threshold = threshold = middle(picks)
    block(hidden.unsqueeze(0)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in block.experts.named_parameters()}
    block.zero_grad()
    naive_output(row, picks, threshold).square().sum().backward()
    for name, parameter in block.experts.named_parameters():
        expected = parameter.grad
        assert (found[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_model_reloads_bit_equal_with_its_dial(tmp_path, dtype):
    make_model().save_pretrained(tmp_path / "first")
    model = load_zero_expert_model(tmp_path / "first", dtype=dtype)
    model.set_zero_threshold([-2.3456789, -3.1])
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in list(file.keys())}
    assert shapes["model.layers.0.mlp.gate.weight"] == [N + 1, 32]
    assert shapes["model.layers.0.mlp.gate.zero_weight"] == [N, 32]
    assert shapes["model.layers.0.mlp.gate.zero_bias"] == [N]
    again, tokens = load_zero_expert_model(tmp_path, dtype=dtype), draw_tokens(1, 8)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    exact = torch.tensor([-2.3456789, -3.1], dtype=torch.float32).tolist()
    assert [block.gate.dials.threshold for block in again.moe_blocks()] == exact
    assert json.loads((tmp_path / "config.json").read_text())["zce_threshold"] == exact


@torch.no_grad()
def test_a_head_that_the_checkpoint_lacks_is_zero_not_garbage(tmp_path):
    model = make_model()
    state = {k: v for k, v in model.state_dict().items() if "gate.zero_" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"gate\.zero_bias is missing"):
        load_zero_expert_model(tmp_path)
    again = modeling.Qwen3MoePlusPlusForCausalLM.from_pretrained(tmp_path)
    for block in again.moe_blocks():
        assert not block.gate.zero_weight.any() and not block.gate.zero_bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zce_routing": "pared"}, "zce_routing 'pared' is unknown"),
        ({"zce_threshold": None}, "no zce_threshold"),
        ({"zce_threshold": "low"}, "zce_threshold 'low' is not a number"),
        ({"zce_threshold": math.inf}, "zce_threshold inf is not a finite number"),
        ({"zce_threshold": [-1.0, -2.0, -3.0]}, "3 numbers for 2 MoE layers"),
        ({"zce_nums": [5]}, r"zce_nums \[5\]"),
        ({"zce_nums": None}, "no zce_nums"),
        ({"zce_types": ["copy"]}, r"zce_types \['copy'\]"),
        ({"zce_score": "weight+height"}, "zce_score 'weight.height' is unknown"),
        ({"zce_routing": "shared", "zce_logit_bias": "big"}, "zce_logit_bias 'big' is not a number"),
    ],
)
def test_configs_that_make_no_sense_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        modeling.Qwen3MoePlusPlusForCausalLM(make_config(**changes))


def test_each_routing_has_its_own_dial():
    with pytest.raises(ValueError, match="use set_zero_threshold"):
        make_model().set_zero_logit_bias(1.0)
    with pytest.raises(ValueError, match="use set_zero_logit_bias"):
        make_model(zce_nums=[4], zce_routing="shared").set_zero_threshold(1.0)


def test_a_block_alone_cannot_know_the_residual():
    with pytest.raises(RuntimeError, match="whole decoder layer"):
        make_model().moe_blocks()[0](torch.randn(1, 4, 32))
