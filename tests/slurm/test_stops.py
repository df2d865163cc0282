"""One node at a time: it is drained, another job wants the same folder, the job is cancelled; nothing is lost."""

import json

import pytest
from chain import ENDLESS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]


def test_drained_contested_and_cancelled_a_run_keeps_every_step(cluster, new_chain, world):
    chain = new_chain("stops", NODES="1", ROLLOUTS=f"({world.rollouts})", STAGE1_FLAGS=f"({ENDLESS})")
    (chain.work).mkdir()
    (chain.work / "start").symlink_to(world.dynamic)
    jobs = chain.submit("--from", "stage1", "--to", "export")
    job = jobs["stage1"]
    chain.steps_beyond(1)
    node = cluster.job(job)["NodeList"]

    # Another job on the same folder is told who works there, and fails.
    second = chain.submit("--from", "stage1", "--to", "stage1")["stage1"]
    assert cluster.wait(second, 900) == "FAILED"
    log = (chain.work / "logs" / f"stage1-{second}.log").read_text()
    assert f"--save {chain.work}/stage1/.zeda.lock: process " in log and f"Slurm job {job} works here" in log

    # The node is drained: the job works on; when its limit comes (as Slurm tells it) it goes on elsewhere.
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    before = chain.metrics()[-1]["step"]
    chain.steps_beyond(before)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 400, f"requeue\n{chain.logs()}")
    cluster.until(lambda: cluster.state(job) == "RUNNING", 300, "the second start")
    saved = chain.saved()
    assert saved > before
    assert cluster.job(job)["NodeList"] != node
    chain.steps_beyond(saved)
    assert [line["step"] for line in chain.metrics()][: saved + 1] == list(range(1, saved + 2))
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    # Cancelled with a word to save first: the last step is kept, what waits is removed, the folder is free.
    cluster.run("scancel", "--signal=TERM", job)
    assert cluster.wait(job, 400) == "FAILED", chain.logs()
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert {cluster.wait(jobs[step], 200) for step in ("stage2", "export")} == {"CANCELLED"}
    steps = [line["step"] for line in chain.metrics()]
    assert steps == list(range(1, chain.saved() + 1)) and chain.saved() > saved
    assert not (chain.work / "stage1" / ".zeda.lock").exists()

    # Plain scancel: Slurm gives the job KillWait seconds.
    third = chain.submit("--from", "stage1", "--to", "stage1")["stage1"]
    kept = chain.saved()
    chain.steps_beyond(kept)
    cluster.run("scancel", third)
    assert cluster.wait(third, 400) == "CANCELLED"
    cluster.until(lambda: not cluster.run("squeue", "-h"), 200, "the end of the job")
    assert (
        chain.saved()
        == json.loads((chain.work / "stage1" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    )
    assert chain.saved() > kept
