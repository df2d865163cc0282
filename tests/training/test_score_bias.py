"""Plain training of GLM-4.7-Flash: the score bias learns when asked to, and only where it can."""

import pytest
import tiny
import tiny_world
import torch

from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")
RATE = 0.25
STATIC = {
    "stage": "pretrain",
    "num_zero_experts": 0,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_router_bias_update_rate": RATE,
}


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return tiny_world.make_world(tmp_path_factory.mktemp("glm"), tiny.glm_model)


def score_routers(run):
    return [
        module for chunk in run.student.chunks for module in chunk.modules() if hasattr(module, "expert_bias")
    ]


def test_the_bias_moves_by_its_rate_towards_experts_with_fewer_tokens_padding_aside(glm):
    run = tiny_world.start(glm, pretrained_checkpoint=glm.static, train_iters=1, **STATIC)
    found = score_routers(run)
    assert len(found) == 2
    before = [router.expert_bias.clone() for router in found]
    counts, padded = [torch.zeros_like(bias) for bias in before], 0

    def count(number):
        def hook(module, args, output):
            nonlocal padded
            padding_T = args[1].reshape(-1)
            padded += int(padding_T.sum())
            for row, is_padding in zip(output[1], padding_T):
                if not is_padding:
                    counts[number] += row

        return hook

    for number, router in enumerate(found):
        router.register_forward_hook(count(number))
    assert run.run() == 0
    assert padded
    for router, old, count_N in zip(found, before, counts):
        torch.testing.assert_close(router.expert_bias, old + RATE * torch.sign(count_N.mean() - count_N))
        assert not torch.equal(router.expert_bias, old)


def test_a_resumed_run_goes_on_with_the_bias_it_had(glm, tmp_path):
    common = {"pretrained_checkpoint": glm.static, "train_iters": 4, **STATIC}
    whole = tiny_world.start(glm, save=tmp_path / "whole", **common)
    whole.run()
    tiny_world.start(glm, save=tmp_path / "parts", exit_interval=2, **common).run()
    rest = tiny_world.start(glm, save=tmp_path / "parts", **common)
    assert rest.iteration == 2
    rest.run()
    for one, other in zip(score_routers(whole), score_routers(rest), strict=True):
        assert torch.equal(one.expert_bias, other.expert_bias)


def test_a_bias_does_not_train_beside_zero_experts_nor_where_there_is_none(glm, world):
    with pytest.raises(UserError, match="--moe-router-bias-update-rate must be 0 with zero experts"):
        tiny_world.start(glm, moe_router_bias_update_rate=RATE)
    with pytest.raises(
        UserError, match=r"--moe-router-bias-update-rate: the routers of Qwen3Moe.* have no score"
    ):
        tiny_world.start(world, pretrained_checkpoint=world.static, **STATIC)


def test_a_model_that_trained_before_in_this_process_may_have_had_fewer_layers(glm, tmp_path):
    small = tiny_world.make_world(
        tmp_path, tiny.glm_model, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"]
    )
    for world in (small, glm):
        run = tiny_world.start(world, pretrained_checkpoint=world.static, train_iters=1, **STATIC)
        assert run.run() == 0
