"""The GPU check of stage 2: rollouts, scoring and update on the device."""

from __future__ import annotations


def stage2(run) -> dict:
    """Answers sampled with refilled slots must score in training as they did in the rollout: in fp32 to rounding, in
    bf16 on average, with routing replay too.

    Args:
        run: `gpu_validate.Validation`, after its conversion and stage 0.
    """
    flags = ("--config", str(run.quickstart / "stage2.yaml"), "--teacher-load", str(run.work / "static"))
    flags += ("--data-path", str(run.work / "prompts.jsonl"), "--generate-batch-size", "8")
    gaps, lines = {}, []
    for name, more in (("fp32", ()), ("bf16", ("--bf16",)), ("replay", ("--bf16", "--routing-replay"))):
        lines = run.train(f"stage2_{name}", *flags, *more, steps=3)
        gaps[name] = max(abs(line["logp_gap"]) for line in lines)
    parts = {f"{part}_seconds": lines[-1][f"{part}_seconds"] for part in ("rollout", "teacher", "update")}
    return {"ok": gaps["fp32"] < 1e-3 and gaps["bf16"] < 0.05, "logp_gaps": gaps, **parts}
