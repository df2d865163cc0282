"""GPU checks of more architectures: GLM's training beside the CPU's, the speed of serving each real layer."""

from __future__ import annotations

import json
import sys

from .kernels import CPU, worst_difference
from .slice import SLICES


def glm(run) -> dict:
    """The quickstart's GLM teacher: the same steps here and on the CPU. run: a `gpu_validate.Validation`."""
    run.import_hf(run.quickstart / "glm" / "teacher", "glm", "--dtype", "fp32", "--num-zero-experts", "8")
    here = run.train("glm_here", start="glm", steps=3, saves=False)
    there = run.train("glm_cpu", start="glm", steps=3, saves=False, env=CPU)
    worst = worst_difference(here, there)
    return {"ok": worst < 2e-3, "worst_relative_difference": worst}


def serving(run) -> dict:
    """Prefill and decode of real layers at a forced zero share, in transformers; on the CPU of tiny ones."""
    ratios, tables = {}, {}
    for recipe in SLICES:
        file = run.work / f"serving_{recipe}.json"
        real = run.device == "cuda"
        folder = run.root / "examples" / recipe if real else run.work / recipe / "hf"
        size = ("--prefill", "64", "--context", "16")
        if real:
            size = ("--layers", "2", "--prefill", "2048", "--prefill-batches", "1", "8")
        command = (sys.executable, "-m", "tools.measure.serving", "--hf", str(folder))
        run.command(*command, *size, "--device", run.device, "--json", str(file))
        tables[recipe] = json.loads(file.read_text())
        for row in tables[recipe]:
            if row["way"] == "skip" and row["share"] == 0.5:
                name = f"{recipe}_{row['phase']}_{row['batch']}x{row['tokens']}"
                ratios[f"{name}_half_to_static"] = row["model_ratio"]
    return {**ratios, "bench": tables}
