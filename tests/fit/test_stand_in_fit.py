"""Fitting stand-ins as a user does, against a dense reduced-rank regression on experts run by hand."""

import pytest
import tiny
import torch
from ridge_reference import dense_low_rank
from test_fit import fit, rows_of

from zeda_megatron.data.rows import load_rows
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.fit.stand_in_fit import pass_plan
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.router_dials import set_dials, set_thresholds

pytestmark = pytest.mark.usefixtures("one_process")
EFFECT = {"fit_target": "effect", "zero_experts_type": "low_rank", "stand_in_rank": 3}


@pytest.fixture(scope="module")
def awake(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "awake"
    return fit(world, out, paired_head="mlp", paired_head_width=6, **EFFECT), out


@pytest.fixture(scope="module")
def constant(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "constant"
    return fit(world, out, fit_target="effect", zero_experts_type="constant"), out


def routers(folder):
    return [layer.mlp.router for layer in load_model(str(folder)).chunk.decoder.layers]


def skipped_rows(world, folder, report, number):
    """Per expert (x, E(x), weight) of the picks of the fit's rows that a layer skips, everything run by hand."""
    static, seen = load_model(str(world.static)), []
    layer = static.chunk.decoder.layers[number].mlp
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 32)))
    rows = load_rows(str(world.rollouts), static.tokenizer, 128, 5)
    with torch.no_grad():
        for row in rows:
            forward_model(static.chunk, row)
        x_TH = torch.cat(seen)[torch.cat([~row.padding_mask[0] for row in rows])]
        best = (x_TH @ layer.router.weight.t()).softmax(-1).topk(3)
        weights = best.values / best.values.sum(1, keepdim=True)
        head = routers(folder)[number].paired
        below = report["stand_ins_fitted_below"]
        for e, expert in enumerate(tiny.expert_weights(layer)):
            mine_T, w_T = (best.indices == e).any(1), (weights * (best.indices == e)).sum(1)
            score_T = w_T.log() + head.predict(x_TH, e)
            x, w = x_TH[mine_T & (score_T < below[0])], w_T[mine_T & (score_T < below[0])]
            yield x, tiny.dense_experts(x, torch.ones(len(x), 1), [expert]), w


@pytest.mark.parametrize("number", [0, 1])
def test_stand_ins_are_the_low_rank_regression_to_experts_run_by_hand_on_the_picks_that_are_skipped(
    world, awake, number
):
    report, out = awake
    answers = routers(out)[number].zero_output
    for e, (x, y, w) in enumerate(skipped_rows(world, out, report, number)):
        assert len(x) > 5
        wanted, constant = dense_low_rank(x, y, w.square(), 1.0, 3)
        tiny.close((answers.up[e] @ answers.down[e]).double(), wanted, atol=2e-4, rtol=1e-2)
        tiny.close(answers.constant[e].double(), constant, atol=2e-4, rtol=1e-2)


def test_constants_are_the_weighted_means_of_the_picks_that_are_skipped(world, constant):
    report, out = constant
    answers = routers(out)[1].zero_output
    assert answers.down is None
    for e, (_x, y, w) in enumerate(skipped_rows(world, out, report, 1)):
        tiny.close(
            answers.constant[e], (w.square()[:, None] * y).sum(0) / w.square().sum(), atol=1e-5, rtol=1e-4
        )


def test_they_explain_a_part_of_held_out_text_and_bring_the_student_nearer(world, awake, constant):
    for layer, explained in awake[0]["stand_in_explains_by_layer"].items():
        assert 0 < constant[0]["stand_in_explains_by_layer"][layer] < explained < 1
    assert awake[0]["zero_share"] == pytest.approx(0.5, abs=0.02)
    static, student = load_model(str(world.static)).chunk, load_model(str(awake[1])).chunk
    row = rows_of(world, 1)[0]
    with torch.no_grad():
        wanted = forward_model(static, row)
        near = (forward_model(student, row) - wanted).norm()
        for layer in student.decoder.layers:
            for part in layer.mlp.router.zero_output.parameters():
                part.zero_()
        silent = (forward_model(student, row) - wanted).norm()
        set_dials(student, zero_mask=True)
        assert torch.equal(forward_model(student, row), wanted)
        set_dials(student, zero_mask=False)
        set_thresholds(student, [-1e4])
        assert torch.equal(forward_model(student, row), wanted)
    assert near < 0.9 * silent


def test_what_does_not_fit_into_memory_is_fitted_in_further_passes(world, awake, tmp_path):
    fit(world, tmp_path / "one", paired_head="mlp", paired_head_width=6, max_memory_gb=1e-9, **EFFECT)
    for mine, wanted in zip(routers(tmp_path / "one"), routers(awake[1])):
        for name, part in mine.zero_output.named_parameters():
            assert torch.equal(part, wanted.zero_output.get_parameter(name)), name


@pytest.mark.parametrize("room", [1, 3, 8, 11, 100])
def test_every_expert_of_every_layer_is_in_one_pass_that_has_room(room):
    plan = list(pass_plan([1, 2, 5], 8, room))
    assert all(sum(last - first for first, last in wanted.values()) <= room for wanted in plan)
    found = [(n, e) for wanted in plan for n, (first, last) in wanted.items() for e in range(first, last)]
    assert found == [(n, e) for n in (1, 2, 5) for e in range(8)]


def test_bfloat16_stand_ins_stay_near_single_precision(world, awake, tmp_path):
    report = fit(world, tmp_path / "bf16", paired_head="mlp", paired_head_width=6, bf16=True, **EFFECT)
    assert report["zero_share"] == pytest.approx(0.5, abs=0.03)
    for layer, explained in awake[0]["stand_in_explains_by_layer"].items():
        assert report["stand_in_explains_by_layer"][layer] == pytest.approx(explained, abs=0.1)
    up = routers(tmp_path / "bf16")[0].zero_output.up
    assert torch.equal(up, up.bfloat16().float())
