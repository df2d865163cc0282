"""Permute fusion with zero experts, on stand-ins for Transformer Engine's kernels: against the dense layer."""

import pytest
import tiny
from dense_layer import ROUTINGS, SITUATIONS, compare, fill, inputs_of, whole_weights, zero_config
from fused_kernels import FusedKernels

from zeda_megatron.errors import UserError
from zeda_megatron.moe.dispatch import check_dispatcher

DISPATCHERS = ("alltoall", "allgather")
CASES = [
    (routing, situation)
    for routing in ROUTINGS
    for situation in SITUATIONS
    if situation == "plain" or routing in ("shared", "paired")
]


@pytest.fixture
def kernels(monkeypatch):
    return FusedKernels().install(monkeypatch)


def make(routing, dispatcher="alltoall", zero=True):
    overrides = {"moe_token_dispatcher_type": dispatcher, "moe_permute_fusion": True}
    return tiny.moe_layer(zero_config(routing) if zero else None, overrides)


@pytest.mark.parametrize(("routing", "situation"), CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_permute_fusion_may_stay_on(kernels, dispatcher, routing, situation):
    made = compare(make(routing, dispatcher), routing, situation)
    assert max(made["worst"].values()) < 1e-4, made["worst"]
    rows, expected = made["rows"]
    assert rows == expected and made["counts"][0] == made["counts"][1]
    # The kernels are asked for the true number of rows, and for none they are not asked.
    assert kernels.allocated == ([rows] if rows else [])
    starves = "starve" in situation
    assert (made["kept"] == [0]) == starves and (starves or made["kept"][0] < 39 or situation == "idle")


def test_megatrons_own_dispatcher_asks_for_rows_that_nobody_fills(kernels):
    """The reason for ours: Megatron's has room for tokens x top-k rows; the rest of the buffer is garbage."""
    layer, stock = make("shared"), make("shared", zero=False)
    layer.token_dispatcher = stock.token_dispatcher
    weights, (hidden,) = whole_weights("shared", "plain"), inputs_of("shared", "plain", 1)
    fill(layer, weights, "shared", 0.0, 0)
    probs, routing_map = layer.router(hidden)
    rows, _ = layer.preprocess(hidden, probs, routing_map)
    real = int(routing_map.sum())
    assert kernels.allocated == [13 * 3] and real < 13 * 3 == len(rows)
    assert rows[:real].isfinite().all() and rows[real:].isnan().all()
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        layer(hidden)


def test_megatrons_own_static_layer_runs_on_the_stand_ins(kernels):
    """The stand-ins are not what breaks: without zero experts stock Megatron agrees with its unfused self."""
    fused, plain = make("shared", zero=False), tiny.moe_layer(None, {"moe_token_dispatcher_type": "alltoall"})
    outputs = []
    for layer in (fused, plain):
        hidden = tiny.hidden_states()
        output = layer(hidden)[0]
        output.square().sum().backward()
        outputs.append((output, hidden.grad, layer.router.weight.grad))
    assert kernels.allocated == [39]
    tiny.close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_router_trains_on_frozen_rows(kernels, dispatcher):
    """Transformer Engine gives weights no gradient where rows want none, as below the first router that trains."""
    gradients = []
    for fusion in (True, False):
        layer = make("shared", dispatcher)
        layer.token_dispatcher.fusion = layer.token_dispatcher.config.moe_permute_fusion = fusion
        layer.experts.requires_grad_(False)
        layer(tiny.hidden_states().detach())[0].square().sum().backward()
        gradients.append(layer.router.weight.grad)
    tiny.close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().sum() > 0


def test_other_layers_keep_their_setting(kernels):
    layer = make("paired")
    compare(layer, "paired", "all starve")
    assert layer.config.moe_permute_fusion and layer.token_dispatcher.config is not layer.config
    assert max(compare(layer, "paired", "plain")["worst"].values()) < 50  # runs again, gradients added up
    assert kernels.allocated and kernels.allocated[-1] > 0


def test_without_transformer_engine_the_flag_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--moe-permute-fusion needs Transformer Engine") as caught:
        check_dispatcher("alltoall", permute_fusion=True)
    assert "\n" not in str(caught.value)
    FusedKernels().install(monkeypatch)
    check_dispatcher("alltoall", permute_fusion=True)
