"""Paired zero experts while a model adapts: the share is held, runs resume bit-equal, heads train or rest."""

import pytest
import tiny
import tiny_world
import torch

from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.moe import stats
from zeda_megatron.moe.paired import KEEP_ALL, paired_modules
from zeda_megatron.moe.router_dials import OPEN, set_thresholds
from zeda_megatron.training.controls import SparsityControl, WeightControl

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def paired_world(world, tmp_path_factory):
    """Flags of a run that starts from a checkpoint whose heads are drawn."""
    folder = tmp_path_factory.mktemp("heads")
    run = tiny_world.start(
        world, pretrained_checkpoint=world.static, zero_expert_routing="paired", save=folder
    )
    for i, paired in enumerate(paired_modules(run.student.chunks)):
        tiny.draw(paired, seed=i)
    run.save()
    return {"pretrained_checkpoint": folder}


def share_of(run, rows=8):
    """Zero share in evaluation, counted from the routing of every token."""
    chunk = run.student.chunks[0].eval()
    stats.reset(chunk)
    with torch.no_grad():
        for row in range(rows):
            forward_model(chunk, run.feed.dataset[row])
    return stats.collect(chunk, 2, torch.device("cpu")).zero_share


@pytest.mark.parametrize("target", [0.25, 0.6])
def test_the_share_is_held_at_its_target_and_calibrated_at_the_end(world, paired_world, tmp_path, target):
    run = tiny_world.start(
        world, save=tmp_path, train_iters=12, target_zero_share=target, calibration_rows=8, **paired_world
    )
    run.run()
    shares = [line["zero_share"] for line in tiny_world.read_metrics(tmp_path)]
    assert shares[0] == 0.0  # its threshold comes from the first step's scores
    assert sum(shares[4:]) / len(shares[4:]) == pytest.approx(target, abs=0.06)
    assert share_of(run) == pytest.approx(target, abs=0.01)


def test_a_budget_per_layer_holds_every_layer_at_the_target(world, paired_world, tmp_path):
    flags = {"target_zero_share": 0.4, "paired_budget": "layer", "calibration_rows": 8}
    run = tiny_world.start(world, save=tmp_path, train_iters=8, **flags, **paired_world)
    run.run()
    assert len({float(paired.threshold) for paired in paired_modules(run.student.chunks)}) == 2
    chunk = run.student.chunks[0].eval()
    stats.reset(chunk)
    with torch.no_grad():
        for row in range(8):
            forward_model(chunk, run.feed.dataset[row])
    shares = stats.collect(chunk, 2, torch.device("cpu")).zero_share_by_layer
    assert shares == [pytest.approx(0.4, abs=0.01)] * 2


def test_net_for_many_shares_draws_k_at_every_step_the_same_after_a_resume(world, tmp_path):
    flags = ("--topk-range", "1", "3", "--moe-router-load-balancing-type", "none")
    values = {"pretrained_checkpoint": world.static, "train_iters": 8}
    tiny_world.start(world, *flags, save=tmp_path / "a", **values).run()
    tiny_world.start(world, *flags, save=tmp_path / "b", exit_interval=4, **values).run()
    tiny_world.start(world, *flags, save=tmp_path / "b", **values).run()
    shares = [[m["zero_share"] for m in tiny_world.read_metrics(tmp_path / name)] for name in "ab"]
    assert shares[0] == shares[1]
    assert {round(share, 6) for share in shares[0]} == {0.0, round(1 / 3, 6), round(2 / 3, 6)}


def test_the_weight_of_the_group_loss_moves_until_the_share_is_there():
    """A plant that answers as a router does: slowly, pulled by w, pulled back by everything else."""
    share, real, zero = 0.25, 8, 4
    control = WeightControl([], 0.6, real, zero, ramp_steps=50, gain=16.0)
    shares = []
    for step in range(200):
        control.before_step(step)
        pull = control.weight * zero / (real + control.weight * zero)
        share += 0.08 * (pull - share) - 0.006
        control.after_step(stats.StatsReport(share, [], 0.0))
        shares.append(share)
    assert shares[-1] == pytest.approx(0.6, abs=0.01)
    assert max(shares) < 0.63  # and does not shoot over
    # Left alone, that w would have ended lower.
    alone = 0.25
    for _ in range(200):
        alone += 0.08 * (0.6 - alone) - 0.006
    assert alone == pytest.approx(0.525, abs=0.001)


def test_shared_zero_experts_follow_a_target_share_and_resume_bit_equal(world, tmp_path):
    values = {"target_zero_share": 0.6, "train_iters": 12}
    straight = tiny_world.start(world, save=tmp_path / "a", **values)
    straight.run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=7, **values).run()
    tiny_world.start(world, save=tmp_path / "b", **values).run()
    lines = tiny_world.read_metrics(tmp_path / "a")
    assert lines == tiny_world.read_metrics(tmp_path / "b")
    weights = [line["zero_weight"] for line in lines]
    assert weights[0] == pytest.approx(0.6 * 8 / (0.4 * 4)) and len(set(weights)) > 6


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"paired_head_lr": 1e-2}, marks=pytest.mark.slow),  # the other weights' rate
        {"paired_head_lr": 3e-2},
        {"paired_control": "sparsity", "paired_head_lr": 1e-2},
    ],
)
def test_resume_is_bit_equal_to_the_uninterrupted_run(world, paired_world, tmp_path, flags):
    straight = tiny_world.start(world, save=tmp_path / "a", **paired_world, **flags)
    straight.run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=3, **paired_world, **flags).run()
    resumed = tiny_world.start(world, save=tmp_path / "b", **paired_world, **flags)
    assert resumed.iteration == 3
    resumed.run()
    one, other = tiny_world.snapshot(straight), tiny_world.snapshot(resumed)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert tiny_world.read_metrics(tmp_path / "a") == tiny_world.read_metrics(tmp_path / "b")


def test_a_range_draws_a_new_target_at_every_step_the_same_after_a_resume(world, paired_world, tmp_path):
    flags = ("--zero-share-range", "0.1", "0.8")
    tiny_world.start(world, *flags, save=tmp_path / "a", train_iters=8, **paired_world).run()
    tiny_world.start(world, *flags, save=tmp_path / "b", train_iters=8, exit_interval=4, **paired_world).run()
    tiny_world.start(world, *flags, save=tmp_path / "b", train_iters=8, **paired_world).run()
    shares = [[m["zero_share"] for m in tiny_world.read_metrics(tmp_path / name)] for name in "ab"]
    assert shares[0] == shares[1]
    assert max(shares[0][1:]) - min(shares[0][1:]) > 0.2


def test_a_frozen_head_rests_and_a_trained_one_moves_at_its_own_rate(world, paired_world, tmp_path):
    moved = {}
    for head_lr in (0.0, 1e-4, 1e-2):
        run = tiny_world.start(world, paired_head_lr=head_lr, train_iters=2, **paired_world)
        before = [paired.weight.detach().clone() for paired in paired_modules(run.student.chunks)]
        run.run()
        after = [paired.weight.detach() for paired in paired_modules(run.student.chunks)]
        moved[head_lr] = max(float((a - b).abs().max()) for a, b in zip(after, before))
    assert moved[0.0] == 0.0
    # Adam's first steps are as long as the learning rate.
    assert 0 < moved[1e-4] <= 3e-4 and 2e-3 < moved[1e-2] <= 3e-2


def test_a_static_checkpoint_starts_with_fresh_heads_that_skip_nothing(world):
    run = tiny_world.start(world, pretrained_checkpoint=world.static, zero_expert_routing="paired")
    assert all(float(paired.threshold) == KEEP_ALL for paired in paired_modules(run.student.chunks))
    assert share_of(run, rows=2) == 0.0


def test_sparsity_control_pushes_while_the_share_is_too_low_and_never_pulls(world):
    run = tiny_world.start(world, pretrained_checkpoint=world.static, zero_expert_routing="paired")
    control = SparsityControl(run.student.chunks, target=0.5, ramp_steps=2, gain=1.0)
    assert all(float(paired.threshold) == OPEN for paired in paired_modules(run.student.chunks))
    pushed = []
    for step, share in enumerate([0.0, 0.1, 0.3, 0.6, 0.9]):
        control.before_step(step)
        pushed.append(control.after_step(stats.StatsReport(share, [], 0.0))["sparsity_coeff"])
    assert pushed[0] == pytest.approx(0.25 + 0.025)
    assert pushed[1] == pytest.approx(0.5 + 0.075)
    assert pushed[4] < pushed[3] < pushed[2] and min(pushed) >= 0.0


def test_the_sparsity_loss_closes_a_mask_that_starts_open(world, tmp_path):
    flags = {
        "paired_score": "head",
        "paired_control": "sparsity",
        "paired_head_lr": 0.1,
        "sparsity_gain": 3.0,
    }
    run = tiny_world.start(
        world,
        pretrained_checkpoint=world.static,
        zero_expert_routing="paired",
        train_iters=30,
        save=tmp_path,
        **flags,
    )
    run.run()
    shares = [line["zero_share"] for line in tiny_world.read_metrics(tmp_path)]
    assert shares[0] == 0.0 and max(shares) > 0.3


def test_bfloat16_trains_and_keeps_the_threshold_exact(world, paired_world, tmp_path):
    run = tiny_world.start(
        world, save=tmp_path, bf16=True, train_iters=3, paired_head_lr=1e-2, **paired_world
    )
    run.run()
    thresholds = {float(paired.threshold) for paired in paired_modules(run.student.chunks)}
    assert len(thresholds) == 1
    again = tiny_world.start(
        world, save=tmp_path, bf16=True, train_iters=3, paired_head_lr=1e-2, **paired_world
    )
    assert {float(paired.threshold) for paired in paired_modules(again.student.chunks)} == thresholds


def test_the_dial_can_be_turned_without_new_weights(world, paired_world):
    run = tiny_world.start(world, **paired_world)
    shares = []
    for threshold in (-50.0, -4.0, -2.0, 50.0):
        set_thresholds(run.student.chunks, [threshold])
        shares.append(share_of(run, rows=2))
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--zero-share-range", "0.5", "0.2"), "--zero-share-range"),
        (("--zero-share-range", "0.5"), "--zero-share-range"),
        (("--target-zero-share", "1"), "--target-zero-share"),
        (("--paired-control", "pid"), "--paired-control"),
        (("--paired-control", "sparsity"), "--paired-head-lr"),
        (("--paired-head-lr", "-1"), "--paired-head-lr"),
        (("--zero-expert-routing", "alone"), "--zero-expert-routing"),
        (("--paired-budget", "token"), "--paired-budget"),
        (("--topk-range", "3", "1"), "--topk-range"),
        (("--topk-range", "0", "2"), "--topk-range"),
        (("--topk-range", "1", "2", "--moe-pick-rule", "topk=2"), "--topk-range"),
        (("--zero-weight-gain", "-1"), "--zero-weight-gain"),
    ],
)
def test_flags_that_cannot_work_are_named(world, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_world.options(world, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--paired-head-lr", "1e-3"), "--paired-head-lr"),
        (("--zero-share-range", "0", "0.5"), "--zero-share-range"),
        (("--paired-budget", "layer"), "--paired-budget"),
        (("--target-zero-share", "0"), "--target-zero-share"),
        (("--target-zero-share", "0.5", "--moe-router-load-balancing-type", "none"), "--target-zero-share"),
        (
            ("--target-zero-share", "0.5", "--group-loss-variant", "adamoe"),
            "--group-loss-variant adamoe has no weight",
        ),
        (("--topk-range", "1", "4"), "--topk-range"),  # the model has top-3
    ],
)
def test_flags_that_this_model_has_no_use_for_are_named(world, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_world.start(world, *flags)


def test_the_routing_of_a_checkpoint_cannot_be_changed_by_a_flag(world, paired_world):
    with pytest.raises(UserError, match="has paired zero experts"):
        tiny_world.start(world, zero_expert_routing="shared", **paired_world)
    with pytest.raises(UserError, match="has shared zero experts"):
        tiny_world.start(world, zero_expert_routing="paired")


def test_a_run_is_not_resumed_under_the_other_budget(world, paired_world, tmp_path):
    for budget, other in (("model", "layer"), ("layer", "model")):
        flags = {"save": tmp_path / budget, "train_iters": 2, "calibration_rows": 0, **paired_world}
        tiny_world.start(world, exit_interval=1, paired_budget=budget, **flags).run()
        with pytest.raises(UserError, match=f"--paired-budget: .* was trained with {budget}"):
            tiny_world.start(world, paired_budget=other, **flags)
        assert tiny_world.start(world, paired_budget=budget, **flags).iteration == 1
