"""Folders of benchmark runs, written by hand: what `evaluation report` reads."""

from __future__ import annotations

import json
from pathlib import Path

import tiny


def write_run(
    folder: Path,
    arm: str,
    benchmarks: dict[str, dict[str, list[bool]]],
    share: float | None,
    zero_experts: bool = False,
    experts: int = 8,
) -> Path:
    """A run that answered each question of each benchmark with these verdicts: 10 tokens of prompt and answer, 0.5 s.

    Its config is that of the tiny Qwen3-MoE, with `experts` experts and, if asked, zero experts.
    """
    config = {**tiny.TINY, "model_type": "qwen3_moe", "num_experts": experts, "decoder_sparse_step": 1}
    config |= {"mlp_only_layers": []}
    if zero_experts:
        config |= {"zce_nums": [4], "zce_types": ["zero"], "use_zce_mask": False}
    identity = {"engine": "transformers", "arm": arm, "fingerprint": "f", "settings": {}, "seed": 0}
    about = {
        "identity": identity,
        "model": f"models/{arm}",
        "head_flops": 0.0,
        "parallel": 2,
        "environment": {"torch": "2.13"},
        "config": config,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    for name, verdicts in benchmarks.items():
        here = folder / name
        here.mkdir()
        samples = len(next(iter(verdicts.values())))
        identity = {"benchmark": name, "questions": "d", "count": len(verdicts), "samples": samples}
        kinds = {uid: "even" if place % 2 == 0 else "odd" for place, uid in enumerate(verdicts)}
        facts = {"identity": identity, "title": name.upper(), "uids": list(verdicts), "kinds": kinds}
        (here / "benchmark.json").write_text(json.dumps(facts))
        answers, judged = [], []
        for uid, right in verdicts.items():
            for sample, one in enumerate(right):
                which = {"uid": uid, "sample": sample}
                answer = {
                    "text": "x",
                    "tokens": 10,
                    "prompt_tokens": 10,
                    "finish": "stop",
                    "zero_share": share,
                }
                answers.append({**which, **answer, "seconds": 0.5})
                judged.append({**which, "right": one, "note": ""})
        for file, lines in (("answers.jsonl", answers), ("verdicts.jsonl", judged)):
            (here / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
