"""A chain of jobs on the tiny world: its recipe and settings, submitting it, watching it."""

from __future__ import annotations

import json
from pathlib import Path

from cluster import ROOT, Cluster
from tiny_world import World

SUBMIT = ROOT / "launch" / "slurm" / "submit_chain.sh"
COMMON = "lr: 0.01\nlr_decay_style: constant\nlr_warmup_fraction: 0.0\nloss_chunk_tokens: 32\nseed: 7\n"
"""With a constant rate a step is the same however many follow."""
RECIPE = {
    "stage0.yaml": "stage: 0\nmax_new_tokens: 6\ngenerate_batch_size: 4\nseed: 7\n",
    "stage1.yaml": COMMON + "stage: 1\nseq_length: 128\nglobal_batch_size: 2\n",
    "stage2.yaml": COMMON
    + "stage: 2\nseq_length: 128\nglobal_batch_size: 4\nmax_new_tokens: 6\ntrain_iters: 3\n",
}
ENDLESS = "--train-iters 1000000"


class Chain:
    """One work folder, its settings file, and the jobs submitted for it."""

    def __init__(self, cluster: Cluster, world: World, folder: Path, settings: dict[str, str]):
        self.cluster, self.folder, self.work = cluster, folder, folder / "work"
        self.settings = {
            "HF": str(world.hf),
            "WORK": str(self.work),
            "RECIPE": str(folder / "recipe"),
            "PROMPTS": str(world.prompts),
            "CONVERT_FLAGS": "(--num-zero-experts 4)",
            "GPUS_PER_NODE": "0",
            "TASKS_PER_NODE": "1",
            "WATCH_SECONDS": "2",
            **settings,
        }
        (folder / "recipe").mkdir()
        for name, text in RECIPE.items():
            (folder / "recipe" / name).write_text(text)
        self.write()

    def write(self, **changes: str) -> None:
        """Write the settings file, with changes."""
        self.settings |= changes
        lines = [f"{name}={value}" for name, value in self.settings.items()]
        # All nodes are this machine, whose name need not resolve.
        (self.folder / "settings.sh").write_text("\n".join([*lines, "export GLOO_SOCKET_IFNAME=lo", ""]))

    def submit(self, *flags: str) -> dict[str, str]:
        """Submit; job id by step."""
        said = self.cluster.run("bash", SUBMIT, self.folder / "settings.sh", *flags)
        return dict(line.split() for line in said.splitlines())

    def metrics(self, stage: str = "stage1") -> list[dict]:
        """Lines that a stage has logged so far."""
        file = self.work / stage / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [json.loads(line) for line in lines]

    def saved(self, stage: str = "stage1") -> int:
        """Step of the newest checkpoint; 0 without."""
        tracker = self.work / stage / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.is_file() else 0

    def steps_beyond(self, step: int, seconds: float = 900, stage: str = "stage1") -> None:
        """Wait until a stage has made more steps than that."""

        def far_enough() -> bool:
            lines = self.metrics(stage)
            return bool(lines) and lines[-1]["step"] > step

        self.cluster.until(far_enough, seconds, f"step {step + 1} of {stage}:\n{self.logs()}")

    def logs(self) -> str:
        """The end of every log."""
        return "".join(
            f"--- {f.name}\n{f.read_text()[-3000:]}" for f in sorted((self.work / "logs").glob("*.log"))
        )
