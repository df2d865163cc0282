"""The whole walk on a small trained teacher: convert, stages 0 to 2, export, reopen, measure, report.

Called by run.sh. Every step is one of the project's own commands, run as a user would run it and printed; a step
whose result exists is not run again, so an interrupted quickstart goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from arms import EXPORTED, FITS, FITTED_OVER, PRUNED, WIDENED, Arm  # noqa: E402
from figures import add_spread, cost_of, environment, history_of  # noqa: E402
from models import MODELS  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, default="qwen3", help="architecture of the teacher")
    parser.add_argument("--out", type=Path, help="folder for everything it makes (default: one a model)")
    parser.add_argument("--arms", help="comma-separated names (default: all of the short run)")
    parser.add_argument("--also", help="comma-separated names, besides those of the short run")
    parser.add_argument("--full", action="store_true", help="three seeds and the frontier as well")
    parser.add_argument("--teacher", type=Path, help="HF folder of the static model (default: the model's)")
    parser.add_argument("--prompts", type=Path, default=HERE / "data" / "prompts.jsonl")
    parser.add_argument("--heldout", type=Path, default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--train-iters", type=int, help="steps per arm (default: stage1.yaml)")
    parser.add_argument("--workers", type=int, default=2, help="arms trained or measured at a time")
    args = parser.parse_args()
    args.out = args.out or MODELS[args.model].out
    args.teacher = args.teacher or MODELS[args.model].teacher
    return args


class Walk:
    """Runs commands, remembers them, stops at the first that fails."""

    def __init__(self, out: Path):
        self.out, self.commands = out, []
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, title: str, command: list[str], made: Path, processes: int = 1) -> None:
        """Run a command unless `made` exists. Its output goes to OUT/logs/<title>.log."""
        shown = shlex.join([_short(part) for part in command])
        self.commands.append(shown)
        if made.exists():
            print(f"  {title}: already there ({_short(made)})", flush=True)
            return
        log = self.out / "logs" / f"{re.sub(r'[^a-z0-9_.]+', '_', title.lower()).strip('_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with open(log, "w") as file:
            env = {**self.env, "NPROC_PER_NODE": str(processes)}
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT
            ).returncode
        if code:
            tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
            raise SystemExit(
                f"error: {title} failed (exit code {code}); command:\n  {shown}\n{tail}\n(whole log: {log})"
            )
        print(f"  {title}: {time.perf_counter() - started:.0f} s", flush=True)


def _short(part) -> str:
    text = str(part)
    for folder, name in ((str(ROOT) + "/", ""), (sys.executable, "python")):
        text = text.replace(folder, name)
    return text


def convert(walk: Walk, teacher: Path, starts: set[str]) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "checkpoint_convert.py"), "hf-to-megatron"]
    tool += ["--hf", str(teacher)]
    common = ["--dtype", "fp32"]
    walk.run("convert static", [*tool, "--out", str(walk.out / "static"), *common], walk.out / "static")
    wanted = {"dynamic", *starts, *(["learned"] if "mean_output" in starts else [])}
    for name, (number, kind) in WIDENED.items():
        if name in wanted:
            rows = ["--num-zero-experts", number, "--zero-experts-type", kind, "--seed", "1234"]
            walk.run(
                f"convert {name}", [*tool, "--out", str(walk.out / name), *rows, *common], walk.out / name
            )


def answer(walk: Walk, prompts: Path) -> None:
    done = walk.out / "rollouts.done"
    command = ["bash", str(ROOT / "launch" / "pretrain_zeda.sh"), "--config", str(HERE / "stage0.yaml")]
    command += ["--pretrained-checkpoint", str(walk.out / "static"), "--data-path", str(prompts)]
    command += ["--rollout-path", str(walk.out / "rollouts.jsonl")]
    walk.run("stage 0 (the teacher answers)", command, done, processes=2)
    done.touch()


def begin_with_mean_output(walk: Walk) -> None:
    """Learned zero experts whose vectors are the mean output of the experts, on the teacher's own answers."""
    out = walk.out / "mean_output"
    command = [sys.executable, "-m", "examples.rivals.mean_output", "--checkpoint", str(walk.out / "learned")]
    command += ["--calibration", str(walk.out / "rollouts.jsonl"), "--out", str(out)]
    walk.run("begin with mean output", command, out)


def fit(walk: Walk, name: str, flags: dict[str, str], start: str = "static") -> None:
    """Heads of paired zero experts, from the teacher's own answers; the threshold for half of the picks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "fit_zero_rows.py"), "--pretrained-checkpoint", str(walk.out / start)]
    command += ["--data-path", str(walk.out / "rollouts.jsonl")]
    command += [part for pair in flags.items() for part in pair]
    walk.run(f"fit {name}", [*command, "--save", str(walk.out / name)], walk.out / name)


def prune(walk: Walk, name: str, teacher: Path) -> None:
    """Cut experts by REAP's score on the teacher's own answers, then convert what is left."""
    hf = walk.out / f"{name}_hf"
    command = [sys.executable, "-m", "examples.rivals.reap", "--hf", str(teacher)]
    command += ["--calibration", str(walk.out / "rollouts.jsonl"), "--fraction", PRUNED[name]]
    walk.run(f"prune {name}", [*command, "--out", str(hf)], hf)
    tool = [sys.executable, str(ROOT / "tools" / "checkpoint_convert.py"), "hf-to-megatron"]
    flags = ["--hf", str(hf), "--out", str(walk.out / name), "--dtype", "fp32"]
    walk.run(f"convert {name}", [*tool, *flags], walk.out / name)


def train(walk: Walk, arm: Arm, prompts: Path, train_iters: int | None) -> None:
    save = walk.out / "arms" / arm.name
    command = ["bash", str(ROOT / "launch" / "pretrain_zeda.sh")]
    command += ["--config", str(HERE / f"stage{arm.stage}.yaml")]
    command += ["--pretrained-checkpoint", str(walk.out / arm.start)]
    command += ["--data-path", str(prompts if arm.stage == "2" else walk.out / "rollouts.jsonl")]
    if arm.waits:  # it starts from an adapted model: the teacher is the original
        command += ["--teacher-load", str(walk.out / "static")]
    command += [part for flag, value in arm.train.items() for part in (flag, *value.split())]
    if train_iters and "--train-iters" not in arm.train:
        command += ["--train-iters", str(train_iters)]
    walk.run(f"train {arm.name}", [*command, "--save", str(save)], save / "latest_checkpointed_iteration.txt")


def file_of(walk: Walk, arm: Arm | None) -> Path:
    """Where the figures of an arm are, or of the teacher itself."""
    return walk.out / "measured" / f"{arm.name if arm else 'teacher'}.json"


def measure(walk: Walk, arms: list[Arm | None], heldout: Path) -> None:
    """Measure several arms in one process, without those that are measured already."""

    def flags(arm: Arm | None) -> str:
        words = ["--out", file_of(walk, arm)]
        if arm:
            source = walk.out / "arms" / arm.name if arm.train else walk.out / arm.start
            words = ["--student", source, *(part for pair in arm.measure.items() for part in pair), *words]
        return shlex.join(_short(word) for word in words)

    missing = [arm for arm in arms if not file_of(walk, arm).exists()] or arms
    last = file_of(walk, missing[-1])
    listed = last.with_suffix(".arms")
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("".join(f"{flags(arm)}\n" for arm in missing))
    command = [sys.executable, "-m", "zeda_megatron", "evaluate", "distance"]
    command += ["--teacher", str(walk.out / "static"), "--arms", str(listed)]
    command += ["--heldout", str(heldout), "--calibration", str(walk.out / "rollouts.jsonl")]
    names = ", ".join(arm.name if arm else "teacher" for arm in missing)
    walk.run(f"measure {names}", command, last)
    walk.commands += [f"# a line of {_short(listed)}: {flags(arm)}" for arm in arms]


MEASURED_TOGETHER = 3
"""Arms that a process measures at most, so that nobody waits long for the last one."""


class Work:
    """What is left to do with the arms, for several workers: training first, and of that what others start from; then
    the export; then measuring what is there.

    Args:
        train: trains one arm. export: exports `EXPORTED`. measure: measures some arms.
    """

    def __init__(
        self,
        arms: list[Arm],
        train: Callable[[Arm], None],
        export: Callable[[], None],
        measure: Callable[[list[Arm | None]], None],
    ):
        self.train, self.export, self.measure = train, export, measure
        begun_from = {arm.start for arm in arms}
        trained = [arm for arm in arms if arm.train]
        order = sorted(trained, key=lambda arm: (f"arms/{arm.name}" not in begun_from, not arm.waits))
        self.to_train, self.there = order, {arm.start for arm in arms if not arm.waits}
        self.to_measure: list[Arm | None] = [None, *arms]
        self.exports = any(arm.name == EXPORTED for arm in arms)

    def next_job(self) -> Callable[[], None] | None:
        """Something that can be done now; it is not given again. None: nothing, until a job has ended."""
        for arm in self.to_train:
            if arm.start in self.there:
                self.to_train.remove(arm)
                return lambda: self._trained(arm)
        if self.exports and f"arms/{EXPORTED}" in self.there:
            self.exports = False
            return self.export
        some = [arm for arm in self.to_measure if self._is_there(arm)][:MEASURED_TOGETHER]
        self.to_measure = [arm for arm in self.to_measure if arm not in some]
        return (lambda: self.measure(some)) if some else None

    def _trained(self, arm: Arm) -> None:
        self.train(arm)
        self.there.add(f"arms/{arm.name}")

    def _is_there(self, arm: Arm | None) -> bool:
        return arm is None or (f"arms/{arm.name}" if arm.train else arm.start) in self.there

    def run(self, workers: int) -> None:
        """Do all of it. Raises what a job raises."""
        running: set[Future] = set()
        with ThreadPoolExecutor(workers) as pool:
            while True:
                while len(running) < workers and (job := self.next_job()):
                    running.add(pool.submit(job))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()


def judge_heads(walk: Walk) -> dict:
    """How much of the way from the linear head to an oracle the head with hidden units goes."""
    out = walk.out / "measured" / "oracle.json"
    students = [str(walk.out / name) for name in ("paired", "sharp")]
    command = [sys.executable, "-m", "zeda_megatron", "evaluate", "oracle", "--students", *students]
    command += ["--teacher", str(walk.out / "static"), "--data-path", str(walk.out / "rollouts.jsonl")]
    walk.run("compare heads with an oracle", [*command, "--out", str(out)], out)
    return json.loads(out.read_text().replace(f"{walk.out}/", ""))


def check_of(walk: Walk) -> Path:
    """What the reopened export was found to answer."""
    return walk.out / "measured" / "export_check.json"


def export(walk: Walk, teacher: Path, heldout: Path) -> None:
    trained, hf, check = walk.out / "arms" / EXPORTED, walk.out / "hf", check_of(walk)
    tool = [sys.executable, str(ROOT / "tools" / "checkpoint_convert.py"), "megatron-to-hf"]
    paths = ["--megatron", str(trained), "--hf-template", str(teacher), "--out", str(hf)]
    walk.run("export to Hugging Face format", [*tool, *paths], hf)
    reopen = [
        sys.executable,
        "-m",
        "zeda_megatron",
        "evaluate",
        "export",
        "--megatron",
        str(trained),
    ]
    walk.run(
        "reopen with transformers",
        [*reopen, "--hf", str(hf), "--trust-remote-code", "--heldout", str(heldout), "--out", str(check)],
        check,
    )


def chosen(args: argparse.Namespace) -> list[Arm]:
    model = MODELS[args.model]
    available = {arm.name: arm for arm in model.full}
    if not (args.arms or args.also):
        return list(model.full if args.full else model.arms)
    flag, names = ("--arms", args.arms) if args.arms else ("--also", args.also)
    unknown = [name for name in names.split(",") if name not in available]
    if unknown:
        raise SystemExit(
            f"error: {flag} {unknown[0]!r} is unknown with --model {model.name}; choose among {', '.join(available)}"
        )
    arms = [available[name] for name in names.split(",")]
    if not args.arms:
        arms = [*model.arms, *arms]
    starts = [available[arm.start.removeprefix("arms/")] for arm in arms if arm.waits]
    return list({arm.name: arm for arm in [*starts, *arms]}.values())  # what an arm starts from comes with it


def main() -> int:
    args = parse_arguments()
    from report.report import (  # what the report lacks ends the walk here, not after it
        format_table,
        write_report,
    )

    arms = chosen(args)
    for flag, path in (("--teacher", args.teacher), ("--prompts", args.prompts), ("--heldout", args.heldout)):
        if not path.exists():
            raise SystemExit(f"error: {flag} {path}: no such file or folder")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    walk = Walk(out)
    print(f"quickstart -> {out}", flush=True)
    starts = {arm.start for arm in arms}
    convert(walk, args.teacher.resolve(), starts)
    prompts = args.prompts.resolve()
    answer(walk, prompts)
    for name, flags in FITS.items():
        if name in starts:
            fit(walk, name, flags)
    for name in PRUNED:
        if starts & {name, *(over for over, start in FITTED_OVER.items() if start == name)}:
            prune(walk, name, args.teacher.resolve())
    for name, start in FITTED_OVER.items():
        if name in starts:
            fit(walk, name, FITS["low_rank"], start)
    if "mean_output" in starts:
        begin_with_mean_output(walk)
    heldout = args.heldout.resolve()

    Work(
        arms,
        lambda arm: train(walk, arm, prompts, args.train_iters),
        lambda: export(walk, args.teacher.resolve(), heldout),
        lambda some: measure(walk, some, heldout),
    ).run(args.workers)
    measured = {
        arm.name if arm else "teacher": json.loads(file_of(walk, arm).read_text()) for arm in [None, *arms]
    }
    results = {}
    for arm in arms:
        lines = history_of(out, arm)
        results[arm.name] = {
            **measured[arm.name],
            "adapt_tokens": lines[-1]["consumed_tokens"] if lines else 0,
            "adapt_seconds": sum(line["seconds"] for line in lines),
            **cost_of(lines),
        }
    add_spread(results)
    about = environment()
    if EXPORTED in results:
        about["export_check"] = json.loads(check_of(walk).read_text())
    if {"paired", "sharp"} <= starts:
        about["oracle"] = judge_heads(walk)
    report = {
        "environment": about,
        "teacher": measured["teacher"],
        "arms": results,
        "commands": walk.commands,
    }
    histories = {arm.name: history_of(out, arm) for arm in arms if arm.train and arm.name in results}
    _, page = write_report(report, histories, out)
    print()
    print(format_table(report))
    if "export_check" in about:
        check = about["export_check"]
        print(
            f"\nreopened with transformers: {check['equal_answers']} of {check['prompts']} greedy answers equal, "
            f"largest logit difference {check['max_logit_difference']:.1e}"
        )
    for name, share in about.get("oracle", {}).get("closed", {}).items():
        print(f"\n{name} goes {share:.0%} of the way from the linear head to an oracle of what picks do")
    print(f"\n{time.perf_counter() - started:.0f} s; report: {page}")
    return 0


if __name__ == "__main__":
    from zeda_megatron.runtime.worker import run_worker

    run_worker(main)
