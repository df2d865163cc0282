"""The head of multi-token prediction learns beside the main loss: on what, from whom, and nothing else feels it."""

import json
from dataclasses import replace

import pytest
import tiny
import tiny_mtp
import tiny_world
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.distill.passes import draft_loss, draft_states, forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.moe.paired import KEEP_ALL
from zeda_megatron.moe.stats import decoder_routers

pytestmark = pytest.mark.usefixtures("one_process")
HEAD = "mtp.layers.0."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = tiny_world.make_world(folder, tiny_mtp.WithHead)
    with_head = replace(world, static=folder / "static mtp", dynamic=folder / "dynamic mtp")
    hf_to_megatron(world.hf, with_head.static, mtp=True)
    hf_to_megatron(world.hf, with_head.dynamic, num_zero_experts=4, mtp=True)
    hf_to_megatron(world.hf, folder / "paired", zero_expert_routing="paired", mtp=True)
    return with_head


def run(world, folder, **values):
    """A run from the dynamic model that is over, and its metrics."""
    made = tiny_world.start(world, save=folder, **{"mtp_loss_scale": 0.5, "train_iters": 4} | values)
    assert made.run() == 0
    return made, tiny_world.read_metrics(folder)


def weights(made) -> dict[str, torch.Tensor]:
    (chunk,) = made.student.chunks
    return {
        name: tensor.detach().clone()
        for name, tensor in chunk.state_dict().items()
        if torch.is_tensor(tensor)
    }


def a_row(world, **values):
    made = tiny_world.start(world, mtp_loss_scale=0.5, **values)
    return made, made.feed.next_rows(0).rows[0]


def plain_loss(made, row, hidden):
    """The definition on full logits: sum and number of tokens, and how often both choose alike."""
    chunk, teacher = made.student.chunks[0], made.teacher
    (theirs,) = teacher.hidden_states([row], 128)
    drafted = (draft_states(chunk, row, hidden) @ chunk.head_weight().detach().t())[:, 0].log_softmax(-1)
    wanted = (theirs @ teacher.head_weight().t())[:, 0].log_softmax(-1)
    ends = row.cu_seqlens.tolist()
    total, tokens, alike = 0.0, 0, 0
    for start, end in zip(ends, ends[1:]):
        for t in range(start, end - 1):
            if row.loss_mask[0, t + 1]:
                total = total + F.kl_div(drafted[t], wanted[t + 1], log_target=True, reduction="sum")
                tokens, alike = tokens + 1, alike + int(drafted[t].argmax() == wanted[t + 1].argmax())
    return total, tokens, alike


def test_the_loss_is_the_distance_to_the_teachers_next_choice_within_each_sequence(world):
    made, row = a_row(world)
    assert len(row.cu_seqlens) > 3  # several sequences
    chunk, hidden = made.student.chunks[0], forward_model(made.student.chunks[0], row)
    theirs = made.teacher.hidden_states([row], 128)[0], made.teacher.head_weight()
    grads = []
    drafted = draft_states(chunk, row, hidden)
    fused, sums = draft_loss(chunk, row, drafted, theirs, made.stepper.loss, made.stepper.vocab_size)
    plain, tokens, alike = plain_loss(made, row, hidden)
    for loss in (fused, plain):
        chunk.zero_grad()
        loss.backward()
        grads.append(
            {n: p.grad.clone() for n, p in chunk.named_parameters() if p.grad is not None and p.grad.any()}
        )
    tiny.close(fused.detach(), plain.detach(), rtol=1e-5, atol=0)
    assert sums["weight"] == tokens > 20 and sums["top1_agreement"] == alike
    assert grads[0].keys() == grads[1].keys() and all(name.startswith(HEAD) for name in grads[0])
    for name in grads[0]:
        assert tiny.gap(grads[0][name], grads[1][name]) < 1e-5, name


def test_another_document_in_the_row_changes_nothing(world):
    made, row = a_row(world)
    chunk, teacher = made.student.chunks[0], made.teacher
    start, end = row.cu_seqlens[1:3].tolist()

    def loss(row):
        theirs = teacher.hidden_states([row], 128)[0], teacher.head_weight()
        drafted = draft_states(chunk, row, forward_model(chunk, row))
        mask = row.loss_mask.clone()
        mask[:, :start] = mask[:, end:] = 0.0  # of the second sequence alone
        return draft_loss(
            chunk, replace(row, loss_mask=mask), drafted, theirs, made.stepper.loss, made.stepper.vocab_size
        )[0].detach()

    chunk.eval()
    before, tokens, labels = loss(row), row.tokens.clone(), row.labels.clone()
    for part in (tokens, labels):
        part[:, :start] = (part[:, :start] + 7) % 96
        part[:, end:] = (part[:, end:] + 5) % 96
    tiny.close(loss(replace(row, tokens=tokens, labels=labels)), before, rtol=1e-5, atol=0)
    assert before > 0


def test_a_run_adapts_the_head_and_leaves_the_decoder_as_without_it(world, tmp_path):
    values = {"clip_grad": 0.0}  # the norm is over all gradients
    with_head, lines = run(world, tmp_path / "with", **values)
    without, plain = run(world, tmp_path / "without", mtp_loss_scale=0.0, **values)
    mine, theirs = weights(with_head), weights(without)
    assert {name for name in mine if not name.startswith(HEAD)} == theirs.keys()
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name
    for line, other in zip(lines, plain, strict=True):
        more = {"mtp_loss", "mtp_top1_agreement", "mtp_group_loss", "mtp_zero_share"}
        assert line.keys() == other.keys() | more and not more & other.keys()
        expected = other["loss"] + 0.5 * (line["mtp_loss"] + line["mtp_group_loss"])
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        for key in other.keys() - {"loss", "grad_norm", "trained_parameters"}:
            assert line[key] == other[key], key
        assert 0 <= line["mtp_zero_share"] <= 1 and len(line["zero_share_by_layer"]) == 3
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"]


def test_the_trained_head_is_exported(world, tmp_path):
    made, _ = run(world, tmp_path / "run")
    megatron_to_hf(tmp_path / "run", world.hf, tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["zce_nums"] == [4]
    back, mine = load_file(tmp_path / "back/model.safetensors"), weights(made)
    for key, name in {
        "mlp.gate.weight": "transformer_layer.mlp.router.weight",
        "eh_proj.weight": "eh_proj.weight",
        "shared_head.norm.weight": "final_layernorm.weight",
    }.items():
        assert torch.equal(back[f"model.layers.3.{key}"], mine[HEAD + name]), key
    assert torch.equal(back["model.layers.3.shared_head.head.weight"], mine["output_layer.weight"])
    assert torch.equal(back["model.layers.3.embed_tokens.weight"], mine["embedding.word_embeddings.weight"])


@pytest.mark.parametrize("kind", ["shared", "paired"])
def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path, kind):
    values = {
        "pretrained_checkpoint": world.dynamic.with_name("paired") if kind == "paired" else world.dynamic
    }
    whole, lines = run(world, tmp_path / "whole", **values)
    run(world, tmp_path / "parts", exit_interval=2, **values)
    parts, more = run(world, tmp_path / "parts", **values)
    mine, theirs = tiny_world.snapshot(parts), tiny_world.snapshot(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert more == lines
    with pytest.raises(UserError, match="was trained with a head of multi-token prediction"):
        run(world, tmp_path / "parts", mtp_loss_scale=0.0, **values)


def test_the_head_alone_can_train(world, tmp_path):
    start = weights(tiny_world.start(world, mtp_loss_scale=1.0))
    made, lines = run(world, tmp_path / "run", trainable="mtp", teacher_memory="shared")
    end = weights(made)
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert changed and all(name.startswith(HEAD) for name in changed)
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] and lines[-1]["kl"] > 0


def test_paired_zero_experts_of_the_head_keep_their_own_threshold(world, tmp_path):
    values = {"pretrained_checkpoint": world.dynamic.with_name("paired"), "lr": 0.0, "train_iters": 6}
    made, lines = run(world, tmp_path / "run", target_zero_share=0.4, **values)
    plain, _ = run(world, tmp_path / "plain", target_zero_share=0.4, mtp_loss_scale=0.0, **values)
    assert lines[-1]["mtp_zero_share"] == 0 < lines[-1]["zero_share"]
    (chunk,) = made.student.chunks
    own = chunk.mtp.layers[0].transformer_layer.mlp.router.paired.threshold
    assert own == KEEP_ALL
    for router, other in zip(decoder_routers(chunk), decoder_routers(plain.student.chunks), strict=True):
        assert torch.equal(router.paired.threshold, other.paired.threshold) and router.paired.threshold != own


@pytest.mark.parametrize("replay", [False, True])
def test_stage_2_trains_the_head_on_the_students_own_answers(world, tmp_path, replay):
    values = {"stage": "2", "train_iters": 2, "routing_replay": replay, "clip_grad": 0.0}
    _, lines = run(world, tmp_path / "run", **values)
    _, without = run(world, tmp_path / "without", mtp_loss_scale=0.0, **values)
    assert all(line["mtp_loss"] > 0 for line in lines)
    assert [line["kd_loss"] for line in lines] == [line["kd_loss"] for line in without]


@pytest.mark.parametrize("more", [{"recompute_granularity": "full"}, {"recompute_granularity": "selective"}])
def test_recomputation_changes_nothing(world, tmp_path, more):
    _, lines = run(world, tmp_path / "run", **more)
    _, plain = run(world, tmp_path / "plain")
    for line, other in zip(lines, plain, strict=True):
        for key in ("loss", "mtp_loss", "mtp_group_loss", "mtp_zero_share", "zero_share", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key


def test_a_run_in_bfloat16_adapts_the_head_too(world, tmp_path):
    made, lines = run(world, tmp_path / "run", bf16=True)
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"]
    assert weights(made)[HEAD + "eh_proj.weight"].dtype == torch.bfloat16


def test_without_a_teacher_the_head_learns_the_token_after_the_next(world, tmp_path):
    values = {"stage": "pretrain", "pretrained_checkpoint": world.static, "lr": 1e-3}
    _, lines = run(world, tmp_path / "run", moe_router_load_balancing_type="none", **values)
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] and "mtp_top1_agreement" not in lines[0]


def test_engines_that_answer_get_the_weights_without_the_head(world):
    with_head, without = (tiny_world.start(world, mtp_loss_scale=scale).student for scale in (0.5, 0.0))
    assert tiny_world.given_out(with_head) == tiny_world.given_out(without)


def test_what_cannot_train_a_head_is_refused_in_one_line(world, tmp_path):
    def refused(match, **values):
        with pytest.raises(UserError, match=match):
            tiny_world.start(world, **{"mtp_loss_scale": 0.5} | values)

    refused("--trainable mtp needs --mtp-loss-scale", trainable="mtp", mtp_loss_scale=0.0)
    refused("needs --pipeline-model-parallel-size 1", pipeline_model_parallel_size=2)
    refused("needs --context-parallel-size 1", context_parallel_size=2)
    refused("use none", stage="pretrain", moe_router_load_balancing_type="aux_loss")
    refused("--stage eval does not train", stage="eval", eval_data_path=world.heldout)
    without = tmp_path / "without"
    hf_to_megatron(world.hf, without, num_zero_experts=4)
    refused("has no head of multi-token prediction", pretrained_checkpoint=without)


def test_a_fit_brings_the_head_along_and_lets_it_keep_all_picks(world, tmp_path):
    tiny_world.fit(
        world,
        tmp_path / "fitted",
        target_zero_share=0.5,
        zero_experts_type="low_rank",
        stand_in_rank=2,
        fit_target="effect",
    )
    start = {"pretrained_checkpoint": tmp_path / "fitted", "mtp_loss_scale": 1.0}
    made = tiny_world.start(world, **start, train_iters=3, save=tmp_path / "run", lr=1e-3)
    router = made.student.chunks[0].mtp.layers[0].transformer_layer.mlp.router
    assert router.paired.threshold == KEEP_ALL and not router.paired.weight.any()
    assert not router.zero_output.constant.any()
    assert all(one.paired.weight.any() for one in decoder_routers(made.student.chunks))
    megatron_to_hf(tmp_path / "fitted", world.hf, tmp_path / "back")
    original, back = (load_file(folder / "model.safetensors") for folder in (world.hf, tmp_path / "back"))
    for key, tensor in original.items():
        assert torch.equal(back[key][: len(tensor)], tensor), key
    made.run()
    lines = tiny_world.read_metrics(tmp_path / "run")
    assert lines[0]["mtp_zero_share"] == lines[-1]["mtp_zero_share"] == 0 < lines[-1]["zero_share"]
