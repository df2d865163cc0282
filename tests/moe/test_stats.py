"""Zero shares against a direct count of the routing maps."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe import stats
from zeda_megatron.moe.pick_rules import StaticTopK
from zeda_megatron.moe.router_dials import set_dials, set_thresholds

N, NZ, K = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"]
CPU = torch.device("cpu")


def model(*layer_numbers, **zero):
    """Some routers of a four-layer model."""
    made = torch.nn.ModuleList()
    for number in layer_numbers:
        router = tiny.router(ZeroExpertConfig(NZ, **zero), seed=number)
        router.set_layer_number(number)
        made.append(router)
    return made


def count(router, hidden, valid_T=None):
    """(zero slots, slots) of one pass, counted on the dense routing."""
    map_TE = tiny.dense_routing(hidden.reshape(-1, hidden.shape[-1]) @ router.weight.t(), K, N).map_TE
    if valid_T is not None:
        map_TE = map_TE[valid_T]
    return int(map_TE[:, N:].sum()), int(map_TE.sum())


def test_share_equals_a_direct_count_over_passes_and_layers():
    routers = model(3, 1)  # stored out of order, layers 2 and 4 are dense
    inputs = [tiny.hidden_states(13, seed=1), tiny.hidden_states(5, seed=2)]
    valid_T = torch.arange(13) < 10
    expected = {1: [0, 0], 3: [0, 0]}
    for router in routers:
        for hidden, valid in zip(inputs, (valid_T, None)):
            router(hidden, None if valid is None else ~valid[:, None])
            for i, n in enumerate(count(router, hidden, valid)):
                expected[router.layer_number][i] += n
    report = stats.collect(routers, 4, CPU)
    shares = [None if i not in expected else expected[i][0] / expected[i][1] for i in (1, 2, 3, 4)]
    assert report.zero_share_by_layer == shares
    zero, slots = (sum(pair[i] for pair in expected.values()) for i in (0, 1))
    assert report.zero_share == pytest.approx(zero / slots) and 0 < zero < slots


def test_experts_that_tokens_decoded_together_need_are_counted():
    routers, valid_T = model(2, 3), torch.arange(40) != 7
    stats.record(routers)
    expected = []
    for router in routers:
        hidden = tiny.hidden_states(40, seed=router.layer_number)
        kept_TN = router(hidden, ~valid_T[:, None])[1][valid_T]
        groups = [kept_TN[start::3] for start in range(3)]  # 39 tokens in groups of at most 16
        expected += [group.any(0).sum() / N for group in groups]
    assert stats.loaded_share(routers) == pytest.approx(float(sum(expected) / len(expected)))


def test_collecting_starts_anew_unless_told_not_to():
    routers = model(1)
    routers[0](tiny.hidden_states())
    kept = stats.collect(routers, 2, CPU, reset_after=False)
    assert stats.collect(routers, 2, CPU) == kept
    assert stats.collect(routers, 2, CPU).zero_share_by_layer == [None, None]


def test_group_loss_is_the_mean_over_micro_batches_of_the_sum_over_layers():
    routers = model(1, 2, group_loss_coeff=0.1)
    losses = torch.zeros(2, 3)
    for i, router in enumerate(routers):
        for j in range(3):
            router.routing_stats.reset()
            router(tiny.hidden_states(seed=j))
            losses[i, j] = router.routing_stats.group_loss
        router.routing_stats.reset()
        for j in range(3):
            router(tiny.hidden_states(seed=j))
    assert stats.collect(routers, 2, CPU).group_loss == pytest.approx(float(losses.mean(1).sum()), rel=1e-6)


def test_tokens_are_recorded_on_request():
    routers = model(1)
    hidden = tiny.hidden_states()
    routers[0](hidden)
    assert routers[0].routing_stats.real_picks_T == []
    routers[0].routing_stats.recording = True
    map_TE = tiny.dense_routing(hidden.reshape(13, -1) @ routers[0].weight.t(), K, N).map_TE
    for _ in range(2):
        routers[0](hidden)
    assert [t.tolist() for t in routers[0].routing_stats.real_picks_T] == [map_TE[:, :N].sum(1).tolist()] * 2
    stats.reset(routers)
    assert routers[0].routing_stats.real_picks_T == []


@pytest.mark.parametrize("routing", ["shared", "paired"])
def test_skipped_shares_of_tokens_are_those_of_the_maps_over_layers_and_passes(routing):
    routers = model(3, 1)
    if routing == "paired":
        zero = ZeroExpertConfig(N, zero_expert_routing="paired", paired_score="head")
        routers = torch.nn.ModuleList(tiny.router(zero, seed=i) for i in range(2))
        set_thresholds(routers, [0.0])
    set_dials(routers[1], pick_rule=StaticTopK(2))
    routers.eval()
    stats.record(routers)
    inputs = [tiny.hidden_states(13, seed=1), tiny.hidden_states(5, seed=2)]
    kept_T = torch.cat([sum(router(hidden)[1].sum(1) for router in routers) for hidden in inputs])
    assert 0 < kept_T.sum() < 18 * 2 * K and len(kept_T.unique()) > 1
    torch.testing.assert_close(stats.take_skipped(routers), 1 - kept_T.double() / (2 * K))
    again = tiny.hidden_states(4, seed=3)
    kept_T = sum(router(again)[1].sum(1) for router in routers)
    torch.testing.assert_close(stats.take_skipped(routers), 1 - kept_T.double() / (2 * K))
    routers[0](again)
    stats.reset(routers)
    assert routers[0].routing_stats.real_picks_T == []


def test_a_model_without_zero_experts_reports_nothing():
    report = stats.collect(torch.nn.Linear(2, 2), 3, CPU)
    assert report.zero_share == 0.0 and report.zero_share_by_layer == [None] * 3 and report.group_loss == 0.0


def test_picks_are_counted_per_expert_on_request_padding_left_out():
    """Against a direct count; the pick rule keeps the heaviest pick of every token."""
    routers = model(2, 4)
    hidden, valid_T = tiny.hidden_states(), torch.arange(13) < 10
    set_dials(routers[0], pick_rule=StaticTopK(1))
    for router in routers:
        router.eval()
        router(hidden, ~valid_T[:, None])
    assert routers[0].routing_stats.picks_2N is None
    stats.record(routers)
    for _ in range(2):
        for router in routers:
            router(hidden, ~valid_T[:, None])
    picks_LN, kept_LN = stats.collect_experts(routers, 4, N, CPU)
    for i, layer in enumerate((1, 3)):
        routed = tiny.dense_routing(hidden.reshape(13, -1) @ routers[i].weight.t(), K, N)
        real_TN = routed.real_TN.detach()[valid_T]
        assert torch.equal(picks_LN[layer], 2.0 * (real_TN > 0).sum(0))
        kept_TN = real_TN > 0
        if i == 0:
            kept_TN = kept_TN & (real_TN == real_TN.max(1, keepdim=True).values)
        assert torch.equal(kept_LN[layer], 2.0 * kept_TN.sum(0))
    assert not picks_LN[0].any() and not picks_LN[2].any()
    stats.reset(routers)
    assert not stats.collect_experts(routers, 4, N, CPU)[0].any()


@pytest.mark.usefixtures("one_process")
def test_collecting_waits_for_the_device_once_however_many_layers_there_are():
    class Scalars(TorchDispatchMode):
        """Counts numbers that are read out of tensors one by one: on a GPU each of them waits."""

        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 6):
        chunk = model(*range(1, layers + 1))
        for router in stats.routers(chunk):
            count(router, tiny.hidden_states())
        with Scalars() as seen:
            stats.collect(chunk, layers, torch.device("cpu"))
        counts.append(seen.count)
    assert counts[0] == counts[1] < 8
