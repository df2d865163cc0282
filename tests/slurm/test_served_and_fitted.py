"""A chain without training: servers answer, zero experts are fitted to the answers, what is exported can be served."""

import json
import subprocess
import sys

import pytest
from cluster import ROOT
from stage0_files import answers, stage0

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]


def test_a_chain_of_servers_and_a_fit_ends_with_a_model_to_serve(
    cluster, new_chain, world, one_process, tmp_path
):
    server = ROOT / "tests" / "served_model.py"
    chain = new_chain(
        "served",
        CONVERT_FLAGS="()",
        SERVER=f"({sys.executable} {server} {world.hf} 18431)",
        SERVER_PORT="18431",
        FIT_FLAGS="(--seq-length 128 --fit-rows 5 --held-out-rows 2)",
        STAGE0_FLAGS="(--temperature 0)",
        STAGE1="0",
    )
    jobs = chain.submit()
    assert list(jobs) == ["convert", "stage0", "fit", "export"]
    ended = {step: cluster.wait(job, 1500) for step, job in jobs.items()}
    assert set(ended.values()) == {"COMPLETED"}, chain.logs()

    own = stage0(world, tmp_path / "own.jsonl", max_new_tokens=6, temperature=0.0, seed=7)
    assert answers(chain.work / "rollouts" / "shard-0-of-1.jsonl") == answers(own)
    running = subprocess.run(["pgrep", "-f", server], capture_output=True, text=True).stdout
    assert not running, "a server outlived its job"
    config = json.loads((chain.work / "hf" / "config.json").read_text())
    assert (config["zce_types"], config["zce_rank"]) == (["low_rank"], 4)

    again = chain.submit("--from", "fit", "--to", "fit")["fit"]
    assert cluster.wait(again, 600) == "COMPLETED" and "fitted is there" in chain.logs()
