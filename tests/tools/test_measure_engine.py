"""Figures of whole models in vLLM: every way computes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import vllm_world

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

COUNT = """
import json, sys
from functools import partial
from tools.measure import engine

options = engine.parse(["--hf", sys.argv[1], "--layers", "2", "--batches", "2", "--shares", "0", "0.5",
                        "--repeats", "1", "--new-tokens", "2", "--prompt", "8"])
contest, rows = engine.Contest(options), {}
for number, kernel in enumerate(contest.kernels):
    inner = contest.applied[number].args[0]
    def count(inner=inner, **more):
        rows[contest.now] = rows.get(contest.now, 0) + more["topk_ids"].numel()
        return inner(**more)
    contest.applied[number] = partial(contest.applied[number].func, count)
stock = contest.set
def told(way, share):
    contest.now = f"{way} {share}"
    stock(way, share)
contest.set = told
found = engine.measure(contest, options)
print(json.dumps({"rows": rows, "found": found, "table": engine.table(found, 8)}))
"""


def test_every_way_hands_the_kernel_the_slots_that_it_says(tmp_path):
    model, sizes = vllm_world.MODELS["qwen"]
    folder = tmp_path / "hf"
    model(**sizes | {"mlp_only_layers": []}).config.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | vllm_world.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    turns, layers, slots = 2, 2, (2 * 8 + 2 * 2) * tiny.TINY["num_experts_per_tok"]
    every = turns * layers * slots
    assert told["rows"]["static 0.0"] == told["rows"]["weight 0 0.5"] == told["rows"]["skip 0.0"] == every
    assert 0.3 * every < told["rows"]["skip 0.5"] < 0.7 * every
    assert {row["phase"] for row in told["found"]} == {"prefill", "decode"}
    assert all(row["ratio"] == 1 for row in told["found"] if row["way"] == "static")
    assert len(told["table"]) == 4
