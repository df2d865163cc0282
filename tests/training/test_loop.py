"""Training runs of a tiny model in this process: resume, signals, normalisation, teacher, metrics, memory."""

import json
import os
import re
import shutil
import signal
import sys
from functools import partial

import pytest
import tiny
import tiny_world
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeda_megatron.checkpoint.state import TRACKER, find_checkpoint
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.data.packing import PackedDataset, TokenSample
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")
CONTRACT = {"step", "loss", "kd_loss", "group_loss", "grad_norm", "zero_share", "lr", "tokens", "seconds"}
V = tiny_world.MODEL["vocab_size"]


def assert_same(one: dict, other: dict) -> None:
    """Same tensors, bit for bit."""
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Six steps without interruption: (folder, state at the end)."""
    folder = tmp_path_factory.mktemp("straight")
    run = tiny_world.start(world, save=folder)
    assert run.run() == 0
    return folder, tiny_world.snapshot(run)


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """The same run stopped after three steps."""
    folder = tmp_path_factory.mktemp("halfway")
    assert tiny_world.start(world, save=folder, exit_interval=3).run() == 0
    assert find_checkpoint(folder).name == "iter_0000003"
    return folder


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def finish(world, folder, straight):
    """Resume in `folder` and compare with the uninterrupted run."""
    run = tiny_world.start(world, save=folder)
    begun = run.iteration
    assert run.run() == 0
    assert_same(tiny_world.snapshot(run), straight[1])
    assert tiny_world.read_metrics(folder) == tiny_world.read_metrics(straight[0])
    return begun


def batches_of(run, rows=4):
    return [run.feed.dataset[row] for row in range(rows)]


def gradients(run) -> dict:
    return {
        name: p.main_grad.clone() for name, p in run.student.chunks[0].named_parameters() if p.requires_grad
    }


# --- resume -------------------------------------------------------------------------------------------------


def test_resume_is_bit_equal_to_the_uninterrupted_run(world, halfway, straight, tmp_path):
    assert finish(world, copied(halfway, tmp_path), straight) == 3


def test_resume_with_the_distributed_optimizer_is_bit_equal(world, tmp_path):
    flags = {"use_distributed_optimizer": True, "train_iters": 4}
    whole = tiny_world.start(world, save=tmp_path / "a", **flags)
    whole.run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=2, **flags).run()
    resumed = tiny_world.start(world, save=tmp_path / "b", **flags)
    assert resumed.iteration == 2
    resumed.run()
    assert tiny_world.read_metrics(tmp_path / "b") == tiny_world.read_metrics(tmp_path / "a")
    assert_same(tiny_world.snapshot(resumed), tiny_world.snapshot(whole))


@pytest.mark.parametrize(
    ("number", "background"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM-sync"),
        pytest.param(signal.SIGUSR1, True, id="SIGUSR1-async"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM-async", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, False, id="SIGUSR1-sync", marks=pytest.mark.slow),
    ],
)
def test_a_request_to_stop_saves_and_ends_with_0_and_a_later_resume_is_equal(
    world, straight, tmp_path, monkeypatch, number, background
):
    run = tiny_world.start(world, save=tmp_path, async_save=background, save_interval=1)
    step, before = run.stepper.step, signal.getsignal(number)

    def interrupted(*given):
        if run.iteration == 1:
            os.kill(os.getpid(), number)
        return step(*given)

    monkeypatch.setattr(run.stepper, "step", interrupted)
    assert run.run() == 0
    assert run.iteration == 2 and find_checkpoint(tmp_path).name == "iter_0000002"
    assert signal.getsignal(number) == before
    assert finish(world, tmp_path, straight) == 2


def spoil(folder, how):
    """The state in which kill -9 may leave a folder that holds iter_0000003 (and was about to write another)."""
    tracker, whole = folder / TRACKER, folder / "iter_0000003"
    if how == "killed while writing":
        shutil.copytree(whole, folder / ".iter_0000004.partial")
        (folder / ".iter_0000004.partial" / "metadata.json").unlink()
        next((folder / ".iter_0000004.partial").glob("*.distcp")).write_bytes(b"half")
    elif how == "killed before the rename":
        shutil.copytree(whole, folder / ".iter_0000004.partial")
    elif how == "tracker empty":
        tracker.write_text("")
    elif how == "tracker missing":
        tracker.unlink()
    elif how == "tracker names a checkpoint that is gone":
        tracker.write_text("9")
    elif how == "temporary tracker left over":
        (folder / f"{TRACKER}.tmp-1").write_text("4")
    elif how == "metrics torn":
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')


@pytest.mark.parametrize(
    "how",
    [
        "killed while writing",
        "killed before the rename",
        "tracker empty",
        "tracker missing",
        "tracker names a checkpoint that is gone",
        "temporary tracker left over",
        "metrics torn",
    ],
)
def test_kill_during_save_leaves_the_last_checkpoint_loadable(world, halfway, straight, tmp_path, how):
    folder = copied(halfway, tmp_path)
    spoil(folder, how)
    assert finish(world, folder, straight) == 3
    assert not list(folder.glob(".iter_*"))


def test_a_checkpoint_that_is_replaced_or_deleted_is_never_seen_half(world, halfway, tmp_path, monkeypatch):
    """Deleting takes many steps; kill -9 may come between any two. Nothing half may keep an `iter_` name."""
    folder, seen = copied(halfway, tmp_path), []
    delete = shutil.rmtree

    def watched(path, *args, **kwargs):
        if str(path).startswith(str(folder)):
            seen.append(os.path.basename(path))
        return delete(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    run = tiny_world.start(world, save=folder, exit_interval=3, most_recent_k=1)
    run.save()  # replaces iter_0000003
    run.iteration = 4
    run.save()  # deletes iter_0000003
    run.iteration = 2
    run.save()  # an older step: must not delete what it has just written
    assert find_checkpoint(folder).name == "iter_0000002"
    assert seen and not any(name.startswith("iter_") for name in seen)


def test_only_the_newest_k_checkpoints_are_kept(world, tmp_path):
    tiny_world.start(world, save=tmp_path, train_iters=3, save_interval=1, most_recent_k=2).run()
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_load_takes_another_folder_and_wins_over_save(world, halfway, straight, tmp_path):
    run = tiny_world.start(world, load=halfway, save=tmp_path / "new")
    assert run.iteration == 3
    run.run()
    assert_same(tiny_world.snapshot(run), straight[1])
    assert [line["step"] for line in tiny_world.read_metrics(tmp_path / "new")] == [4, 5, 6]


def one_sample_less(lines):
    return lines[:-1]


def one_word_changed(lines):
    return [lines[0].replace('"content": "', '"content": "x', 1)] + lines[1:]


def another_order(lines):
    return lines[::-1]


@pytest.mark.parametrize("change", [one_sample_less, one_word_changed, another_order])
def test_a_data_file_that_changed_since_the_save_is_a_user_error(world, halfway, tmp_path, change):
    lines = world.rollouts.read_text().splitlines()
    file = tmp_path / "rollouts.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert (
        tiny_world.start(world, load=halfway, data_path=file).iteration == 3
    )  # the same text elsewhere is fine
    file.write_text("\n".join(change(lines)) + "\n")
    what = " conversations was 60, is 59" if change is one_sample_less else ", its tokenizer"
    with pytest.raises(
        UserError, match=rf"--load .*iter_0000003: was trained on other data .*--data-path{what}"
    ):
        tiny_world.start(world, load=halfway, data_path=file)


def test_a_data_file_cut_in_the_middle_of_a_line_is_a_user_error_that_names_the_line(
    world, halfway, tmp_path
):
    lines = world.rollouts.read_bytes().splitlines(keepends=True)
    file = tmp_path / "rollouts.jsonl"
    file.write_bytes(b"".join(lines[:40]) + lines[40][:30])
    with pytest.raises(UserError, match=r"rollouts.jsonl line 41: not valid JSON") as told:
        tiny_world.start(world, load=halfway, data_path=file)
    assert "\n" not in str(told.value)


def test_mistakes_on_resume_are_user_errors(world, halfway, tmp_path):
    with pytest.raises(UserError, match=r"--load .*nowhere: no such folder"):
        tiny_world.start(world, load=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--load .*empty: holds no complete Megatron checkpoint"):
        tiny_world.start(world, load=tmp_path / "empty")
    with pytest.raises(UserError, match=r"was trained on other data.*--seq-length was 128, is 160\)"):
        tiny_world.start(world, load=halfway, seq_length=160)
    with pytest.raises(UserError, match=r"was trained on other data.*--seed was 1234, is 5\)"):
        tiny_world.start(world, load=halfway, seed=5)
    with pytest.raises(UserError, match=r"--load .*iter_0000003: does not fit this model"):
        tiny_world.start(
            world, load=halfway, pretrained_checkpoint=world.static, moe_router_load_balancing_type="none"
        )
    for size in (0, 100):
        folder = shutil.copytree(halfway, tmp_path / f"cut{size}")
        for file in (folder / "iter_0000003").glob("*.distcp"):
            os.truncate(file, size)
        with pytest.raises(UserError, match=r"--load .*iter_0000003: cannot be read") as caught:
            tiny_world.start(world, load=folder, verify_checkpoint="none")
        assert "\n" not in str(caught.value)


def test_a_wrong_pretrained_checkpoint_is_a_user_error(world, tmp_path):
    with pytest.raises(
        UserError, match=r"has 0 zero experts a layer, not 4; convert the model with --num-zero-exp"
    ):
        tiny_world.start(world, pretrained_checkpoint=world.static, num_zero_experts=4, hf_config=world.hf)
    with pytest.raises(UserError, match=r"has 4 zero experts a layer, not 6; leave --num-zero-experts out"):
        tiny_world.start(world, num_zero_experts=6)
    with pytest.raises(
        UserError, match=r"--pretrained-checkpoint .*: is a Hugging Face folder; convert it first"
    ):
        tiny_world.start(world, pretrained_checkpoint=world.hf)
    with pytest.raises(UserError, match=r"hf_config is missing.*--hf-config"):
        tiny_world.start(world, pretrained_checkpoint=tmp_path)
    with pytest.raises(UserError, match="--teacher-load is missing"):
        tiny_world.start(world, pretrained_checkpoint=None, hf_config=world.hf, num_zero_experts=4)
    with pytest.raises(UserError, match=r"grouped_aux_loss.*--num-zero-experts is 0"):
        tiny_world.start(world, pretrained_checkpoint=world.static)
    with pytest.raises(UserError, match=r"--pretrained-checkpoint .* does not fit .* no .*zero_output\.bias"):
        tiny_world.start(world, zero_experts_type="learned")
    with pytest.raises(
        UserError, match=r"--zero-experts-type constant: .* zeda fit --zero-experts-type constant"
    ):
        tiny_world.start(
            world,
            pretrained_checkpoint=world.static,
            zero_expert_routing="paired",
            zero_experts_type="constant",
        )
    with pytest.raises(UserError, match=r"--recompute-granularity selective .* copy"):
        tiny_world.start(world, zero_experts_type="copy", recompute_granularity="selective")


def test_one_iteration_of_a_checkpoint_can_be_named(world, straight):
    run = tiny_world.start(
        world, pretrained_checkpoint=straight[0] / "iter_0000006", teacher_load=world.dynamic
    )
    assert run.student.zero.num_zero_experts == 4 and run.iteration == 0
    trained = {n: t for n, t in straight[1].items() if n.startswith("/model")}
    assert_same({n: t for n, t in tiny_world.snapshot(run).items() if n.startswith("/model")}, trained)


def test_the_teacher_may_be_the_static_checkpoint(world):
    batch = batches_of(tiny_world.start(world), 1)
    hidden = [
        tiny_world.start(world, teacher_load=source).teacher.hidden_states(batch, 128)[0]
        for source in (world.static, world.dynamic)
    ]
    assert torch.equal(*hidden)


# --- loss and gradients -------------------------------------------------------------------------------------


def reference_gradients(run, batches, alpha):
    """Plain autograd on full logits: sum of KL over response tokens / their number + mean group loss."""
    student, teacher = run.student.chunks[0], run.teacher.model_chunks[0]
    student.train()
    total, count = 0.0, sum(float(b.loss_mask.sum()) for b in batches)
    for batch in batches:
        with torch.no_grad(), zero_mask(teacher):
            target = (forward_model(teacher, batch) @ teacher.head_weight().t()).log_softmax(-1)[:, 0]
        picked = []  # per layer: router, its input, its routing map
        watch = partial(lambda into, router, args, out: into.append((router, args[0], out[1])), picked)
        handles = [router.register_forward_hook(watch) for router in routers(student)]
        logits = (forward_model(student, batch) @ student.head_weight().t())[:, 0]
        for handle in handles:
            handle.remove()
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        total = total + (kl * batch.loss_mask[0]).sum() / count
        valid = ~batch.padding_mask[0]
        for router, hidden, map_TN in picked:
            scores = (hidden[:, 0] @ router.weight.t()).softmax(-1)[valid]
            n, nz, k = router.num_real, router.num_zero, router.topk
            share = 1 - map_TN[valid].sum().item() / (k * valid.sum().item())
            mass = scores[:, n:].sum(1).mean()
            group = (n + 2 * nz) * ((1 - share) * (1 - mass) / n + share * mass / (2 * nz))
            total = total + alpha * group / len(batches)
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # The attached group loss must not add to ours.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.0))
    names, parameters = zip(*student.named_parameters())
    grads = torch.autograd.grad(total, parameters, materialize_grads=True)
    return float(total.detach()), dict(zip(names, grads))


@pytest.mark.parametrize("memory", ["own", "offload"])
def test_loss_and_gradients_equal_plain_autograd_on_full_logits(world, memory):
    run = tiny_world.start(world, clip_grad=0.0, teacher_memory=memory)
    batches = batches_of(run)
    expected_loss, expected = reference_gradients(run, batches, alpha=0.1)
    for router in routers(run.student.chunks):
        router.routing_stats.reset()
    metrics = run.stepper.step(batches)
    from zeda_megatron.moe import stats

    group = stats.collect(run.student.chunks, 2, torch.device("cpu")).group_loss * 0.1
    assert metrics["loss"] + group == pytest.approx(expected_loss, rel=1e-5)
    mine = gradients(run)
    assert mine.keys() == expected.keys()
    for name in mine:
        tiny.close(mine[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("loss", ["forward_kl", "ce"])
def test_gradient_accumulation_does_not_change_the_result(world, loss):
    """Four micro-batches with unequal numbers of response tokens, or the same sequences in one long row."""
    draw = torch.Generator().manual_seed(0)
    samples = [
        TokenSample(torch.randint(0, 256, (64,), generator=draw).tolist(), [i >= start for i in range(64)])
        for start in (5, 60, 30, 1)
    ]
    results = []
    for seq_length, rows in ((64, 4), (128, 2), (256, 1)):
        run = tiny_world.start(world, distill_loss=loss, clip_grad=0.0, moe_aux_loss_coeff=0.0)
        dataset = PackedDataset(samples, seq_length, pad_id=0, seed=1)
        run.stepper.seq_length = seq_length
        results.append((run.stepper.step([dataset[i] for i in range(rows)]), gradients(run)))
    for metrics, grads in results[1:]:
        assert metrics["tokens"] == results[0][0]["tokens"] == 63 - 4 + 63 - 59 + 63 - 29 + 63
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(results[0][0]["grad_norm"], rel=1e-5)
        for name in grads:
            tiny.close(grads[name], results[0][1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["ce", "forward_kl", "reverse_kl", "jsd"])
def test_losses_go_down(world, tmp_path, loss):
    flags = {"distill_loss": loss, "train_iters": 12, "lr": 5e-3, "lr_warmup_fraction": 0.0}
    tiny_world.start(world, save=tmp_path, global_batch_size=2, **flags).run()
    values = [line["kd_loss"] for line in tiny_world.read_metrics(tmp_path)]
    assert values[-1] < 0.8 * max(values[:4])


def test_group_loss_drives_the_zero_share_to_its_target(world, tmp_path):
    run = tiny_world.start(
        world,
        save=tmp_path,
        train_iters=25,
        lr=3e-3,
        moe_aux_loss_coeff=10.0,
        trainable="router",
        global_batch_size=2,
    )
    run.run()
    target = run.student.zero.target_share(8)
    assert target == 0.5
    shares = [line["zero_share"] for line in tiny_world.read_metrics(tmp_path)]
    assert abs(shares[0] - target) > 0.2 and abs(shares[-1] - target) < 0.1


def test_a_run_may_go_on_with_another_learning_rate(world, halfway, tmp_path):
    folder = copied(halfway, tmp_path)
    run = tiny_world.start(world, save=folder, lr=2e-3)
    assert run.iteration == 3 and run.run() == 0
    rates = [line["lr"] for line in tiny_world.read_metrics(folder)]
    assert max(rates[:3]) > 5e-3 and max(rates[3:]) <= 2e-3


@pytest.mark.parametrize(
    ("granularity", "memory", "trainable"),
    [
        ("full", "own", "router"),
        ("selective", "shared", "router"),
        ("full", "shared", "router+norms"),
        ("selective", "shared", "lora"),
        pytest.param("full", "shared", "lora", marks=pytest.mark.slow),
        pytest.param("full", "shared", "router", marks=pytest.mark.slow),
        pytest.param("selective", "own", "router", marks=pytest.mark.slow),
    ],
)
def test_what_trains_alone_learns_the_same_with_recomputation(world, granularity, memory, trainable):
    """Embeddings are frozen then, so the first recomputed block has no input that wants a gradient of its own."""
    ends = []
    for recompute in (None, granularity):
        flags = {"trainable": trainable, "teacher_memory": memory, "recompute_granularity": recompute}
        run = tiny_world.start(world, train_iters=2, **flags)
        run.run()
        ends.append(tiny_world.parameters(run))
        assert run.stepper.step(run.feed.rows_of_rank(range(4)))["grad_norm"] > 1e-4
    for name, weight in ends[0].items():
        tiny.close(ends[1][name], weight, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("trainable", ["all", "router", "router+norms", "lora"])
def test_trainable_says_which_weights_move(world, trainable):
    run = tiny_world.start(world, trainable=trainable, lr_warmup_fraction=0.0, train_iters=1)
    before = tiny_world.parameters(run)
    run.run()
    moved = {name for name, p in tiny_world.parameters(run).items() if not torch.equal(p, before[name])}
    routers = {name for name in before if ".router." in name}
    norms = {name for name in before if name.endswith(("norm.weight", "norm_weight"))}
    adapters = {name for name in before if ".adapter." in name}
    few = {"router": routers, "router+norms": routers | norms, "lora": routers | adapters}
    assert moved == few.get(trainable, set(before))
    assert routers and norms and bool(adapters) == (trainable == "lora")


# --- teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "trainable"),
    [
        ("own", "all"),
        ("offload", "all"),
        ("own", "router"),
        ("shared", "router"),
        ("shared", "router+norms"),
        ("shared", "lora"),
        ("own", "lora"),
    ],
)
def test_the_teacher_does_not_move_and_is_the_static_model(world, memory, trainable):
    flags = {"teacher_memory": memory, "trainable": trainable, "train_iters": 2, "lr_warmup_fraction": 0.0}
    run = tiny_world.start(world, **flags)
    batch = batches_of(run, 1)
    before = tiny_world.weight_hash(run.teacher)
    first = run.teacher.hidden_states(batch, 128)[0]
    run.run()
    assert tiny_world.weight_hash(run.teacher) == before
    after = run.teacher.hidden_states(batch, 128)[0]
    static = tiny_world.start(
        world, pretrained_checkpoint=world.static, moe_router_load_balancing_type="none"
    ).student.chunks[0]
    with torch.no_grad():
        expected = forward_model(static.eval(), batch[0])
    assert torch.equal(first, expected) and torch.equal(after, expected)
    assert run.student.chunks[0].training and not after.requires_grad


@pytest.mark.parametrize("trainable", ["router", "router+norms", "lora"])
def test_the_three_memory_modes_give_the_same_losses_and_weights(world, tmp_path, trainable):
    ends, lines = [], []
    for memory in ("own", "offload", "shared"):
        flags = {"teacher_memory": memory, "trainable": trainable, "train_iters": 3}
        run = tiny_world.start(world, save=tmp_path / memory, **flags)
        run.run()
        ends.append(tiny_world.snapshot(run))
        lines.append(tiny_world.read_metrics(tmp_path / memory))
    assert lines[0] == lines[1] == lines[2] and lines[0][-1]["kd_loss"] > 0
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("memory", ["own", "shared"])
def test_a_resumed_run_keeps_its_first_teacher(world, tmp_path, memory):
    flags = {"teacher_memory": memory, "trainable": "router", "save": tmp_path}
    first = tiny_world.start(world, exit_interval=2, **flags)
    before = tiny_world.weight_hash(first.teacher)
    first.run()
    assert tiny_world.weight_hash(tiny_world.start(world, **flags).teacher) == before


# --- what is written ----------------------------------------------------------------------------------------


def test_metrics_have_every_contract_key_and_one_line_per_step(straight):
    lines = [json.loads(line) for line in (straight[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() >= CONTRACT and all(isinstance(line[key], (int, float)) for key in CONTRACT)
        assert line["loss"] == line["kd_loss"] + line["group_loss"]
        assert line["tokens"] > 0 and line["seconds"] > 0 and 0 < line["zero_share"] < 1
    assert [line["lr"] for line in lines[:2]] == [0.0, 1e-2]  # what the step used, not what comes next


def test_zero_share_is_a_direct_count(world, tmp_path):
    run = tiny_world.start(world, save=tmp_path, train_iters=1)
    counts = {1: [0, 0], 2: [0, 0]}

    def count(router, args, out):
        valid = ~args[1].reshape(-1)
        slots = router.topk * int(valid.sum())
        counts[router.layer_number][0] += slots - int(out[1][valid].sum())
        counts[router.layer_number][1] += slots

    for router in routers(run.student.chunks):
        router.register_forward_hook(count)
    run.run()
    (line,) = tiny_world.read_metrics(tmp_path)
    tokens = sum(int((~batch.padding_mask).sum()) for batch in batches_of(run))
    assert counts[1][1] == counts[2][1] == 3 * tokens < 3 * 4 * 128
    assert line["zero_share_by_layer"] == [counts[1][0] / counts[1][1], counts[2][0] / counts[2][1]]
    assert line["zero_share"] == sum(c[0] for c in counts.values()) / sum(c[1] for c in counts.values())


def test_tensorboard_gets_the_scalars(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "zeda/zero_share",
        "zeda/zero_share_layer_0",
        "zeda/zero_share_layer_1",
        "zeda/group_loss",
    }
    assert tags >= {"zeda/kd_loss", "zeda/teacher_student_kl"}
    assert [event.step for event in events.Scalars("zeda/kd_loss")] == [1, 2, 3, 4, 5, 6]


class WidestVocabularyTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that has the vocabulary as a dimension."""

    widest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and V in tensor.shape:
                self.widest = max(self.widest, tensor.numel())
        return out


@pytest.mark.parametrize("loss", ["ce", "forward_kl"])
def test_no_tensor_of_tokens_times_vocabulary_exists(world, loss):
    widest = {}
    for chunk in (32, 1024):
        run = tiny_world.start(world, distill_loss=loss, loss_chunk_tokens=chunk)
        batches = batches_of(run)
        kept = max(int(batch.loss_mask.sum()) for batch in batches)
        with WidestVocabularyTensor() as watch:
            run.stepper.step(batches)
        widest[chunk] = watch.widest
    assert kept > 32
    assert widest[32] == max(32 * V, V * 32)  # one chunk of logits (and the head, as wide as it is high here)
    assert widest[1024] == kept * V  # the watch does see logits


def test_bfloat16_runs_and_resumes(world, tmp_path):
    flags = {"bf16": True, "train_iters": 4}
    whole = tiny_world.start(world, save=tmp_path / "a", **flags)
    whole.run()
    lines = tiny_world.read_metrics(tmp_path / "a")
    assert len(lines) == 4 and all(line["loss"] == line["loss"] and line["updated"] for line in lines)
    assert whole.student.chunks[0].decoder.layers[0].mlp.router.weight.dtype == torch.bfloat16
    tiny_world.start(world, save=tmp_path / "b", exit_interval=2, **flags).run()
    resumed = tiny_world.start(world, save=tmp_path / "b", **flags)
    assert resumed.iteration == 2
    resumed.run()
    assert_same(tiny_world.snapshot(resumed), tiny_world.snapshot(whole))
    assert tiny_world.read_metrics(tmp_path / "b") == lines
    fp32 = tiny_world.start(world, save=tmp_path / "c", train_iters=1)
    fp32.run()
    assert lines[0]["ce"] == pytest.approx(tiny_world.read_metrics(tmp_path / "c")[0]["ce"], rel=0.02)


@pytest.mark.parametrize("kind", ["copy", "learned"])
def test_other_kinds_of_zero_experts_train_and_resume(world, tmp_path, kind):
    source = tmp_path / "source"
    hf_to_megatron(world.hf, source, num_zero_experts=4, zero_experts_type=kind)
    flags = {"pretrained_checkpoint": source, "train_iters": 3, "recompute_granularity": "full"}
    whole = tiny_world.start(world, save=tmp_path / "a", **flags)
    assert whole.student.zero.zero_experts_type == kind
    whole.run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=2, **flags).run()
    resumed = tiny_world.start(world, save=tmp_path / "b", **flags)
    resumed.run()
    assert_same(tiny_world.snapshot(resumed), tiny_world.snapshot(whole))
    about = json.loads((tmp_path / "a" / "zeda.json").read_text())
    begun = json.loads((source / "zeda.json").read_text())
    assert about == begun | {"adapted_steps": 3} and about["zero_experts_type"] == kind
    if kind == "learned":
        assert whole.student.chunks[0].decoder.layers[0].mlp.router.zero_output.bias.abs().sum() > 0
        with pytest.raises(UserError, match=r"--zero-experts-type zero: .* learned"):
            tiny_world.start(world, **flags, zero_experts_type="zero")


def test_a_run_that_saves_nothing_can_write_its_figures(world, tmp_path):
    file = tmp_path / "folder" / "figures.jsonl"
    tiny_world.start(world, metrics_path=file, train_iters=2).run()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["peak_memory_gib"] > 0.05 for line in lines)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_figures_of_another_run_are_not_written_over(world, tmp_path):
    file = tmp_path / "figures.jsonl"
    file.write_text('{"step": 7}\n')
    with pytest.raises(UserError, match=r"--metrics-path .*figures.jsonl: holds another run's figures"):
        tiny_world.start(world, metrics_path=file, train_iters=1).run()
    assert file.read_text() == '{"step": 7}\n'


# --- what a run says -----------------------------------------------------------------------------------------


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_a_run_that_keeps_nothing_says_so_before_its_first_step(world, tmp_path, capsys):
    tiny_world.start(world, train_iters=1).run()
    assert said(capsys) == ["warning: no --save: nothing of this run will be kept"]
    tiny_world.start(world, train_iters=1, metrics_path=tmp_path / "m.jsonl").run()
    assert said(capsys) == [
        f"warning: no --save: nothing of this run will be kept but the figures in --metrics-path {tmp_path / 'm.jsonl'}"
    ]


def test_a_finished_run_says_where_it_is_and_a_finished_one_given_again_that_there_is_nothing_to_do(
    world, tmp_path, capsys
):
    for _ in range(2):
        tiny_world.start(world, save=tmp_path, train_iters=1).run()
    first, second = said(capsys)
    assert first.startswith(f"saved {tmp_path / 'iter_0000001'}; next: ")
    export = f"zeda convert megatron-to-hf --megatron {tmp_path}"
    assert (
        first.endswith(f"{export} exports it") and f"--stage 2 --pretrained-checkpoint {tmp_path} " in first
    )
    assert second.startswith(
        f"nothing to do: all 1 steps of --train-iters are in {tmp_path}; a larger --train-iters"
    )


def test_a_terminal_sees_the_steps_of_a_run_unless_it_is_told_not_to(world, capsys, monkeypatch):
    shown = []
    for progress in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        tiny_world.start(world, train_iters=2, progress=progress).run()
        shown.append(capsys.readouterr().err)
    assert "2/2 [" in shown[0] and "step" in shown[0]
    assert "2/2 [" not in shown[1]


def test_a_schedule_that_has_changed_since_the_save_is_told_with_both_learning_rates(
    world, halfway, tmp_path, capsys
):
    folder, flags = copied(halfway, tmp_path), {"train_iters": 12, "lr_warmup_fraction": 0.5}
    run = tiny_world.start(world, save=folder, **flags)
    (line,) = said(capsys)
    found = re.fullmatch(
        r"warning: the schedule of the learning rate has changed \(--train-iters was 6, is 12, "
        r"--lr-warmup-fraction was 0.1, is 0.5\): step 3 had (.*), step 4 gets (.*)",
        line,
    )
    run.run()
    rates = {entry["step"]: entry["lr"] for entry in tiny_world.read_metrics(folder)}
    assert [float(text) for text in found.groups()] == pytest.approx([rates[3], rates[4]], rel=1e-2)
    capsys.readouterr()
    tiny_world.start(world, load=halfway)
    assert said(capsys) == []  # nothing has changed


@pytest.mark.parametrize("memory", ["own", "offload"])
def test_the_teachers_passes_leave_its_chunks_as_they_were(world, memory):
    run = tiny_world.start(world, teacher_memory=memory)
    (chunk,) = run.teacher.model_chunks
    run.teacher.hidden_states(batches_of(run, 1), 128)
    assert not chunk.training
