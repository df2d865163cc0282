"""What the teacher costs: step time and peak memory of its modes beside plain fine-tuning, measured in one run.

python -m tools.measure.teacher_cost

Times: every variant steps in turn on the same rows, so a busy machine slows all alike; CPU time on the CPU. Memory:
a process per variant, peak of resident memory above what the interpreter and the libraries take (on the GPU: of
allocated memory).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.text_table import markdown_table

from .loss_memory import resident

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "examples" / "quickstart" / "teacher"
ROWS = ROOT / "examples" / "quickstart" / "data" / "heldout.jsonl"
VARIANTS = {
    "plain, static model": ("static", ["--stage", "pretrain", "--moe-router-load-balancing-type", "none"]),
    "plain, zero experts": ("dynamic", ["--stage", "pretrain"]),
    "own, ahead": ("dynamic", []),
    "own, alongside": ("dynamic", ["--teacher-schedule", "alongside"]),
    "offload, ahead": ("dynamic", ["--teacher-memory", "offload"]),
    "routers only, no teacher": ("dynamic", ["--stage", "pretrain", "--trainable", "router"]),
    "routers only, own, ahead": ("dynamic", ["--trainable", "router"]),
    "routers only, shared, ahead": ("dynamic", ["--trainable", "router", "--teacher-memory", "shared"]),
    "routers and norms, shared": ("dynamic", ["--trainable", "router+norms", "--teacher-memory", "shared"]),
    "adapters, shared": ("dynamic", ["--trainable", "lora", "--teacher-memory", "shared"]),
}
"""Name -> checkpoint it starts from and its flags."""
BASE = {"routers only": "routers only, no teacher"}
"""First words of a variant -> what it is compared with; the others with fine-tuning of the static model."""
FULL = "own, ahead"
"""All weights train beside a teacher: what few weights that train are compared with, too."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf", type=Path, default=TEACHER, help="HF folder of the static model")
    parser.add_argument("--rows", type=Path, default=ROWS, help="conversations (jsonl) to train on")
    parser.add_argument("--num-zero-experts", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=7, help="steps per variant; the first is not counted")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for flag in ("seq_length", "global_batch_size", "num_zero_experts"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    if options.steps < 2:
        raise UserError(f"--steps {options.steps} must be at least 2: the first is not counted")
    return options


def build(options: argparse.Namespace, checkpoints: str, name: str):
    """A `TrainingRun` of one variant, in this process. `checkpoints`: folder of `static` and `dynamic`."""
    from zeda_megatron.config.arguments import parse as parse_flags
    from zeda_megatron.config.options import GROUPS, Options
    from zeda_megatron.training.loop import TrainingRun

    start, flags = VARIANTS[name]
    argv = [
        "--pretrained-checkpoint",
        f"{checkpoints}/{start}",
        "--data-path",
        str(options.rows),
        "--no-progress",
    ]
    argv += ["--seq-length", str(options.seq_length), "--global-batch-size", str(options.global_batch_size)]
    argv += ["--lr", "1e-4", "--overlong", "truncate", *flags]
    made = Options(**parse_flags(argv, GROUPS))
    made.validate()
    return TrainingRun(made)


def times(options: argparse.Namespace, checkpoints: str) -> dict[str, float]:
    """Median seconds of a step per variant, the variants taking turns."""
    import torch

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    runs = {name: build(options, checkpoints, name) for name in VARIANTS}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(options.steps):
        for name, run in runs.items():
            rows = run.feed.rows_of_rank(
                range(step * options.global_batch_size, (step + 1) * options.global_batch_size)
            )
            begun = clock()
            run.stepper.step(rows)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(clock() - begun)
    return {name: statistics.median(values[1:]) for name, values in spent.items()}


def peak(options: argparse.Namespace, checkpoints: str, name: str) -> int:
    """Bytes that building a variant and two steps need at their peak, in this process."""
    import torch

    from zeda_megatron.training import loop  # noqa: F401  (libraries are loaded before memory is counted)

    before = resident("VmRSS")
    run = build(options, checkpoints, name)
    for step in range(2):
        first = step * options.global_batch_size
        run.stepper.step(run.feed.rows_of_rank(range(first, first + options.global_batch_size)))
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before


def peak_apart(options: argparse.Namespace, checkpoints: str, name: str) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--measure", checkpoints, name, "--rows", options.rows]
    command += ["--seq-length", options.seq_length, "--global-batch-size", options.global_batch_size]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"measuring {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def main() -> int:
    """Entry point: prints a table, writes --json."""
    options = parse()
    from zeda_megatron.runtime import cpu, process_groups

    cpu.install()
    with process_groups.started():
        if options.measure:
            print(peak(options, *options.measure))
            return 0
        from zeda_megatron.convert.hf_to_megatron import hf_to_megatron

        with tempfile.TemporaryDirectory() as folder:
            hf_to_megatron(options.hf, f"{folder}/static", dtype="fp32")
            hf_to_megatron(
                options.hf, f"{folder}/dynamic", num_zero_experts=options.num_zero_experts, dtype="fp32"
            )
            seconds = times(options, folder)
            memory = {name: peak_apart(options, folder, name) for name in VARIANTS}
    table = []
    for name in VARIANTS:
        base = next((b for words, b in BASE.items() if name.startswith(words)), next(iter(VARIANTS)))
        table.append(
            {
                "variant": name,
                "seconds": seconds[name],
                "times_plain": seconds[name] / seconds[base],
                "peak_mib": memory[name] / 2**20,
                "above_plain_mib": (memory[name] - memory[base]) / 2**20,
                "times_full": seconds[name] / seconds[FULL],
                "memory_of_full": memory[name] / memory[FULL],
            }
        )
    rows = [
        [
            row["variant"],
            f"{row['seconds']:.2f} s",
            f"{row['times_plain']:.2f}",
            f"{row['peak_mib']:.0f} MiB",
            f"{row['above_plain_mib']:+.0f} MiB",
            f"{row['times_full']:.2f}",
            f"{row['memory_of_full']:.2f}",
        ]
        for row in table
    ]
    head = ["teacher", "step", "× plain", "peak memory", "above plain", "step × full", "memory × full"]
    print("\n".join(markdown_table(head, rows)))
    if options.json:
        write_result("--json", options.json, json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_worker(main)
