"""The checks behind tools/gpu_validate.sh: the project's own commands on a GPU, compared with the CPU.

Each check is a command or two and a comparison; all go on after a failure, and the exit code tells of any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from .families import glm, serving
from .kernels import CPU, flex, own_kernels, permute_fusion
from .slice import SLICES, real_slice
from .stage2 import stage2, stage2_vllm


class Validation:
    """Runs commands in a scratch folder and collects results."""

    def __init__(self, root: Path, work: Path, device: str):
        self.root, self.work, self.device = root, work, device
        self.quickstart = root / "examples" / "quickstart"
        self.results: list[dict] = []

    def check(self, name: str, run: Callable[[], dict]) -> None:
        """Run one check; a result with `ok` False, or an exception, is a failure."""
        started = time.perf_counter()
        try:
            result = {"ok": True, **run()}
        except Exception as error:  # every failure is reported, none ends the others
            result = {"ok": False, "error": f"{type(error).__name__}: {str(error)[-2000:]}"}
        result = {"name": name, **result, "seconds": round(time.perf_counter() - started, 1)}
        self.results.append(result)
        print(f"{_state(result):4} {name}: {_summary(result)}", flush=True)

    def command(self, *parts: str, env: dict[str, str] | None = None) -> str:
        """Run a command of the project; raises with the end of its output if it fails."""
        place = {**os.environ, "PYTHON": sys.executable, **(env or ({} if self.device == "cuda" else CPU))}
        done = subprocess.run(parts, capture_output=True, text=True, cwd=self.root, env=place)
        if done.returncode:
            raise RuntimeError(f"{' '.join(parts)}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return done.stdout

    def train(
        self,
        save: str,
        *flags: str,
        env: dict[str, str] | None = None,
        steps: int = 4,
        start: str = "dynamic",
        processes: int = 1,
        saves: bool = True,
    ) -> list[dict]:
        """Train on the rollouts; returns the lines of metrics.jsonl. Without `saves` no checkpoint is written."""
        folder = self.work / save
        place = ("--save", str(folder)) if saves else ("--metrics-path", str(folder / "metrics.jsonl"))
        self.command(
            "bash",
            str(self.root / "launch" / "pretrain_zeda.sh"),
            *("--config", str(self.quickstart / "stage1.yaml"), *place),
            *(
                "--pretrained-checkpoint",
                str(self.work / start),
                "--data-path",
                str(self.work / "rollouts.jsonl"),
            ),
            *("--train-iters", str(steps), "--no-progress", *flags),
            env={**(env or ({} if self.device == "cuda" else CPU)), "NPROC_PER_NODE": str(processes)},
        )
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def import_hf(self, hf: Path, name: str, *flags: str) -> None:
        """Convert a Hugging Face folder to the checkpoint `name` of the scratch folder."""
        tool = (sys.executable, str(self.root / "tools" / "checkpoint_convert.py"), "hf-to-megatron")
        self.command(*tool, "--hf", str(hf), "--out", str(self.work / name), *flags)

    # The checks, in order.

    def convert(self) -> dict:
        self.import_hf(self.quickstart / "teacher", "static", "--dtype", "fp32")
        self.import_hf(self.quickstart / "teacher", "dynamic", "--dtype", "fp32", "--num-zero-experts", "8")
        return {}

    def stage0(self) -> dict:
        lines = (self.quickstart / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)[:192]
        (self.work / "prompts.jsonl").write_text("".join(lines))
        self.command(
            "bash",
            str(self.root / "launch" / "pretrain_zeda.sh"),
            *(
                "--config",
                str(self.quickstart / "stage0.yaml"),
                "--pretrained-checkpoint",
                str(self.work / "static"),
            ),
            *("--data-path", str(self.work / "prompts.jsonl")),
            *("--rollout-path", str(self.work / "rollouts.jsonl"), "--max-new-tokens", "96"),
            env={**({} if self.device == "cuda" else CPU), "NPROC_PER_NODE": "1"},
        )
        return {"answers": len((self.work / "rollouts.jsonl").read_text().splitlines())}

    def same_losses_as_cpu(self) -> dict:
        here, there = self.train("fp32"), self.train("fp32_cpu", env=CPU)
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(here, there, strict=True))
        return {
            "ok": worst < 2e-3,
            "worst_relative_difference": worst,
            "losses": [line["loss"] for line in here],
        }

    def bf16(self) -> dict:
        lines = self.train("bf16", "--bf16", steps=12)
        reference = self.train("fp32_12", steps=12)
        worst = max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(lines, reference, strict=True)
        )
        speed = [line["tokens"] / line["seconds"] for line in lines[4:]]
        return {
            "ok": worst < 0.05,
            "worst_relative_difference_to_fp32": worst,
            "loss_tokens_per_second": sum(speed) / len(speed),
        }

    def expert_backends(self) -> dict:
        loop = self.train("loop", "--expert-backend", "loop")
        grouped = self.train("grouped", "--expert-backend", "grouped_mm")
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(loop, grouped, strict=True))
        return {"ok": worst < 2e-3, "worst_relative_difference": worst}

    def teacher_memory(self) -> dict:
        losses = {
            mode: [
                line["loss"] for line in self.train(mode, "--trainable", "router", "--teacher-memory", mode)
            ]
            for mode in ("own", "offload", "shared")
        }
        worst = max(abs(a - b) for mode in losses.values() for a, b in zip(mode, losses["own"]))
        return {"ok": worst < 1e-4, "worst_difference": worst}

    def paired(self) -> dict:
        """Fit of paired zero experts on both devices, then the same steps from one of the fits."""
        tool = (sys.executable, str(self.root / "tools" / "fit_zero_rows.py"))
        data = ("--pretrained-checkpoint", str(self.work / "static"))
        data += ("--data-path", str(self.work / "rollouts.jsonl"), "--fit-rows", "8", "--held-out-rows", "2")
        fits = {}
        for name, env in (("paired", None), ("paired_cpu", CPU)):
            self.command(*tool, *data, "--save", str(self.work / name), env=env)
            fits[name] = json.loads((self.work / name / "fit.json").read_text())
        apart = abs(fits["paired"]["threshold"] - fits["paired_cpu"]["threshold"])
        here = self.train("paired_run", start="paired")
        there = self.train("paired_run_cpu", start="paired", env=CPU)
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(here, there, strict=True))
        # A pick whose score is at the threshold may fall on either side.
        return {
            "ok": worst < 2e-2 and apart < 0.05,
            "worst_relative_difference": worst,
            "thresholds_apart": apart,
        }

    def export(self) -> dict:
        tool = (sys.executable, str(self.root / "tools" / "checkpoint_convert.py"), "megatron-to-hf")
        paths = ("--megatron", str(self.work / "fp32"), "--hf-template", str(self.quickstart / "teacher"))
        self.command(*tool, *paths, "--out", str(self.work / "hf"))
        return {}


FIRST = ("convert", "stage0")
"""What all other checks need."""


def checks(run: Validation) -> dict[str, Callable[[], dict]]:
    """All checks, in order."""
    own = (run.same_losses_as_cpu, run.bf16, run.expert_backends, run.teacher_memory, run.paired, run.export)
    found = {check.__name__: check for check in (run.convert, run.stage0, *own)}
    found |= {
        check.__name__: partial(check, run)
        for check in (stage2, stage2_vllm, permute_fusion, flex, glm, own_kernels)
    }
    found |= {recipe: partial(real_slice, run, recipe) for recipe in SLICES}
    return found | {"serving": partial(serving, run)}


def _state(result: dict) -> str:
    return "skip" if "skipped" in result else "ok" if result["ok"] else "FAIL"


def _summary(result: dict) -> str:
    shown = {
        k: f"{v:.3g}" if isinstance(v, float) else v
        for k, v in result.items()
        if k not in ("name", "ok", "bench")  # a table of its own, in the JSON
    }
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def main() -> int:
    """Run all checks, write JSON and a table. Exit code 1 if any failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="the checkout")
    parser.add_argument("--out", type=Path, help="folder for the results (default: docs/gpu in the checkout)")
    parser.add_argument("--only", help="comma-separated names of checks, besides those that all others need")
    parser.add_argument(
        "--first", action="store_true", help="the kernels' first seven minutes on a new GPU instead"
    )
    args = parser.parse_args()
    unknown = set((args.only or "").split(",")) - {"", *checks(Validation(args.root, Path(), "cpu"))}
    if unknown:
        print(f"error: --only {', '.join(sorted(unknown))}: no such check", file=sys.stderr)
        return 2
    device = os.environ.get("ZEDA_VALIDATE_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA device here (ZEDA_VALIDATE_DEVICE=cpu walks through without one)", file=sys.stderr
        )
        return 2
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory(prefix="zeda-gpu-") as work:
        run = Validation(args.root, Path(work), device)
        for title, check in checks(run).items():
            if args.only is None or title in FIRST or title in args.only.split(","):
                run.check(title, check)
    out = args.out or args.root / "docs" / "gpu"
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{date.today().isoformat()}_{name.replace(' ', '_').replace('/', '_')}"
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "checks": run.results}
    stem.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    rows = [f"| {r['name']} | {_state(r)} | {r['seconds']} | {_summary(r)} |" for r in run.results]
    table = "\n".join([f"# {name}", "", "| check | result | seconds | figures |", "|---|---|---|---|", *rows])
    stem.with_suffix(".md").write_text(table + "\n")
    print(f"written: {stem}.json, .md")
    return 0 if all(r["ok"] for r in run.results) else 1


if __name__ == "__main__":
    sys.exit(main())
