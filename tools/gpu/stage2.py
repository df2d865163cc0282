"""The GPU checks of stage 2: rollouts, scoring and update on the device."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def _flags(run) -> tuple[str, ...]:
    flags = ("--config", str(run.quickstart / "stage2.yaml"), "--teacher-load", str(run.work / "static"))
    return (*flags, "--data-path", str(run.work / "prompts.jsonl"), "--generate-batch-size", "8")


def _parts(line: dict) -> dict[str, float]:
    return {f"{part}_seconds": line[f"{part}_seconds"] for part in ("rollout", "teacher", "update")}


def stage2(run) -> dict:
    """Answers sampled with refilled slots must score in training as they did in the rollout: in fp32 to rounding, in
    bf16 on average, with routing replay too.

    Args:
        run: `gpu_validate.Validation`, after its conversion and stage 0.
    """
    gaps, lines = {}, []
    for name, more in (("fp32", ()), ("bf16", ("--bf16",)), ("replay", ("--bf16", "--routing-replay"))):
        lines = run.train(f"stage2_{name}", *_flags(run), *more, steps=3)
        gaps[name] = max(abs(line["logp_gap"]) for line in lines)
    return {"ok": gaps["fp32"] < 1e-3 and gaps["bf16"] < 0.05, "logp_gaps": gaps, **_parts(lines[-1])}


def stage2_vllm(run) -> dict:
    """The same with vLLM in the training's processes (two where there are two GPUs, or none): its engine sleeps while
    the student trains and answers with the weights that were handed over, or the gap would grow with every step."""
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    processes = 2 if run.device == "cpu" else min(2, torch.cuda.device_count())
    engine = ("--rollout-engine", "vllm")
    found, losses = {}, {}
    for name, more in (("vllm", engine), ("builtin", ())):
        lines = run.train(f"stage2_of_{name}", *_flags(run), *more, steps=3, processes=processes)
        found[f"{name}_gap"] = max(abs(line["logp_gap"]) for line in lines)
        found |= {f"{name}_{part}": seconds for part, seconds in _parts(lines[-1]).items()}
        found[f"{name}_peak_gib"] = lines[-1]["peak_memory_gib"]
        losses[name] = [line["loss"] for line in lines]
    return {"ok": found["vllm_gap"] < 1e-3, **found, "losses": losses, "processes": processes}
