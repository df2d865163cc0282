"""The whole chain on two nodes: a shard fails and is submitted again, stage 1 meets its time limit; nothing is lost."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from chain import ENDLESS
from cluster import ROOT
from safetensors.torch import load_file
from stage0_files import answers, stage0

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def walked(cluster, new_chain, world):
    """The chain, walked to its end; what was seen on the way."""
    chain = new_chain(
        "walked",
        SHARDS="2",
        NODES="2",
        HELDOUT=str(world.heldout),
        STAGE1_FLAGS=f"({ENDLESS})",
        SAVE_SECONDS="300",
    )
    broken = chain.work / "rollouts" / "shard-1-of-2.jsonl"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"a line": "of something else"}\n')
    first = chain.submit()
    failed = {step: cluster.wait(job, 900) for step, job in first.items() if step != "stage0"}
    failed["stage0"] = cluster.states_of_array(first["stage0"])
    first_logs = chain.logs()

    broken.unlink()
    second = chain.submit("--from", "stage0", "--shards", "1")
    chain.steps_beyond(2)
    job = second["stage1"]
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={cluster.minutes_run(job) + 4}")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 400, f"requeue\n{chain.logs()}")
    cluster.until(lambda: chain.saved() > 0, 60, "the save")
    stopped = chain.saved()
    chain.write(STAGE1_FLAGS=f"(--train-iters {stopped + 4})")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=600")
    ended = {step: cluster.wait(one, 1500) for step, one in second.items() if step != "stage0"}
    nodes = cluster.job(job)["NumNodes"]
    return SimpleNamespace(
        chain=chain,
        failed=failed,
        ended=ended,
        stopped=stopped,
        first_logs=first_logs,
        nodes=nodes,
        logs=chain.logs(),
    )


@pytest.fixture(scope="module")
def straight(walked, world, tmp_path_factory):
    """Stages 1 and 2 on the same answers in two processes without Slurm and without a stop."""
    folder, chain = tmp_path_factory.mktemp("straight"), walked.chain
    environment = os.environ | {"NPROC_PER_NODE": "2", "PATH": chain.cluster.environment["PATH"]}
    start, answers = (
        chain.work / "start",
        [chain.work / "rollouts" / f"shard-{i}-of-2.jsonl" for i in range(2)],
    )
    iters = ["--train-iters", walked.stopped + 4]
    for stage, flags in (
        ("stage1", ["--pretrained-checkpoint", start, "--data-path", *answers, *iters]),
        (
            "stage2",
            [
                "--pretrained-checkpoint",
                folder / "stage1",
                "--teacher-load",
                start,
                "--data-path",
                world.prompts,
            ],
        ),
    ):
        command = [
            "bash",
            ROOT / "launch" / "pretrain_zeda.sh",
            "--config",
            chain.folder / "recipe" / f"{stage}.yaml",
        ]
        command += [*flags, "--save", folder / stage, "--no-progress"]
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr
    return folder


def test_one_failing_shard_fails_alone_and_what_waits_for_it_is_removed(walked):
    assert sorted(walked.failed["stage0"]) == ["COMPLETED", "FAILED"]
    later = {walked.failed[step] for step in ("stage1", "stage2", "export", "evaluate")}
    assert later == {"CANCELLED"} and walked.failed["convert"] == "COMPLETED"
    assert "shard-1-of-2.jsonl exists but shard-1-of-2.jsonl.meta.json does not" in walked.first_logs


def test_after_the_shard_was_submitted_again_the_chain_reaches_its_end(walked):
    assert set(walked.ended.values()) == {"COMPLETED"}, walked.logs
    assert walked.nodes == "2"
    measured = json.loads((walked.chain.work / "metrics.json").read_text())
    assert measured["eval_zero_share"] > 0 and measured["eval_kl"] > 0


def test_the_shards_hold_the_answers_of_one_job(walked, world, one_process, tmp_path):
    shards = [walked.chain.work / "rollouts" / f"shard-{i}-of-2.jsonl" for i in range(2)]
    whole = stage0(world, tmp_path / "whole.jsonl", max_new_tokens=6, generate_batch_size=4, seed=7)
    assert answers(*shards) == answers(whole)


def test_the_time_limit_saves_and_the_job_goes_on_from_there(walked):
    assert "requeued because of the time limit; saved: " in walked.logs
    assert f"start 2, on node[1-2]; saved so far: {walked.stopped}" in walked.logs
    steps = [line["step"] for line in walked.chain.metrics()]
    assert steps == list(range(1, walked.stopped + 5))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_step_is_that_of_an_uninterrupted_run(walked, straight, stage):
    from tiny_world import read_metrics

    assert read_metrics(walked.chain.work / stage) == read_metrics(straight / stage)


def exported(checkpoint, world, folder) -> dict[str, torch.Tensor]:
    from zeda_megatron.convert.megatron_to_hf import megatron_to_hf

    megatron_to_hf(checkpoint, world.hf, folder)
    return load_file(folder / "model.safetensors")


def assert_bit_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_interrupted_stage_1_ends_with_the_weights_of_an_uninterrupted_run(walked, straight, world, tmp_path):
    expected = exported(straight / "stage1", world, tmp_path / "expected")
    assert_bit_equal(exported(walked.chain.work / "stage1", world, tmp_path / "got"), expected)


def test_the_interrupted_chain_exports_the_weights_of_an_uninterrupted_one(walked, straight, world, tmp_path):
    expected = exported(straight / "stage2", world, tmp_path / "expected")
    assert_bit_equal(load_file(walked.chain.work / "hf" / "model.safetensors"), expected)
