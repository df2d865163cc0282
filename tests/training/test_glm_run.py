"""Whole runs of GLM-4.7-Flash in one process: the score bias stays, and what was trained opens in transformers."""

import pytest
import tiny
import tiny_world
import torch
from safetensors.torch import load_file

from zeda_megatron.checkpoint.convert import megatron_to_hf
from zeda_megatron.evaluation.models import load_model
from zeda_megatron.moe.stats import routers
from zeda_megatron.serving.load import load_glm4_moe_lite_zero

pytestmark = pytest.mark.usefixtures("one_process")
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return tiny_world.make_world(tmp_path_factory.mktemp("glm"), tiny.glm_model)


def exported(checkpoint, template, out):
    megatron_to_hf(checkpoint, template, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bf16": True},
        {"recompute_granularity": "full"},
        {"stage": "2", "global_batch_size": 10, "samples_per_prompt": 2, "routing_replay": True},
    ],
    ids=["stage 1", "bf16", "recompute", "stage 2 replay"],
)
def test_training_moves_weights_and_zero_share_but_no_score_bias(glm, tmp_path, flags):
    before = exported(glm.dynamic, glm.hf, tmp_path / "before")
    run = tiny_world.start(glm, save=tmp_path / "run", train_iters=3, **flags)
    still = run.teacher.weight_hash()
    assert run.run() == 0 and run.teacher.weight_hash() == still
    metrics = tiny_world.read_metrics(tmp_path / "run")
    assert all(line["zero_share_by_layer"][0] is None for line in metrics)
    assert all(0 < line["zero_share"] < 1 for line in metrics)
    after = exported(tmp_path / "run", glm.hf, tmp_path / "after")
    assert before.keys() == after.keys()
    biases = [key for key in before if key.endswith(BIAS)]
    assert len(biases) == 2
    for key in biases:
        assert after[key].dtype == torch.float32 and torch.equal(before[key], after[key])
    assert not torch.equal(before["model.layers.1.mlp.gate.weight"], after["model.layers.1.mlp.gate.weight"])


def test_a_trained_model_has_the_same_logits_in_transformers(glm, tmp_path):
    tiny_world.start(glm, save=tmp_path / "run", train_iters=2).run()
    exported(tmp_path / "run", glm.hf, tmp_path / "hf")
    tokens = torch.randint(0, 272, (2, 15), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "run").chunk
    assert len(routers(model)) == 2
    with torch.no_grad():
        ours = model(tokens, torch.arange(15).expand_as(tokens), None)
        theirs = load_glm4_moe_lite_zero(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
