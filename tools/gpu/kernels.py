"""Checks of tools/gpu_validate.sh for dispatch kernels that not every machine has: skipped, with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import torch

from zeda_megatron.ops.expert_kernels import why_not

CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a command that is to run on the CPU."""


def worst_difference(lines: list[dict], reference: list[dict]) -> float:
    """Largest relative difference of the losses of two runs."""
    pairs = zip(lines, reference, strict=True)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


def permute_fusion(run) -> dict:
    """Transformer Engine's fused permutation against Megatron's plain one. run: a `gpu_validate.Validation`."""
    if run.device != "cuda":
        return {"skipped": "needs a GPU"}
    if find_spec("transformer_engine") is None:
        return {"skipped": "Transformer Engine is not installed"}
    worst = worst_difference(run.train("fused_permute", "--moe-permute-fusion"), run.train("plain_permute"))
    return {"ok": worst < 2e-3, "worst_relative_difference": worst}


def flex(run) -> dict:
    """The flex dispatcher on DeepEP against all-to-all, on two GPUs."""
    if run.device != "cuda":
        return {"skipped": "needs GPUs"}
    if find_spec("deep_ep") is None:
        return {"skipped": "deep_ep is not installed"}
    if torch.cuda.device_count() < 2:
        return {"skipped": "DeepEP needs two GPUs, one is here"}
    layout = ("--bf16", "--expert-model-parallel-size", "2")
    dispatchers = [
        run.train(kind, *layout, "--moe-token-dispatcher-type", kind, processes=2)
        for kind in ("flex", "alltoall")
    ]
    worst = worst_difference(*dispatchers)
    return {"ok": worst < 2e-2, "worst_relative_difference": worst}


def own_kernels(run) -> dict:
    """This project's kernels: their tests, the same training as on torch's grouped GEMM, a short benchmark."""
    if run.device != "cuda":
        return {"skipped": "needs a GPU"}
    reason = why_not(torch.device("cuda", 0), torch.bfloat16)
    if reason:
        return {"skipped": reason}
    tests = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        str(run.root / "tests" / "gpu"),
    )
    done = subprocess.run(tests, capture_output=True, text=True, cwd=run.root)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    }
    worst = worst_difference(
        run.train("own_kernels", "--bf16", "--expert-backend", "kernels"),
        run.train("no_own_kernels", "--bf16", "--expert-backend", "grouped_mm"),
    )
    file = run.work / "kernels_bench.json"
    run.command(sys.executable, str(run.root / "kernels" / "bench.py"), "--quick", "--json", str(file))
    return {
        "ok": done.returncode == 0 and worst < 2e-2,
        "tests": counts,
        "worst_relative_difference": worst,
        "failures": [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:20],
        "bench": json.loads(file.read_text()),
    }
