"""A whole MoE layer against a dense loop over experts: what is sent, what comes back, all gradients."""

import deepep_buffer
import pytest
import tiny
import torch
from megatron.core.parallel_state import get_expert_tensor_and_model_parallel_group
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, _DeepepManager

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.moe.dispatch import RealSlotsDeepepManager, check_dispatcher, install_dispatchers
from zeda_megatron.moe.router_dials import zero_mask

N, NZ, K = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"]
DISPATCHERS = ("alltoall", "allgather")
BACKENDS = ("loop", "grouped_mm")


def make(dispatcher="alltoall", backend="loop", **zero):
    overrides = {"moe_token_dispatcher_type": dispatcher}
    return tiny.moe_layer(ZeroExpertConfig(**({"num_zero_experts": NZ} | zero)), overrides, backend)


def all_gradients(output, layer, hidden, seed=3):
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    wanted = [hidden, *layer.parameters()]
    return torch.autograd.grad((output * coefficients).sum(), wanted, materialize_grads=True)


def dense_output(layer, hidden):
    flat_TH = hidden.reshape(-1, hidden.shape[-1])
    routed = tiny.dense_routing(flat_TH @ layer.router.weight.t(), K, N)
    return tiny.dense_experts(flat_TH, routed.real_TN, tiny.expert_weights(layer)).view_as(hidden), routed


def rows_seen_by_experts(layer, hidden):
    seen = []
    handle = layer.experts.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape[0], args[1]))
    )
    layer(hidden)
    handle.remove()
    return seen[0]


def prefer(layer, experts, hidden, strength=50.0):
    """Make every token pick `experts` first, by a direction that all tokens share."""
    with torch.no_grad():
        direction_H = hidden.reshape(-1, hidden.shape[-1]).mean(0)
        hidden += 3 * direction_H / direction_H.norm()
        for expert in experts:
            layer.router.weight[expert] = strength * direction_H / direction_H.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_output_and_all_gradients_equal_a_dense_loop_over_experts(dispatcher, backend):
    layer, hidden = make(dispatcher, backend), tiny.hidden_states()
    output, _ = layer(hidden)
    expected, _ = dense_output(layer, hidden)
    tiny.close(output, expected, rtol=1e-4, atol=1e-5)
    mine, reference = all_gradients(output, layer, hidden), all_gradients(expected, layer, hidden)
    tiny.close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_when_all_picks_are_zero_experts_the_layer_adds_nothing(dispatcher, backend):
    layer, hidden = make(dispatcher, backend), tiny.hidden_states()
    prefer(layer, [N, N + 1, N + 2], hidden)
    output, _ = layer(hidden)
    assert torch.equal(output, torch.zeros_like(output))
    assert rows_seen_by_experts(layer, hidden)[0] == 0
    for gradient in all_gradients(output, layer, hidden):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(p.grad is not None for p in backward(layer, hidden))  # Megatron's DDP waits for every gradient


def backward(layer, hidden):
    layer(hidden)[0].sum().backward()
    return [weight for pair in tiny.expert_weights(layer) for weight in pair]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_experts_without_tokens_get_zero_gradients(dispatcher, backend):
    layer, hidden = make(dispatcher, backend), tiny.hidden_states()
    prefer(layer, [1, 6, N], hidden)
    output, _ = layer(hidden)
    expected, routed = dense_output(layer, hidden)
    assert routed.map_TE.any(0).nonzero().flatten().tolist() == [1, 6, N]
    tiny.close(output, expected, rtol=1e-4, atol=1e-4)
    tiny.close(
        all_gradients(output, layer, hidden), all_gradients(expected, layer, hidden), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_rows_dispatched_are_the_real_slots(dispatcher):
    layer, hidden = make(dispatcher), tiny.hidden_states()
    _, routed = dense_output(layer, hidden)
    slots_N = routed.map_TE[:, :N].sum(0)
    rows, counts = rows_seen_by_experts(layer, hidden)
    assert rows == int(slots_N.sum()) < K * 13
    assert counts.tolist() == slots_N.tolist()


def test_num_out_tokens_is_the_true_count():
    layer, hidden = make(), tiny.hidden_states()
    layer(hidden)
    _, routed = dense_output(layer, hidden)
    assert layer.token_dispatcher.num_out_tokens == int(routed.map_TE[:, :N].sum())
    stock = tiny.moe_layer()
    stock(hidden)
    assert type(stock.token_dispatcher) is MoEAlltoAllTokenDispatcher
    assert stock.token_dispatcher.num_out_tokens == K * 13  # what upstream assumes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_masked_layer_is_bit_equal_to_megatrons_own_layer(dispatcher, backend):
    layer, stock = make(dispatcher, backend), tiny.moe_layer(None, {"moe_token_dispatcher_type": dispatcher})
    if backend == "grouped_mm":
        stock = tiny.moe_layer(ZeroExpertConfig(0), {"moe_token_dispatcher_type": dispatcher}, backend)
    weights = {name: value for name, value in layer.state_dict().items() if torch.is_tensor(value)}
    weights["router.weight"] = weights["router.weight"][:N]
    stock.load_state_dict(weights, strict=False)
    hidden = tiny.hidden_states()
    with zero_mask(layer):
        assert torch.equal(layer(hidden)[0], stock(hidden)[0])
    assert not torch.equal(layer(hidden)[0], stock(hidden)[0])


def test_shared_experts_are_added_as_usual():
    overrides = {"moe_shared_expert_intermediate_size": 16}
    layer, hidden = tiny.moe_layer(ZeroExpertConfig(NZ), overrides), tiny.hidden_states()
    expected, _ = dense_output(layer, hidden)
    shared = layer.shared_experts
    gate, up = (hidden @ shared.linear_fc1.weight.t()).chunk(2, -1)
    expected = expected + (torch.nn.functional.silu(gate) * up) @ shared.linear_fc2.weight.t()
    tiny.close(layer(hidden)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_dispatcher_with_a_fixed_number_of_rows_is_refused():
    layer = make()

    class Strange(MoEAlltoAllTokenDispatcher):
        pass

    layer.token_dispatcher.__class__ = Strange
    with pytest.raises(UserError, match="moe-token-dispatcher-type"):
        install_dispatchers(layer)


N, K, T = tiny.TINY["num_experts"], tiny.TINY["num_experts_per_tok"], 40


@pytest.fixture
def stand_ins(monkeypatch):
    return deepep_buffer.install(monkeypatch, get_expert_tensor_and_model_parallel_group())


def manager(kind, **overrides):
    config = tiny.megatron_config(overrides)
    group = get_expert_tensor_and_model_parallel_group()
    return kind(group=group, num_local_experts=N, router_topk=K, num_experts=N, config=config)


def routing():
    """A map with 0 to K picks per token and its weights, some of them exactly 0."""
    draw = torch.Generator().manual_seed(0)
    map_TN = torch.zeros(T, N, dtype=torch.bool)
    for t in range(T):
        map_TN[t, torch.randperm(N, generator=draw)[: t % (K + 1)]] = True
    probs_TN = torch.rand(T, N, generator=draw) * map_TN
    probs_TN[::5] = 0.0
    return map_TN, probs_TN.requires_grad_()


def test_deepep_is_told_every_real_pick_and_nothing_else(stand_ins):
    mine, (map_TN, probs_TN) = manager(RealSlotsDeepepManager), routing()
    mine.setup_metadata(map_TN, probs_TN)
    assert mine.token_indices.shape == (T, K) and mine.token_indices.dtype == torch.int64
    for t in range(T):
        named = mine.token_indices[t][mine.token_indices[t] >= 0]
        assert sorted(named.tolist()) == map_TN[t].nonzero().flatten().tolist()
        assert torch.equal(mine.token_probs[t, : len(named)], probs_TN[t, named])
        assert not mine.token_probs[t, len(named) :].any()  # picks come first
    weights = torch.rand(T, K)
    (mine.token_probs * weights).sum().backward()
    assert (probs_TN.grad != 0).equal(map_TN)  # picks of weight 0 too, and only picks


@pytest.mark.parametrize("kind", [RealSlotsDeepepManager, _DeepepManager])
def test_counts_are_those_of_the_map_where_megatrons_own_are_not(stand_ins, kind):
    mine, (map_TN, probs_TN) = manager(kind), routing()
    mine.setup_metadata(map_TN, probs_TN)
    hidden = torch.randn(T, 4)
    rows, weights = mine.get_permuted_hidden_states_by_experts(mine.dispatch(hidden))
    counts = mine.get_number_of_tokens_per_expert().tolist()
    if kind is _DeepepManager:
        assert len(rows) == sum(counts) == T * K > int(map_TN.sum())
        return
    assert counts == map_TN.sum(0).tolist() and mine.dispatched_routing_map.sum() == map_TN.sum()
    experts, tokens = map_TN.t().nonzero().unbind(1)
    # Tokens without a real pick are not sent; the others arrive in their order.
    torch.testing.assert_close(rows, hidden[tokens])
    torch.testing.assert_close(weights, probs_TN[tokens, experts])
    back = mine.combine(mine.get_restored_hidden_states_by_experts(rows * weights[:, None]))
    torch.testing.assert_close(back, hidden * probs_TN.sum(1, keepdim=True))


def test_where_deep_ep_is_missing_the_flag_says_what_to_install():
    for backend, words in (("deepep", "deepseek-ai/DeepEP,"), ("hybridep", "branch hybrid-ep")):
        with pytest.raises(
            UserError, match="--moe-token-dispatcher-type flex needs the package deep_ep"
        ) as e:
            check_dispatcher("flex", backend, expert_ranks=2, bf16=True)
        assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expert_ranks": 1}, "--expert-model-parallel-size above 1"),
        ({"bf16": False}, "needs --bf16"),
    ],
)
def test_what_deep_ep_cannot_do_is_refused(stand_ins, fields, words):
    check_dispatcher("flex", **({"expert_ranks": 2, "bf16": True}))
    with pytest.raises(UserError, match="--moe-token-dispatcher-type flex") as caught:
        check_dispatcher("flex", **({"expert_ranks": 2, "bf16": True} | fields))
    assert words in str(caught.value)
