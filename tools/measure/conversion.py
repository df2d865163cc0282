"""How fast conversions are beside a plain copy, and how much memory they take.

Every step runs in a process of its own and begins with files that were dropped from the page cache (as far as the
kernel follows `posix_fadvise`); every time includes `fsync` of what was written, that of the copy too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.models.config_values import text_settings
from zeda_megatron.runtime import cpu
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.text_table import text_table

_CONVERT = Path(__file__).parents[2] / "tools" / "checkpoint_convert.py"
_BASE = (
    "import zeda_megatron.runtime.cpu as cpu; cpu.install(); import zeda_megatron.convert.command, "
    "megatron.core.models.gpt, zeda_megatron.models.build; "
    "import time; time.sleep(0.5)"
)


@dataclass(frozen=True)
class Step:
    """One measured step."""

    name: str
    """copy, import, export or verify."""
    seconds: float
    """Wall time."""
    gb_per_second: float
    """Bytes of the model over that, in 10^9 bytes per second."""
    cpu_seconds: float
    """Processor time of its process: what does not depend on the disk and on others."""
    peak_bytes: int
    """Highest resident memory of its process."""


def main() -> int:
    """Entry point of `python -m tools.measure.conversion`."""
    args = _parse()
    work = Path(args.work)
    if work.exists():
        raise UserError(f"--work {work}: exists already; give a new folder")
    cpu.install()
    try:
        from .random_model import QWEN3_30B_A3B

        config = shortened(_config(args.model) if args.model else QWEN3_30B_A3B, args.layers)
        report = measure(work, config, args.max_shard_bytes, args.workers, args.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _print(report)
    if args.json:
        write_result("--json", args.json, json.dumps(report, indent=1) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speed and memory of conversions beside a plain copy.", allow_abbrev=False
    )
    parser.add_argument("--work", required=True, metavar="DIR", help="new folder for three models")
    parser.add_argument(
        "--model", metavar="FILE", help="a file of docs/models/, or a config.json (default: Qwen3-30B-A3B)"
    )
    parser.add_argument("--layers", type=int, default=5, help="layers of it, all with experts")
    parser.add_argument("--max-shard-bytes", type=int, default=1_000_000_000, metavar="BYTES")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--rounds", type=int, default=1, help="repeat copy, import, export, verify")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def _config(file: str) -> dict[str, Any]:
    read = json.loads(Path(file).read_text())
    return read.get("config", read)


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of the model's first layers with experts, of plain bf16 weights; the language model's alone."""
    config = text_settings(config)
    whole, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
    cut = {
        key: value[dense : dense + layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in config.items()
        if key not in ("quantization_config", "num_nextn_predict_layers")
    }
    fixed = {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * layers} if dense else {}
    return cut | fixed | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"}


def measure(work: Path, config: dict[str, Any], max_shard_bytes: int, workers: int, rounds: int) -> dict:
    """Make a random model of this config.json in `work`, then time each step `rounds` times."""
    from .random_model import write_random_model

    work.mkdir(parents=True)
    hf, megatron, out = work / "hf", work / "megatron", work / "out"
    nbytes = write_random_model(hf, config, max_shard_bytes, workers=workers)
    flags = ["--workers", str(workers)]
    size = ["--max-shard-bytes", str(max_shard_bytes)]
    convert = [sys.executable, str(_CONVERT)]
    steps = {
        "copy": ["cp", "-r", str(hf), str(out)],
        "import": [*convert, "hf-to-megatron", "--hf", str(hf), "--out", str(megatron), *flags, *size],
        "export": [*convert, "megatron-to-hf", "--megatron", str(megatron), "--hf-template", str(hf)]
        + ["--out", str(out), *flags, *size],
        "verify": [*convert, "verify", "--hf", str(hf), "--megatron", str(megatron), *flags],
    }
    results = []
    for _ in range(rounds):
        for name, command in steps.items():
            _forget(work)
            written = {"import": megatron}.get(name, out)
            results.append(_timed(name, command, written, nbytes))
            if written == out and name != "verify":
                shutil.rmtree(out)
        shutil.rmtree(megatron)
    base = _timed("start", [sys.executable, "-c", _BASE], out, nbytes)
    return {
        "model_bytes": nbytes,
        "max_shard_bytes": max_shard_bytes,
        "workers": workers,
        "cores": os.cpu_count(),
        "base_bytes": base.peak_bytes,
        "start_seconds": base.seconds - 0.5,
        "steps": [asdict(step) for step in results],
    }


def _timed(name: str, command: list[str], written: Path, nbytes: int) -> Step:
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, done = 0, 0
    while not done:
        peak = max(peak, _peak_memory(process.pid))
        time.sleep(0.02)
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} failed with exit code {process.returncode}")
    _sync(written)
    seconds = time.monotonic() - started
    return Step(name, seconds, nbytes / seconds / 1e9, usage.ru_utime + usage.ru_stime, peak)


def _peak_memory(pid: int) -> int:
    """The kernel's own record for this program; `ru_maxrss` would count the parent that started it too."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _forget(folder: Path) -> None:
    """Drop files from the page cache."""
    _sync(folder)
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _print(report: dict) -> None:
    """The table."""
    print(
        f"model {report['model_bytes'] / 1e9:.2f} GB, shards of {report['max_shard_bytes'] / 1e9:.2f} GB, "
        f"{report['workers']} workers, {report['cores']} cores, "
        f"base memory {report['base_bytes'] / 1e9:.2f} GB, start of Python {report['start_seconds']:.1f} s"
    )
    rows, copy = [["step", "seconds", "GB/s", "of copy", "CPU s", "peak GB", "above base"]], 0.0
    for step in report["steps"]:
        copy = step["gb_per_second"] if step["name"] == "copy" else copy
        above = max(step["peak_bytes"] - report["base_bytes"], 0)
        speed = [f"{step['gb_per_second']:.3f}", f"{step['gb_per_second'] / copy:.2f}"]
        memory = [f"{step['peak_bytes'] / 1e9:.2f}", f"{above / 1e9:.2f}"]
        rows.append([step["name"], f"{step['seconds']:.1f}", *speed, f"{step['cpu_seconds']:.1f}", *memory])
    print("\n".join(text_table(rows)))


if __name__ == "__main__":
    run_worker(main)
