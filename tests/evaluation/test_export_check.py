"""An exported folder answers like the Megatron checkpoint it came from, as transformers opens it."""

import json

import pytest
import tiny
import tiny_world

from zeda_megatron.checkpoint.convert import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.export_check import CheckOptions, check, main
from zeda_megatron.moe.paired import paired_modules, set_threshold


@pytest.fixture(scope="module")
def paired(world, one_process, tmp_path_factory):
    """(checkpoint with drawn heads, folder exported from it)."""
    folder = tmp_path_factory.mktemp("paired")
    run = tiny_world.start(
        world, save=folder, pretrained_checkpoint=world.static, zero_expert_routing="paired"
    )
    for i, head in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(head, seed=i, std=0.1)
    set_threshold(run.student.chunks, -2.0)
    run.save()
    megatron_to_hf(folder, world.hf, folder / "out")
    return folder, folder / "out"


def options(world, megatron, hf, **more):
    return CheckOptions(str(megatron), str(hf), str(world.rollouts), prompts=4, max_new_tokens=8, **more)


def test_paired_export_gives_equal_answers_and_logits(world, paired):
    result = check(options(world, *paired))
    assert result["equal_answers"] == result["prompts"] >= 4
    assert result["max_logit_difference"] < 1e-4
    assert 0.1 < result["zero_share_transformers"] < 0.9


def test_an_export_with_another_threshold_is_noticed(world, paired):
    megatron, hf = paired
    text = (hf / "config.json").read_text()
    try:
        (hf / "config.json").write_text(json.dumps(json.loads(text) | {"zce_threshold": -1.0}))
        assert check(options(world, megatron, hf))["max_logit_difference"] > 1e-3
    finally:
        (hf / "config.json").write_text(text)


def test_missing_flags_are_named(world):
    with pytest.raises(UserError, match="--hf is missing"):
        main(["--megatron", "x"])
