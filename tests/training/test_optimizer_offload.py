"""Optimizer states in host memory: the same steps, but for the rounding of another kernel, and checkpoints that both
kinds of run read."""

import pytest
import tiny
import tiny_world
import torch

from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")
STEPS = {
    "bf16": True,
    "use_distributed_optimizer": True,
    "train_iters": 4,
    "lr_warmup_fraction": 0.0,
    "lr": 1e-3,
}
HOST = STEPS | {"optimizer_cpu_offload": True}


def states(run):
    """Step, moments and master weights of every parameter, in order."""
    found = []
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                master = state.get("master_param", parameter)
                found.append((float(state["step"]), state["exp_avg"], state["exp_avg_sq"], master))
    return found


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert a[0] == b[0]
        for x, y in zip(a[1:], b[1:]):
            tiny.close(x, y, rtol=1e-5, atol=1e-9)


def close(weights, others):
    """To one step of bfloat16."""
    for name, weight in weights.items():
        tiny.close(weight, others[name], rtol=2**-7, atol=1e-6)


@pytest.fixture(scope="module")
def plain(one_process, world, tmp_path_factory):
    """A run with the optimizer where it usually is."""
    run = tiny_world.start(world, save=tmp_path_factory.mktemp("plain"), **STEPS)
    run.run()
    return tiny_world.parameters(run), states(run)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_steps_are_those_of_an_optimizer_beside_the_weights(world, plain, trainable):
    weights, expected = plain
    if trainable == "lora":
        run = tiny_world.start(world, trainable="lora", lora_rank=8, teacher_memory="shared", **STEPS)
        run.run()
        weights, expected = tiny_world.parameters(run), states(run)
        run = tiny_world.start(world, trainable="lora", lora_rank=8, teacher_memory="shared", **HOST)
    else:
        run = tiny_world.start(world, **HOST)
    assert all("HybridDevice" in type(part.optimizer).__name__ for part in run.optimizer.chained_optimizers)
    run.run()
    assert all(torch.equal(p, weights[name]) for name, p in tiny_world.parameters(run).items())
    assert_same(states(run), expected)


@pytest.mark.parametrize(
    ("first", "then"), [(HOST, HOST), (STEPS, HOST), (HOST, STEPS)], ids=["on", "to", "from"]
)
def test_a_run_goes_on_where_it_stopped_with_its_optimizer_on_either_side(
    world, plain, tmp_path, first, then
):
    """Every parameter counts its own steps: loaded by Megatron alone, all would count in one tensor."""
    tiny_world.start(world, save=tmp_path, exit_interval=2, **first).run()
    run = tiny_world.start(world, save=tmp_path, **then)
    assert run.iteration == 2
    run.run()
    weights, expected = plain
    assert_same(states(run), expected)
    close(tiny_world.parameters(run), weights)


def test_a_run_that_stays_there_goes_on_bit_for_bit(world, tmp_path):
    ends = []
    for stops in (None, 2):
        folder = tmp_path / str(stops)
        run = tiny_world.start(world, save=folder, **HOST, **({"exit_interval": stops} if stops else {}))
        run.run()
        if stops:
            run = tiny_world.start(world, save=folder, **HOST)
            run.run()
        ends.append((tiny_world.parameters(run), states(run)))
    (weights, one), (others, two) = ends
    assert all(torch.equal(weights[name], p) for name, p in others.items())
    assert all(a[0] == b[0] and all(map(torch.equal, a[1:], b[1:])) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("missing", ["bf16", "use_distributed_optimizer"])
def test_what_it_cannot_do_without_is_named(world, missing):
    with pytest.raises(
        UserError, match="--optimizer-cpu-offload needs --bf16 and --use-distributed-optimizer"
    ):
        tiny_world.options(world, **HOST | {missing: False})
