"""Evaluation while training: what it measures, when, and that training does not notice."""

import json
import sys

import pytest
import tiny_world
import torch

from zeda_megatron.data.conversation import tokenize_rollouts
from zeda_megatron.data.packing import PackedDataset
from zeda_megatron.data.prompts import load_rollouts
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.moe.stats import routers
from zeda_megatron.training.evaluate import run_evaluation

pytestmark = pytest.mark.usefixtures("one_process")
KEYS = {"eval_ce", "eval_kl", "eval_top1_agreement", "eval_zero_share"}
V = tiny_world.MODEL["vocab_size"]


def paired(world):
    return {"pretrained_checkpoint": world.static, "zero_expert_routing": "paired"}


def without_evaluation(lines):
    return [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines]


def held_out_rows(world, count):
    """The first rows of the held-out file, packed here."""
    tokenizer = load_tokenizer(world.hf)
    samples = tokenize_rollouts(load_rollouts([str(world.heldout)]), tokenizer, 128)
    packed = PackedDataset(samples, 128, tokenizer.pad_id, seed=0)
    assert packed.rows_in_epoch(0) > count
    return [packed[i] for i in range(count)]


def by_full_logits(student, teacher, rows):
    """The four numbers with whole logits and a hook on every router."""
    total, slots = dict.fromkeys(("weight", "ce", "kl", "agreement"), 0.0), [0, 0]

    def count(router, args, out):
        valid = ~args[1].reshape(-1)
        slots[0] += router.topk * int(valid.sum()) - int(out[1][valid].sum())
        slots[1] += router.topk * int(valid.sum())

    for row in rows:
        weight = row.loss_mask[0].double()
        with torch.no_grad():
            with zero_mask(teacher):
                target = (forward_model(teacher, row)[:, 0] @ teacher.head_weight().t())[:, :V].double()
            handles = [router.register_forward_hook(count) for router in routers(student)]
            mine = (forward_model(student, row)[:, 0] @ student.head_weight().t())[:, :V].double()
            for handle in handles:
                handle.remove()
        p, q = mine.log_softmax(-1), target.log_softmax(-1)
        total["weight"] += float(weight.sum())
        total["ce"] -= float((p.gather(1, row.labels[0][:, None])[:, 0] * weight).sum())
        total["kl"] += float(((q.exp() * (q - p)).sum(-1) * weight).sum())
        total["agreement"] += float(((p.argmax(-1) == q.argmax(-1)) * weight).sum())
    tokens = total["weight"]
    return {
        "eval_ce": total["ce"] / tokens,
        "eval_kl": total["kl"] / tokens,
        "eval_top1_agreement": total["agreement"] / tokens,
        "eval_zero_share": slots[0] / slots[1],
    }


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"distill_temperature": 3.0, "distill_loss": "reverse_kl"},
        {"distill_loss": "ce", "global_batch_size": 2},
        {"moe_pick_rule": "topk=2"},
        {"bf16": True},
    ],
    ids=["plain", "another temperature", "two rows at a time", "pick rule", "bf16"],
)
def test_an_evaluation_equals_the_loss_by_full_logits_on_the_same_rows(world, flags):
    run = tiny_world.start(world, eval_rows=5, train_iters=2, lr_warmup_fraction=0.0, **flags)
    run.run()
    student, teacher = run.student.chunks[0].eval(), run.teacher.model_chunks[0]
    expected = by_full_logits(student, teacher, held_out_rows(world, 5))
    found = run.evaluation.evaluator.measure()
    assert found.keys() == KEYS
    assert found["eval_kl"] > 1e-3 and 0 < found["eval_zero_share"] < 1
    for name, value in found.items():
        near = 0.02 if "bf16" in flags else 1e-5  # here logits are bfloat16, there they are not
        assert value == pytest.approx(expected[name], rel=near, abs=near), name


def test_with_a_teacher_that_shares_the_weights_the_numbers_are_the_same(world, tmp_path):
    lines = []
    for memory in ("own", "offload", "shared"):
        flags = {"teacher_memory": memory, "trainable": "router", "train_iters": 2}
        tiny_world.start(world, save=tmp_path / memory, eval_rows=3, **flags).run()
        lines.append(tiny_world.read_metrics(tmp_path / memory))
    assert lines[0] == lines[1] == lines[2] and lines[0][-1].keys() >= KEYS


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"paired": True}, marks=pytest.mark.slow),
        {"paired": True, "paired_head_lr": 1e-2, "recompute_granularity": "selective"},
        {"topk_range": (1, 3)},
        {"target_zero_share": 0.5},
        {"trainable": "router", "teacher_memory": "shared", "recompute_granularity": "full"},
        {"use_distributed_optimizer": True},
        {"teacher_schedule": "alongside"},
        {"stage": "pretrain"},
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_training_with_and_without_evaluation_is_bit_equal(world, tmp_path, flags):
    flags = {"train_iters": 2, "lr_warmup_fraction": 0.0} | flags
    if flags.pop("paired", False):
        flags |= paired(world)
    ends, lines = [], []
    for name, more in {"with": {"eval_rows": 3, "eval_interval": 1}, "without": {}}.items():
        run = tiny_world.start(world, save=tmp_path / name, **flags, **more)
        run.run()
        ends.append(tiny_world.snapshot(run))
        lines.append(tiny_world.read_metrics(tmp_path / name))
    assert ends[0].keys() == ends[1].keys() and ends[0]
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    assert without_evaluation(lines[0]) == lines[1] != lines[0]


def test_an_evaluation_puts_everything_back(world):
    run = tiny_world.start(world, eval_rows=3)
    chunk = run.student.chunks[0]
    run.stepper.step(run.feed.rows_of_rank(range(2)))
    mine = routers(run.student.chunks)
    before = [(router.routing_stats, int(router.routing_stats.slots)) for router in mine]
    state = torch.get_rng_state()
    assert chunk.training
    run.evaluation.evaluator.measure()
    assert chunk.training and all(module.training for module in chunk.modules())
    assert [(router.routing_stats, int(router.routing_stats.slots)) for router in mine] == before
    assert torch.equal(torch.get_rng_state(), state)
    chunk.eval()
    run.evaluation.evaluator.measure()
    assert not chunk.training


@pytest.mark.parametrize(
    ("interval", "steps"), [(0, [5]), (2, [2, 4, 5]), (5, [5]), (9, [5])], ids="every {}".format
)
def test_it_evaluates_before_the_first_step_every_interval_and_after_the_last(
    world, tmp_path, capsys, interval, steps
):
    flags = {"eval_rows": 2, "eval_interval": interval, "train_iters": 5, "global_batch_size": 1}
    run = tiny_world.start(world, save=tmp_path, **flags)
    first = run.evaluation.evaluator.measure()
    run.run()
    lines = tiny_world.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if KEYS & line.keys()] == steps
    assert all(line.keys() >= KEYS for line in lines if line["step"] in steps)
    started = {k.replace("_start", ""): v for k, v in lines[0].items() if k.startswith("eval_start_")}
    assert started == first
    assert not any(key.startswith("eval_start_") for line in lines[1:] for key in line)
    said = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    assert len(said) == 1 + len(steps)
    assert f"held out, before the first step: ce {first['eval_ce']:.4f}, kl" in said[0]
    assert "held out, after step 5: ce" in said[-1] and "zero share" in said[-1]


def test_tensorboard_gets_evaluations_from_step_0_and_at_any_log_interval(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"eval_rows": 2, "eval_interval": 2, "train_iters": 3, "log_interval": 5}
    tiny_world.start(world, save=tmp_path, **flags).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in KEYS:
        assert [event.step for event in events.Scalars(f"zeda/{key}")] == [0, 2, 3]


@pytest.mark.parametrize("stop", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_evaluates_as_the_uninterrupted_one(world, tmp_path, stop):
    flags = {"eval_rows": 2, "eval_interval": 2, "train_iters": 4, "global_batch_size": 2}
    tiny_world.start(world, save=tmp_path / "a", **flags).run()
    tiny_world.start(world, save=tmp_path / "b", exit_interval=stop, **flags).run()
    tiny_world.start(world, save=tmp_path / "b", **flags).run()
    assert tiny_world.read_metrics(tmp_path / "b") == tiny_world.read_metrics(tmp_path / "a")


def test_the_last_evaluation_is_of_the_model_that_is_saved(world, tmp_path):
    """Paired zero experts get their threshold at the end."""
    flags = paired(world) | {"eval_rows": 3, "train_iters": 3, "target_zero_share": 0.4}
    run = tiny_world.start(world, save=tmp_path, **flags)
    run.run()
    again = tiny_world.start(world, load=tmp_path, **flags)
    found = again.evaluation.evaluator.measure()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found == {key: last[key] for key in KEYS}
    assert found["eval_zero_share"] == pytest.approx(0.4, abs=0.05)


def test_without_a_teacher_there_is_no_kl(world, tmp_path):
    run = tiny_world.start(world, save=tmp_path, stage="pretrain", eval_rows=2, train_iters=1)
    run.run()
    (line,) = tiny_world.read_metrics(tmp_path)
    assert {key for key in line if key.startswith("eval_")} == {
        "eval_ce",
        "eval_zero_share",
        "eval_start_ce",
        "eval_start_zero_share",
    }


def test_all_rows_are_taken_where_there_are_fewer(world):
    few = tiny_world.start(world, eval_rows=2).evaluation.evaluator.rows
    many = tiny_world.start(world, eval_rows=1000).evaluation.evaluator.rows
    assert len(few.rows) == few.count == 2 < many.count == len(many.rows) < 20
    assert few.fingerprint != many.fingerprint
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(few.rows, many.rows))


def test_a_held_out_file_that_cannot_be_used_is_a_user_error(world, tmp_path):
    file = tmp_path / "held.jsonl"
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        tiny_world.start(world, eval_data_path=tmp_path / "nowhere.jsonl")
    file.write_text("")
    with pytest.raises(UserError, match=r"held\.jsonl"):
        tiny_world.start(world, eval_data_path=file)
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 200}]}
    file.write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match=r"held\.jsonl sample 1 .*--seq-length 128"):
        tiny_world.start(world, eval_data_path=file)
    with pytest.raises(UserError, match=r"--eval-data-path .*held\.jsonl: no conversation is left"):
        tiny_world.start(world, eval_data_path=file, overlong="skip")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_interval": 5}, "--eval-interval 5 needs --eval-data-path"),
        ({"eval_interval": -1, "eval_data_path": "x"}, "--eval-interval -1 must be at least 0"),
        ({"eval_rows": 0}, "--eval-rows 0 must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(world, flags, words):
    with pytest.raises(UserError, match=words):
        tiny_world.options(world, **flags)


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


def test_an_evaluation_says_what_it_wrote_and_shows_a_terminal_how_far_it_is(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    output = tmp_path / "out.json"
    fields = {"stage": "eval", "eval_data_path": world.heldout, "teacher_load": world.static}
    for progress in (True, False):
        assert run_evaluation(tiny_world.options(world, **fields, eval_output=output, progress=progress)) == 0
        said = capsys.readouterr().err
        assert (
            f"wrote {output}; next: zeda convert megatron-to-hf --megatron {world.dynamic} exports it" in said
        )
        assert ("held out: 100%" in said) is progress
