"""What stands beside a checkpoint keeps later steps from going wrong silently."""

import json

import pytest
import tiny_world

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def renormalised(world, tmp_path_factory):
    """A run after AdaMoE: its loss, and weights over the real picks."""
    folder = tmp_path_factory.mktemp("renormalised")
    flags = {"group_loss_variant": "adamoe", "renormalize_after_drop": True, "train_iters": 2}
    assert tiny_world.start(world, save=folder, **flags).run() == 0
    return folder


def test_a_model_with_rescaled_weights_is_measured_as_it_was_trained(renormalised):
    chunk = load_model(str(renormalised)).chunk
    assert all(router.zero.renormalize_after_drop for router in routers(chunk))


def test_a_model_with_rescaled_weights_is_not_exported_as_something_else(world, renormalised, tmp_path):
    with pytest.raises(UserError, match="--renormalize-after-drop"):
        megatron_to_hf(renormalised, world.hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_distilled_weights_are_marked_as_adapted(world, renormalised, tmp_path):
    assert json.loads((renormalised / "zeda.json").read_text())["adapted_steps"] == 2
    flags = {"stage": "pretrain", "moe_router_load_balancing_type": "none", "train_iters": 1}
    tiny_world.start(world, save=tmp_path, **flags).run()
    assert "adapted_steps" not in json.loads((tmp_path / "zeda.json").read_text())
