"""Whole runs of the other families in one process: what was trained opens in transformers, score biases stay."""

from functools import cache

import pytest
import stage0_files
import tiny
import tiny_world
import torch
from families import FAMILIES, seeing_model
from safetensors.torch import load_file

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.stats import routers
from zeda_megatron.serving.load import load_zero_expert_model

pytestmark = pytest.mark.usefixtures("one_process")
MAKE = {name: family.make for name, family in FAMILIES.items()}
if "qwen3_5_moe_text" in FAMILIES:
    MAKE["qwen3_5_moe"] = seeing_model
BIAS = "e_score_correction_bias"
PAIRED = {"moe_router_load_balancing_type": "none"}


@pytest.fixture(scope="module")
def world_of(tmp_path_factory):
    """A family's tiny world, made once."""
    return cache(lambda name: tiny_world.make_world(tmp_path_factory.mktemp(name), MAKE[name]))


@pytest.fixture
def glm(world_of):
    return world_of("glm4_moe_lite")


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
    still = tiny_world.weight_hash(run.teacher)
    assert run.run() == 0 and tiny_world.weight_hash(run.teacher) == still
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


def assert_same_logits_in_transformers(world, run, folder):
    exported(run, world.hf, folder)
    tokens = torch.randint(0, 272, (2, 15), generator=torch.Generator().manual_seed(1))
    model = load_model(run).chunk
    with torch.no_grad():
        ours = model(tokens, torch.arange(15).expand_as(tokens), None)
        dynamic = load_zero_expert_model(folder)
        theirs = dynamic(tokens).logits
    tiny.close(ours, theirs, rtol=0, atol=1e-4)
    assert len(routers(model)) == len(dynamic.zero_share())
    assert all(0 < share < 1 for share in dynamic.zero_share())


OTHERS = [name for name in MAKE if name != "qwen3_moe"]
"""Qwen3-MoE is the model of all other tests."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_trained_in_all_stages_has_the_same_logits_in_transformers(name, tmp_path, world_of):
    """Stage 1 learns from stage 0's answers; stage 2 begins where it ends, and answers with the built-in engine."""
    world = world_of(name)
    stage0_files.stage0(world, tmp_path / "answers.jsonl")
    data = {"data_path": tmp_path / "answers.jsonl"}
    assert tiny_world.start(world, save=tmp_path / "one", train_iters=2, **data).run() == 0
    flags = {"stage": "2", "global_batch_size": 10, "samples_per_prompt": 2, "train_iters": 1}
    run = tiny_world.start(world, pretrained_checkpoint=tmp_path / "one", save=tmp_path / "two", **flags)
    assert run.run() == 0
    assert_same_logits_in_transformers(world, tmp_path / "two", tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("glm4_moe_lite", "norm"),
        *(
            pytest.param(
                name, "effect", marks=[pytest.mark.slow] * (name not in ("mixtral", "gpt_oss", "deepseek_v3"))
            )
            for name in OTHERS
            if name != "glm4_moe_lite"
        ),
        pytest.param("glm4_moe_lite", "effect", marks=pytest.mark.slow),
        pytest.param("mixtral", "norm", marks=pytest.mark.slow),
    ],
)
def test_paired_zero_experts_are_fitted_trained_and_exported(name, target, tmp_path, world_of):
    world = world_of(name)
    report = tiny_world.fit(world, tmp_path / "fitted", fit_target=target)
    assert report["zero_share"] == pytest.approx(0.5, abs=0.01)
    flags = {"pretrained_checkpoint": tmp_path / "fitted", "target_zero_share": 0.5, **PAIRED}
    tiny_world.start(world, save=tmp_path / "run", train_iters=2, **flags).run()
    metrics = tiny_world.read_metrics(tmp_path / "run")
    assert all(0 < line["zero_share"] < 1 for line in metrics)
    assert_same_logits_in_transformers(world, tmp_path / "run", tmp_path / "hf")


@pytest.mark.parametrize("trainable", ["router+norms", "lora"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_teacher_that_shares_weights_stays_what_it_is(name, trainable, world_of):
    """Whatever trains, a router's bias too, has its first value in the teacher's passes."""
    flags = {"trainable": trainable, "teacher_memory": "shared", "lr_warmup_fraction": 0.0}
    run = tiny_world.start(world_of(name), train_iters=1, **flags)
    teacher, before = tiny_world.weight_hash(run.teacher), tiny_world.parameters(run)
    run.run()
    assert tiny_world.weight_hash(run.teacher) == teacher
    moved = {key for key, w in tiny_world.parameters(run).items() if not torch.equal(w, before[key])}
    beside = ".adapter." if trainable == "lora" else "norm.weight"
    assert moved == {key for key in before if ".router." in key or beside in key}


@pytest.mark.parametrize("name", MAKE)
def test_adapters_are_trained_in_both_stages_and_merged_into_an_export(name, tmp_path, world_of):
    """Stage 2 goes on with stage 1's adapters; the teacher, without them, is the original in the same memory."""
    world, flags = world_of(name), {"trainable": "lora", "lora_rank": 8, "teacher_memory": "shared"}
    assert tiny_world.start(world, save=tmp_path / "one", train_iters=3, **flags).run() == 0
    flags |= {"stage": "2", "global_batch_size": 10, "samples_per_prompt": 2, "teacher_load": None}
    second = tiny_world.start(
        world, pretrained_checkpoint=tmp_path / "one", save=tmp_path / "two", train_iters=1, **flags
    )
    own = tiny_world.start(
        world, stage="1", pretrained_checkpoint=world.dynamic, trainable="router", teacher_memory="own"
    )
    assert tiny_world.weight_hash(second.teacher) == tiny_world.weight_hash(own.teacher)
    assert second.run() == 0
    assert_same_logits_in_transformers(world, tmp_path / "two", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["copy", "learned"])
def test_other_kinds_of_zero_experts_are_trained_and_exported(kind, glm, tmp_path):
    hf_to_megatron(glm.hf, tmp_path / "start", num_zero_experts=4, zero_experts_type=kind)
    flags = {"pretrained_checkpoint": tmp_path / "start", "zero_experts_type": kind}
    tiny_world.start(glm, save=tmp_path / "run", train_iters=2, **flags).run()
    assert_same_logits_in_transformers(glm, tmp_path / "run", tmp_path / "hf")
