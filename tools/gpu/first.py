"""The first minutes of the kernels on a new GPU: `tools/gpu_validate.sh --first`.

Six steps, each in processes of its own under its own time limit, and after each one line that says what follows. A step
that hangs or fails takes no other with it; what has been found is on disk before the next begins. Nothing here imports
more than torch: a bare image and a library that was built before are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch

from zeda_megatron.durable_file import write_atomically

SECONDS = 420.0
"""For all steps; one whose time is up is left out."""
FAILURES = 5
"""With more failed tests than these nothing is timed: the rest of the time goes into finding out why."""

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest")
"""The suite's own preparation needs Megatron-Core; these tests do not."""


@dataclass
class Step:
    """What a step found."""

    name: str
    decision: str
    """One line: what follows."""
    seconds: float
    found: dict
    """Figures, or the end of the output."""


class First:
    """Runs the steps, and writes what they find into the folder `out`."""

    def __init__(self, root: Path, out: Path, device: str):
        self.root, self.out, self.device = root, out, device
        self.began, self.steps, self.broken = time.monotonic(), [], []
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """All steps; exit code 1 if a kernel is broken or a test failed."""
        for step in (self.machine, self.smoke, self.tests, self.tiles, self.times, self.profile):
            self._step(step)
        wrong = any(step.found.get("failed") for step in self.steps)
        print(f"written: {self.out / 'first.json'}")
        return 1 if wrong or self.broken else 0

    def _step(self, step: Callable[[], tuple[str, dict]]) -> None:
        began, left = time.monotonic(), SECONDS - (time.monotonic() - self.began)
        try:
            decision, found = step() if left > 20 else ("left out: the time is up", {})
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            decision, found = f"broke off: {type(error).__name__}", {"failed": str(error)[-1500:]}
        done = Step(step.__name__, decision, round(time.monotonic() - began, 1), found)
        self.steps.append(done)
        print(f"{done.name}: {done.decision} ({done.seconds:.0f} s)", flush=True)
        write_atomically(
            self.out / "first.json", json.dumps([vars(one) for one in self.steps], indent=1) + "\n"
        )

    def _command(self, limit: float, *parts: str) -> tuple[int, str]:
        """Exit code (124: it ran past its limit) and the end of what it said."""
        limit = max(10.0, min(limit, SECONDS - (time.monotonic() - self.began)))
        line = [sys.executable, *parts]
        try:
            done = subprocess.run(line, cwd=self.root, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as stopped:
            told = (stopped.stdout or b"").decode(errors="replace")
            return 124, f"{told[-1500:]}\nstopped after {limit:.0f} s"
        return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]

    def _kernels(self, name: str) -> str:
        return str(self.root / "kernels" / name)

    def _walk(self) -> list[str]:
        """Flags that walk through the benchmark without a GPU."""
        return [] if self.device == "cuda" else ["--device", "cpu", "--tiny", "--repeats", "1"]

    # The steps.

    def machine(self) -> tuple[str, dict]:
        found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
        if self.device != "cuda":
            return "no GPU: this walks through", found
        told = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
        props = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": props.name,
            "multiprocessors": props.multi_processor_count,
            "nvidia-smi": told[:2500],
        }
        return f"{props.name}, {props.multi_processor_count} multiprocessors", found

    def smoke(self) -> tuple[str, dict]:
        file = self.out / "smoke.json"
        _, told = self._command(
            120, self._kernels("smoke.py"), "--limit", "40", "--device", self.device, "--json", str(file)
        )
        if not file.is_file():
            self.broken = ["all"]
            return "no kernel was tried", {"failed": told}
        found = json.loads(file.read_text())
        self.broken = [name for name, result in found.items() if result != "ok"]
        if not self.broken:
            return "every kernel gives the right numbers: go on", found
        return f"{', '.join(self.broken)}: not right; what is timed below leaves them out", found

    def tests(self) -> tuple[str, dict]:
        marks = ["-m", "gpu"] if self.device == "cuda" else ["-k", "repeat_bit_for_bit and cpu"]
        more = ["-n", "6"] if _has("xdist") and self.device == "cuda" else []
        more += ["--timeout", "60"] if _has("pytest_timeout") else []
        line = [*PYTEST, *marks, *more, "tests/gpu"]
        code, told = self._command(120, *line, *([] if self.device != "cuda" else ["-k", "not sanitizer"]))
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", told)}
        wrong = [row for row in told.splitlines() if row.startswith(("FAILED", "ERROR"))]
        found = {"counts": counts, "failed": wrong or (told[-1500:] if code else [])}
        if code == 0:
            return f"{counts.get('passed', 0)} tests pass: go on", found
        if len(wrong) > FAILURES or not counts:
            self.broken = self.broken or ["tests"]
            return f"{len(wrong) or 'no'} results: nothing is timed, see what the sanitizer says", found
        return f"{len(wrong)} tests fail: go on, mend them after this", found

    def tiles(self) -> tuple[str, dict]:
        if self.broken:
            return f"left out: {', '.join(self.broken)}", {}
        code, told = self._command(60, self._kernels("bench.py"), "--tiles", *self._walk())
        begins = re.search(r"from (\d+) rows per expert", told)
        if code or not begins:
            return "no crossover was found: tiles.json stays as it is", {"failed": told[-1500:]}
        kept = "in tiles.json" if self.device == "cuda" else "not written down without a GPU"
        return f"the large tile begins at {begins[1]} rows per expert: {kept}", {"told": told}

    def times(self) -> tuple[str, dict]:
        if self.broken:
            return f"left out: {', '.join(self.broken)}", {}
        file = self.out / "bench.json"
        which = [] if self.device != "cuda" else ["--tokens", "8,512,4096,16384,32768,65536"]
        which += ["--zero-shares", "0,.5", "--repeats", "10"] if self.device == "cuda" else ["--tokens", "4"]
        _, told = self._command(150, self._kernels("bench.py"), *which, "--json", str(file), *self._walk())
        if not file.is_file():
            return "the benchmark did not end", {"failed": told[-1500:]}
        rows = json.loads(file.read_text())["timings"]
        return judgement(rows), {"slower_than_torch": slower(rows), "host_bound": host_bound(rows)}

    def profile(self) -> tuple[str, dict]:
        tool = shutil.which("compute-sanitizer")
        if self.device != "cuda" or tool is None:
            return "compute-sanitizer is not here: left out", {}
        marks = ["-m", "gpu", "-k", "sanitizer", "--timeout", "90"]
        code, told = self._command(100, *PYTEST, *marks, "tests/gpu")
        return ("the sanitizer finds nothing" if code == 0 else "the sanitizer finds faults"), {
            "failed": told[-3000:] if code else ""
        }


def _has(package: str) -> bool:
    return find_spec(package) is not None


def _by_case(rows: list[dict], what: str) -> dict[tuple, dict[str, dict]]:
    """(model, tokens, share) -> timings by back end."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["what"] == what:
            found.setdefault((row["model"], row["tokens"], row["zero_share"]), {})[row["backend"]] = row
    return found


def slower(rows: list[dict]) -> list[str]:
    """Cases in which torch's own takes less time on the device than the kernels."""
    found = []
    for what in ("forward", "fc1", "layer"):
        for case, by in _by_case(rows, what).items():
            mine, other = (by.get(name, {}).get("device_us") for name in ("kernels", "grouped_mm"))
            if mine and other and other < mine:
                found.append(f"{what} {' '.join(map(str, case))}: {mine / other:.2f} times grouped_mm's time")
    return found


def host_bound(rows: list[dict]) -> list[str]:
    """Cases in which Python takes longer to launch a layer than the device to compute it."""
    return [
        f"{' '.join(map(str, case))}: {by['kernels']['host_us']:.0f} us for {by['kernels']['device_us']:.0f}"
        for case, by in _by_case(rows, "layer").items()
        if "kernels" in by and by["kernels"]["host_us"] > by["kernels"]["device_us"]
    ]


def judgement(rows: list[dict]) -> str:
    """The figures against the targets, in one line."""
    told = []
    layers = _by_case(rows, "layer")
    for (model, tokens, share), by in layers.items():
        whole = layers.get((model, tokens, 0.0), {}).get("kernels")
        if tokens == 4096 and share == 0.5 and whole and "kernels" in by:
            told.append(
                f"{model}: t(.5)/t(0) = {by['kernels']['device_us'] / whole['device_us']:.2f} at 4096"
            )
    best = max((row["tflops"] for row in rows if row["backend"] == "kernels"), default=0.0)
    told.append(f"at best {best:.0f} TFLOP/s")
    behind = slower(rows)
    told.append(f"{len(behind)} cases slower than torch's" if behind else "no case slower than torch's")
    told.append(f"Python is the limit in {len(host_bound(rows))} cases")
    return "; ".join(told)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 1 if something is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="the checkout")
    parser.add_argument("--out", type=Path, help="folder for the results (default: docs/gpu in the checkout)")
    args = parser.parse_args(argv)
    device = os.environ.get("ZEDA_VALIDATE_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        told = "error: no CUDA device here (ZEDA_VALIDATE_DEVICE=cpu walks through without one)"
        print(told, file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    folder = f"{date.today().isoformat()}_{name.replace(' ', '_').replace('/', '_')}"
    return First(args.root, (args.out or args.root / "docs" / "gpu") / folder, device).run()


if __name__ == "__main__":
    sys.exit(main())
