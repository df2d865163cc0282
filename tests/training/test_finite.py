"""NaN and infinity end a run in one line that names the step, before anything is saved."""

import math
import shutil
from functools import partial

import pytest
import tiny_world
import torch

from zeda_megatron.checkpoint.state import find_checkpoint
from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")


def spoil(module, name, value=math.nan):
    """One element of one weight."""
    parameter = dict(module.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[3] = value


def before_step(run, step, do):
    """`do` comes first in the given step."""
    stock = run.stepper.step

    def spoiled(*given):
        if run.iteration + 1 == step:
            do()
        return stock(*given)

    run.stepper.step = spoiled


LAYER = "decoder.layers.1.self_attention.linear_proj.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"


@pytest.mark.parametrize(
    ("who", "value", "name"),
    [
        ("student", math.nan, LAYER),
        ("student", math.inf, ROUTER),
        ("teacher", math.nan, ROUTER),
        ("teacher", math.inf, LAYER),
        pytest.param("student", math.nan, ROUTER, marks=pytest.mark.slow),
        pytest.param("student", math.inf, LAYER, marks=pytest.mark.slow),
        pytest.param("teacher", math.nan, LAYER, marks=pytest.mark.slow),
        pytest.param("teacher", math.inf, ROUTER, marks=pytest.mark.slow),
    ],
)
def test_a_weight_that_is_no_number_ends_the_run_and_is_never_saved(
    world, halfway, tmp_path, who, value, name
):
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder, save_interval=1)
    chunk = (run.student.chunks if who == "student" else run.teacher.model_chunks)[0]
    before_step(run, 4, partial(spoil, chunk, name, value))
    with pytest.raises(UserError, match=rf"step 4: .* not finite: {who} {name}") as caught:
        run.run()
    assert "--no-check-for-nan-in-loss-and-grad" in str(caught.value) and "\n" not in str(caught.value)
    assert find_checkpoint(folder).name == "iter_0000003"
    assert tiny_world.start(world, save=folder).iteration == 3


def test_a_weight_that_no_token_has_met_is_found_before_it_is_saved(world, halfway, tmp_path):
    """The embedding of a token that is in no text: no loss ever shows it."""
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder)
    rows = run.student.chunks[0].embedding.word_embeddings.weight
    with torch.no_grad():
        rows[-1, 0] = math.nan
    with pytest.raises(UserError, match=r"step 6: a weight .*student embedding.word_embeddings.weight"):
        run.run()
    assert find_checkpoint(folder).name == "iter_0000002"


def test_a_gradient_that_is_no_number_ends_the_run_though_the_loss_is_one(world, halfway, tmp_path):
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder)
    weight = dict(run.student.chunks[0].named_parameters())[LAYER]
    weight.register_hook(lambda gradient: gradient * (math.nan if run.iteration == 3 else 1))
    with pytest.raises(UserError, match=r"step 4: the gradient norm is nan.*lower --lr"):
        run.run()
    assert find_checkpoint(folder).name == "iter_0000002"


def test_the_check_can_be_switched_off(world, tmp_path):
    run = tiny_world.start(
        world, save=tmp_path, check_for_nan_in_loss_and_grad=False, train_iters=2, save_interval=1
    )
    spoil(run.student.chunks[0], LAYER)
    assert run.run() == 0
    assert [math.isnan(line["loss"]) for line in tiny_world.read_metrics(tmp_path)] == [True, True]
