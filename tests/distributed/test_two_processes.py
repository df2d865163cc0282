"""Two processes against one: losses, gradient norms, weights, masks, stage 0, signals."""

import json
import re

import pytest
import tiny
import tiny_world
import torch
from cases import (
    ANSWERS,
    CHANGED,
    FLEX,
    FUSED,
    MASKED,
    MOVED,
    OTHERS,
    REPLAYED,
    RESUMED,
    SAMPLED,
    STAGE_2,
    STARVED,
    TRAIN,
    UNEVEN,
    WORLD_FLAGS,
)
from tiny import weights_of

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf

pytestmark = pytest.mark.timeout(1500)


def each(cases, names=None):
    """Parametrize over cases, slow ones marked."""
    chosen = [case for case in cases if names is None or case["name"] in names]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c["name"], marks=[pytest.mark.slow] * c["slow"]) for c in chosen]
    )


def test_no_two_rows_of_the_table_in_the_docs_are_called_alike():
    from parity_table import EVERY, head_of

    assert len(set(map(head_of, EVERY))) == len(EVERY)


def test_the_table_in_the_docs_has_a_row_of_every_run():
    from parity_table import BEGIN, END, EVERY, PAGE, head_of

    _, table = PAGE.read_text().split(BEGIN)
    table, _ = table.split(END)
    rows = [row.rsplit("|", 5)[0] + "|" for row in table.splitlines() if row.startswith("|")]
    assert rows[2:] == list(map(head_of, EVERY))


@each(TRAIN + STAGE_2)
def test_same_numbers_everywhere(assert_same_run, case):
    assert_same_run(case)


@each(RESUMED)
def test_a_run_of_one_process_goes_on_under_another_layout(assert_same_run, case):
    assert_same_run(case, first_step=3)


@each(MOVED)
def test_a_run_of_two_processes_goes_on_under_another_layout(assert_same_run, results, case):
    assert_same_run(case)
    assert all(rank["stopped"] == rank["resumed"] == 2 for rank in results(case["name"]))


@each(CHANGED)
def test_a_run_goes_on_with_the_other_kind_of_optimizer_or_says_why_not(results, case):
    for rank in results(case["name"]):
        assert re.search("--use-distributed-optimizer", rank["told"]) and "\n" not in rank["told"]


def test_weights_that_are_no_numbers_on_one_rank_end_all_ranks_at_the_same_step(runs, results):
    first, second = results("diverged ep2")
    assert first == second and first["tracker"] == "2"
    assert re.match(
        r"step 3: .* not finite: student decoder\.layers\.0\..*experts.* \(rank 1\)", first["told"]
    )
    folder = runs("diverged ep2")[1]
    assert [path.name for path in folder.glob("*iter_*")] == ["iter_0000002"]


def test_a_guard_rail_ends_all_ranks_at_the_same_step_and_leaves_the_checkpoint_of_before(runs, results):
    first, second = results("guarded ep2")
    assert first == second and first["tracker"] == "2"
    assert re.match(r"step 3: the mean zero share of the last 3 steps is 0\.\d+", first["told"])
    folder = runs("guarded ep2")[1]
    assert [path.name for path in folder.glob("*iter_*")] == ["iter_0000002"]


def test_what_rank_0_alone_cannot_write_ends_all_ranks_with_one_message(results):
    first, second = results("unwritable dp2")
    assert first == second and not first["waited"]
    assert sorted(first["told"]) == ["figures", "new folder", "stage 0"]
    for name, flag in {
        "figures": "--metrics-path",
        "new folder": "--save",
        "stage 0": "--rollout-path",
    }.items():
        assert first["told"][name].startswith(flag) and "cannot be written" in first["told"][name]


def test_all_ranks_go_back_from_a_damaged_file_to_the_same_checkpoint(results):
    first, second = results("damaged ep2")
    assert first == second and first["resumed"] == 2
    assert "iter_0000003: __1_0.distcp has changed" in first["told"]


@each(TRAIN + STAGE_2)
def test_the_teacher_does_not_move_on_any_rank(results, case):
    assert all(rank["teacher_still"] for rank in results(case["name"]))


@each([case for case in TRAIN if case["flags"].get("trainable") == "lora"])
def test_engines_get_the_merged_weights_that_an_export_has(results, runs, worlds, tmp_path, case):
    megatron_to_hf(runs(case["name"])[1], worlds[case["world"]].hf, tmp_path / "hf")
    expected = {key: tiny_world.bits_of(part) for key, part in weights_of(tmp_path / "hf").items()}
    assert all(rank["given_out"] == expected for rank in results(case["name"]))


@each(REPLAYED)
def test_every_pick_of_the_rollout_is_replayed_on_one_rank_and_stage(results, case):
    """Open picks would change no number here: both passes route alike."""
    ranks = results(case["name"])
    fixed = [sum(counts) for counts in zip(*(rank["fixed"] for rank in ranks), strict=True)]
    fed, dense = ranks[0]["fed"], "odd" in case["name"]
    assert fed > 0 and fixed == [0 if dense else fed, fed]


@each(MASKED)
def test_masked_student_is_the_teacher_on_every_layout(results, worlds, case):
    from zeda_megatron.data.packing import local_places

    ranks = results(case["name"])
    assert all(rank["equal"] for rank in ranks)
    assert [rank["count"] for rank in ranks] == ([0, 2] if "pp2" in case["name"] else [2, 2])
    world, flags = worlds[case["world"]], WORLD_FLAGS[case["world"]]
    flags = flags | {"pretrained_checkpoint": world.static, "moe_router_load_balancing_type": "none"}
    run = tiny_world.start(world, **flags)
    for i in range(2):
        row = run.feed.dataset[i]
        expected = run.teacher.hidden_states([row], 128)[0].flatten(0, 1)
        parts = [torch.tensor(rank["hidden"][i]) for rank in ranks if rank["count"]]
        if "cp2" in case["name"]:
            expected = expected[torch.cat([local_places(row.cu_seqlens, rank, 2) for rank in range(2)])]
        mine = torch.cat(parts) if case["name"][-3:] in ("tp2", "cp2") else parts[-1]
        tiny.close(mine, expected, rtol=1e-5, atol=1e-5)


@each(MASKED)
def test_every_rank_gets_all_weights_of_a_student_by_their_names_on_every_layout(results, worlds, case):
    world, flags = worlds[case["world"]], WORLD_FLAGS[case["world"]]
    alone = tiny_world.given_out(tiny_world.start(world, **flags).student)
    assert len(alone) > 40
    for rank in results(case["name"]):
        assert rank["given_out"] == alone and list(rank["given_out"]) == list(alone)


@each(STARVED)
def test_a_rank_whose_tokens_pick_only_zero_experts_or_that_gets_no_token_neither_hangs_nor_drifts(
    results, case
):
    for rank in results(case["name"]):
        assert len(rank["worst"]) == 9
        assert max(rank["worst"].values()) < 1e-4, rank["worst"]


@each(FUSED)
def test_permute_fusion_may_stay_on_over_several_ranks(results, case):
    for rank in results(case["name"]):
        assert len(rank) == 11
        for made in rank.values():
            assert max(made["worst"].values()) < 1e-4, made["worst"]
            assert made["rows"][0] == made["rows"][1] and made["counts"][0] == made["counts"][1]
            assert 0 not in made["allocated"]


@each(FLEX)
def test_the_flex_dispatcher_sends_and_counts_real_slots_only(results, case):
    ranks, copies = results(case["name"]), 2 if "etp2" in case["name"] else 1
    for situation in ranks[0]:
        pair = [rank[situation] for rank in ranks]
        for made in pair:
            assert max(made["worst"].values()) < 1e-4, (situation, made["worst"])
            assert made["rows"][0] == made["rows"][1] and made["counts"][0] == made["counts"][1], situation
        # Every slot that some rank named became one row somewhere, on every tensor-parallel rank.
        assert sum(made["named"] for made in pair) == sum(made["rows"][0] for made in pair)
        if not situation.startswith("paired head"):
            assert sum(made["named"] for made in pair) == copies * sum(pair[0]["kept"])
    assert len(ranks[0]) == 22


def test_megatrons_own_flex_dispatcher_sends_slots_that_no_token_chose(results):
    """The reason for ours: the answers are right, but all K places are sent, counted and multiplied."""
    ranks = results("stock flex")
    for routing in ("shared", "paired", "topk"):
        pair = [rank[routing] for rank in ranks]
        assert all(made["worst"]["output"] < 1e-4 for made in pair)
        assert sum(made["rows"][0] for made in pair) == 2 * 3 * 13 > sum(made["rows"][1] for made in pair)
        assert any(made["counts"][0] != made["counts"][1] for made in pair)


def test_zero_experts_with_an_output_work_through_the_flex_dispatcher(results):
    for rank in results("flex zero outputs"):
        assert rank["copy"] < 1e-4 > rank["learned"]
        assert rank["copy adds"] > 1e-2 < rank["learned adds"]


@each(ANSWERS)
def test_stage_0_answers_the_same_on_every_layout(runs, results, worlds, tmp_path, case):
    from zeda_megatron.training.stage0 import run_stage0

    results(case["name"])
    world = worlds[case["world"]]
    fields = {"stage": "0", "data_path": world.prompts, "rollout_path": tmp_path / "answers.jsonl"}
    run_stage0(tiny_world.options(world, **fields, **SAMPLED))
    files = (tmp_path / "answers.jsonl", runs(case["name"])[1] / "answers.jsonl")
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    one, two = ({line["key"]: line for line in part} for part in lines)
    assert one == two and len(lines[0]) == len(lines[1]) == 9


@pytest.mark.parametrize("name", ["interrupted ep2", "async ep2"])
def test_sigterm_to_one_rank_stops_all_at_the_same_step_and_a_resume_ends_equal(runs, results, name):
    for rank in results(name):
        assert rank == {"code": 0, "stopped": 2, "resumed": 2, "end": 0}
    folders = [runs(name)[1] for name in (name, "ep2 alltoall")]
    assert tiny_world.read_metrics(folders[0]) == tiny_world.read_metrics(folders[1])


def assert_near(lines, wanted):
    for mine, reference in zip(lines, wanted, strict=True):
        for key in ("loss", "grad_norm", "zero_share"):
            assert mine[key] == pytest.approx(reference[key], rel=1e-5), (mine["step"], key)


@each(OTHERS, ("sharded optimizer dp2", "sharded optimizer ep2"))
def test_distributed_optimizer_trains_and_resumes_like_the_plain_one(runs, results, alone, case):
    for rank in results(case["name"]):
        assert rank == {"code": 0, "stopped": 2, "resumed": 2, "end": 0}
    assert_near(tiny_world.read_metrics(runs(case["name"])[1]), alone["plain"][0])


def test_an_optimizer_in_host_memory_trains_and_resumes_like_one_beside_the_weights(runs, results):
    names = ("offloaded ep2", "bf16 sharded ep2")
    for name in names:
        for rank in results(name):
            assert rank == {"code": 0, "stopped": 2, "resumed": 2, "end": 0}
    mine, theirs = (tiny_world.read_metrics(runs(name)[1]) for name in names)
    assert_near(mine, theirs)


@each(UNEVEN)
def test_a_stage_without_moe_layers_saves_and_resumes_like_the_others(runs, results, alone, case):
    for rank in results(case["name"]):
        assert rank == {"code": 0, "stopped": 2, "resumed": 2, "end": 0}
    lines = tiny_world.read_metrics(runs(case["name"])[1])
    assert [line["zero_share_by_layer"][0] for line in lines] == [None] * 3
    if case["name"] in ("uneven plain", "uneven sharded"):
        assert_near(lines, alone["odd"][0])


@each(OTHERS, ("bf16 ep2", "bf16 ep2 flex"))
def test_bfloat16_stays_near_float32(runs, results, alone, case):
    results(case["name"])
    for mine, wanted in zip(tiny_world.read_metrics(runs(case["name"])[1]), alone["plain"][0], strict=True):
        assert mine["ce"] == pytest.approx(wanted["ce"], rel=0.02) and mine["updated"] == 1.0


@each([case for case in OTHERS if case["do"] == "wide_scope"])
def test_wide_scope_counts_the_slots_of_all_data_parallel_ranks(results, world, case):
    """Two ranks with one sequence each get the gradients of one process with both in a row."""
    ranks = results(case["name"])
    run, rows = tiny_world.run_on_pairs(world, 128, "tp_cp", **case["flags"])
    norm = run.stepper.step(rows)["grad_norm"]
    wanted = {name: p.main_grad for name, p in run.student.chunks[0].named_parameters()}
    for rank in ranks:
        assert rank["wide norm"] == pytest.approx(norm, rel=1e-5)
        assert rank["narrow norm"] != pytest.approx(norm, rel=1e-4)
        for name, gradient in rank["gradients"].items():
            tiny.close(torch.tensor(gradient), wanted[name], rtol=1e-3, atol=1e-6)


def test_generation_refuses_a_dispatcher_that_wants_equal_numbers_of_tokens(runs):
    for rank in runs("allgather answers ep2")[0]:
        assert rank["error"].startswith("UserError: --moe-token-dispatcher-type allgather")


def test_data_parallel_ranks_begin_with_equal_weights(results):
    first, second = results("initial dp2")
    assert first == second and len(set(first["experts"])) == 8


def test_experts_of_different_ranks_do_not_begin_equal(results):
    first, second = results("initial ep2")
    assert first["router"] == second["router"]
    assert len(set(first["experts"] + second["experts"])) == 8
