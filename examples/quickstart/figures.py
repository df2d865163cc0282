"""What the quickstart reads from what it has made: histories of arms, the spread over seeds, the environment."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from statistics import mean, median, stdev

from arm import Arm


def history_of(out: Path, arm: Arm) -> list[dict]:
    """Lines of metrics.jsonl of all its training, what it started from first."""
    names = [arm.start.removeprefix("arms/")] if arm.waits else []
    names += [arm.name] if arm.train else []
    lines = []
    for name in names:
        path = out / "arms" / name / "metrics.jsonl"
        before = lines[-1] if lines else {"step": 0, "consumed_tokens": 0}
        for line in path.read_text().splitlines() if path.is_file() else ():
            made = json.loads(line)
            for key in ("step", "consumed_tokens"):
                made[key] += before[key]
            lines.append(made)
    return lines


def cost_of(lines: list[dict]) -> dict:
    """What an arm's last training took: parameters that trained, median time of a step, most memory of a process."""
    if not lines:
        return {}
    return {
        "trained_parameters": lines[-1].get("trained_parameters"),  # older runs do not tell
        "step_seconds": median(line["seconds"] for line in lines),
        "peak_memory_gib": lines[-1].get("peak_memory_gib"),
    }


def add_spread(arms: dict[str, dict]) -> None:
    """Fold the seeds of an arm into one entry: the first seed's figures, `runs` with each seed's, `*_mean`, `*_std`."""
    keys = ("kl_to_teacher", "ce", "exact_match", "zero_share")
    for name in [name for name in arms if "_seed" not in name]:
        others = [other for other in arms if other.startswith(f"{name}_seed")]
        if not others:
            continue
        first = arms[name]
        runs = [first, *map(arms.pop, others)]
        if all("own_answers" in run for run in runs):
            for run in runs:
                run["own_reverse_kl"] = run["own_answers"]["reverse_kl"]
        wanted = [*keys, *(["own_reverse_kl"] if "own_reverse_kl" in first else [])]
        first["runs"] = [{key: run[key] for key in wanted} for run in runs]
        first["seeds"] = len(runs)
        for key in wanted:
            values = [run[key] for run in first["runs"]]
            first[f"{key}_mean"], first[f"{key}_std"] = mean(values), stdev(values)


def environment() -> dict:
    from importlib.metadata import version

    import torch

    packages = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"python": platform.python_version(), **packages, "device": device}
