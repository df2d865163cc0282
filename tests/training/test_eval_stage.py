"""Evaluation of a checkpoint without training."""

import json

import pytest
import tiny_world

from zeda_megatron.errors import UserError
from zeda_megatron.training.eval_stage import run_evaluation

pytestmark = pytest.mark.usefixtures("one_process")


def evaluated(world, output, **values):
    """What `--stage eval` writes."""
    fields = {
        "stage": "eval",
        "data_path": None,
        "eval_rows": 3,
        "eval_output": output,
        "teacher_load": world.static,
    }
    assert run_evaluation(tiny_world.options(world, **fields | values)) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bf16": True},
        {"pretrained_checkpoint": "static", "zero_expert_routing": "paired"},
        {"trainable": "router"},
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_the_figures_are_those_of_the_evaluation_after_the_last_step(world, tmp_path, flags):
    flags = {name: getattr(world, value) if value == "static" else value for name, value in flags.items()}
    tiny_world.start(world, save=tmp_path / "run", eval_rows=3, teacher_load=world.static, **flags).run()
    last = tiny_world.read_metrics(tmp_path / "run")[-1]
    kept = {name: value for name, value in flags.items() if name == "bf16"}
    found = evaluated(world, tmp_path / "found.json", pretrained_checkpoint=tmp_path / "run", **kept)
    expected = {name: value for name, value in last.items() if name.startswith("eval_")}
    assert len(expected) == 4 and expected["eval_kl"] > 0
    near = (
        1e-2 if "bf16" in flags else 1e-6
    )  # training keeps fp32 weights beside the bf16 ones, checkpoints too
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=near)
    layers = found["eval_zero_share_by_layer"]
    assert sum(layers) / len(layers) == pytest.approx(found["eval_zero_share"])


def test_a_layout_that_trains_routers_over_shared_weights_can_evaluate(world, tmp_path):
    flags = {"pretrained_checkpoint": world.dynamic, "trainable": "router"}
    own = evaluated(world, tmp_path / "own.json", **flags)
    shared = evaluated(world, tmp_path / "shared.json", teacher_memory="shared", **flags)
    assert own == shared


def test_a_static_teacher_agrees_with_itself(world, tmp_path):
    found = evaluated(world, tmp_path / "same.json", pretrained_checkpoint=world.static)
    assert found["eval_kl"] == pytest.approx(0, abs=1e-9) and found["eval_top1_agreement"] == 1
    assert found["eval_zero_share"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_data_path": None}, "--eval-data-path is missing"),
        ({"eval_output": "/nowhere/at/all.json"}, "--eval-output /nowhere/at/all.json: its folder"),
        ({"pretrained_checkpoint": None}, "--pretrained-checkpoint is missing"),
        ({"stage": "1", "eval_output": "x.json"}, "--eval-output is for --stage eval"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_named(world, changes, said):
    fields = {"stage": "eval", "teacher_load": world.static, "eval_rows": 3, "hf_config": world.hf} | changes
    with pytest.raises(UserError, match=said):
        run_evaluation(tiny_world.options(world, **fields))
