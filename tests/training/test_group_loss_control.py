"""One budget of zero slots for all layers: the model holds it, layers differ, runs resume bit-equal."""

import pytest
import tiny_world
import torch

from zeda_megatron.errors import UserError
from zeda_megatron.moe.stats import StatsReport, routers
from zeda_megatron.training.group_loss_control import ModelBudgetControl, WeightControl
from zeda_megatron.training.share_control import ShareControl

pytestmark = pytest.mark.usefixtures("one_process")
TARGET = {"target_zero_share": 0.6}


def start_apart(world, **values):
    """A run whose two layers begin far apart: one with many zero slots, one with few."""
    run = tiny_world.start(world, lr_decay_style="constant", global_batch_size=2, **values)
    with torch.no_grad():
        for router, factor in zip(routers(run.student.chunks), (3.0, 0.1)):
            router.weight[router.num_real :] *= factor
    return run


def test_layers_may_differ_while_the_model_holds_the_budget(world, tmp_path):
    gaps = {}
    for budget in ("layer", "model"):
        folder = tmp_path / budget
        run = start_apart(world, save=folder, train_iters=45, lr=3e-3, group_loss_budget=budget)
        run.run()
        last = tiny_world.read_metrics(folder)[-15:]
        share = sum(line["zero_share"] for line in last) / len(last)
        assert share == pytest.approx(run.student.zero.target_share(8), abs=0.04)
        first, second = (sum(line["zero_share_by_layer"][i] for line in last) / len(last) for i in (0, 1))
        gaps[budget] = abs(first - second)
    assert gaps["layer"] < 0.1 and gaps["model"] > 0.5


def test_every_step_takes_the_share_of_the_step_before(world):
    run = tiny_world.start(world, train_iters=3, group_loss_budget="model")
    layers, seen, measured = routers(run.student.chunks), [], []
    step, after_step = run.stepper.step, run.control.after_step

    def watched(*given):
        seen.append([router.model_zero_share for router in layers])
        return step(*given)

    def told(report):
        measured.append(report.zero_share)
        return after_step(report)

    run.stepper.step, run.control.after_step = watched, told
    run.run()
    assert seen == [[None] * 2, [measured[0]] * 2, [measured[1]] * 2] and len(set(measured)) == 3


@pytest.mark.parametrize("flags", [{}, TARGET])
def test_resume_is_bit_equal_to_the_uninterrupted_run(world, tmp_path, flags):
    values = {"group_loss_budget": "model", **flags}
    straight = tiny_world.start(world, save=tmp_path / "a", **values)
    straight.run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=3, **values).run()
    resumed = tiny_world.start(world, save=tmp_path / "b", **values)
    assert resumed.iteration == 3 and 0 < resumed.control.share < 1
    resumed.run()
    one, other = tiny_world.snapshot(straight), tiny_world.snapshot(resumed)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert tiny_world.read_metrics(tmp_path / "a") == tiny_world.read_metrics(tmp_path / "b")


@pytest.mark.parametrize("flags", [{}, TARGET])
def test_a_checkpoint_of_before_goes_on_with_either_budget(world, tmp_path, flags):
    """Saved with a budget per layer, it has no share of the model; its first step counts each layer's slots."""
    tiny_world.start(world, save=tmp_path, exit_interval=2, **flags).run()
    run = tiny_world.start(world, save=tmp_path, group_loss_budget="model", exit_interval=2, **flags)
    assert run.iteration == 2 and run.control.share is None
    assert run.run() == 0 and run.iteration == 4
    back = tiny_world.start(world, save=tmp_path, **flags)
    assert back.iteration == 4 and back.run() == 0


def test_the_weight_still_follows_its_target_beside_the_budget():
    """A plant of two layers, pulled by w and the model's share, pulled back by everything else."""
    real, zero, shares, steps = 8, 4, [0.45, 0.05], []
    control = ModelBudgetControl([], WeightControl([], 0.6, real, zero, ramp_steps=50, gain=16.0))
    alone = WeightControl([], 0.6, real, zero, ramp_steps=50, gain=16.0)
    for step in range(200):
        control.before_step(step)
        alone.before_step(step)
        weight = control.other.weight
        assert weight == alone.weight  # the budget leaves the weight alone
        pull = weight * zero / (real + weight * zero)
        mean = sum(shares) / 2
        shares = [share + 0.08 * (pull - mean) - 0.006 for share in shares]
        report = StatsReport(sum(shares) / 2, shares, 0.0)
        assert control.after_step(report) == alone.after_step(report) == {"zero_weight": weight}
        assert control.share == report.zero_share
        steps.append(report.zero_share)
    assert steps[-1] == pytest.approx(0.6, abs=0.01) and shares[0] - shares[1] == pytest.approx(0.4)


def test_the_state_of_both_controls_is_kept():
    made = [ModelBudgetControl([], WeightControl([], 0.6, 8, 4, 5, 16.0)) for _ in range(2)]
    for step, share in enumerate((0.2, 0.3, 0.35)):
        made[0].before_step(step)
        made[0].after_step(StatsReport(share, [], 0.0))
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].share == made[1].other.share == 0.35 and made[1].other.start == 0.2
    assert made[0].state_dict() == made[1].state_dict()
    plain = ModelBudgetControl([], ShareControl())
    plain.load_state_dict({})
    assert plain.share is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--moe-router-load-balancing-type", "none"), "--group-loss-budget model needs the group loss"),
        (("--moe-aux-loss-coeff", "0"), "--group-loss-budget model needs the group loss"),
        (("--moe-pick-rule", "topk=2"), "--moe-pick-rule"),
        (("--topk-range", "1", "3"), "--topk-range"),
        (("--group-loss-variant", "adamoe"), "--group-loss-variant adamoe"),
        (("--group-loss-variant", "authors"), "--group-loss-variant authors"),
        (("--group-loss-budget", "token"), "--group-loss-budget 'token'"),
    ],
)
def test_a_budget_of_the_model_is_refused_where_it_cannot_work(world, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_world.start(world, "--group-loss-budget", "model", *flags)


def test_paired_zero_experts_are_sent_to_their_own_budget(world):
    values = {"pretrained_checkpoint": world.static, "zero_expert_routing": "paired"}
    with pytest.raises(UserError, match="--paired-budget model"):
        tiny_world.start(world, group_loss_budget="model", **values)
