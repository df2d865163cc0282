"""What DeepEP is told of tokens with fewer than K real experts; who may not use it. Layers: tests/distributed."""

import deepep_buffer
import pytest
import tiny
import torch
from megatron.core.parallel_state import get_expert_tensor_and_model_parallel_group
from megatron.core.transformer.moe.token_dispatcher import _DeepepManager

from zeda_megatron.errors import UserError
from zeda_megatron.moe.dispatch import check_dispatcher
from zeda_megatron.moe.flex_dispatch import RealSlotsDeepepManager

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
