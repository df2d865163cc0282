"""Routing limited to groups of experts: Megatron's and the definition, and zero experts outside of it."""

import pytest
import tiny
import torch
from families import FAMILIES
from megatron.core.transformer.moe.moe_utils import group_limited_topk

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.group_limit import GroupLimit
from zeda_megatron.moe.router_dials import set_dials
from zeda_megatron.moe.stats import routers

T, N, K = 50, 16, 4


def scores(columns=N, seed=0):
    return torch.rand(T, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (8, 2)])
def test_two_best_scores_make_a_group_s_as_in_megatron(groups, kept):
    """Megatron sums K / kept scores of a group, here two."""
    limited = GroupLimit(N, groups, kept, best=K // kept)(scores())
    _, wanted_TK = group_limited_topk(scores(), K, T, N, groups, kept)
    mine_TK = limited.topk(K, dim=1).indices
    assert torch.equal(mine_TK.sort(1).values, wanted_TK.sort(1).values)


@pytest.mark.parametrize("best", [1, 2, 3])
@pytest.mark.parametrize("zero", [0, 5])
def test_the_limit_is_its_definition_and_says_nothing_of_zero_experts(best, zero):
    found = GroupLimit(N, 4, 2, best)(scores(N + zero))
    for row, limited in zip(scores(N + zero).tolist(), found.tolist()):
        sums = [sum(sorted(row[g * 4 : g * 4 + 4])[-best:]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -sums[g])[:2]
        wanted = [x if e >= N or e // 4 in kept else float("-inf") for e, x in enumerate(row)]
        assert limited == wanted


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("name", "changes"), [("deepseek_v3", {}), ("glm4_moe", {"n_group": 4, "topk_group": 2})]
)
@torch.no_grad()
def test_zero_experts_that_nobody_picks_change_no_pick_of_the_teacher(name, changes):
    """As at the start of a training whose zero rows are pushed down: groups are chosen without them."""
    hf = FAMILIES[name].make(**changes)
    static, dynamic = tiny.megatron_model(hf), tiny.megatron_model(hf, ZeroExpertConfig(4))
    set_dials([dynamic], zero_logit_bias=-1e4)
    for router in routers(dynamic):
        router.expert_bias[8:] = -10.0
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    places = torch.arange(17).expand_as(tokens)
    tiny.close(dynamic(tokens, places, None), static(tokens, places, None), rtol=0, atol=1e-5)
    set_dials([dynamic], zero_logit_bias=0.0)
    for router in routers(dynamic):
        router.expert_bias[8:] = 0.0
    assert tiny.gap(dynamic(tokens, places, None), static(tokens, places, None)) > 1e-2
