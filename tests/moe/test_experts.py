"""The grouped product against a loop over experts, and its place in Megatron's checkpoints."""

from dataclasses import replace

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.moe.experts import GroupedExperts, backend_for
from zeda_megatron.ops import expert_kernels
from zeda_megatron.ops.grouped_mlp import BACKENDS, grouped_mlp, stacked

H, F = 32, 16


def inputs(counts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.5).to(dtype).requires_grad_()

    rows = sum(counts)
    fc1, fc2 = [draw(2 * F, H) for _ in counts], [draw(H, F) for _ in counts]
    return draw(rows, H), draw(rows), fc1, fc2


def dense(rows_RH, probs_R, counts, fc1, fc2):
    """Each row through each expert, then only its own kept."""
    owner_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights_RE = torch.nn.functional.one_hot(owner_R, len(counts)).to(rows_RH.dtype) * probs_R[:, None]
    return tiny.dense_experts(rows_RH, weights_RE, list(zip(fc1, fc2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[3, 5, 2], [0, 7, 0, 1], [4, 0], [0, 0, 6], [0, 0]])
def test_outputs_and_gradients_equal_a_dense_loop(backend, counts):
    rows_RH, probs_R, fc1, fc2 = inputs(counts)
    wanted = [rows_RH, probs_R, *fc1, *fc2]
    mine = grouped_mlp(rows_RH, probs_R, counts, fc1, fc2, backend)
    expected = dense(rows_RH, probs_R, counts, fc1, fc2)
    tiny.close(mine, expected, rtol=1e-5, atol=1e-6)
    coefficients = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9))
    grads = [
        torch.autograd.grad((out * coefficients).sum(), wanted, materialize_grads=True)
        for out in (mine, expected)
    ]
    tiny.close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient_is_fine(backend):
    counts = [3, 0, 4]
    rows_RH, probs_R, fc1, fc2 = inputs(counts)
    wanted = [rows_RH, *fc1, *fc2]
    mine = torch.autograd.grad(grouped_mlp(rows_RH, probs_R, counts, fc1, fc2, backend).sum(), wanted)
    expected = torch.autograd.grad(
        dense(rows_RH, probs_R, counts, fc1, fc2).sum(), wanted, materialize_grads=True
    )
    tiny.close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_near_the_float32_result(backend):
    counts = [5, 0, 9]
    rows_RH, probs_R, fc1, fc2 = inputs(counts, torch.bfloat16)
    wanted = [rows_RH, *fc1, *fc2]
    mine = grouped_mlp(rows_RH, probs_R.float(), counts, fc1, fc2, backend)
    assert mine.dtype == torch.bfloat16
    exact = dense(
        rows_RH.float(), probs_R.float(), counts, [w.float() for w in fc1], [w.float() for w in fc2]
    )
    tiny.close(mine.float(), exact, rtol=0.05, atol=0.05)
    for a, b in zip(
        torch.autograd.grad(mine.float().square().sum(), wanted),
        torch.autograd.grad(exact.square().sum(), wanted, materialize_grads=True),
    ):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * max(1.0, float(b.abs().max())))


def test_layer_with_grouped_experts_has_the_same_checkpoint_names():
    plain = tiny.moe_layer(ZeroExpertConfig(4))
    grouped = tiny.moe_layer(ZeroExpertConfig(4), backend="grouped_mm")
    stock = tiny.moe_layer(None)
    assert list(plain.state_dict()) == list(grouped.state_dict()) == list(stock.state_dict())
    assert plain.sharded_state_dict().keys() == grouped.sharded_state_dict().keys()
    assert grouped.experts.plain and grouped.experts.backend == "grouped_mm"


def test_what_the_operator_cannot_do_falls_back_to_megatrons_loop():
    hidden = tiny.hidden_states(size=36)
    changes = {"hidden_size": 36, "moe_intermediate_size": 18}  # rows that start at no multiple of 16 bytes
    outputs = [
        tiny.moe_layer(ZeroExpertConfig(4), backend=backend, **changes)(hidden)[0]
        for backend in ("loop", "grouped_mm")
    ]
    assert torch.equal(*outputs)


def test_unknown_backend_is_a_user_error():
    with pytest.raises(UserError, match="--expert-backend 'fast'"):
        tiny.moe_layer(ZeroExpertConfig(4), backend="fast")


@pytest.mark.parametrize("built", [False, True])
def test_auto_takes_our_kernels_where_they_run_and_asking_for_them_in_vain_is_a_user_error(
    monkeypatch, built
):
    gpu, reason = torch.device("cuda", 0), None if built else "the kernels are not built"
    own = replace(expert_kernels.find(), why_not=lambda device, dtype: reason)
    monkeypatch.setattr(expert_kernels, "find", lambda: own)
    assert backend_for("auto", gpu, torch.bfloat16) == ("kernels" if built else "grouped_mm")
    assert backend_for("loop", gpu, torch.bfloat16) == "loop"
    assert backend_for("auto", torch.device("cpu"), torch.float32) == "grouped_mm"
    assert backend_for("kernels", torch.device("cpu"), torch.float32) == "kernels"
    if built:
        assert backend_for("kernels", gpu, torch.bfloat16) == "kernels"
    else:
        with pytest.raises(UserError, match="kernels are not built"):
            backend_for("kernels", gpu, torch.bfloat16)


def test_weight_gradients_added_to_main_grad_are_those_of_the_loop():
    counts = [3, 0, 4]
    rows_RH, probs_R, fc1, fc2 = inputs(counts)
    for weight in (*fc1, *fc2):
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    wanted = [rows_RH, probs_R, *fc1, *fc2]
    grads = [
        torch.autograd.grad(grouped_mlp(rows_RH, probs_R, counts, fc1, fc2, backend).square().sum(), wanted)
        for backend in ("loop", "kernels")
    ]
    torch.testing.assert_close(grads[0][:2], grads[1][:2])
    assert all(weight.grad_added_to_main_grad for weight in (*fc1, *fc2))
    tiny.close([w.main_grad - 1 for w in (*fc1, *fc2)], list(grads[0][2:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["grouped_mm", "kernels"])
@torch.no_grad()
def test_weights_are_gathered_once_and_again_when_they_are_other_objects(backend):
    layers = [tiny.moe_layer(ZeroExpertConfig(4), backend=name) for name in ("loop", backend)]
    layers[1].load_state_dict(layers[0].state_dict())
    hidden, kept = tiny.hidden_states(), layers[1].experts._parts

    def same():
        torch.testing.assert_close(layers[0](hidden)[0], layers[1](hidden)[0])

    same()
    assert kept() is kept()
    beside = stacked(kept()[0]).data_ptr() == kept()[0][0].data_ptr()
    assert beside == (backend == "grouped_mm")  # not copied at each call; kernels take them wherever they lie
    for layer in layers:  # in place, as optimizers and checkpoints do; then as other objects
        for expert in layer.experts.local_experts:
            expert.linear_fc1.weight.mul_(2)
    same()
    for layer in layers:
        for expert in layer.experts.local_experts:
            expert.linear_fc2.weight = torch.nn.Parameter(expert.linear_fc2.weight * 3)
    same()
    before = kept()
    layers[1].float()
    assert kept() is not before
    same()


def test_kernels_that_were_asked_for_and_do_not_fit_are_refused_in_one_line():
    changes = {"hidden_size": 36, "moe_intermediate_size": 18}
    with pytest.raises(UserError, match=r"--expert-backend kernels: they know SwiGLU.*use auto"):
        tiny.moe_layer(ZeroExpertConfig(4), backend="kernels", **changes)


def test_a_backend_that_was_asked_for_takes_the_place_of_megatrons_grouped_experts():
    """As Transformer Engine's are where it is installed."""
    arch = read_architecture(tiny.TINY)
    for backend in ("loop", "grouped_mm", "kernels"):
        config = transformer_config(arch, overrides={"moe_grouped_gemm": True})
        model = build_gpt_model(arch, config, ZeroExpertConfig(4), expert_backend=backend)
        assert type(model.decoder.layers[1].mlp.experts) is GroupedExperts
