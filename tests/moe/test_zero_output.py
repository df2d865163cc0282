"""Zero experts that are not silent: `learned` begins as nothing, `copy` hands the input through."""

import pytest
import tiny
import torch
from megatron.core.models.gpt import GPTModel

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.models.build import decoder_block_spec
from zeda_megatron.moe.dispatch import install_dispatchers
from zeda_megatron.moe.spec import apply_zero_experts

N, NZ, K = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def layer(kind, dispatcher="alltoall"):
    made = tiny.moe_layer(
        ZeroExpertConfig(NZ, zero_experts_type=kind), {"moe_token_dispatcher_type": dispatcher}
    )
    if kind == "learned":
        torch.nn.init.zeros_(made.router.zero_output.bias)  # tiny.moe_layer draws every parameter
    return made


def same_weights(target, source):
    return target.load_state_dict(source.state_dict(), strict=False)


def zero_weights(made, hidden):
    flat_TH = hidden.reshape(-1, hidden.shape[-1])
    return tiny.dense_routing(flat_TH @ made.router.weight.t(), K, N).weights_TE[:, N:]


def test_learned_zero_experts_are_born_as_zeros():
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from zeda_megatron.moe.router import ZeroExpertRouter

    zero = ZeroExpertConfig(NZ, zero_experts_type="learned")
    router = ZeroExpertRouter(tiny.megatron_config(), get_default_pg_collection(), zero=zero)
    assert torch.equal(router.zero_output.bias, torch.zeros(NZ, 32))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_learned_starts_bit_equal_to_zero_and_gets_gradients(dispatcher):
    zero, learned, hidden = layer("zero", dispatcher), layer("learned", dispatcher), tiny.hidden_states()
    same_weights(learned, zero)
    output, _ = learned(hidden)
    assert torch.equal(output, zero(hidden)[0])
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    bias = learned.router.zero_output.bias
    grad_bias = torch.autograd.grad((output * coefficients).sum(), bias)[0]
    # d/db_j of sum_t c_t * w_tj * b_j
    tiny.close(grad_bias, zero_weights(learned, hidden).t() @ coefficients.view(13, 32), rtol=1e-4, atol=1e-5)
    assert grad_bias.abs().sum() > 0


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_learned_adds_weight_times_bias(dispatcher):
    zero, learned, hidden = layer("zero", dispatcher), layer("learned", dispatcher), tiny.hidden_states()
    same_weights(learned, zero)
    bias = learned.router.zero_output.bias
    torch.nn.init.normal_(bias)
    expected = zero(hidden)[0] + (zero_weights(learned, hidden) @ bias).view_as(hidden)
    tiny.close(learned(hidden)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_copy_adds_weight_times_input(dispatcher):
    zero, copy, hidden = layer("zero", dispatcher), layer("copy", dispatcher), tiny.hidden_states()
    same_weights(copy, zero)
    weight_T = zero_weights(copy, hidden).sum(1)
    expected = zero(hidden)[0] + weight_T[:, None, None] * hidden
    output = copy(hidden)[0]
    tiny.close(output, expected, rtol=1e-4, atol=1e-5)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad((out * coefficients).sum(), [hidden, copy_or_zero.router.weight])
        for out, copy_or_zero in (
            (output, copy),
            (zero(hidden)[0] + zero_weights(zero, hidden).sum(1)[:, None, None] * hidden, zero),
        )
    ]
    tiny.close(*grads, rtol=1e-4, atol=1e-5)


def model(kind, overrides):
    config = tiny.megatron_config(overrides)
    block = apply_zero_experts(
        decoder_block_spec(config), ZeroExpertConfig(NZ, zero_experts_type=kind), "loop"
    )
    made = GPTModel(config, block, vocab_size=96, max_sequence_length=64, position_embedding_type="rope")
    install_dispatchers(made)
    tiny.draw(made)
    return made.train()


@pytest.mark.parametrize("kind", ["zero", "copy", "learned"])
def test_full_recomputation_changes_neither_loss_nor_gradients_nor_counts(kind):
    tokens = torch.arange(12)[None]
    results = []
    for overrides in ({}, FULL):
        made = model(kind, overrides)
        loss = made(tokens, tokens, None, labels=tokens.roll(-1, 1)).sum()
        loss.backward()
        counts = [
            (int(r.routing_stats.zero_slots), int(r.routing_stats.slots))
            for r in (x.mlp.router for x in made.decoder.layers)
        ]
        results.append((loss.detach(), {n: p.grad for n, p in made.named_parameters()}, counts))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    assert results[0][2] == results[1][2] and all(slots == 12 * K for _, slots in results[0][2])
    if kind == "learned":
        assert results[1][1]["decoder.layers.0.mlp.router.zero_output.bias"].abs().sum() > 0
