"""Bytes that expert-parallel ranks exchange in one training step, by zero share. Starts its own processes.

A step is forward and backward of the student and the optimizer, on random tokens; nothing is simulated, the
messages are those of the step (`evaluation.traffic`). Zero shares are routed: by paired zero experts with a
calibrated threshold, or by a pick rule that keeps the heaviest picks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zeda_megatron.config.arguments import check_choices, parse
from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.text_table import markdown_table

ROUTINGS = ("paired", "topk")
GEOMETRY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""The model of this measurement where no other is named."""


@dataclass(frozen=True)
class ByteOptions:
    """What is measured."""

    zero_shares: list[str] = ("0", "0.5", "0.75")
    """Shares of the picks that go to zero experts; every ratio is against the first."""

    routing: Literal[ROUTINGS] = "paired"
    """paired: a threshold, calibrated on the step's own tokens. topk: every token keeps its heaviest picks."""

    hf_config: str | None = None
    """HF folder whose geometry the model takes, with random weights. Default: a small one, 32 experts, top-8."""

    pretrained_checkpoint: str | None = None
    """Megatron checkpoint with real weights instead."""

    seq_length: int = 512
    """Tokens of a row; every process steps on one row per micro-batch."""

    micro_batches: int = 2
    """Rows per process."""

    expert_model_parallel_size: int = 2
    """Processes, which share the experts among them."""

    json: str | None = None
    """Also write the figures to this file."""

    def validate(self) -> None:
        """Raise `UserError` naming the flag."""
        check_choices(self)
        for flag, value in (("--seq-length", self.seq_length), ("--micro-batches", self.micro_batches)):
            if value < 1:
                raise UserError(f"{flag} {value} must be at least 1")
        if self.expert_model_parallel_size < 2:
            raise UserError("--expert-model-parallel-size must be at least 2: one process sends nothing")
        for flag, folder in (
            ("--hf-config", self.hf_config),
            ("--pretrained-checkpoint", self.pretrained_checkpoint),
        ):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{flag} {folder}: no such folder")
        if not self.shares or not all(0 <= share < 1 for share in self.shares):
            raise UserError(f"--zero-shares {' '.join(self.zero_shares)}: give numbers from 0 to below 1")

    @property
    def shares(self) -> list[float]:
        """`zero_shares` as numbers. Raises `UserError`."""
        try:
            return [float(share) for share in self.zero_shares]
        except ValueError:
            raise UserError(
                f"--zero-shares {' '.join(self.zero_shares)}: give numbers from 0 to below 1"
            ) from None


COLUMNS = {
    "zero share": lambda row: row["arm"],
    "routed": lambda row: f"{row['zero_share']:.1%}",
    "real slots": lambda row: f"{row['real_slots']:,}",
    "rows dispatched": lambda row: f"{row['rows_there_and_back'] // 2:,}",
    "rows fwd MiB": lambda row: _mib(row["rows_forward"]),
    "rows bwd MiB": lambda row: _mib(row["rows_backward"]),
    "weights MiB": lambda row: _mib(row["probabilities"]),
    "counts KiB": lambda row: f"{row['gathers'] / 1024:.1f}",
    "all MiB": lambda row: _mib(row["bytes"]),
    "ratio": lambda row: f"{row['bytes_ratio']:.3f}",
    "left its rank, MiB": lambda row: _mib(row["sent"]),
    "ratio ": lambda row: f"{row['sent_ratio']:.3f}",
    "teacher MiB": lambda row: _mib(row["teacher_bytes"]),
}


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def table(rows: list[dict]) -> str:
    """The figures as Markdown."""
    return "\n".join(markdown_table([*COLUMNS], [[show(row) for show in COLUMNS.values()] for row in rows]))


def work(options: ByteOptions) -> int:
    """One of the processes: measure; rank 0 prints the table and writes the file."""
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.runtime import cpu
    from zeda_megatron.runtime.process_groups import initialize

    cpu.install()
    import torch

    from .dispatch_step import measure_all

    torch.set_num_threads(1)
    initialize(ParallelConfig(expert_model_parallel_size=options.expert_model_parallel_size))
    with tempfile.TemporaryDirectory() as folder:
        geometry = options.hf_config
        if geometry is None and options.pretrained_checkpoint is None:
            geometry = folder
            (Path(folder) / "config.json").write_text(json.dumps(GEOMETRY))
        rows = measure_all(options, geometry)
    if torch.distributed.get_rank() == 0:
        name = (
            options.hf_config or f"{GEOMETRY['num_experts']} experts, top-{GEOMETRY['num_experts_per_tok']}"
        )
        weights = options.pretrained_checkpoint or f"random weights, {name}"
        size = f"{options.micro_batches} x {options.seq_length} tokens on each of "
        size += f"{options.expert_model_parallel_size} expert-parallel processes"
        about = f"One step, {size}, {options.routing} routing, {weights}; all processes together"
        print(f"{about}\n\n{table(rows)}", flush=True)
        if options.json:
            write_result("--json", options.json, json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    torch.distributed.barrier()
    return 0


def launch(options: ByteOptions, argv: list[str]) -> int:
    """Start the processes on this machine's CPU and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "1"]
    command += ["--nproc-per-node", str(options.expert_model_parallel_size)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", __spec__.name, *argv]
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=os.environ | quiet | {"PYTHONPATH": path}).returncode


def main(argv: list[str] | None = None) -> int:
    """Entry point of python -m tools.measure.dispatch_bytes, and of each process that it starts."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv, {"measurement": ByteOptions}, prog="python -m tools.measure.dispatch_bytes")[
        "measurement"
    ]
    options.validate()
    return work(options) if "RANK" in os.environ else launch(options, argv)


if __name__ == "__main__":
    run_worker(main)
